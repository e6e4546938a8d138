r"""LoRA-RITE: an adaptive optimizer whose course does not depend on how A B is split into A and B.

LoRA Done RITE: Robust Invariant Transformation Equilibration for LoRA Optimization. Yen et al., 2024.
https://arxiv.org/abs/2410.20625

With B^T = Q R, Q [out, r] orthonormal, the unmagnified gradient of A is u = g_A R^{-1} = s G Q [in, r]: what A's
gradient would be, were B's rows orthonormal. At each step

.. math::  V \leftarrow \beta_2 T V T^\top + (1 - \beta_2)\, u^\top u / \mathrm{in}, \qquad
           M \leftarrow \beta_1 M T^\top + (1 - \beta_1)\, u (V + \rho I)^{-1/2}, \qquad d_A = M R^{-\top}

V [r, r] and M [in, r] in the basis Q, T = Q^T Q' [r, r] the way from the previous basis Q' to it, and rho what V has
lost on that way so far (only with ``escape``). The decays are those of Adam with its bias correction,
b (1 - b^{t-1}) / (1 - b^t). B is the mirror image.

Read in the authors' PyTorch code, which the float64 formula of the tests was compared with. Any orthonormal basis
gives the same steps; here Q comes of r x r eigenvectors instead of a QR decomposition, so that sharded factors stay
where they are. Where a factor is zero, its partner stands still. Departures: the option that rescales A and B to equal
norms after each step is left out; a stacked matrix is skipped and capped by itself.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PyTree

from jlora.factors import Factors
from jlora.optim.pairs import PairTree, Tall, inner, norm2, orthonormal, times, transposed, with_others


class LoraRiteState(NamedTuple):
    """What ``scale_by_lora_rite`` remembers; the trees have ``Factors`` for every pair and nothing elsewhere."""

    count: Int[Array, ""]
    momentum: PyTree  # M, [*stack, in, r] and [*stack, r, out]
    basis: PyTree  # the orthonormal bases of A's columns [*stack, in, r] and of B's rows [*stack, r, out]
    square: PyTree  # V of A and of B, [*stack, r, r]
    escaped: PyTree  # rho of A and of B, [*stack]


def scale_by_lora_rite(
    b1: float | Array = 0.9,
    b2: float | Array = 0.999,
    eps: float | Array = 1e-6,
    *,
    clip: float | None = 1.0,
    skip: float | None = 1.0,
    cap: float | None = None,
    escape: bool = False,
) -> optax.GradientTransformation:
    """The direction d of the top of this file; what is in no pair passes.

    Args:
      b1, b2: decays of M and V.
      eps: added to the roots of V's eigenvalues.
      clip: largest norm of all unmagnified gradients together; None: no limit. It takes the place of clipping the
        gradients, whose norm depends on the split.
      skip: an unmagnified gradient whose root mean square is above this counts as zero; None: none does.
      cap: largest root mean square of M where it becomes a step.
      escape: whether mass that V loses when the basis turns stays in the denominator, as rho.
    """
    name = "scale_by_lora_rite"

    def init(params: PyTree) -> LoraRiteState:
        tree = PairTree(params, name)
        square, escaped = jnp.zeros(()), jnp.zeros(())  # no parameter-shaped state, in the eyes of tree_map_params
        if not tree.empty:
            grams = [Tall(inner(a, a), inner(b, b)) for a, b in tree.tall(params)]
            square = tree.state(Factors(*map(jnp.zeros_like, pair)) for pair in grams)
            escaped = tree.state(Factors(*(jnp.zeros_like(gram[..., 0, 0]) for gram in pair)) for pair in grams)
        return LoraRiteState(jnp.zeros((), jnp.int32), tree.zeros(), tree.zeros(), square, escaped)

    def update(updates: PyTree, state: LoraRiteState, params: PyTree | None = None) -> tuple[PyTree, LoraRiteState]:
        tree = PairTree(params, name)
        if tree.empty:
            return updates, state
        pairs, count = tree.pairs(updates), optax.safe_increment(state.count)
        bases = [(orthonormal(pair.a), orthonormal(pair.b)) for pair in pairs]

        def unmagnified(grad: Array, k: Array) -> Array:
            u = times(grad, k)
            return u if skip is None else jnp.where(rms(u) > skip, 0, u)

        seen = [
            Tall(unmagnified(pair.grad_a, k_b), unmagnified(pair.grad_b, k_a))
            for pair, ((_, k_a), (_, k_b)) in zip(pairs, bases, strict=True)
        ]
        if clip is not None:
            norm = jnp.sqrt(sum(norm2(u.a) + norm2(u.b) for u in seen))
            shrink = clip / jnp.maximum(norm, clip)
            seen = [Tall(*(u * shrink.astype(u.dtype) for u in pair)) for pair in seen]

        def half(u: Array, k: Array, q: Array, q_old: Array, m: Array, v: Array, rho: Array) -> tuple:
            """Of one factor, k and q being its partner's: its direction, and M, V and rho to remember."""
            way = inner(q, q_old)
            turned = symmetric(times(times(way, v), transposed(way)))
            decay1, decay2 = corrected(b1, count, v.dtype), corrected(b2, count, v.dtype)
            if escape:
                rho = decay2 * (rho + lost(v, turned))
            v = decay2 * turned + (1 - decay2) * symmetric(inner(u, u)) / u.shape[-2]
            values, vectors = jnp.linalg.eigh(v)
            root = 1 / (jnp.sqrt(jnp.maximum(values, 0) + rho[..., None]) + eps)
            scaled = times(times(u, vectors) * root[..., None, :], transposed(vectors))
            m = decay1 * times(m, transposed(way)) + (1 - decay1) * scaled
            step = m if cap is None else m / jnp.maximum(rms(m) / cap, 1)
            return tuple(x.astype(u.dtype) for x in (times(step, transposed(k)), m, v, rho))

        parts = [[], [], [], []]
        momenta, olds = tree.tall(state.momentum), tree.tall(state.basis)
        squares, escaped = tree.nodes(state.square), tree.nodes(state.escaped)
        for u, basis, m, old, v, rho in zip(seen, bases, momenta, olds, squares, escaped, strict=True):
            (q_a, k_a), (q_b, k_b) = basis
            of_a = half(u.a, k_b, q_b, old.b, m.a, v.a, rho.a)
            of_b = half(u.b, k_a, q_a, old.a, m.b, v.b, rho.b)
            for part, a, b in zip(parts, of_a, of_b, strict=True):
                part.append(Tall(a, b))
        directions, momenta, squares, escaped = parts
        new = LoraRiteState(
            count,
            tree.lying(momenta),
            tree.lying(Tall(q_a, q_b) for (q_a, _), (q_b, _) in bases),
            tree.state(Factors(*pair) for pair in squares),
            tree.state(Factors(*pair) for pair in escaped),
        )
        return tree.updated(updates, directions), new

    return optax.GradientTransformation(init, update)


def lora_rite(
    learning_rate: optax.ScalarOrSchedule,
    b1: float | Array = 0.9,
    b2: float | Array = 0.999,
    eps: float | Array = 1e-6,
    *,
    weight_decay: float | Array = 0.0,
    clip: float | None = 1.0,
    skip: float | None = 1.0,
    cap: float | None = None,
    escape: bool = False,
    other: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """LoRA-RITE. The formula is at the top of this file.

    When to use it: in the place of Adam, where the two factors differ much in size. State: twice LoRA's parameters and
    two r x r matrices a pair.

    Args:
      learning_rate: a number or a schedule, of Adam's order.
      weight_decay: decoupled, of every parameter; with it the course does depend on the split.
      other: the direction of what is in no pair; default ``optax.scale_by_adam()``.
      b1, b2, eps, clip, skip, cap, escape: as for ``scale_by_lora_rite``; the defaults are the authors'.

    >>> tx = jlora.optim.lora_rite(1e-3)
    """
    direction = scale_by_lora_rite(b1, b2, eps, clip=clip, skip=skip, cap=cap, escape=escape)
    return with_others(direction, learning_rate, weight_decay, other)


def rms(x: Float[Array, "*stack n r"]) -> Float[Array, "*stack 1 1"]:
    return jnp.sqrt(jnp.mean(jnp.square(x), axis=(-2, -1), keepdims=True))


def symmetric(x: Float[Array, "*stack r r"]) -> Float[Array, "*stack r r"]:
    return (x + transposed(x)) / 2


def corrected(decay: float | Array, count: Int[Array, ""], dtype: jnp.dtype) -> Float[Array, ""]:
    """The decay whose running mean is Adam's with the bias correction already in it; count from 1."""
    decay = jnp.asarray(decay, dtype)
    return decay * (1 - decay ** (count - 1)) / (1 - decay**count)


def lost(old: Float[Array, "*stack r r"], new: Float[Array, "*stack r r"]) -> Float[Array, "*stack"]:
    """How much less a second moment is in the new basis: by its eigenvalues or its trace, whichever says less."""
    values = jnp.max(jnp.linalg.eigvalsh(old) - jnp.linalg.eigvalsh(new), axis=-1)
    trace = jnp.trace(old, axis1=-2, axis2=-1) - jnp.trace(new, axis1=-2, axis2=-1)
    return jnp.minimum(jnp.maximum(values, 0), jnp.maximum(trace, 0))
