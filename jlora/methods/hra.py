r"""HRA: the inputs of a weight are reflected r times. A chain of reflections is a rotation, and a low-rank change.

Bridging the Gap between Low-rank and Orthogonal Adaptation via Householder Reflection Adaptation. Yuan, Liu and Xu,
2024. https://arxiv.org/abs/2405.17484

.. math::  y = x\,H_r \cdots H_1\,W, \qquad H_j = I - 2\,\hat u_j \hat u_j^\top, \quad \hat u_j = u_j / \|u_j\|_2

x [..., in], W [in, out] frozen, U = (u_1, ..., u_r) [in, r] trained. Trained: r in a matrix.

* The chain is one low-rank term, H_1 ... H_r = I - U T U^T, where T [r, r] is the inverse of the upper
  triangle of U^T U with half its diagonal. So the activation is reflected in two thin products, 4 T in r FLOPs
  for T tokens, and W' = W - U T^T (U^T W) is W and a pair of rank r: it exports to plain LoRA exactly.
* The columns start in equal pairs, uniform in +-1/sqrt(in): the reflections of a pair cancel, and the output starts as
  the base's. With an odd rank, or with ``orthogonal``, it cannot, and does not.
* ``orthogonal``: the directions are made orthonormal (Gram-Schmidt) first. What is left is the reflection at the span
  of U, I - 2 U (U^T U)^-1 U^T, which starts from independent columns: equal ones have no such thing (PEFT's start is
  not a number there).

When to use it: where the weight's angles should be kept (as by OFT) at LoRA's cost. It has about half of LoRA's
parameters at equal rank. The rank should be even.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jlora.factors import Factors
from jlora.linalg import inverse
from jlora.methods.base import Method, Site, require
from jlora.weight import Context, Dot, Params


@dataclasses.dataclass(frozen=True)
class HRA(Method):
    """Householder reflection adaptation. The formula and shapes are at the top of this file.

    Parameters of a leaf: trainable ``{"u": [*stack, in, r]}``.

    Attributes:
      rank: r, the number of reflections. Even, to start as the base.
      orthogonal: make the directions orthonormal. PEFT's ``apply_GS``.
    """

    rank: int = 8
    _: dataclasses.KW_ONLY
    orthogonal: bool = False

    sliceable = frozenset({"out"})  # the norms of a slice along `in` are others

    def __post_init__(self):
        require(
            isinstance(self.rank, int) and self.rank > 0,
            f"HRA(rank={self.rank!r}): the rank is a positive and even integer, 4 to 32 as a rule.",
        )

    def check(self, site: Site) -> str | None:
        if site.axes.kind == "embedding":
            return "HRA reflects inputs, and those of an embedding are its vocabulary; use LoRA for this leaf"
        n_in = site.canonical_shape[1]
        if self.orthogonal and self.rank > n_in:
            return f"{n_in} inputs have no {self.rank} orthogonal directions; choose a rank of at most {n_in}"
        return None

    def init(self, key: Any, w: Array, site: Site, dtype: Any) -> Params:
        n_in, bound = w.shape[0], w.shape[0] ** -0.5
        if self.orthogonal or self.rank % 2:
            return Params(trainable={"u": jax.random.uniform(key, (n_in, self.rank), dtype, -bound, bound)})
        half = jax.random.uniform(key, (n_in, self.rank // 2), dtype, -bound, bound)
        return Params(trainable={"u": jnp.repeat(half, 2, axis=1)})

    def count(self, site: Site) -> int:
        return site.stack * self.rank * site.canonical_shape[1]

    def dims(self, p: Params) -> Params:
        return Params(trainable={"u": "in rank"})

    def reflections(self, p: Params) -> tuple[Float[Array, "in r"], Float[Array, "r r"]]:
        """U and M of ``H_r ... H_1 = I - U M U^T``. At least float32."""
        u = p.trainable["u"]
        u = u.astype(jnp.promote_types(u.dtype, jnp.float32))
        gram = jnp.matmul(u.T, u, precision=jax.lax.Precision.HIGHEST)
        eye = jnp.eye(self.rank, dtype=u.dtype)
        if self.orthogonal:
            return u, 2.0 * inverse(gram)
        return u, inverse(jnp.triu(gram) - 0.5 * eye * gram).T

    def factors(self, w: Float[Array, "in out"], p: Params) -> Factors:
        u, m = self.reflections(p)
        b = jnp.matmul(u.T.astype(w.dtype), w, preferred_element_type=jnp.promote_types(u.dtype, w.dtype))
        return Factors(-(u @ m), b)

    def forward(self, dot: Dot, x: Array, w: Array, p: Params, ctx: Context) -> tuple[Array, Any]:
        if dot.kind != "linear" or not dot.features_last(x):
            return super().forward(dot, x, w, p, ctx)
        u, m = self.reflections(p)
        along = dot.einsum("...i,ir->...r", x, u)
        return dot(x - dot.einsum("...r,ri->...i", along.astype(x.dtype), m @ u.T).astype(x.dtype), w), None

    def forward_transposed(self, dot: Dot, x: Array, wt: Float[Array, "out in"], p: Params, ctx: Context) -> Array:
        y = dot(x, wt)
        if not dot.features_last(y):
            return super().forward_transposed(dot, x, wt, p, ctx)
        u, m = self.reflections(p)
        along = dot.einsum("...i,ir->...r", y, u)
        return y - dot.einsum("...r,ri->...i", along.astype(y.dtype), m.T @ u.T).astype(y.dtype)

    def describe(self) -> dict[str, str]:
        return {"rank": str(self.rank)}
