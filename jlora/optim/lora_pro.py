r"""LoRA-Pro: steps of the factors that move the weight as its own gradient would, as nearly as rank r can.

LoRA-Pro: Are Low-Rank Adapters Properly Optimized? Wang et al., 2024. https://arxiv.org/abs/2407.18242

.. math::  \min_{d_A, d_B} \|s (d_A B + A d_B) - G\|_F

G [in, out] the weight's gradient, g_A = s G B^T [in, r] and g_B = s A^T G [r, out] those of the factors, s the pair's
scale. All solutions, one for each Y [r, r], cause the same first change of the weight, the projection of G on the
tangent space of the matrices of rank r, P_A G + G P_B - P_A G P_B:

.. math::  d_A = s^{-2} g_A (B B^\top)^{-1} + A Y, \qquad d_B = s^{-2} (A^\top A)^{-1} g_B (I - P_B) - Y B

The paper's Y keeps d_A and d_B closest to g_A and g_B, which is a Sylvester equation. Here it is solved in the
eigenvectors U, V of A^T A and B B^T with eigenvalues a, b: with H = U^T A^T g_A V, the part of the gradient that lies
in the columns of A and the rows of B at once, H_ij / (a_i b_j), is divided between the factors,

.. math::  d_A = s^{-2} \bigl[ (I - P_A) g_A V b^{-1} + A U (\theta \circ H / (a_i b_j)) \bigr] V^\top, \qquad
           \theta_{ij} = b_j / (a_i + b_j)

and d_B its mirror image with 1 - theta. No difference of large numbers is left in it, and no general eigensolver: just
after the start, with B of size 1e-4, the published form is off by half in float32.

The gradients may come from rsLoRA or any other scale: s is read off each pair. (The authors' code has s = 2 written
into it.) Eigenvalues below rounding count as zero, so B = 0 is no special case: A then stands still.

Read in the authors' code (a fork of DeepSpeed) and in a library that reimplements it; the tests compare with records
of both.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

from jlora.optim.pairs import Pair, PairTree, Spectrum, Tall, across, by_pair, inner, outer, times, transposed

MODES = ("sylvester", "symmetry", "zero")


class LoraProFullState(NamedTuple):
    """What ``lora_pro_full`` remembers."""

    base: Any  # of the base, with a matrix [*stack, in, out] for every pair


def scale_by_lora_pro(mode: str = "sylvester", *, damping: float | Array = 0.0) -> optax.GradientTransformation:
    """(d_A, d_B) of the top of this file in the place of (g_A, g_B); what is in no pair passes. No state.

    Args:
      mode: how the doubly projected part is divided. "sylvester" by theta; "symmetry" in equal halves; "zero" (that is
        Y = 0) to A alone. The weight's first change is the same; what an elementwise optimizer makes of it is not.
      damping: added to the eigenvalues that are divided by. The authors have 1e-8. Raise it, or warm the learning rate
        up, where the second step is too wild: just after B has left zero, the part of d_A outside A's columns is in
        inverse proportion to B.
    """
    _check(mode, "scale_by_lora_pro")

    return by_pair("scale_by_lora_pro", lambda pair: solve(pair, spectra(pair), mode, damping))


def lora_pro(
    base: optax.GradientTransformation, mode: str = "sylvester", *, damping: float | Array = 0.0
) -> optax.GradientTransformationExtraArgs:
    """Any optimizer, on LoRA-Pro's gradients of the factors. Arguments as for ``scale_by_lora_pro``.

    Over gradient descent it is the paper's first form. Over AdamW it costs LoRA's memory and runs well, but Adam then
    normalizes the factors' entries and not the weight's: the paper's AdamW is ``lora_pro_full``.

    When to use it: where LoRA lags behind full fine-tuning. 12 r^2 (in + out) FLOPs and four eigendecompositions of
    r x r matrices a pair. Warm the learning rate up.

    >>> tx = jlora.optim.lora_pro(optax.adamw(1e-4))
    """
    return optax.chain(scale_by_lora_pro(mode, damping=damping), base)


def lora_pro_full(
    base: optax.GradientTransformation, mode: str = "sylvester", *, damping: float | Array = 0.0
) -> optax.GradientTransformationExtraArgs:
    r"""Any optimizer, on the weight's own projected gradient: the AdamW form of the paper over ``optax.adamw``.

    .. math::  E = s (d_A B + A d_B) \to N = \mathrm{base}(E) \to
               (d_A, d_B) \text{ of } g_A = s N B^\top,\; g_B = s A^\top N

    E and N [in, out]. **The base's state is that of full fine-tuning**, 2 in out numbers a matrix for Adam, though no
    matrix of the model is trained. What is in no pair goes to the base as it is.

    When to use it: where memory allows, and the aim is full fine-tuning's course with LoRA's result.

    Args:
      base: the whole optimizer. It sees s A B as the parameter, so that weight decay shrinks the change of the weight
        (by both factors, half each in the balanced case). The authors decay nothing.
      mode, damping: as for ``scale_by_lora_pro``.

    Departures from the authors' code, beside those of the top: Adam's bias correction counts from 1, theirs from 2; its
    second moment is not kept in bfloat16.

    >>> tx = jlora.optim.lora_pro_full(optax.adamw(2e-5))
    """
    _check(mode, "lora_pro_full")
    base = optax.with_extra_args_support(base)

    def init(params: PyTree) -> LoraProFullState:
        tree = PairTree(params, "lora_pro_full")
        full = (jnp.zeros_like(outer(*tall)) for tall in tree.tall(params))
        return LoraProFullState(base.init(tree.replaced(params, full)))

    def update(
        updates: PyTree, state: LoraProFullState, params: PyTree | None = None, **extra: Any
    ) -> tuple[PyTree, LoraProFullState]:
        tree = PairTree(params, "lora_pro_full")
        pairs = tree.pairs(updates)
        known = [spectra(pair) for pair in pairs]

        def change(pair: Pair, known: tuple[Spectrum, Spectrum]) -> Array:
            d = solve(pair, known, "zero", damping)
            return pair.scale * (outer(d.a, pair.b) + outer(pair.a, d.b))

        full = tree.replaced(updates, map(change, pairs, known))
        weights = tree.replaced(params, (pair.scale * outer(pair.a, pair.b) for pair in pairs))
        full, inner_state = base.update(full, state.base, weights, **extra)

        def factors(pair: Pair, known: tuple[Spectrum, Spectrum], n: Array) -> Tall:
            seen = pair._replace(
                grad_a=pair.scale * across(n, pair.b), grad_b=pair.scale * across(transposed(n), pair.a)
            )
            return solve(seen, known, mode, damping)

        talls = list(map(factors, pairs, known, tree.nodes(full)))
        # The leaves in no pair are the base's; the types are those of the gradients.
        full = tree.replaced(full, tree.nodes(updates))
        return tree.updated(full, talls), LoraProFullState(inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def _check(mode: str, name: str) -> None:
    if mode not in MODES:
        raise ValueError(f"{name}(mode={mode!r}): one of {', '.join(MODES)} is wanted.")


def spectra(pair: Pair) -> tuple[Spectrum, Spectrum]:
    return Spectrum.twice(pair.a), Spectrum.twice(pair.b)


def solve(pair: Pair, known: tuple[Spectrum, Spectrum], mode: str, damping: float | Array) -> Tall:
    """(d_A, d_B), both tall."""
    a, b = known
    rows, columns = a.values[..., :, None], b.values[..., None, :]
    total = rows + columns
    even = jnp.full_like(total, 0.5)
    theta = {
        "sylvester": lambda: jnp.where(total > 0, columns / jnp.where(total > 0, total, 1), even),
        "symmetry": lambda: even,
        "zero": lambda: jnp.ones_like(total),
    }[mode]()
    over_a, over_b = a.reciprocal(damping), b.reciprocal(damping)
    overlap = times(times(transposed(a.vectors), inner(pair.a, pair.grad_a)), b.vectors)  # H
    both = overlap * over_a[..., :, None] * over_b[..., None, :]

    def half(x: Array, grad: Array, own: Spectrum, over_own: Array, other: Spectrum, over: Array, part: Array) -> Array:
        within = times(own.vectors * over_own[..., None, :], times(transposed(own.vectors), inner(x, grad)))
        outside = times(grad - times(x, within), other.vectors) * over[..., None, :]
        return times(outside + times(x, times(own.vectors, part)), transposed(other.vectors)) * pair.scale**-2

    return Tall(
        half(pair.a, pair.grad_a, a, over_a, b, over_b, both * theta),
        half(pair.b, pair.grad_b, b, over_b, a, over_a, transposed(both * (1 - theta))),
    )
