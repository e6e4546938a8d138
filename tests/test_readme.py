"""The README's examples run as they stand."""

import pathlib
import re

import pytest

README = pathlib.Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
RUNNABLE = [block for block in BLOCKS if "path/to" not in block]


@pytest.mark.parametrize("block", RUNNABLE, ids=range(len(RUNNABLE)))
def test_example(block):
    exec(compile(block, "README.md", "exec"), {"__name__": "readme"})  # noqa: S102


def test_the_examples_were_found():
    assert len(RUNNABLE) == 7 and len(BLOCKS) == 8
