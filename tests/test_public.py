"""What `import jlora` offers, and what it does not wait for."""

import ast
import pathlib
import subprocess
import sys
import tomllib

import pytest

import jlora
from jlora import methods


def for_editors(module) -> set[str]:
    """The names imported for type checkers and editors alone."""
    body = ast.parse(pathlib.Path(module.__file__).read_text()).body
    block = next(node for node in body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    return {alias.asname for node in block.body for alias in node.names}


def test_what_editors_see_is_what_there_is():
    classes = {cls.__name__ for cls in methods.METHODS.values()}
    assert for_editors(methods) == {*classes, "Follow", "KernelLoRA", "MiddleLoRA"}
    assert for_editors(jlora) == {*classes, "MiddleLoRA", *jlora._SUBPACKAGES}
    for module in (jlora, methods):
        for name in for_editors(module):
            assert name in dir(module) and getattr(module, name).__name__.rpartition(".")[2] == name
        with pytest.raises(AttributeError, match=f"module '{module.__name__}' has no attribute 'LoRa'"):
            module.LoRa  # noqa: B018


def test_every_package_is_in_the_distribution():
    root = pathlib.Path(__file__).parents[1]
    listed = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    top = {"jlora": "jlora", "kernels": "jlora.kernels", "train": "jlora.train"}
    found = {file.parent.relative_to(root).parts for name in top for file in (root / name).rglob("*.py")}
    assert sorted(listed) == sorted(".".join((top[first], *rest)) for first, *rest in found | {("train", "assets")})


def test_methods_are_imported_when_asked_for():
    code = (
        "import sys, jlora; jlora.methods.METHODS.keys(); seen = [m for m in sys.modules if m.startswith('jlora.')];"
        "print(len([m for m in seen if m.startswith('jlora.methods.')]), 'jlora.optim' in seen, 'jlora.io' in seen)"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert int(printed[0]) < 8 and printed[1:] == ["False", "False"]
