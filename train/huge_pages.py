"""Memory on a CPU in pages of 2 MB.

XLA's CPU backend takes the temporary memory of a program anew at every call and gives it back after. malloc asks the
kernel for blocks so large and returns them to it, so that each page is cleared again at its first touch, 4 kB at a
time: a fifth of a training step (docs/how-to/cpu.md). Since version 2.35 glibc asks for pages of 2 MB, five hundred
times fewer, where the environment says so when a process starts.
"""

import os
import pathlib
import re
import sys

_TUNABLE = "glibc.malloc.hugetlb"
_KERNEL = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")


def tunables(environ: dict[str, str], kernel: str, libc: str) -> str | None:
    """The GLIBC_TUNABLES with which malloc asks for huge pages, or None where that would change nothing: the user has
    chosen, the C library is another or older, or the kernel gives such pages always or never.

    Args:
      environ: the process's environment.
      kernel: what the kernel says of transparent huge pages, its choice in brackets: "always [madvise] never".
      libc: name and version of the C library: "glibc 2.36".
    """
    given = environ.get("GLIBC_TUNABLES", "")
    version = re.fullmatch(r"glibc (\d+)\.(\d+)\S*", libc)
    if _TUNABLE in given or "[madvise]" not in kernel or not version or tuple(map(int, version.groups())) < (2, 35):
        return None
    return ":".join(filter(None, (given, f"{_TUNABLE}=1")))


def restart_with_huge_pages() -> None:
    """Start this process's command anew, as the same process, if it could then have huge pages. It starts over: call
    this before anything has been done. ``GLIBC_TUNABLES=glibc.malloc.hugetlb=0`` keeps it from that."""
    try:
        kernel, libc = _KERNEL.read_text(), os.confstr("CS_GNU_LIBC_VERSION") or ""
    except (OSError, ValueError, AttributeError):  # no such kernel, no such C library, no confstr
        return
    wanted = tunables(dict(os.environ), kernel, libc)
    if wanted is not None and sys.executable:
        command = [sys.executable, *sys.orig_argv[1:]]
        os.execve(sys.executable, command, os.environ | {"GLIBC_TUNABLES": wanted})
