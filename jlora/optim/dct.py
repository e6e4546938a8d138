r"""DCT-AdamW: projection onto columns of a fixed orthogonal matrix, of which only the indices are stored.

SVD-Free Low-Rank Adaptive Gradient Optimization for Large Language Models. Modoranu et al., 2025.
https://arxiv.org/abs/2505.17967
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from jlora.optim import projection
from jlora.optim.fira import one_side
from jlora.optim.projection import Basis, Pattern, Plan
from jlora.weight import Axes


def dct_columns(size: int, index: Int[Array, "*stack r"], dtype: Any = jnp.float32) -> Float[Array, "*stack size r"]:
    """Columns i of the orthogonal matrix Q with X Q the cosine transform (DCT-II) of the rows of X:
    Q[j, i] = sqrt(2 / size) cos(pi i (2j + 1) / (2 size)), and sqrt(1 / size) for i = 0. Made from their indices."""
    i, j = index[..., None, :], jnp.arange(size, dtype=index.dtype)[:, None]
    angle = (i * (2 * j + 1)) % (4 * size)  # whole numbers: exact, where a large angle would be rounded
    wide = jnp.promote_types(dtype, jnp.float32)
    q = jnp.cos(angle.astype(wide) * (math.pi / (2 * size))) * math.sqrt(2 / size)
    return jnp.where(i == 0, jnp.asarray(math.sqrt(1 / size), wide), q).astype(dtype)


def column_norm(norm: str) -> str:
    if norm not in ("l1", "l2"):
        raise ValueError(f"norm={norm!r}: 'l1' or 'l2' is wanted.")
    return norm


@dataclasses.dataclass(frozen=True)
class Columns:
    """The columns of the transform along which the gradient is largest, by the l1 or l2 norm; in rising order."""

    norm: str

    def init(self, plan: Plan) -> Int[Array, "*stack r"]:
        index = jnp.broadcast_to(jnp.arange(plan.rank, dtype=jnp.int32), (*plan.stack, plan.rank))
        return plan.put(index, (*plan.spec[:-2], None))

    def refresh(self, plan: Plan, stored: Array, g: Array, count: Array) -> Array:
        (side,), head = plan.sides, plan.spec[:-2]
        g = g.astype(jnp.promote_types(g.dtype, jnp.float32))
        q = dct_columns(plan.size(side), jnp.arange(plan.size(side), dtype=jnp.int32), g.dtype)
        if side == "in":
            size = jnp.abs(plan.product("di,...dn->...in", q, g, (*head, None, *plan.spec[-1:])))
        else:
            size = jnp.abs(plan.product("...md,di->...mi", g, q, (*head, *plan.spec[-2:-1], None)))
        size = (size if self.norm == "l1" else size * size).sum(-1 if side == "in" else -2)
        size = plan.whole(size)
        found = jnp.sort(jax.lax.top_k(size, plan.rank)[1].astype(jnp.int32), axis=-1)
        usable = jnp.isfinite(size).all(-1, keepdims=True)
        return plan.put(jnp.where(usable, found, plan.whole(stored)), (*head, None))

    def basis(self, plan: Plan, stored: Array, count: Array) -> Basis:
        (side,) = plan.sides
        columns = dct_columns(plan.size(side), plan.whole(stored), plan.dtype)
        return {side: plan.put(columns, plan.basis_spec(side))}

    def overlap(self, plan: Plan, new: Array, old: Array) -> Basis:
        (side,) = plan.sides
        return {side: (new[..., :, None] == old[..., None, :]).astype(plan.dtype)}


def dct(
    inner: optax.GradientTransformation,
    rank: int = 128,
    *,
    period: int = 1,
    scale: float = 1.0,
    norm: str = "l1",
    error_feedback: bool = False,
    transport: str = "rotate",
    side: str = "smaller",
    axes: Mapping[Pattern, Axes] | None = None,
    where: Pattern = "**",
    dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""An optimizer on the columns of the gradient's cosine transform that matter most; DCT-AdamW around ``adamw``.

    With G [m, n] the gradient of W [m, n], n >= m (transposed otherwise), and Q [m, m] the orthogonal matrix of the
    cosine transform,

    .. math::  I = \mathrm{top}_r \,\|(Q^T G)_{i:}\|, \qquad R = Q_I^T G \;\; [r, n], \qquad
               \Delta W = s\, Q_I\, \mathrm{inner}(R).

    State per matrix, with Adam inside: 2 max(m, n) r numbers and r indices; Q is the same for all and made when it is
    used. With ``error_feedback`` also E [m, n]: what was discarded is added to the next gradient.

    For what ``galore`` is for, where decompositions are slow or a basis costs too much: the choice is a product and a
    sort, cheap enough for every step. The basis fits the gradient a little less than singular vectors.

    Args:
      inner: a complete optimizer or a direction. Its weight decay acts on all of W, unscaled.
      rank: r.
      period: steps between two choices of columns.
      scale: s, on the update of projected leaves only.
      norm: "l1", the authors' default, or "l2", which discards the least of the gradient.
      error_feedback: keep what is discarded.
      transport: "rotate" keeps the moments of columns that stay chosen and begins the others at zero, for columns of
        one orthogonal matrix turn into each other so; "keep" gives each place's moments to whatever column is there
        next (the authors' default), "reset" begins all at zero.
      side, axes, where, dtype: as for ``galore``; a side of "both" is refused.

    >>> tx = jlora.optim.dct(optax.adamw(1e-3), rank=128)

    The authors' code was read. Departures: moments follow their columns by default, since the order of the columns, by
    which "keep" goes there, is arbitrary; indices are sorted; the second moments are rotated by the squared overlap,
    which here is the same as theirs; one Q per size, not the first matrix's for all; matrices are projected on their
    smaller side without exceptions of shape, and no dimension is too long; the product is used, not an FFT (the set of
    columns is that of their FFT).
    """
    one_side("dct", side)

    def finish(plan: Plan, basis: Basis, g: Array, r: Array, u: Array, extra: Any) -> tuple:
        if error_feedback:
            extra = (g - plan.up(r, basis)).astype(plan.dtype)
        return scale * plan.up(u, basis), extra

    return projection.low_rank(
        inner,
        Columns(column_norm(norm)),
        finish,
        rank=rank,
        period=period,
        side=side,
        transport=transport,
        axes=axes,
        where=where,
        dtype=dtype,
        remember=projection.whole_zeros if error_feedback else None,
        begin=(lambda g, missed: g + missed) if error_feedback else None,
    )
