"""Recipes: a scenario each, with its command, the time it takes, and the figure to expect.

A recipe is the options of `jlora finetune` that were found to do, with {0}, {1}, ... in the places of its paths:

    python -m jlora.train.recipes.NAME PATH ... [further options of jlora finetune]
"""

import sys
from collections.abc import Sequence


def finetune(options: Sequence[str], doc: str, paths: int, argv: Sequence[str] | None = None) -> int:
    """`jlora finetune` with `options` and the first `paths` arguments in their places, then the other arguments.

    Of an option that is given twice the last counts. Without the paths, or with --help, `doc` is shown.
    """
    from jlora.train.cli import main

    given = list(sys.argv[1:] if argv is None else argv)
    found, more = given[:paths], given[paths:]
    if "--help" in given or len(found) < paths or any(path.startswith("-") for path in found):
        asked = "--help" in given
        print(doc.strip(), file=sys.stdout if asked else sys.stderr)
        return 0 if asked else 2
    return main(["finetune", *(option.format(*found) for option in options), *more])
