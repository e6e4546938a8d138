"""The laws are exact: 64-bit arithmetic, unless a test asks for less."""

import pytest


@pytest.fixture(autouse=True)
def exact(x64: None, unoptimized: None) -> None:
    pass
