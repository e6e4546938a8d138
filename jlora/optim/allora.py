r"""ALLoRA's adaptive learning rate, as near as an optimizer comes to it.

ALLoRA: Adaptive Learning Rate Mitigates LoRA Fatal Flaws. Huang and Balestriero, 2024.
https://arxiv.org/abs/2410.09692

.. math::  c_j = \bigl(\|s (A B)_{:j}\|_2 + 1 / \eta^2\bigr)^{-1/2}, \qquad
           g_B \leftarrow g_B\,\mathrm{diag}(c), \quad g_A \leftarrow \bar c\, g_A

for every output channel j; c [out] and its mean, g_A [in, r], g_B [r, out]. The rule itself scales the gradient of the
output before it reaches the factors, g_A = s G diag(c) B^T and g_B = s A^T G diag(c). The second is what stands here;
in the first, c stands between two factors of g_A and cannot be had from it: **A's gradient is an approximation**, exact
where all channels have the same c, as they do at the start. Norms come of A^T A, without forming A B. The exact rule is
the method ``jlora.ALLoRA``, whose own gradients these are; this is for other methods with pairs, like DoRA.

At the start, A B = 0, gradients are eta times as large; for large changes they fall with the root of their norm. The
method wants LoRA without dropout and with alpha = r (s = 1): eta takes their place. The formula was read in a
third-party code that cites section 4.2 of the paper; the authors publish none that was found, and the default of eta
is those codes'.
"""

from __future__ import annotations

import jax.numpy as jnp
import optax
from jaxtyping import Array

from jlora.optim.pairs import Pair, Tall, by_pair, inner, times


def scale_by_allora_approx(eta: float | Array = 2.0) -> optax.GradientTransformation:
    """The gradients of the top of this file; what is in no pair passes.

    Args:
      eta: how much larger gradients are made at the start. Raising it raises the rate of small changes only.
    """

    def rule(pair: Pair) -> Tall:
        square = jnp.sum(times(pair.b, inner(pair.a, pair.a)) * pair.b, axis=-1, keepdims=True)
        norms = abs(pair.scale) * jnp.sqrt(jnp.maximum(square, 0))
        c = (1 / jnp.sqrt(norms + 1 / jnp.square(eta))).astype(norms.dtype)
        return Tall(c.mean(-2, keepdims=True) * pair.grad_a, c * pair.grad_b)

    return by_pair("scale_by_allora_approx", rule)


def allora_approx(
    base: optax.GradientTransformation, eta: float | Array = 2.0
) -> optax.GradientTransformationExtraArgs:
    """Any optimizer, on ALLoRA's gradients for B and an approximation of them for A.

    When to use it: short runs with gradient descent or momentum. Adam divides most of a channel's factor out again.

    Args:
      base: the whole optimizer.
      eta: as for ``scale_by_allora_approx``.

    >>> tx = jlora.optim.allora_approx(optax.sgd(0.1, momentum=0.9), eta=2.0)
    """
    return optax.chain(scale_by_allora_approx(eta), base)
