"""Recipes: a scenario each, with its command and, where they were measured, the time and the figure to expect.

    python -m jlora.train.recipes.NAME PATH ... [further options of jlora finetune]

A recipe is options of `jlora finetune`, with {0}, {1}, ... in the places of its paths.
"""

import sys
from collections.abc import Sequence


def finetune(options: Sequence[str], doc: str, argv: Sequence[str] | None = None) -> int:
    """`jlora finetune` with `options` and the first arguments in the places of their paths, then the other arguments.

    Of an option that is given twice the last counts. Without the paths, or with --help, `doc` is shown.
    """
    from jlora.train.cli import main
    from jlora.train.huge_pages import restart_with_huge_pages

    given = list(sys.argv[1:] if argv is None else argv)
    paths = sum(option.startswith("{") for option in options)
    found, more = given[:paths], given[paths:]
    if "--help" in given or len(found) < paths or any(path.startswith("-") for path in found):
        asked = "--help" in given
        print(doc.strip(), file=sys.stdout if asked else sys.stderr)
        return 0 if asked else 2
    if argv is None:  # the recipe is what this process is for
        restart_with_huge_pages()
    return main(["finetune", *(option.format(*found) for option in options), *more])
