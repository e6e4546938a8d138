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
import numpy as np
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


def cosine_transform(x: Float[Array, "*n a b"], axis: int) -> list[tuple[np.ndarray, Array]]:
    """The transform of x along its last axis or the one before: pieces of it, each with the indices that it has.

    Columns of even index are the same from both ends, and half as long a transform of the sum of the halves; those of
    odd index change their sign. A third of the FLOPs of the product with Q, when it is halved often.
    """
    size = x.shape[axis]
    times = lambda x, q: jnp.einsum("...dn,di->...in" if axis == -2 else "...md,di->...mi", x, q)
    if size % 2 or size < 64:
        index = np.arange(size)
        return [(index, times(x, dct_columns(size, jnp.asarray(index), x.dtype)))]
    first, second = jnp.split(x, 2, axis)
    second, odd = jnp.flip(second, axis), np.arange(1, size, 2)
    even = [(2 * index, s) for index, s in cosine_transform((first + second) * math.sqrt(0.5), axis)]
    return [*even, (odd, times(first - second, dct_columns(size, jnp.asarray(odd), x.dtype)[: size // 2]))]


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

    def refresh(self, plan: Plan, stored: Array, g: Array, count: Array) -> tuple[Array, Array | None]:
        (side,) = plan.sides
        g = g.astype(jnp.promote_types(g.dtype, jnp.float32))
        axis = -2 if side == "in" else -1
        parts = cosine_transform(g, axis) if plan.mesh is None else [self._whole(plan, side, g)]
        order = np.concatenate([index for index, _ in parts])
        where = np.argsort(order)
        measure = (lambda s: jnp.abs(s)) if self.norm == "l1" else (lambda s: s * s)
        size = plan.whole(jnp.concatenate([measure(s).sum(-3 - axis) for _, s in parts], -1)[..., where])
        found = jnp.sort(jax.lax.top_k(size, plan.rank)[1].astype(jnp.int32), axis=-1)
        usable = jnp.isfinite(size).all(-1, keepdims=True)
        index = plan.put(jnp.where(usable, found, plan.whole(stored)), (*plan.spec[:-2], None))
        if plan.mesh is not None:
            return index, None
        at = jnp.expand_dims(jnp.asarray(where)[index], -3 - axis)
        return index, jnp.take_along_axis(jnp.concatenate([s for _, s in parts], axis), at, axis)

    def _whole(self, plan: Plan, side: str, g: Array) -> tuple[np.ndarray, Array]:
        """The transform as one product, which keeps a sharded gradient where it is."""
        head, index = plan.spec[:-2], np.arange(plan.size(side), dtype=np.int32)
        q = dct_columns(plan.size(side), jnp.asarray(index), g.dtype)
        if side == "in":
            return index, plan.product("di,...dn->...in", q, g, (*head, None, *plan.spec[-1:]))
        return index, plan.product("...md,di->...mi", g, q, (*head, *plan.spec[-2:-1], None))

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
