"""The rule for embedding lookups."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jlora.factors import Factors
from jlora.lift.core import Run, is_adapted, plain, rule
from jlora.lift.products import Branch, atoms_of, consume, from_canonical, observe
from jlora.storage import Stored, is_stored
from jlora.weight import IN, AdaptedWeight, Context, Params


@dataclasses.dataclass(frozen=True)
class LookupDot(Branch):
    """Row lookup: x holds row numbers [..., 1]; out-of-bounds rows are treated as the model's gather treats them.

    ``stored``, ``table``: where the base is stored, and the matrix that the method is shown for it: of that one, only
    the rows looked up are formed.
    """

    params: dict[str, Any]
    stored: Stored | None = None
    table: Array | None = None
    kind: str = "lookup"

    def _rows(self, ids: Array, table: Array, fill: Any) -> Array:
        n = ids.ndim - 1
        offset = tuple(range(n, n + table.ndim - 1))
        numbers = lax.GatherDimensionNumbers(offset_dims=offset, collapsed_slice_dims=(0,), start_index_map=(0,))
        return lax.gather(
            table,
            ids,
            numbers,
            slice_sizes=(1, *table.shape[1:]),
            indices_are_sorted=self.params["indices_are_sorted"],
            unique_indices=self.params["unique_indices"],
            mode=self.params["mode"],
            fill_value=fill,
        )

    def __call__(self, ids: Array, w: Array) -> Array:
        rows = self.stored.rows(lambda part: self._rows(ids, part, 0)) if w is self.table and self.stored else None
        if rows is None:
            return self._rows(ids, w, self.params["fill_value"])
        if self.params["mode"] != lax.GatherScatterMode.FILL_OR_DROP:
            return rows
        fill = self._rows(ids, jnp.zeros((w.shape[0], 1), rows.dtype), self.params["fill_value"])  # 0 where it is a row
        return jnp.where(fill == 0, rows, fill)

    def inner(self, ids: Array, a: Array) -> Array:
        return self._rows(ids, a, 0)  # the base's row already carries the fill

    def outer(self, h: Array, b: Array) -> Array:
        return h @ b.astype(h.dtype)

    mix = outer  # a looked up row is an activation like any other

    def factored(self, ids: Array, w: Array, f: Factors, context: Context, rate: float = 0.0) -> Array:
        return self(ids, w) + (self.outer(self.inner(ids, f.a), f.b) * f.scale).astype(w.dtype)


@rule("gather")
def gather(run: Run, eqn: Any, values: list) -> list | None:
    w, ids = values
    if not is_adapted(w) or is_adapted(ids):
        return None
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    indexed = list(numbers.start_index_map)
    if len(indexed) > 1 and eqn.params["mode"] in (lax.GatherScatterMode.CLIP, lax.GatherScatterMode.PROMISE_IN_BOUNDS):
        # A row that is cut out under vmap has a number on every axis; on those that it takes whole, that counts as 0.
        indexed = [a for a in indexed if sizes[a] != w.shape[a]]
    if len(indexed) != 1 or sizes[indexed[0]] != 1 or tuple(numbers.collapsed_slice_dims) not in ((), tuple(indexed)):
        return None
    (axis,) = indexed
    rest = [a for a in range(len(w.shape)) if a != axis]
    if numbers.operand_batching_dims or any(sizes[a] != w.shape[a] for a in rest):
        return None
    if run.observe is not None:
        observe(run, w, "lookup", (axis,), (), rest, 0.0)
        return plain(eqn, [w.base, ids])
    if set(atoms_of(w, (axis,))) != set(w.group(IN)) or w.stack_shape or w.backwards:
        return None
    at = numbers.start_index_map.index(axis)
    ids = lax.slice_in_dim(ids, at, at + 1, axis=ids.ndim - 1)

    def forward(w: AdaptedWeight, ids: Array, base: Array, p: Params, ctx: Context) -> tuple[Array, Any]:
        stored = w.base if is_stored(w.base) else None
        return w.method.forward(LookupDot(eqn.params, stored, base), ids, base, p, ctx)

    y = consume(run, w, ids, forward)
    y = from_canonical(y, y.ndim - 1, [w.labels[a] for a in rest], [w.shape[a] for a in rest])
    n = ids.ndim - 1
    y = y if numbers.collapsed_slice_dims else jnp.expand_dims(y, n + axis)
    return [jnp.moveaxis(y, range(n, y.ndim), numbers.offset_dims)]
