r"""DEFT: a few directions of the outputs are taken away from a weight and given anew.

DEFT: Decompositional Efficient Fine-Tuning for Text-to-Image Models. Kumar et al., 2025.
https://arxiv.org/abs/2509.22793
Without what is given anew, PaRa: Personalizing Text-to-Image Diffusion via Parameter Rank Reduction. Chen et al., 2024.
https://arxiv.org/abs/2406.05641

.. math::  y = x W + \bigl(s\, \mathrm{drop}(x) A - (x W)\, G^\top\bigr) Q, \qquad
           (Q, G) = (B, \max(B, 0)) \ \text{("relu")} \quad\text{or}\quad (\hat B, \hat B) \ \text{("qr")}

x [..., in], W [in, out] frozen, A [in, r] and B [r, out] trained; Q, G [r, out], where the rows of B^ are B's made
orthonormal (Householder QR of B^T). s = alpha / r, or 1. Trained: r (in + out) a matrix, or r out without A.

* With "qr" the outputs lose what they had in the span of B, W (I - B^^T B^), and get x A there; with "relu" the same is
  done by a matrix that is no projection, and needs no decomposition.
* A starts as W G^T / s: what is taken is given back, and the output starts as the base's. Without A (PaRa) it cannot,
  and does not. B starts normal with deviation 0.02.
* x W is there anyway: the change costs 2 T r (in + 2 out) FLOPs for T tokens and never touches W. As a pair of factors,
  W' = W + (s A - W G^T) Q, it exports to plain LoRA exactly.
* A weight with fewer than r outputs has as many directions as outputs, as in PEFT.

When to use it: to add a subject or a style to a model that should otherwise stay what it is. PaRa for the opposite: it
only narrows what the model can say.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jlora.factors import Factors
from jlora.methods.base import Method, Site, contract, dropout, require, unsharded
from jlora.weight import Context, Dot, Params


@dataclasses.dataclass(frozen=True)
class DEFT(Method):
    """Decompositional efficient fine-tuning. The formula and shapes are at the top of this file.

    Parameters of a leaf: trainable ``{"a": [*stack, in, r], "b": [*stack, r, out]}``; without ``inject`` only ``"b"``.

    Attributes:
      rank: r, the number of directions.
      alpha: numerator of the scale of what is given; None for a scale of 1.
      directions: "relu" or "qr".
      inject: give anew what was taken. False is PaRa.
      dropout: rate, on the input of what is given. Active exactly when the tree was bound with a key.
    """

    rank: int = 8
    alpha: float | None = None
    _: dataclasses.KW_ONLY
    directions: str = "relu"
    inject: bool = True
    dropout: float = 0.0

    sliceable = frozenset({"in"})  # a slice along `out` has other sums of outputs

    def __post_init__(self):
        require(
            isinstance(self.rank, int) and self.rank > 0,
            f"DEFT(rank={self.rank!r}): the rank is a positive integer, 4 to 64 as a rule.",
        )
        require(self.alpha is None or self.alpha > 0, f"DEFT(alpha={self.alpha!r}): a positive number, or None.")
        require(self.directions in ("relu", "qr"), f"DEFT(directions={self.directions!r}): 'relu' or 'qr' is wanted.")
        require(0.0 <= self.dropout < 1.0, f"DEFT(dropout={self.dropout}): a rate in [0, 1) is wanted.")

    def rank_of(self, n_out: int) -> int:
        """r of a matrix with so many outputs."""
        return min(self.rank, n_out)

    def scale_of(self, rank: int) -> float:
        """s for a true rank."""
        return 1.0 if self.alpha is None else self.alpha / rank

    def init(self, key: Any, w: Array, site: Site, dtype: Any) -> Params:
        w, rank = unsharded(w), self.rank_of(w.shape[1])
        b = 0.02 * jax.random.normal(key, (rank, w.shape[1]), dtype)
        if not self.inject:
            return Params(trainable={"b": b})
        _, g = self.pair(b)
        a = jnp.matmul(w.astype(dtype), g.T, precision=jax.lax.Precision.HIGHEST) / self.scale_of(rank)
        return Params(trainable={"a": a, "b": b})

    def count(self, site: Site) -> int:
        _, n_in, n_out = site.canonical_shape
        return site.stack * self.rank_of(n_out) * (n_out + (n_in if self.inject else 0))

    def dims(self, p: Params) -> Params:
        return Params(trainable={"a": "in rank", "b": "rank out"} if self.inject else {"b": "rank out"})

    def pair(self, b: Float[Array, "r out"]) -> tuple[Float[Array, "r out"], Float[Array, "r out"]]:
        """Q and G. At least float32: a decomposition in half precision is worth little."""
        b = b.astype(jnp.promote_types(b.dtype, jnp.float32))
        if self.directions == "relu":
            return b, jax.nn.relu(b)
        q = jnp.linalg.qr(b.T)[0].T
        return q, q

    def taken(self, w: Float[Array, "in out"], p: Params) -> Factors:
        """The pair - W G^T Q."""
        q, g = self.pair(p.trainable["b"])
        return Factors(-contract(w, g.T.astype(w.dtype), g.dtype), q)

    def factors(self, w: Float[Array, "in out"], p: Params) -> Factors:
        f = self.taken(w, p)
        if not self.inject:
            return f
        return Factors(f.a + self.scale_of(f.rank) * p.trainable["a"].astype(f.a.dtype), f.b)

    def forward(self, dot: Dot, x: Array, w: Array, p: Params, ctx: Context) -> tuple[Array, Any]:
        drops = ctx.key is not None and self.dropout > 0.0 and self.inject and dot.kind != "lookup"
        y = dot(x, w) if dot.kind in ("linear", "lookup") else None
        if y is not None and (dot.kind == "lookup" or dot.features_last(y)):
            q, g = self.pair(p.trainable["b"])
            z = -dot.mix(y, g.T)
            if self.inject:
                given = dot.inner(dropout(x, self.dropout, ctx.key) if drops else x, p.trainable["a"])
                z = z + self.scale_of(g.shape[0]) * given
            return y + dot.outer(z, q).astype(y.dtype), None
        if not drops:
            return dot.factored(x, w, dot.per_matrix(self.factors, w, p), ctx), None
        f = dot.per_matrix(self.taken, w, p)
        given = dot.inner(dropout(x, self.dropout, ctx.key), p.trainable["a"]) * self.scale_of(f.rank)
        return dot.factored(x, w, f, ctx) + dot.outer(given, f.b), None

    def forward_transposed(self, dot: Dot, x: Array, wt: Float[Array, "out in"], p: Params, ctx: Context) -> Array:
        if not dot.features_last(x):
            return super().forward_transposed(dot, x, wt, p, ctx)
        q, g = self.pair(p.trainable["b"])
        along = dot.einsum("...o,ro->...r", x, q)
        y = dot(x - dot.einsum("...r,ro->...o", along.astype(x.dtype), g).astype(x.dtype), wt)
        if not self.inject:
            return y
        scaled = (self.scale_of(g.shape[0]) * along).astype(x.dtype)
        return y + dot.einsum("...r,ir->...i", scaled, p.trainable["a"])

    def describe(self) -> dict[str, str]:
        return {"rank": str(self.rank), "scale": "1" if self.alpha is None else f"{self.alpha:g} / r"}
