r"""GaLore: Adam, or any other optimizer, on a low-rank projection of the gradient.

GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection. Zhao et al., 2024.
https://arxiv.org/abs/2403.03507
"""

from collections.abc import Mapping
from typing import Any

import optax

from jlora.optim import projection
from jlora.optim.projection import Leading, Pattern
from jlora.optim.q_galore import Lazy, Quantized
from jlora.weight import Axes


def galore(
    inner: optax.GradientTransformation,
    rank: int = 128,
    *,
    period: int = 200,
    scale: float = 0.25,
    side: str = "smaller",
    solver: str = "randomized",
    transport: str = "keep",
    projector_bits: int | None = None,
    lazy: float | None = None,
    axes: Mapping[Pattern, Axes] | None = None,
    where: Pattern = "**",
    dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""An optimizer whose state has the size of rank-r projections of the gradients. The weights stay dense.

    With G [m, n] the gradient of W [m, n], and where n >= m,

    .. math::  R = P^T G \;\; [r, n], \qquad \Delta W = s\, P\, \mathrm{inner}(R),

    P [m, r] being the r leading left singular vectors of the gradient of every T-th step; where n < m, the right ones
    [n, r], and R = G P [m, r]. State per matrix, with k = min(m, n) and K = max(m, n) and Adam inside: k r + 2 K r
    numbers (``side="larger"``: K r + 2 k r, fewer) for Adam's 2 m n.

    For training all of W, from scratch or from a checkpoint, where Adam's moments do not fit. The gradient itself is
    still formed. Where the update's low rank costs quality, ``fira`` adds what is discarded, for one number more.

    Args:
      inner: a complete optimizer, like ``optax.adamw(1e-3)``, or a direction, like ``optax.scale_by_adam()``. Its
        weight decay acts on all of W, unscaled. Leaves that are not projected get its ordinary step.
      rank: r; more is closer to the inner optimizer and takes more memory.
      period: T, steps between refreshes of the basis.
      scale: s, on the update of projected leaves only.
      side: the side that is projected, as in the module of projections; "smaller" is the authors' ``std``, "larger"
        their ``reverse_std`` (and ``optax.contrib.galore``), "in" and "out" their ``right`` and ``left``, "both" their
        ``full``, with R [r, r]: diagonal at a refresh, up to rounding, of which Adam with a small eps makes steps.
      solver: "randomized", "svd" (the authors'), "eigh" or "subspace".
      transport: the moments at a refresh: "keep" them as they are (the authors'), "rotate" them into the new basis,
        M <- Z M and V <- (Z*Z) V with Z = P_new^T P_old, or "reset" them to zero (step counts go on).
      projector_bits: 8 or 4, Q-GaLore's quantized P, in blocks that share a magnitude; None keeps it in ``dtype``.
      lazy: Q-GaLore's refreshes: a cosine, 0.4 in its code. The period of a matrix doubles at a refresh when its first
        basis vector was that similar, on the average of the last five, to the one before. Wants transport="keep". With
        both options P is no longer orthonormal to rounding, and a refresh costs where it is needed. None: every T.
      axes: ``{pattern: jlora.Axes}`` for leaves of several axes. By default they are stacks of [in, out].
      where: a pattern for the leaves that may be projected. The authors take those of attention and MLPs.
      dtype: of the basis and of the moments of projected leaves; None, the leaf's.

    Returns:
      A transformation. ``init`` raises ``ValueError`` if no leaf can be projected.

    >>> tx = jlora.optim.galore(optax.adamw(1e-2, weight_decay=0.0), rank=128, where="**/{attn,mlp}/**")
    >>> eight_bit = jlora.optim.galore(jlora.optim.quantized_state(optax.adamw(1e-2)), rank=128)
    >>> q_galore = jlora.optim.galore(optax.adamw(1e-2), rank=128, projector_bits=4, lazy=0.4)

    Defaults are those of the authors' README; their code was read, and traces of it are reproduced. Departures: the
    solver; a matrix smaller than the rank is not rotated, but left to the inner optimizer. With their "std" the authors
    find the side on the way up by the shape of R, which goes wrong for ``reverse_std`` at full rank; here it is known.
    Q-GaLore's projector was read as well; departures: its levels are as many above zero as below (there, from the
    least entry to the largest), the cosine counts without its sign, which singular vectors do not have, and the
    vectors compared are those stored. Its weights in 8 bits are not here: see ``jlora.quant``.
    """
    source = _source(solver, projector_bits, lazy, period, transport)

    def finish(plan: projection.Plan, basis: dict, g: Any, r: Any, u: Any, extra: Any) -> tuple:
        return scale * plan.up(u, basis), extra

    return projection.low_rank(
        inner,
        source,
        finish,
        rank=rank,
        period=period,
        side=side,
        transport=transport,
        axes=axes,
        where=where,
        dtype=dtype,
    )


def _source(solver: str, bits: int | None, lazy: float | None, period: int, transport: str) -> projection.Source:
    source: projection.Source = leading(solver)
    if bits not in (None, 4, 8):
        raise ValueError(f"projector_bits={bits!r}: None, 8 or 4 is wanted.")
    if bits is not None:
        source = Quantized(source, bits)
    if lazy is None:
        return source
    if not 0 < lazy <= 1:
        raise ValueError(f"lazy={lazy!r}: a cosine is wanted, above 0 and at most 1; or None for one period for all.")
    if transport != "keep":
        raise ValueError(f'lazy renews some of the bases at a time: transport="keep" is wanted, not {transport!r}.')
    return Lazy(source, lazy, period)


def leading(solver: str) -> Leading:
    if solver not in projection.SOLVERS:
        raise ValueError(f"solver={solver!r}: one of {', '.join(projection.SOLVERS)} is wanted.")
    return Leading(solver)
