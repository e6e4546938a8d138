"""What in the state of any optax transformation belongs to the parameters, and what it is."""

from __future__ import annotations

from typing import Any

import jax
import optax

Keys = tuple[Any, ...]

# As optax calls the fields of what is divided by: means, maxima and sums of squares, of Adafactor also factored.
_SECOND = ("nu", "nu_max", "sum_of_squares", "v", "v_row", "v_col")


def fields(inner: optax.GradientTransformation) -> list[Keys]:
    """Key paths of the fields of a state that are trees like the parameters, such as Adam's ``mu`` and ``nu``."""
    found: list[Keys] = []

    def init(placeholder: Any) -> tuple:
        stop = lambda x: isinstance(x, type(placeholder))
        leaves, _ = jax.tree_util.tree_flatten_with_path(inner.init(placeholder), is_leaf=stop)
        found.extend(keys for keys, leaf in leaves if stop(leaf))
        return ()

    optax.tree_map_params(init, lambda leaf: leaf, ())
    return found


def is_second(keys: Keys, known: list[Keys]) -> bool:
    """Whether the leaf of a state at this path is of second moments, given the state's ``fields``."""
    return any(keys[: len(field)] == field and getattr(field[-1], "name", None) in _SECOND for field in known if field)
