"""Tables in plain text, for what is printed."""

from collections.abc import Container, Sequence


def table(rows: Sequence[Sequence[str]], right: Container[str] = ()) -> str:
    """Rows under their header, the columns named in ``right`` flush right."""
    header = rows[0]
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    align = [str.rjust if name in right else str.ljust for name in header]
    rows = [header, ["-" * width for width in widths], *rows[1:]]
    return "\n".join("  ".join(f(c, w) for f, c, w in zip(align, row, widths, strict=True)).rstrip() for row in rows)
