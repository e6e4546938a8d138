r"""AltLoRA and AltLoRA+: each factor's best step given the other, with a momentum that follows the other as it moves.

AltLoRA: Towards Better Gradient Approximation in LoRA with Alternating Projections. Yu et al., 2025.
https://arxiv.org/abs/2505.12455

.. math::  t_A = s^{-2} g_A (B B^\top + \delta I)^{-1}, \qquad
           M_A \leftarrow \beta_1 M_A\, B' B^\top (B B^\top + \delta I)^{-1} + (1 - \beta_1)\, t_A, \qquad
           d_A = M_A / (1 - \beta_1^t)

and the mirror image for B. g_A [in, r] the gradient, B [r, out], B' the B that the previous step of A saw, s the pair's
scale. For delta = 0, s t_A B is the part of the weight's gradient in the rows of B, and the momentum in the weight,
M_A B', is kept as well as the new rows allow: the course of A B then does not depend on how it is split into A and B.
AltLoRA+ divides d_A by sqrt(V_A) + eps, V_A the running mean of t_A^2, not carried over and without bias correction;
it is not indifferent to the split.

Read in the authors' code, whose classes the float64 formula of the tests was compared with. Departures: the code leaves
1 / s^2 out, so its rates are s^2 times ours, in effect; ``scale_correction=False`` is as there. In AltLoRA+ it stores
momentum that is carried over for the step only; ``carry=False`` is as there. Where a matrix cannot be inverted it
silently leaves the gradient as it is; here a pseudo-inverse serves. Decay comes after both steps, and B's step does not
see A's.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, PyTree

from jlora.optim.pairs import PairTree, Spectrum, Tall, inner, times, with_others

ORDERS = ("sequential", "joint", "alternate")


class AltLoraState(NamedTuple):
    """What ``scale_by_altlora`` remembers; the trees have ``Factors`` for every pair and nothing elsewhere."""

    count_a: Int[Array, ""]  # steps of A taken
    count_b: Int[Array, ""]  # steps of B taken
    momentum: PyTree  # M, [*stack, in, r] and [*stack, r, out]
    seen: PyTree  # the A that B's last step saw, the B that A's last step saw
    square: PyTree  # V of AltLoRA+; nothing in AltLoRA


def scale_by_altlora(
    b1: float | Array = 0.9,
    b2: float | Array | None = None,
    eps: float | Array = 1e-6,
    *,
    damping: float | Array = 1e-5,
    relative: bool = False,
    order: str = "joint",
    period: int | Array = 1,
    learning_rate: optax.ScalarOrSchedule | None = None,
    scale_correction: bool = True,
    carry: bool = True,
) -> optax.GradientTransformation:
    """The direction d of the top of this file; what is in no pair passes.

    Args:
      b1: decay of the momentum.
      b2: decay of the squares: AltLoRA+; None is AltLoRA.
      eps: added to the root of the squares.
      damping: delta; at 0 a pseudo-inverse.
      relative: the damping is a share of the mean eigenvalue of the Gram matrix: kinder to a B just off zero, whose
        Gram matrix may be far below any fixed number.
      order: "joint": both factors step from what they see. "sequential", as the authors' code does it: B sees A after
        its step, for which the ``learning_rate`` has to be known here. "alternate", as the paper's title has it:
        ``period`` steps of B, then as many of A, the other one's step being zero and its state held.
      period: of "alternate". The authors' trainer has 10, and has it turned off.
      learning_rate: that follows in the chain; "sequential" only.
      scale_correction: False leaves 1 / s^2 out.
      carry: False, for AltLoRA+: store the momentum as it was before it is carried over.
    """
    if order not in ORDERS:
        raise ValueError(f"scale_by_altlora(order={order!r}): one of {', '.join(ORDERS)} is wanted.")
    if (order == "sequential") != (learning_rate is not None):
        raise ValueError(
            'scale_by_altlora: order="sequential" wants the learning_rate that follows in the chain, and only it does. '
            "jlora.optim.altlora(learning_rate) sees to that."
        )
    plus = b2 is not None

    def init(params: PyTree) -> AltLoraState:
        tree = PairTree(params, "scale_by_altlora")
        start = lambda: jnp.zeros((), jnp.int32)  # one buffer each: states are donated
        square = tree.zeros() if plus else ()
        return AltLoraState(start(), start(), tree.zeros(), tree.zeros(), square)

    def update(updates: PyTree, state: AltLoraState, params: PyTree | None = None) -> tuple[PyTree, AltLoraState]:
        tree = PairTree(params, "scale_by_altlora")
        steps = state.count_a + state.count_b  # "alternate" only
        turn_b = (steps // period) % 2 == 0
        moves = (~turn_b, turn_b) if order == "alternate" else (True, True)
        counts = [jnp.where(m, optax.safe_increment(c), c) for m, c in zip(moves, state[:2], strict=True)]
        rate = learning_rate(state.count_a) if callable(learning_rate) else learning_rate

        def half(grad: Array, partner: Array, seen: Array, m: Array, v: Array | None, gain: float, which: int) -> tuple:
            """Of one factor: its direction, and M, V and the partner to remember."""
            inverse = Spectrum.of(partner).inverse(damping, relative)
            t = gain * times(grad, inverse)
            carried = times(m, times(inner(seen, partner), inverse))
            new = b1 * carried + (1 - b1) * t
            stored = new if carry else b1 * m + (1 - b1) * t
            correction = 1 - jnp.asarray(b1, new.dtype) ** jnp.maximum(counts[which], 1)
            direction = new / correction
            squares = None
            if plus:
                squares = b2 * v + (1 - b2) * jnp.square(t)
                direction = direction / (jnp.sqrt(squares) + eps)
            direction, *rest = (None if x is None else x.astype(m.dtype) for x in (direction, stored, squares))
            if order != "alternate":
                return direction, *rest, partner
            held = lambda new, old: None if new is None else jnp.where(moves[which], new, old)
            return held(direction, jnp.zeros_like(m)), *map(held, rest, (m, v)), held(partner, seen)

        directions, momenta, squares, partners = [], [], [], []
        nothing = [Tall(None, None)] * len(tree.factors)
        states = (tree.tall(state.momentum), tree.tall(state.seen), tree.tall(state.square) if plus else nothing)
        for pair, m, seen, v in zip(tree.pairs(updates), *states, strict=True):
            gain = pair.scale**-2 if scale_correction else 1.0
            of_a = half(pair.grad_a, pair.b, seen.b, m.a, v.a, gain, 0)
            a = pair.a - (rate * of_a[0]).astype(pair.a.dtype) if order == "sequential" else pair.a
            of_b = half(pair.grad_b, a, seen.a, m.b, v.b, gain, 1)
            for together, x, y in zip((directions, momenta, squares), of_a, of_b, strict=False):
                together.append(Tall(x, y))
            partners.append(Tall(of_b[-1], of_a[-1]))
        new = (tree.lying(momenta), tree.lying(partners), tree.lying(squares) if plus else ())
        return tree.updated(updates, directions), AltLoraState(*counts, *new)

    return optax.GradientTransformation(init, update)


def altlora(
    learning_rate: optax.ScalarOrSchedule,
    b1: float | Array = 0.9,
    *,
    damping: float | Array = 1e-5,
    relative: bool = False,
    weight_decay: float | Array = 0.0,
    order: str = "sequential",
    period: int | Array = 1,
    scale_correction: bool = True,
    other: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """AltLoRA. The formula is at the top of this file.

    When to use it: the weight's projected gradient with momentum, at twice LoRA's parameters in state, once for the
    momentum and once for the factors last seen.

    Args:
      learning_rate: a number or a schedule. Directions are of the size of the weight's gradient, not of Adam's.
      weight_decay: decoupled, of every parameter. The authors' trainer has 1e-5.
      other: the direction of what is in no pair; default ``optax.scale_by_adam()``.
      b1, damping, relative, order, period, scale_correction: as for ``scale_by_altlora``.

    >>> tx = jlora.optim.altlora(1e-2)
    """
    return _optimizer(
        learning_rate, weight_decay, other, b1, damping=damping, relative=relative, order=order, period=period,
        scale_correction=scale_correction,
    )  # fmt: skip


def altlora_plus(
    learning_rate: optax.ScalarOrSchedule,
    b1: float | Array = 0.9,
    b2: float | Array = 0.999,
    eps: float | Array = 1e-6,
    *,
    damping: float | Array = 1e-5,
    relative: bool = False,
    weight_decay: float | Array = 0.0,
    order: str = "sequential",
    period: int | Array = 1,
    scale_correction: bool = True,
    carry: bool = True,
    other: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """AltLoRA+: AltLoRA with Adam's division by the root of the mean square. Arguments as for ``scale_by_altlora``.

    Its squares start at zero and are not corrected for that, so that the first steps are 1 / sqrt(1 - b2) times as
    large, 30 with the default: a warm-up of the learning rate is wanted.

    >>> tx = jlora.optim.altlora_plus(optax.warmup_constant_schedule(0.0, 1e-4, 100))
    """
    return _optimizer(
        learning_rate, weight_decay, other, b1, b2, eps, damping=damping, relative=relative, order=order, period=period,
        scale_correction=scale_correction, carry=carry,
    )  # fmt: skip


def _optimizer(
    learning_rate: optax.ScalarOrSchedule,
    weight_decay: float | Array,
    other: optax.GradientTransformation | None,
    *decays: float | Array,
    order: str,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    known = learning_rate if order == "sequential" else None
    direction = scale_by_altlora(*decays, order=order, learning_rate=known, **options)
    return with_others(direction, learning_rate, weight_decay, other)
