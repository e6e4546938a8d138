r"""Batch sizes that grow with the noise of the gradient: AdAdaGrad, around any optimizer and any loop.

AdAdaGrad: Adaptive Batch Size Schemes for Adaptive Gradient Methods. Lau, Liu and Kolar, 2024.
https://arxiv.org/abs/2402.11215

The gradients g_i of the b examples of a step scatter about their mean g. The batch is large enough while

.. math::  \frac{v}{b} \le \eta^2 \|g\|^2, \qquad v = \sum_k \mathrm{Var}_i (g_i)_k

(**norm test**, v summed over all parameters), or the weaker two, of the scatter along g and across it,

.. math::  \frac{1}{b} \mathrm{Var}_i \langle g_i, g \rangle \le \theta^2 \|g\|^4, \qquad
           \frac{1}{b} \Bigl(v - \frac{\mathrm{Var}_i \langle g_i, g \rangle}{\|g\|^2}\Bigr) \le \nu^2 \|g\|^2

(**inner-product test** and **orthogonality test**; the larger of the two is the augmented one). Each says what b it
wants; a larger one than there is becomes the next step's batch size, which never shrinks.

* Variances are unbiased, of two gradients or more: those of single examples (``jax.vmap`` of ``jax.grad``, cheap for
  adapters), or of J micro-batches of c examples each, whose means scatter c times less.
* ``gradient_noise`` takes them stacked. ``gradient_sums`` meets them one after another, as accumulation makes them, and
  keeps their sum and one number: enough for the norm test. Sums over devices are its ``jax.lax.psum``; under ``jit`` an
  axis of gradients that is sharded needs nothing. (The authors' code adds the biased variance of the devices' means to
  the mean of the variances within them; this is the unbiased one of all.)
* The authors' code takes the inner products of the second test one parameter at a time and adds their variances up;
  these are of the whole gradient, as in the paper.
* The batch size is a number of the host: an array's shape. ``AdaptiveBatch`` rounds it to whole passes, by powers of
  two, so that few programs are compiled.

Read in the authors' code; the estimator for micro-batches is derived. The learning rate is not touched. Differential
privacy forbids batch sizes that depend on the data: do not use the two together.

>>> control = jlora.optim.AdaptiveBatch(rows=32, largest=4096)
>>> state = control.init()
>>> for step in range(1000):
...     grads, noise = passes(params, next_batch(control.passes(state) * 32))  # the mean, and its ``gradient_noise``
...     params, opt_state = update(params, opt_state, grads)
...     state = control.update(state, jlora.optim.norm_test(noise, eta=0.1))

When to use it: where many rows fit, the right number is not known, and late steps are noisy. Any optimizer will do; the
paper's are ``optax.adagrad`` and ``jlora.optim.adagrad_norm``.
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PyTree


class GradientNoise(NamedTuple):
    """How the gradients of single examples scatter about their mean g."""

    variance: Float[Array, ""]  # v
    along: Float[Array, ""] | None  # the variance of <g_i, g>; None where only sums are known
    norm2: Float[Array, ""]  # ||g||^2


class GradientSums(NamedTuple):
    """What is kept of gradients that come one after another."""

    total: PyTree  # their sum
    square: Float[Array, ""]  # the sum of their squared norms
    count: Int[Array, ""]  # how many there were


def gradient_noise(grads: PyTree, size: int = 1) -> GradientNoise:
    """The scatter of gradients that are stacked along a first axis [J, ...].

    Args:
      grads: of single examples, or of micro-batches (their means).
      size: examples of which each of them is the mean.
    """
    leaves = [leaf.astype(_wide(leaf)) for leaf in jax.tree.leaves(grads)]
    if not leaves or leaves[0].shape[0] < 2:
        raise ValueError(
            f"gradient_noise got {[leaf.shape for leaf in leaves] or 'no arrays'}: two gradients or more are wanted, "
            "stacked along the first axis, of single examples or of micro-batches."
        )
    count = leaves[0].shape[0]
    means = [leaf.mean(axis=0) for leaf in leaves]
    apart = [leaf - mean for leaf, mean in zip(leaves, means, strict=True)]
    each = lambda x, y: jnp.sum((x * y).reshape(count, -1), axis=1)
    variance = sum(jnp.sum(jnp.square(x)) for x in apart)
    along = jnp.sum(jnp.square(sum(each(x, mean) for x, mean in zip(apart, means, strict=True))))
    unbiased = size / (count - 1)
    return GradientNoise(unbiased * variance, unbiased * along, sum(jnp.sum(jnp.square(mean)) for mean in means))


def gradient_sums(params: PyTree) -> GradientSums:
    """Sums of no gradients yet, for ``add_gradients``."""
    total = jax.tree.map(lambda leaf: jnp.zeros_like(leaf, _wide(leaf)), params)
    zero = jnp.zeros((), jnp.result_type(jnp.float32, *jax.tree.leaves(total)))
    return GradientSums(total, zero, jnp.zeros((), jnp.int32))


def add_gradients(sums: GradientSums, grads: PyTree) -> GradientSums:
    """With one gradient more."""
    total = jax.tree.map(jnp.add, sums.total, grads)
    square = optax.tree.norm(jax.tree.map(lambda g, t: g.astype(t.dtype), grads, total), squared=True)
    return GradientSums(total, sums.square + square, sums.count + 1)


def noise_of_sums(sums: GradientSums, size: int = 1) -> GradientNoise:
    """The scatter of gradients that were summed, for the norm test; ``size`` as for ``gradient_noise``.

    NaN of fewer than two. It is a difference of sums: a scatter below the rounding of the squared norm is lost in it,
    and is far below what any test asks about.
    """
    norm2 = optax.tree.norm(sums.total, squared=True) / jnp.square(sums.count)
    apart = jnp.maximum(sums.square - sums.count * norm2, 0.0)
    variance = jnp.where(sums.count > 1, size * apart / jnp.maximum(sums.count - 1, 1), jnp.nan)
    return GradientNoise(variance, None, norm2)


def norm_test(noise: GradientNoise, eta: float = 0.1) -> Float[Array, ""]:
    """The batch size that the norm test wants: v / (eta^2 ||g||^2).

    Args:
      eta: how large the error of the mean may be beside its length. Raising it keeps batches small; the authors take
        0.1 to 0.5.
    """
    return noise.variance / (eta**2 * noise.norm2)


def inner_product_test(noise: GradientNoise, theta: float = 0.1) -> Float[Array, ""]:
    """The batch size that the inner-product test wants: Var <g_i, g> / (theta^2 ||g||^4).

    Args:
      theta: how large the error along the mean may be beside its length.
    """
    return _along(noise, "inner_product_test") / (theta**2 * jnp.square(noise.norm2))


def orthogonality_test(noise: GradientNoise, nu: float = 0.1) -> Float[Array, ""]:
    """The batch size that the orthogonality test wants. ``jnp.maximum`` of it and the inner-product test's is what the
    augmented test wants.

    Args:
      nu: how large the error across the mean may be beside its length.
    """
    across = noise.variance - _along(noise, "orthogonality_test") / noise.norm2
    return jnp.maximum(across, 0.0) / (nu**2 * noise.norm2)


class BatchState(NamedTuple):
    """What ``AdaptiveBatch`` remembers, numbers of the host: save them with a checkpoint."""

    size: int  # examples of the next step
    step: int  # steps taken


@dataclasses.dataclass(frozen=True)
class AdaptiveBatch:
    """Chooses the batch size of the next step. A loop asks it; see the top of this file.

    Attributes:
      rows: examples of one pass, on all devices together. Batch sizes are multiples of it.
      largest: the batch size not to exceed, but for rounding; there tests end.
      interval: steps from one test to the next.
      powers: take 1, 2, 4, 8, ... passes, rounded up, so that few programs are compiled; else any number of them.
    """

    rows: int
    largest: int = 50_000
    interval: int = 1
    powers: bool = True

    def __post_init__(self):
        if not 0 < self.rows <= self.largest or self.interval < 1:
            raise ValueError(
                f"{self}: a positive number of rows, of at most `largest`, and an interval of one step or more are "
                "wanted."
            )

    def init(self, size: int | None = None) -> BatchState:
        """At the first step, of ``size`` examples, rounded up; by default one pass."""
        return BatchState(self._rounded(self.rows if size is None else size), 0)

    def due(self, state: BatchState) -> bool:
        """Whether this step's gradients are to be tested: else a loop can do without their noise."""
        return state.step % self.interval == 0 and state.size < self._rounded(self.largest)

    def passes(self, state: BatchState) -> int:
        """Passes over ``rows`` examples to accumulate in this step."""
        return state.size // self.rows

    def update(self, state: BatchState, wanted: float | Array | None = None) -> BatchState:
        """After a step. ``wanted`` is what its test gave, None where none was due; NaN changes nothing. Waits for
        ``wanted`` if it is still being computed."""
        size = state.size
        if wanted is not None and self.due(state) and float(wanted) > size:
            size = self._rounded(min(float(wanted), self.largest))
        return BatchState(size, state.step + 1)

    def _rounded(self, size: float) -> int:
        passes = math.ceil(size / self.rows)
        return self.rows * (1 << (passes - 1).bit_length() if self.powers else passes)


def _along(noise: GradientNoise, test: str) -> Float[Array, ""]:
    if noise.along is None:
        raise ValueError(f"{test} wants the gradients themselves: gradient_noise(grads), not noise_of_sums.")
    return noise.along


def _wide(leaf: Array) -> jnp.dtype:
    return jnp.promote_types(leaf.dtype, jnp.float32)
