"""The rule for ragged products: rows of x sorted by expert, a matrix for each expert."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jlora.lift.core import Run, is_adapted, plain, rule
from jlora.lift.products import Branch, atoms_of, consume, observe
from jlora.weight import IN, OUT, STACK, AdaptedWeight, Context, Params


@dataclasses.dataclass(frozen=True)
class RaggedDot(Branch):
    """x [rows, in] times [experts, in, out], row by row with the expert of its group."""

    group_sizes: Array
    precision: Any
    preferred: Any
    kind: str = "ragged"

    def _dot(self, x: Array, w: Array, preferred: Any) -> Array:
        return lax.ragged_dot(x, w, self.group_sizes, precision=self.precision, preferred_element_type=preferred)

    def __call__(self, x: Array, w: Array) -> Array:
        return self._dot(x, w, self.preferred)

    def inner(self, x: Array, a: Array) -> Array:
        return self._dot(x, a.astype(x.dtype), None)

    def outer(self, h: Array, b: Array) -> Array:
        return self._dot(h, b.astype(h.dtype), self.preferred)

    def per_matrix(self, fn: Callable, w: Array, p: Params) -> Any:
        return jax.vmap(lambda w, own: fn(w, own._replace(shared=p.shared)))(w, p._replace(shared=None))

    def along(self, y: Array, g: Array) -> Array:
        return jnp.repeat(g.astype(y.dtype), self.group_sizes, axis=0, total_repeat_length=y.shape[0])

    def mix(self, y: Array, m: Array) -> Array:
        return self._dot(y, m.astype(y.dtype), None)


@rule("ragged_dot_general", "ragged_dot")
def ragged_dot(run: Run, eqn: Any, values: list) -> list | None:
    x, w, group_sizes = values
    numbers = eqn.params.get("ragged_dot_dimension_numbers")
    if is_adapted(x) or not is_adapted(w) or is_adapted(group_sizes) or eqn.params.get("group_offset") is not None:
        return None
    if numbers is not None and (
        numbers.dot_dimension_numbers != (((1,), (1,)), ((), ()))
        or tuple(numbers.lhs_ragged_dimensions) != (0,)
        or tuple(numbers.rhs_group_dimensions) != (0,)
    ):
        return None
    if run.observe is not None:
        observe(run, w, "ragged", (1,), (0,), (2,), 2.0 * x.shape[0] * w.shape[1] * w.shape[2])
        return plain(eqn, [x, w.base, group_sizes])
    groups = [set(atoms_of(w, (axis,))) for axis in range(3)]
    if groups != [set(w.group(STACK)), set(w.group(IN)), set(w.group(OUT))] or len(w.stack_shape) != 1 or w.backwards:
        return None
    dot = RaggedDot(group_sizes, eqn.params["precision"], eqn.params["preferred_element_type"])

    def forward(w: AdaptedWeight, x: Array, base: Array, p: Params, ctx: Context) -> tuple[Array, Any]:
        one_key = dataclasses.replace(ctx, key=None if ctx.key is None else ctx.key[0])
        return w.method.forward(dot, x, base, p, one_key)

    return [consume(run, w, x, forward)]
