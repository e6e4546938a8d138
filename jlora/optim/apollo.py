r"""APOLLO: the gradient itself, scaled by what Adam does to a random projection of it.

APOLLO: SGD-like Memory, AdamW-level Performance. Zhu et al., 2024. https://arxiv.org/abs/2412.05270
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from jlora.optim import projection
from jlora.optim.adam import correct_bias, raw_adam
from jlora.optim.fira import channel_factors, limit_growth, no_norm, norms, one_side
from jlora.optim.projection import Basis, Pattern, Plan
from jlora.weight import Axes


@dataclasses.dataclass(frozen=True)
class Gaussian:
    """Independent normal numbers of variance 1 / r, drawn again from the step and the leaf whenever they are used:
    nothing is stored."""

    seed: int
    period: int

    def init(self, plan: Plan) -> tuple:
        return ()

    def refresh(self, plan: Plan, stored: tuple, g: Array, count: Array) -> tuple[tuple, None]:
        return (), None

    def basis(self, plan: Plan, stored: tuple, count: Array) -> Basis:
        key = jax.random.fold_in(jax.random.key(self.seed), plan.index)
        key = jax.random.fold_in(key, count // self.period)
        draw = lambda d: jax.random.normal(key, (*plan.stack, d, plan.rank), plan.dtype) / math.sqrt(plan.rank)
        return {side: plan.put(draw(plan.size(side)), plan.basis_spec(side)) for side in plan.sides}

    def overlap(self, plan: Plan, new: tuple, old: tuple) -> Basis:
        raise NotImplementedError("Two draws have nothing in common to rotate moments by.")


def scale_by_apollo(
    inner: optax.GradientTransformation | None = None,
    rank: int = 128,
    *,
    period: int = 200,
    scale: float = 1.0,
    limit: float | None = 1.01,
    per: str = "channel",
    seed: int = 0,
    side: str = "smaller",
    axes: Mapping[Pattern, Axes] | None = None,
    where: Pattern = "**",
    dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """The direction of ``apollo``: before bias correction, weight decay and learning rate.

    Args:
      inner: a direction, as for ``scale_by_fira``. None: Adam without bias correction.
      rank: r. With ``per="tensor"`` 1 is enough.
      period: steps between two draws of the projection.
      scale: its square root multiplies the update of projected leaves.
      limit: gamma, by which factor the update may grow from step to step; None does not limit it.
      per: "channel", one factor for each row or column of the longer side, or "tensor", one for the matrix.
      seed: of the projections.
      side, axes, where, dtype: as for ``galore``.
    """
    if per not in ("channel", "tensor"):
        raise ValueError(f"per={per!r}: 'channel' or 'tensor' is wanted.")
    one_side("apollo", side)

    def finish(plan: Plan, basis: Basis, g: Array, r: Array, u: Array, before: Array) -> tuple[Array, Array]:
        whole = lambda x: norms(x, (-2, -1))
        factors = channel_factors(plan, r, u) if per == "channel" else whole(u) / (whole(r) + 1e-8)
        s = g * factors
        if limit is not None:
            s, before = limit_growth(s, before, limit)
        return jnp.sqrt(jnp.asarray(scale, s.dtype)) * s, before

    return projection.low_rank(
        raw_adam() if inner is None else inner,
        Gaussian(seed, period),
        finish,
        rank=rank,
        period=period,
        side=side,
        axes=axes,
        where=where,
        dtype=dtype,
        remember=None if limit is None else no_norm,
    )


def apollo(
    learning_rate: optax.ScalarOrSchedule,
    rank: int = 128,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-6,
    weight_decay: float = 0.0,
    period: int = 200,
    scale: float = 1.0,
    limit: float | None = 1.01,
    per: str = "channel",
    seed: int = 0,
    side: str = "smaller",
    axes: Mapping[Pattern, Axes] | None = None,
    where: Pattern = "**",
    dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Descent along the gradient, each channel as long as Adam would have made it, judged by a random projection.

    With G [m, n] the gradient of W [m, n] (n >= m; transposed otherwise), P [m, r] random, R = P^T G [r, n] and
    N = M / (sqrt(V) + eps) Adam's direction of R,

    .. math::  \phi_j = \frac{\|N_{:j}\|}{\|R_{:j}\| + 10^{-8}}, \qquad
               \Delta W = -\eta_t \sqrt{a}\; \mathrm{limit}\bigl(G\,\mathrm{diag}(\phi)\bigr) - \eta \lambda W,

    with the limiter of ``fira`` and Adam's bias correction in eta_t. State per matrix: 2 max(m, n) r numbers and one:
    no basis, for it is drawn again from the step. APOLLO-Mini is ``rank=1, per="tensor", scale=128``, with next to no
    state.

    For pre-training with the least state of the methods here. The update is the gradient's, of full rank; within a
    channel it is not preconditioned.

    Args:
      learning_rate: a number or a schedule.
      rank: r.
      b1, b2, eps: Adam's.
      weight_decay: lambda, of all leaves; ``optax.chain`` with ``scale_by_apollo`` for a mask.
      scale: a.
      period, limit, per, seed, side, axes, where, dtype: as for ``scale_by_apollo``.

    >>> tx = jlora.optim.apollo(1e-2, rank=128)
    >>> mini = jlora.optim.apollo(1e-2, rank=1, per="tensor", scale=128.0)

    Defaults are those of transformers' Trainer. The authors' optimizer was read (in a fork of its repository), its
    random projection was not: the variance 1/r, on which only eps and the 1e-8 look, is from memory. Departures: other
    random numbers; the limiter always acts before the scale, as by default there; norms in float32.
    """
    direction = scale_by_apollo(
        raw_adam(b1, b2, eps),
        rank,
        period=period,
        scale=scale,
        limit=limit,
        per=per,
        seed=seed,
        side=side,
        axes=axes,
        where=where,
        dtype=dtype,
    )
    return optax.chain(
        direction,
        correct_bias(b1, b2),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    )
