"""The pages of the methods say what a reader needs, and are Markdown."""

import importlib.util
import pathlib
import re

import pytest

from jlora.methods import METHODS

FILE = pathlib.Path(__file__).parents[1] / "docs" / "methods.py"


@pytest.fixture(scope="module")
def docs():
    spec = importlib.util.spec_from_file_location("jlora_method_pages", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def pages(docs) -> dict[str, str]:
    return docs.pages()


@pytest.mark.parametrize("name", METHODS)
def test_page_says_what_a_reader_needs(name, pages, docs):
    cls = METHODS[name]
    stem = cls.__module__.rpartition(".")[2]
    text = pages[f"{stem}.md"]
    assert f"## `jlora.{cls.__name__}`" in text and f"`--method {name}`" in text
    assert f"[{cls.__name__}]({stem}.md)" in pages["index.md"]
    assert re.search(r"<https?://\S+>", text), "no paper"
    assert re.search(r"^(\*   )?When to use (it|them)", text, re.MULTILINE)
    assert re.search(r"\bTrained\b|^\|.*\| (trained|count)\b", text, re.MULTILINE), "no count"
    assert "$$" in text, "no formula"
    undescribed = [option for option, _, meaning in docs.options(cls) if not meaning]
    assert not undescribed, f"not among the attributes of {cls.__name__}: {undescribed}"


def test_pages_are_markdown(pages):
    for name, text in pages.items():
        assert not re.search(r"\.\. \w+::|^=+ +=+$|(?<!`)``\w|::$", text, re.MULTILINE), name
        assert text.count("$$") % 2 == 0 and text.count("```") % 2 == 0, name
        for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
            cells = {len(re.split(r"(?<!\\)\|", line)) for line in block.splitlines()}
            assert len(cells) == 1, (name, block)


def test_markup(docs):
    text = (
        "A sum,\n\n.. math::  y = x_1\n           + x_2\n\nW_o * a, ``code_b``, https://x.org/a_b.\n\n* First::\n\n"
        "      f(x)\n\n  and\n\n  .. math::  z\n* second\n\n=====  =======\nname   trained\n=====  =======\n"
        "a      1 | 2\n       more\nb      3\n=====  =======\n"
    )
    assert docs.markdown(text) == (
        "A sum,\n\n$$\ny = x_1\n+ x_2\n$$\n\nW\\_o \\* a, `code_b`, <https://x.org/a_b>.\n\n*   First:\n\n"
        "    ```python\n    f(x)\n    ```\n\n    and\n\n    $$\n    z\n    $$\n\n*   second\n\n| name | trained |\n"
        "| --- | --- |\n| a | 1 \\| 2 more |\n| b | 3 |\n"
    )


def test_only_what_changed_is_written(docs, tmp_path):
    (tmp_path / "gone.md").write_text("of a method that is no more")
    docs.write(tmp_path)
    assert not (tmp_path / "gone.md").exists()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    docs.write(tmp_path)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before
