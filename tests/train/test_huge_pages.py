"""Commands that train start over with memory in huge pages, once, and only where that changes anything."""

import os
import pathlib
import subprocess
import sys

import pytest

from jlora.train import cli, huge_pages, recipes

CHOICE = "always [madvise] never"
KERNEL = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.mark.parametrize(
    ("environ", "kernel", "libc", "wanted"),
    [
        ({}, CHOICE, "glibc 2.36", "glibc.malloc.hugetlb=1"),
        ({}, CHOICE, "glibc 2.35", "glibc.malloc.hugetlb=1"),
        ({"GLIBC_TUNABLES": "a.b=1"}, CHOICE, "glibc 2.41.9", "a.b=1:glibc.malloc.hugetlb=1"),
        ({"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}, CHOICE, "glibc 2.36", None),  # after the restart
        ({"GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"}, CHOICE, "glibc 2.36", None),
        ({}, "[always] madvise never", "glibc 2.36", None),
        ({}, "always madvise [never]", "glibc 2.36", None),
        ({}, CHOICE, "glibc 2.34", None),
        ({}, CHOICE, "musl 1.2", None),
        ({}, CHOICE, "", None),
    ],
)
def test_only_where_it_changes_something(environ, kernel, libc, wanted):
    assert huge_pages.tunables(environ, kernel, libc) == wanted


@pytest.fixture
def restarts(monkeypatch):
    """The arguments of the process that would be started in this one's place, in a list that is empty until then."""
    started = []
    monkeypatch.setattr(cli, "main", lambda argv=None: started.append("main") or 0)
    monkeypatch.setattr(huge_pages, "tunables", lambda *_: "glibc.malloc.hugetlb=1")
    monkeypatch.setattr(os, "execve", lambda path, argv, environ: started.append((argv, environ["GLIBC_TUNABLES"])))
    monkeypatch.setattr(huge_pages, "_KERNEL", pathlib.Path(__file__))  # there is one to read
    monkeypatch.setattr(sys, "orig_argv", ["python", "jlora", "finetune", "--steps", "3"])
    return started


@pytest.mark.skipif(not hasattr(os, "confstr"), reason="wants POSIX")
def test_a_command_that_trains(restarts, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["jlora", "finetune", "--steps", "3"])
    assert cli.command() == 0
    assert restarts == [([sys.executable, "jlora", "finetune", "--steps", "3"], "glibc.malloc.hugetlb=1"), "main"]


@pytest.mark.parametrize("argv", [["finetune", "--help"], ["inspect", "RUN"], []])
def test_other_commands(restarts, monkeypatch, argv):
    monkeypatch.setattr(sys, "argv", ["jlora", *argv])
    assert cli.command() == 0
    assert restarts == ["main"]


def test_a_recipe_as_a_command_and_as_a_function(restarts, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["recipe"])
    assert recipes.finetune([], "", []) == 0
    assert restarts == ["main"]
    recipes.finetune([], "")
    assert [entry == "main" for entry in restarts] == [True, False, True]


@pytest.mark.skipif(
    not KERNEL.exists() or huge_pages.tunables({}, KERNEL.read_text(), os.confstr("CS_GNU_LIBC_VERSION") or "") is None,
    reason="this kernel or C library has no choice of pages",
)
def test_a_real_process_starts_over_once():
    code = (
        "import os; print(os.getpid(), flush=True); import jlora.train.huge_pages as pages; "
        "pages.restart_with_huge_pages(); print(os.environ['GLIBC_TUNABLES'])"
    )
    environ = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    done = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=True)
    first, second, tunables = done.stdout.split()
    assert first == second
    assert tunables == "glibc.malloc.hugetlb=1"
