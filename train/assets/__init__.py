"""Model, tokenizer and texts shipped with jlora; NOTICE.md beside them tells where each comes from and its licence."""

import importlib.resources


def read(name: str) -> bytes:
    """The content of a shipped file."""
    return importlib.resources.files(__name__).joinpath(name).read_bytes()
