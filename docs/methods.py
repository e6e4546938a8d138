"""The pages of the methods, `docs/methods/*.md`, from the docstrings: one for each file of jlora/methods, one of the
starts in jlora/init, and an index.

    python docs/methods.py            # writes docs/methods/
    python docs/methods.py --out DIRECTORY

As a hook of mkdocs (`hooks: [docs/methods.py]` in mkdocs.yml) it does so before each build. The pages are not kept in
the repository. Formulas come out for `pymdownx.arithmatex`, between `$$`.
"""

import argparse
import dataclasses
import inspect
import itertools
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jlora import init
from jlora.methods import METHODS, Method
from jlora.train.inform import form, merges, shares

OUT = Path(__file__).parent / "methods"


# What the docstrings are written in: paragraphs, lists, `.. math::`, simple tables, literal blocks after `::`, `>>>`.


def markdown(text: str) -> str:
    """A docstring as Markdown."""
    text = re.sub(r"``[^`]+``", lambda code: re.sub(r"\s*\n\s*", " ", code[0]), text)  # code across lines
    lines, out, i = text.splitlines(), [], 0
    in_list = False
    plain = lambda line: "*   " + inline(line[2:]) if line.startswith("* ") else prefix + inline(line.strip())
    while i < len(lines):
        line = lines[i]
        indent = len(line) - len(line.lstrip())
        if line.startswith("* "):
            if out and out[-1] and not in_list:
                out.append("")
            in_list = True
        elif line and not indent:
            in_list = False
        # A list's own paragraphs are indented by two there, and by four here.
        prefix = " " * (4 if in_list and indent else 0)
        if math := re.match(r" *\.\. math::(.*)", line):
            body, i = _indented(lines, i + 1, indent + 1, paragraphs=False)
            formula = [part for part in (math[1].strip(), *(part.strip() for part in body)) if part]
            if any("&" in part for part in formula):
                formula = [r"\begin{aligned}", *formula, r"\end{aligned}"]
            out += ["", *(prefix + part for part in ("$$", *formula, "$$")), ""]
        elif re.fullmatch(r"=+( +=+)+", line):
            end = [j for j in range(i, len(lines)) if re.fullmatch(r"=+( +=+)+", lines[j])][2]
            out += ["", *_table(lines[i : end + 1]), ""]
            i = end + 1
        elif line.startswith(">>> "):
            end = next((j for j in range(i, len(lines)) if not lines[j].startswith((">>> ", "... "))), len(lines))
            out += ["", "```python", *(part[4:] for part in lines[i:end]), "```", ""]
            i = end
        elif line.rstrip().endswith("::"):
            body, i = _indented(lines, i + 1, indent + (3 if line.startswith("* ") else 1), paragraphs=True)
            cut = min((len(part) - len(part.lstrip()) for part in body if part), default=0)
            code = ("```python", *(part[cut:] for part in body), "```")
            out += [plain(line.rstrip()[:-1]), "", *(" " * 4 * in_list + part for part in code), ""]
        else:
            out.append(plain(line))
            i += 1
    return re.sub(r"\n{3,}", "\n\n", "\n".join(out)).strip() + "\n"


def _indented(lines: list[str], start: int, indent: int, paragraphs: bool) -> tuple[list[str], int]:
    """The lines from `start` that are indented, and the place after them; with or without blank lines between."""
    end = start
    while end < len(lines) and (lines[end][:indent].isspace() or (paragraphs and not lines[end])):
        end += 1
    body = lines[start:end]
    while body and not body[0]:
        body = body[1:]
    while body and not body[-1]:
        body = body[:-1]
    return body, end


def _table(lines: list[str]) -> list[str]:
    """A simple table. A row whose first cell is empty goes on with the one above."""
    starts = [match.start() for match in re.finditer("=+", lines[0])]
    ends = [*starts[1:], None]
    cut = lambda line: [line[a:b].strip() for a, b in zip(starts, ends, strict=True)]
    rows: list[list[str]] = []
    for line in lines[1:-1]:
        if set(line) <= set("= "):
            continue
        cells = cut(line)
        if rows and not cells[0] and len(rows) > 1:
            rows[-1] = [" ".join(filter(None, pair)) for pair in zip(rows[-1], cells, strict=True)]
        else:
            rows.append(cells)
    shown = [table_row(map(inline, row)) for row in rows]
    return [shown[0], table_row("---" for _ in starts), *shown[1:]]


def table_row(cells: Any) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def inline(text: str) -> str:
    """``code`` and addresses; what Markdown would take for emphasis is escaped."""
    parts = re.split(r"(``[^`]+``|https?://[^\s)]+)", text)
    return "".join(
        part[1:-1] if part.startswith("``")
        else f"<{part.rstrip('.,')}>{part[len(part.rstrip('.,')):]}" if part.startswith("http")
        else re.sub(r"([_*])", r"\\\1", part).replace("<", "&lt;")
        for part in parts
    )  # fmt: skip


# What the classes say.


def options(cls: type[Method]) -> Iterator[tuple[str, str, str]]:
    """(name, default, meaning) of every option."""
    meanings: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        meanings |= _attributes(inspect.cleandoc(base.__dict__.get("__doc__") or ""))
    for field in dataclasses.fields(cls):
        default = "wanted" if field.default is dataclasses.MISSING else f"`{field.default!r}`"
        yield field.name, default, meanings.get(field.name, "")


def _attributes(doc: str) -> dict[str, str]:
    """The entries of the section `Attributes:`, and of `Class attributes:`, whose names options may have."""
    found: dict[str, str] = {}
    lines = doc.splitlines()
    for heading in [i for i, line in enumerate(lines) if re.fullmatch(r"(Class a|A)ttributes:", line)]:
        body, _ = _indented(lines, heading + 1, 1, paragraphs=False)
        for line in body:
            if entry := re.match(r"  (\w+(?:, \w+)*): (.*)", line):
                names = entry[1].split(", ")
                found |= dict.fromkeys(names, entry[2])
            else:
                found |= {name: f"{found[name]} {line.strip()}" for name in names}
    return found


def about(cls: type[Method]) -> str:
    """The class's docstring without its attributes."""
    doc = inspect.cleandoc(cls.__dict__.get("__doc__") or "")
    return re.split(r"^(?:Class a|A)ttributes:$", doc, maxsplit=1, flags=re.MULTILINE)[0].strip()


GROUPS = {
    "pairs": "Low-rank pairs beside a weight",
    "shared": "Parameters shared by several weights",
    "weights": "Other changes of a weight",
    "activations": "Branches that do not merge",
    "leaves": "Whole leaves",
}


def group(cls: type[Method]) -> str:
    """Where in the index a method belongs, by what it is."""
    kind = form(cls)
    own = {"leaf": "leaves", "activations": "activations"}.get(kind)
    return own or ("shared" if shares(cls) else f"{kind}s")


def files() -> dict[str, list[tuple[str, type[Method]]]]:
    """File of jlora/methods -> (name on the command line, class) of the methods in it."""
    found: dict[str, list[tuple[str, type[Method]]]] = {}
    for name, cls in METHODS.items():
        found.setdefault(cls.__module__.rpartition(".")[2], []).append((name, cls))
    return found


def title(doc: str) -> tuple[str, str]:
    """(name, the rest) of a docstring's first line."""
    first = " ".join(doc.partition("\n\n")[0].split())
    name, colon, rest = first.partition(": ")
    return (name, rest) if colon and len(name) < 40 else (first.rstrip("."), "")


def page(stem: str, methods: list[tuple[str, type[Method]]]) -> str:
    doc = inspect.getdoc(sys.modules[methods[0][1].__module__]) or ""
    head, _, body = doc.partition("\n\n")
    out = [f"# {', '.join(cls.__name__ for _, cls in methods)}\n", markdown(head), markdown(body)]
    for name, cls in methods:
        out += [f"## `jlora.{cls.__name__}`\n", markdown(about(cls))]
        out.append(f"On the command line `--method {name}`. Merges: {merges(cls)}.\n")
        rows = [table_row((f"`{option}`", default, inline(meaning))) for option, default, meaning in options(cls)]
        if rows:
            out.append("\n".join([table_row(("option", "default", "")), table_row(("---",) * 3), *rows]) + "\n")
    return "\n".join(out)


def index() -> str:
    out = ["# Methods\n", "The formula, the count, the cost of each, and when to use it.\n"]
    out.append("What LoRA's factors may start at is on [a page of its own](starts.md).\n")
    by_group = {key: [] for key in GROUPS}
    for stem, methods in files().items():
        doc = inspect.getdoc(sys.modules[methods[0][1].__module__]) or ""
        for key, part in itertools.groupby(sorted(methods, key=lambda m: group(m[1])), key=lambda m: group(m[1])):
            part = list(part)
            names = ", ".join(f"[{cls.__name__}]({stem}.md)" for _, cls in part)
            name, rest = title(doc)
            by_group[key].append(table_row((names, inline(rest or name), ", ".join(f"`{n}`" for n, _ in part))))
    for key, rows in by_group.items():
        if rows:
            out.append(f"## {GROUPS[key]}\n")
            out.append("\n".join([table_row(("method", "", "`--method`")), table_row(("---",) * 3), *rows]) + "\n")
    return "\n".join(out)


def starts() -> str:
    """The page of what LoRA's factors may start at: jlora/init."""
    out = ["# Starts of LoRA\n", markdown((inspect.getdoc(init) or "").partition("\n\n")[2])]
    by_file: dict[str, list[tuple[str, type]]] = {}
    for name, cls in init.STARTS.items():
        by_file.setdefault(cls.__module__, []).append((name, cls))
    for module, classes in by_file.items():
        doc = inspect.getdoc(sys.modules[module]) or ""
        out += [f"## {inline(title(doc)[0])}\n", markdown(doc)]
        for name, cls in classes:
            out += [f"### `jlora.init.{cls.__name__}`\n", markdown(about(cls))]
            out.append(f"On the command line `--init {name}`.\n")
            rows = [table_row((f"`{option}`", default, inline(meaning))) for option, default, meaning in options(cls)]
            if rows:
                out.append("\n".join([table_row(("option", "default", "")), table_row(("---",) * 3), *rows]) + "\n")
    return "\n".join(out)


def pages() -> dict[str, str]:
    """File name -> content."""
    made = {f"{stem}.md": page(stem, methods) for stem, methods in files().items()}
    return {"index.md": index(), "starts.md": starts()} | made


def write(out: Path) -> None:
    """The pages, into a folder."""
    write_pages(out, pages())


def write_pages(out: Path, wanted: dict[str, str]) -> None:
    """Only what changed, so that a server that watches the folder comes to rest; what is no page any more goes."""
    out.mkdir(parents=True, exist_ok=True)
    for old in out.glob("*.md"):
        if old.name not in wanted:
            old.unlink()
    for name, text in wanted.items():
        path = out / name
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")


def on_pre_build(config: Any) -> None:
    """The hook of mkdocs."""
    write(Path(config["docs_dir"]) / "methods")


def on_config(config: Any) -> Any:
    """All pages below "Methods"."""
    return list_pages(config, "methods", pages())


def list_pages(config: Any, folder: str, wanted: dict[str, str]) -> Any:
    """In the navigation, all pages of a folder in the place of its index."""
    entry = f"{folder}/index.md"
    rest = [f"{folder}/{name}" for name in sorted(wanted) if name != "index.md"]
    config["nav"] = [{t: [entry, *rest] if x == entry else x for t, x in item.items()} for item in config["nav"]]
    return config


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT)
    write(parser.parse_args().out)
