"""What tests read off a program before it is compiled."""

from collections.abc import Iterator
from typing import Any

import jax


def equations(jaxpr: Any, repeat: int = 1) -> Iterator[tuple[Any, int]]:
    """(equation, how often it runs), of a jaxpr and of all within it."""
    for eqn in jaxpr.eqns:
        yield eqn, repeat
        inner = repeat * eqn.params.get("length", 1) if eqn.primitive.name == "scan" else repeat
        for param in jax.tree.leaves(eqn.params, is_leaf=lambda p: hasattr(p, "eqns") or hasattr(p, "jaxpr")):
            if hasattr(param, "jaxpr"):
                yield from equations(param.jaxpr, inner)
            elif hasattr(param, "eqns"):
                yield from equations(param, inner)
