r"""Fira: GaLore, and what the projection leaves out, scaled by what Adam did to the rest.

Fira: Can We Achieve Full-rank Training of LLMs Under Low-rank Constraint? Chen et al., 2024.
https://arxiv.org/abs/2410.01623
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from jlora.optim import projection
from jlora.optim.adam import correct_bias, raw_adam
from jlora.optim.galore import leading
from jlora.optim.projection import Pattern, Plan
from jlora.weight import Axes


def scale_by_fira(
    inner: optax.GradientTransformation | None = None,
    rank: int = 128,
    *,
    period: int = 200,
    scale: float = 0.25,
    limit: float = 1.01,
    residual: str = "reference",
    side: str = "smaller",
    solver: str = "randomized",
    transport: str = "keep",
    axes: Mapping[Pattern, Axes] | None = None,
    where: Pattern = "**",
    dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""The direction of ``fira``: before bias correction, weight decay and learning rate.

    Args:
      inner: a direction, of the gradient's sign and without a learning rate: the limiter compares its size between
        steps, and a warm-up from zero would keep the residual at zero. None: Adam without bias correction.
      rank, period, side, solver, transport, axes, where, dtype: as for ``galore``; a side of "both" is refused.
      scale: alpha.
      limit: gamma, by which factor the residual may grow from step to step.
      residual: "reference", G - alpha P R, as the authors' code has it, or "orthogonal", G - P R.

    >>> tx = optax.chain(jlora.optim.scale_by_fira(rank=64), optax.scale_by_learning_rate(1e-2))
    """
    if residual not in ("reference", "orthogonal"):
        raise ValueError(f"residual={residual!r}: 'reference' or 'orthogonal' is wanted.")
    one_side("fira", side)

    def finish(plan: Plan, basis: dict, g: Array, r: Array, u: Array, before: Array) -> tuple[Array, Array]:
        kept = plan.up(r, basis)
        rest = (g - (scale * kept if residual == "reference" else kept)) * channel_factors(plan, r, u)
        rest, norm = limit_growth(rest, before, limit)
        return scale * plan.up(u, basis) + rest, norm

    return projection.low_rank(
        raw_adam() if inner is None else inner,
        leading(solver),
        finish,
        rank=rank,
        period=period,
        side=side,
        transport=transport,
        axes=axes,
        where=where,
        dtype=dtype,
        remember=no_norm,
    )


def fira(
    learning_rate: optax.ScalarOrSchedule,
    rank: int = 128,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-6,
    weight_decay: float = 0.0,
    period: int = 200,
    scale: float = 0.25,
    limit: float = 1.01,
    residual: str = "reference",
    side: str = "smaller",
    solver: str = "randomized",
    transport: str = "keep",
    axes: Mapping[Pattern, Axes] | None = None,
    where: Pattern = "**",
    dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""AdamW on the projected gradient, plus the rest of the gradient, scaled column by column.

    With R = P^T G [r, n] and N = M / (sqrt(V) + eps) Adam's direction of it (n >= m; transposed otherwise),

    .. math::  \phi_j = \frac{\|N_{:j}\|}{\|R_{:j}\| + 10^{-8}}, \qquad S = (G - \alpha P R)\,\mathrm{diag}(\phi),
               \qquad \Delta W = -\eta_t \bigl(\alpha P N + S / c\bigr) - \eta \lambda W,

    where eta_t carries Adam's bias correction and c = max(|S| / (s + 1e-8), gamma) / gamma lets the Frobenius norm of S
    grow by no more than gamma over that of the step before, s. State per matrix: that of ``galore`` and the number s.

    For what ``galore`` is for, from scratch above all: the update has full rank, at the price of two products more.

    Args:
      learning_rate: a number or a schedule.
      rank: r.
      b1, b2, eps: Adam's. eps is added to the square root of the second moment before the bias correction.
      weight_decay: lambda, of all leaves; ``optax.chain`` with ``scale_by_fira`` for a mask.
      scale: alpha.
      limit: gamma.
      residual: "reference", as above, or "orthogonal", G - P R.
      period, side, solver, transport, axes, where, dtype: as for ``galore``; a side of "both" is refused.

    >>> tx = jlora.optim.fira(optax.warmup_cosine_decay_schedule(0.0, 1e-2, 1000, 10_000), rank=128)

    Defaults are those of the authors' pre-training scripts; their code was read, and traces of it are reproduced. In it
    the residual holds a (1 - alpha) part of what was kept, so that Adam replaced by plain descent gives plain descent
    for every alpha; ``residual="orthogonal"`` is the paper's. Departures: the solver; the norms of phi are taken over
    the projected axis whatever the shape, and in float32; and weight decay acts on the weights before the step, as in
    optax.
    """
    direction = scale_by_fira(
        raw_adam(b1, b2, eps),
        rank,
        period=period,
        scale=scale,
        limit=limit,
        residual=residual,
        side=side,
        solver=solver,
        transport=transport,
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


def one_side(name: str, side: str) -> None:
    if side == "both":
        raise ValueError(f"{name} compares norms along the projected axis: side='both' leaves none. Choose another.")


def no_norm(plan: Plan) -> Float[Array, "*stack"]:
    """The norm of a step before the first."""
    return plan.put(jnp.full(plan.stack, -1.0, jnp.promote_types(plan.dtype, jnp.float32)), plan.spec[:-2])


def channel_factors(plan: Plan, r: Array, u: Array) -> Array:
    """By how much the inner transformation scaled each row or column of R: its norms over the projected axis."""
    axis = -2 if plan.sides == ("in",) else -1
    return norms(u, axis) / (norms(r, axis) + 1e-8)


def norms(x: Array, axes: int | tuple[int, ...]) -> Array:
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return jnp.sqrt(jnp.sum(x * x, axis=axes, keepdims=True))


def limit_growth(
    s: Float[Array, "*stack m n"], before: Float[Array, "*stack"], limit: float
) -> tuple[Float[Array, "*stack m n"], Float[Array, "*stack"]]:
    """``s`` shortened to ``limit`` times the norm before, each matrix of a stack by itself, and its norm then."""
    norm = norms(s, (-2, -1))
    old = before[..., None, None]
    c = jnp.where(old < 0, 1.0, jnp.maximum(norm / (old + 1e-8), limit) / limit)
    return s / c, (norm / c)[..., 0, 0].astype(before.dtype)
