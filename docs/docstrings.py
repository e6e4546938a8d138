"""For mkdocstrings: examples after `>>>` in a docstring as blocks of code, wherever they stand, and `.. math::` between
`$$`."""

import re
from typing import Any

import griffe


def fenced(text: str) -> str:
    block = lambda lines: (
        "\n```python\n" + re.sub(r"^(?:>>>|\.\.\.) ", "", lines[0].rstrip("\n"), flags=re.MULTILINE) + "\n```\n\n"
    )
    return re.sub(r"(?:^(?:>>>|\.\.\.) .*\n?)+", block, text, flags=re.MULTILINE)


def formulas(text: str) -> str:
    block = lambda found: f"$$\n{re.sub(r'^ +', '', found[1].strip(), flags=re.MULTILINE)}\n$$\n"
    return re.sub(r"^\.\. math::((?:.*\S.*\n)(?: +\S.*\n)*)", block, text, flags=re.MULTILINE)


class Examples(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = formulas(fenced(obj.docstring.value))
