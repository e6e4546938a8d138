"""The cases of a file of recorded numbers, in the directory ``JLORA_ORACLES`` (default ``../shared/oracles``)."""

import os
import pathlib
from typing import Any

import numpy as np
import pytest

DIRECTORY = pathlib.Path(os.environ.get("JLORA_ORACLES", pathlib.Path(__file__).parents[2] / "shared" / "oracles"))


def cases(file: str) -> list[Any]:
    """The names of a file's cases, as values of a test's parameter; without the file, one that is skipped."""
    path = DIRECTORY / file
    if not path.exists():
        return [pytest.param(None, id="absent", marks=pytest.mark.skip(reason=f"no file {path}: set JLORA_ORACLES"))]
    with np.load(path) as z:
        return sorted({key.partition("/")[0] for key in z.files})


def arrays(file: str, case: str) -> dict[str, np.ndarray]:
    """What was recorded of a case, without the case's name before it."""
    with np.load(DIRECTORY / file) as z:
        return {key.removeprefix(f"{case}/"): z[key] for key in z.files if key.startswith(f"{case}/")}
