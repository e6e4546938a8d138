r"""Intruder dimensions: strong directions of a tuned weight that the weight did not have before.

LoRA vs Full Fine-tuning: An Illusion of Equivalence. Shuttleworth et al., 2024. https://arxiv.org/abs/2410.21228

.. math::  c_j = \max_i |\langle q^1_j, q^0_i \rangle|, \qquad j \text{ is an intruder if } c_j < \epsilon

q^0_i are all min(in, out) singular vectors of W_0 [in, out] on the side of the outputs, q^1_j the first k of W_1, the
weight after training. The paper finds them after LoRA and hardly any after full fine-tuning, and that models with more
of them forget more. Defaults of the authors' code: k = 10, epsilon = 0.5.

A unit vector at random has a largest cosine of about sqrt(2 ln d / d) with d orthonormal ones: 0.55 for d = 16, 0.32
for 64, 0.11 for 1024. So the default means something where d is well above 32. Of equal singular values the vectors
are not determined, and c_j says nothing.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Intruders:
    """What became of the strongest singular vectors.

    Attributes:
      similarity: c_j of the first k vectors after training.
      nearest: which vector before training that is the cosine with, i.
      growth: the j-th singular value after training over the j-th before.
      threshold: epsilon.
    """

    similarity: Float[Array, "*stack k"]
    nearest: Int[Array, "*stack k"]
    growth: Float[Array, "*stack k"]
    threshold: float = dataclasses.field(default=0.5, metadata=dict(static=True))

    @property
    def found(self) -> Bool[Array, "*stack k"]:
        return self.similarity < self.threshold

    @property
    def count(self) -> Int[Array, "*stack"]:
        return jnp.sum(self.found, axis=-1)


def intruders(
    before: Float[Array, "in out"],
    after: Float[Array, "in out"],
    *,
    k: int = 10,
    threshold: float = 0.5,
    side: str = "out",
) -> Intruders:
    """Which of the k strongest singular vectors of a weight after training were not there before.

    Two full decompositions, in float32 or wider: seconds for matrices of 1,000, a minute for 4,000 on a CPU.

    Args:
      before, after: one matrix, [in, out]; ``jlora.diagnostics.report`` goes through a model.
      k: how many vectors are looked at, at most min(in, out).
      threshold: epsilon. A higher one finds more.
      side: "out", as in the paper, or "in".
    """
    if before.shape != after.shape or before.ndim != 2:
        raise ValueError(
            f"intruders wants one weight [in, out] before and after; got {before.shape} and {after.shape}."
        )
    check(k, threshold, side)
    return Intruders(*_compare(before, after, k, side), threshold)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _compare(before: Array, after: Array, k: int, side: str) -> tuple[Array, Array, Array]:
    wide = jnp.promote_types(jnp.result_type(before, after), jnp.float32)
    (u0, s0, vh0), (u1, s1, vh1) = (jnp.linalg.svd(w.astype(wide), full_matrices=False) for w in (before, after))
    q0, q1 = (u0.T, u1.T) if side == "in" else (vh0, vh1)
    k = min(k, len(s0))
    cosines = jnp.abs(jnp.matmul(q1[:k], q0.T, precision=jax.lax.Precision.HIGHEST))
    return jnp.max(cosines, axis=1), jnp.argmax(cosines, axis=1), s1[:k] / s0[:k]


def check(k: int, threshold: float, side: str) -> None:
    if not (isinstance(k, int) and k > 0 and 0.0 < threshold < 1.0 and side in ("in", "out")):
        raise ValueError(
            f"intruders(k={k!r}, threshold={threshold!r}, side={side!r}): a positive number of vectors, a cosine "
            "between 0 and 1, and 'out' or 'in' are wanted."
        )
