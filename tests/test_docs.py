"""The documentation: its examples run and print what it says they print, its commands exist, and the site builds."""

import contextlib
import io
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys

import pytest

from jlora.train import cli

ROOT = pathlib.Path(__file__).parents[1]
PAGES = {
    str(path.relative_to(ROOT / "docs")): path.read_text(encoding="utf-8")
    for path in sorted((ROOT / "docs").rglob("*.md"))
    if path.parent.name not in ("methods", "optimizers")  # made from docstrings
}
BLOCK = re.compile(r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```\n)?", re.DOTALL | re.MULTILINE)
OTHERS = ("gemma", "haiku", "equinox", "keras", "tunix")  # libraries of models, which the tests do without
WITH_BLOCKS = [name for name, text in PAGES.items() if BLOCK.search(text)]


def printed_by(block: str, names: dict, where: str) -> str:
    """What a block prints, or the message of the error that it ends with."""
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            exec(compile(block, where, "exec"), names)  # noqa: S102
    except (ValueError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    return printed.getvalue()


@pytest.mark.parametrize("name", WITH_BLOCKS)
def test_examples(name, tmp_path, monkeypatch):
    """The blocks of a page are one program. A block of text right after one is what it prints, or its error."""
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "docs"}
    for i, (block, wanted) in enumerate(BLOCK.findall(PAGES[name])):
        try:
            got = printed_by(block, names, f"{name}, block {i}")
        except ModuleNotFoundError as error:
            if error.name not in OTHERS:
                raise
            pytest.skip(f"from block {i} on, for want of {error.name}: pip install 'jlora[others]'")
        assert got.split() == wanted.split(), f"{name}, block {i}:\n{block}\nprinted\n{got}"


def commands(text: str) -> list[str]:
    shown = "".join(re.findall(r"^```sh\n(.*?)^```", text, re.DOTALL | re.MULTILINE))
    return [line.partition("#")[0].strip() for line in shown.splitlines() if line.startswith("jlora ")]


@pytest.mark.parametrize("command", sorted({command for text in PAGES.values() for command in commands(text)}))
def test_commands_exist(command, monkeypatch):
    """The command line takes them; they are not run."""
    taken = []
    monkeypatch.setattr(cli, "_run", lambda config, argv: taken.append(config) or 0)
    if "--tyro-print-completion" in command:
        with pytest.raises(SystemExit) as stop, contextlib.redirect_stdout(io.StringIO()) as printed:
            cli.main(shlex.split(command.partition(">")[0])[1:])
        assert stop.value.code in (0, None) and "finetune" in printed.getvalue()
        return
    assert cli.main(shlex.split(command)[1:]) == 0 and len(taken) == 1


def test_the_examples_were_found():
    assert len(WITH_BLOCKS) >= 15 and sum(len(BLOCK.findall(text)) for text in PAGES.values()) >= 50
    assert sum(text.count("```python") for text in PAGES.values()) == sum(
        len(BLOCK.findall(text)) for text in PAGES.values()
    )


def test_optimizer_pages_are_markdown():
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        import optimizers
    finally:
        sys.path.remove(str(ROOT / "docs"))
    pages = optimizers.pages()
    from jlora import optim

    for name in (name for name in dir(optim) if not name.startswith("_")):
        if callable(getattr(optim, name)):
            assert any(f"## `jlora.optim.{name}`" in text for text in pages.values()), name
            assert f"[{name}](" in pages["index.md"]
    for name, text in pages.items():
        assert not re.search(r"\.\. \w+::|^>>> |::$", text, re.MULTILINE), name
        assert text.count("$$") % 2 == 0 and text.count("```") % 2 == 0, name


@pytest.mark.slow
def test_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs")
    source = tmp_path / "source"
    source.mkdir()
    shutil.copytree(ROOT / "docs", source / "docs", ignore=shutil.ignore_patterns("methods", "optimizers"))
    shutil.copytree(ROOT / "jlora", source / "jlora", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copyfile(ROOT / "mkdocs.yml", source / "mkdocs.yml")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}  # of the theme, about itself
    done = subprocess.run(command, cwd=source, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stderr
    assert (tmp_path / "site" / "methods" / "lora" / "index.html").is_file()
