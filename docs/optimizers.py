"""The pages of the optimizers, `docs/optimizers/*.md`, from docstrings: one for each file of jlora/optim, and an index.

A hook of mkdocs, as `methods.py` is, whose Markdown it shares. The pages are not kept in the repository.
"""

import importlib.util
import inspect
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jlora import optim
from jlora.train.optimizers import OPTIMIZERS


def _beside(name: str) -> Any:
    """Another hook of this folder, which is no package."""
    spec = importlib.util.spec_from_file_location(f"jlora_docs_{name}", Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


_methods = _beside("methods")
markdown, table_row, inline = _methods.markdown, _methods.table_row, _methods.inline


def files() -> dict[str, list[Callable]]:
    """File of jlora/optim -> the public functions, and classes, in it."""
    found: dict[str, list[Callable]] = {}
    for name, value in vars(optim).items():
        if (inspect.isfunction(value) or inspect.isclass(value)) and not name.startswith("_"):
            found.setdefault(value.__module__.rpartition(".")[2], []).append(value)
    return dict(sorted(found.items()))


def page(stem: str, functions: list[Callable]) -> str:
    doc = inspect.getdoc(sys.modules[functions[0].__module__]) or ""
    name, rest = _methods.title(doc)
    plain = [function.__name__ for function in functions if not function.__name__.startswith("scale_by_")]
    out = [f"# {inline(name if rest else ', '.join(plain))}\n", markdown(doc)]
    for function in functions:
        out += [f"## `jlora.optim.{function.__name__}`\n", _signature(function), _documented(function)]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(out))


def _signature(function: Callable) -> str:
    shown = []
    for option in inspect.signature(function).parameters.values():
        if option.kind is option.KEYWORD_ONLY and "*" not in shown:
            shown.append("*")
        shown.append(option.name if option.default is option.empty else f"{option.name}={option.default!r}")
    line = f"{function.__name__}({', '.join(shown)})"
    if len(line) > 90:
        line = f"{function.__name__}(\n" + "".join(f"    {option},\n" for option in shown) + ")"
    return f"```python\n{line}\n```\n"


def _documented(function: Callable) -> str:
    """A docstring: prose, a table of the arguments, prose."""
    out, doc = [], inspect.getdoc(function) or ""
    for part in re.split(r"(^(?:Args|Attributes|Returns):\n(?:(?: +.*)?\n?)*)", doc, flags=re.MULTILINE):
        if part.startswith(("Args:", "Attributes:")):
            rows = [table_row((f"`{names}`", inline(meaning))) for names, meaning in _arguments(part)]
            out.append("\n".join([table_row(("argument", "")), table_row(("---",) * 2), *rows]) + "\n")
        elif part.startswith("Returns:"):
            out.append("Returns: " + markdown(inspect.cleandoc(part.partition("\n")[2])))
        else:
            out.append(markdown(part))
    return "\n".join(out)


def _arguments(section: str) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    for line in section.splitlines()[1:]:
        if entry := re.match(r"  (\w+(?:, \w+)*): (.*)", line):
            found.append((entry[1], entry[2]))
        elif line.strip():
            found[-1] = (found[-1][0], f"{found[-1][1]} {line.strip()}")
    return found


def index() -> str:
    on_the_line = {kind.make.__name__: name for name, kind in OPTIMIZERS.items()}
    rows = []
    for stem, functions in files().items():
        for function in functions:
            first = " ".join((inspect.getdoc(function) or "").partition("\n\n")[0].split())
            option = on_the_line.get(function.__name__)
            link = f"[{function.__name__}]({stem}.md#jloraoptim{function.__name__.lower()})"
            rows.append(table_row((link, inline(first), f"`{option}`" if option else "")))
    return "\n".join(
        [
            "# Optimizers\n",
            "Optax transformations that know what low-rank factors are, or that project gradients. They compose with "
            "`optax.chain`, `optax.masked` and the rest. [How to use them](../how-to/optimizers.md).\n",
            table_row(("function", "", "`--optimizer`")),
            table_row(("---",) * 3),
            *rows,
            "",
        ]
    )


def pages() -> dict[str, str]:
    """File name -> content."""
    return {"index.md": index()} | {f"{stem}.md": page(stem, functions) for stem, functions in files().items()}


def on_pre_build(config: Any) -> None:
    """The hook of mkdocs."""
    _methods.write_pages(Path(config["docs_dir"]) / "optimizers", pages())


def on_config(config: Any) -> Any:
    """All pages below "Optimizers"."""
    return _methods.list_pages(config, "optimizers", pages())
