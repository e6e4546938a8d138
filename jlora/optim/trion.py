r"""Trion: momentum projected onto the columns of the cosine transform that matter most, and there made orthogonal.

SVD-Free Low-Rank Adaptive Gradient Optimization for Large Language Models. Modoranu et al., 2025.
https://arxiv.org/abs/2505.17967
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree

from jlora.optim import projection
from jlora.optim.dct import Columns, column_norm
from jlora.optim.projection import Basis, Pattern, Plan
from jlora.weight import Axes

# c for W [m inputs, n outputs].
FACTORS = {
    "none": lambda m, n: 1.0,
    "kj": lambda m, n: math.sqrt(max(1.0, n / m)),
    "kimi": lambda m, n: 0.2 * math.sqrt(max(m, n)),
    "dion": lambda m, n: math.sqrt(n / m),
}
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def scale_by_trion(
    rank: int = 128,
    *,
    momentum: float = 0.95,
    factor: str = "kj",
    norm: str = "l1",
    iterations: int = 5,
    side: str = "smaller",
    axes: Mapping[Pattern, Axes] | None = None,
    where: Pattern = "**",
) -> optax.GradientTransformationExtraArgs:
    """The direction of ``trion``, of the leaves that are projected; others pass as they are.

    Args:
      rank, momentum, factor, norm, side, axes, where: as for ``trion``.
      iterations: of Newton and Schulz.
    """
    if factor not in FACTORS:
        raise ValueError(f"factor={factor!r}: one of {', '.join(FACTORS)} is wanted.")
    if side == "both":
        raise ValueError("trion projects on one side: side='both' is not one. Choose another.")

    def finish(plan: Plan, basis: Basis, b: Array, r: Array, u: Array, before: Array) -> tuple[Array, Array]:
        left = b - (1 - momentum) * plan.up(r, basis)
        c = FACTORS[factor](plan.size("in"), plan.size("out"))
        return c * plan.up(orthogonalized(plan, r, iterations), basis), left.astype(plan.dtype)

    return projection.low_rank(
        optax.identity(),
        Columns(column_norm(norm)),
        finish,
        rank=rank,
        period=1,
        side=side,
        axes=axes,
        where=where,
        remember=projection.whole_zeros,
        begin=lambda g, left: left + g,
    )


def trion(
    learning_rate: optax.ScalarOrSchedule,
    rank: int = 128,
    *,
    momentum: float = 0.95,
    factor: str = "kj",
    norm: str = "l1",
    weight_decay: float = 0.0,
    rest: optax.GradientTransformation | None = None,
    side: str = "smaller",
    axes: Mapping[Pattern, Axes] | None = None,
    where: Pattern = "**",
) -> optax.GradientTransformationExtraArgs:
    r"""Muon in r columns of the cosine transform: a momentum whose leading part is made orthogonal and decays.

    With G [m, n] the gradient of W [m, n], n >= m (transposed otherwise), Q [m, m] the orthogonal matrix of the cosine
    transform and M [m, n] the momentum,

    .. math::  B = M + G, \quad I = \mathrm{top}_r \,\|(Q^T B)_{i:}\|, \quad R = Q_I^T B \;\; [r, n], \\
               M \leftarrow B - (1 - \mu)\, Q_I R, \qquad
               \Delta W = -\eta\, c\, Q_I\, \mathrm{NS}(R) - \eta \lambda W

    NS are five iterations of Newton and Schulz, which bring the singular values of R near 1. What was not projected
    stays in M in full: its error feedback. State per matrix: the momentum, m n numbers, and r indices.

    For training all of W on many devices, which then exchange R and the indices in place of whole updates; its state is
    no smaller than momentum's. ``dct`` is what saves state.

    Args:
      learning_rate: a number or a schedule, of all leaves.
      rank: r; at the smaller side, heavy-ball Muon.
      momentum: mu.
      factor: c: "none" 1, "kj" sqrt(max(1, n / m)), "kimi" 0.2 sqrt(max(m, n)), "dion" sqrt(n / m).
      norm: "l1" or "l2", by which the columns are chosen.
      weight_decay: lambda, of projected leaves.
      rest: the optimizer of leaves that are not projected; None: AdamW of the same rate, without decay.
      side, axes, where: as for ``galore``; a side of "both" is refused.

    >>> tx = jlora.optim.trion(0.02, rank=128, rest=optax.adamw(3e-4))

    The authors' code was read; as released it does not run. Departures: indices are sorted; the iterations are computed
    in float32, in place of bfloat16; the default c, which the code leaves to its caller, is Muon's.
    """
    matrices = optax.chain(
        scale_by_trion(rank, momentum=momentum, factor=factor, norm=norm, side=side, axes=axes, where=where),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    )

    def labels(tree: PyTree) -> PyTree:
        chosen = projection.projected(tree, rank, side=side, axes=axes, where=where)
        if (leaves := jax.tree.leaves(tree)) and not any(jax.tree.leaves(chosen)):
            raise ValueError(projection.nothing_to_project(leaves, rank))
        return jax.tree.map(lambda yes: "projected" if yes else "rest", chosen)

    others = optax.adamw(learning_rate, weight_decay=0.0) if rest is None else rest
    return optax.partition({"projected": matrices, "rest": others}, labels)


def orthogonalized(plan: Plan, r: Float[Array, "*stack a b"], iterations: int) -> Float[Array, "*stack a b"]:
    """U V^T of R = U S V^T, nearly: X <- a X + (b X X^T + c (X X^T)^2) X, on the side of the rank."""
    a, b, c = NEWTON_SCHULZ
    head, ends = plan.projected_spec[:-2], plan.projected_spec[-2:]
    x = r.astype(jnp.promote_types(r.dtype, jnp.float32))
    x = x / (jnp.sqrt(jnp.sum(x * x, (-2, -1), keepdims=True)) + 1e-7)
    small = plan.spec and (*head, None, None)
    for _ in range(iterations):
        if plan.sides == ("in",):
            gram = plan.product("...rn,...sn->...rs", x, x, small)
            gram = b * gram + c * plan.product("...rs,...st->...rt", gram, gram, small)
            x = a * x + plan.product("...rs,...sn->...rn", gram, x, (*head, None, *ends[1:]))
        else:
            gram = plan.product("...mr,...ms->...rs", x, x, small)
            gram = b * gram + c * plan.product("...rs,...st->...rt", gram, gram, small)
            x = a * x + plan.product("...mr,...rs->...ms", x, gram, (*head, *ends[:1], None))
    return x
