r"""AdaGrad with one step size for each array: AdaGradNorm.

AdaGrad stepsizes: Sharp convergence over nonconvex landscapes. Ward, Wu and Bottou, 2018.
https://arxiv.org/abs/1806.01811

.. math::  s \leftarrow s + \|g\|^2, \qquad u = -\lambda\, g / (\sqrt s + \epsilon)

g is the gradient of one leaf of the tree, whatever its shape, and s a number beside it: that is the whole state.
AdAdaGrad (``jlora.optim.norm_test``) puts it on batches that grow; its authors' code has a number for each row of a
matrix instead.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import PyTree


class AdagradNormState(NamedTuple):
    """What ``scale_by_adagrad_norm`` remembers."""

    square: PyTree  # s of each leaf, []


def scale_by_adagrad_norm(initial: float = 1e-2, eps: float = 1e-10) -> optax.GradientTransformation:
    """The direction of the top of this file, without the learning rate.

    Args:
      initial: s before the first step. Raising it makes the first steps shorter.
      eps: keeps the root from zero, where ``initial`` is.
    """

    def init(params: PyTree) -> AdagradNormState:
        start = lambda leaf: jnp.full((), initial, jnp.promote_types(leaf.dtype, jnp.float32))
        return AdagradNormState(jax.tree.map(start, params))

    def update(updates: PyTree, state: AdagradNormState, params: PyTree | None = None) -> tuple:
        square = jax.tree.map(lambda g, s: s + jnp.sum(jnp.square(g.astype(s.dtype))), updates, state.square)
        out = jax.tree.map(lambda g, s: (g / (jnp.sqrt(s) + eps)).astype(g.dtype), updates, square)
        return out, AdagradNormState(square)

    return optax.GradientTransformation(init, update)


def adagrad_norm(
    learning_rate: optax.ScalarOrSchedule = 1.0, initial: float = 1e-2, eps: float = 1e-10
) -> optax.GradientTransformation:
    """AdaGrad with one step size for each leaf.

    When to use it: where a rate that falls by itself is wanted and no state to speak of; with batches that grow.

    Args:
      learning_rate: lambda. The rule finds its own step size: 1 as a rule.
      initial: as for ``scale_by_adagrad_norm``.
      eps: as for ``scale_by_adagrad_norm``.

    >>> tx = jlora.optim.adagrad_norm(1.0)
    """
    return optax.chain(scale_by_adagrad_norm(initial, eps), optax.scale_by_learning_rate(learning_rate))
