r"""Riemannian preconditioning: each factor's gradient times the inverse Gram matrix of the other.

Riemannian Preconditioned LoRA for Fine-Tuning Foundation Models. Zhang and Pilanci, 2024.
https://arxiv.org/abs/2402.02347

.. math::  d_A = g_A (B B^\top + \delta I)^{-1}, \qquad d_B = (A^\top A + \delta I)^{-1} g_B

g_A [in, r] and g_B [r, out] the gradients, delta the damping, I [r, r]. Before gradient descent it is the paper's
scaled GD, before AdamW its scaled AdamW. With delta = 0 a step of gradient descent on A B does not depend on how A B is
split into A and B: a large A beside a small B no longer learns slowly. No state; 4 r^2 (in + out) FLOPs and two
eigendecompositions of r x r matrices a pair.

Read in the authors' code and PEFT's. Both factors see the other as it was before the step, as in PEFT; the authors
change A first. PEFT leaves the factors of embeddings alone; here all pairs are preconditioned.
"""

from __future__ import annotations

import optax
from jaxtyping import Array

from jlora.optim.pairs import Pair, Spectrum, Tall, by_pair, times


def scale_by_gram_inverse(
    damping: float | Array = 1e-2, *, relative: bool = False, scale_correction: bool = False
) -> optax.GradientTransformation:
    """The direction d of the top of this file; what is in no pair passes.

    Args:
      damping: delta. PEFT has 1e-2, the authors 1e-6. It bounds the steps of a factor whose partner is still near zero,
        by its inverse. At 0, with a pseudo-inverse: directions in which the partner is zero get no step.
      relative: the damping is a share of the mean eigenvalue of the Gram matrix, so that it means the same for small
        factors as for large ones.
      scale_correction: divide by s^2, for the s of each pair. Then s d_A B is the part of the weight's gradient in the
        rows of B exactly. No published code of this method has it; LoRA-FA's and LoRA-Pro's do.
    """

    def rule(pair: Pair) -> Tall:
        gain = pair.scale**-2 if scale_correction else 1.0
        a, b = (gain * Spectrum.of(x).inverse(damping, relative) for x in (pair.a, pair.b))
        return Tall(times(pair.grad_a, b), times(pair.grad_b, a))

    return by_pair("scale_by_gram_inverse", rule)


def riemannian(
    base: optax.GradientTransformation, damping: float | Array = 1e-2, *, relative: bool = False
) -> optax.GradientTransformationExtraArgs:
    """Any optimizer, on preconditioned gradients. Arguments as for ``scale_by_gram_inverse``.

    When to use it: where plain LoRA is sensitive to its learning rate or its start.

    >>> tx = jlora.optim.riemannian(optax.adamw(1e-4), damping=1e-2)
    """
    return optax.chain(scale_by_gram_inverse(damping, relative=relative), base)


def scaled_gd(
    learning_rate: optax.ScalarOrSchedule, damping: float | Array = 1e-2, *, relative: bool = False
) -> optax.GradientTransformationExtraArgs:
    """Gradient descent on preconditioned gradients: the paper's scaled GD."""
    return riemannian(optax.sgd(learning_rate), damping, relative=relative)


def scaled_adam(
    learning_rate: optax.ScalarOrSchedule,
    b1: float | Array = 0.9,
    b2: float | Array = 0.999,
    eps: float | Array = 1e-8,
    *,
    damping: float | Array = 1e-2,
    weight_decay: float | Array = 0.0,
    relative: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """AdamW on preconditioned gradients: the paper's scaled AdamW."""
    adamw = optax.adamw(learning_rate, b1, b2, eps, weight_decay=weight_decay)
    return riemannian(adamw, damping, relative=relative)
