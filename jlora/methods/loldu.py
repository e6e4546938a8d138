r"""LoLDU: train the leading diagonal entries of the weight's LDU decomposition.

LoLDU: Low-Rank Adaptation via Lower-Diag-Upper Decomposition for Parameter-Efficient Fine-Tuning. Shi et al., 2024.
https://arxiv.org/abs/2410.13618

.. math::  y = x W + s\,\bigl((\mathrm{drop}(x) A) \odot (z - z_0)\bigr) B, \qquad s = \alpha / r

W [in, out] frozen; W^T = P L diag(D) U by LU with row pivoting, the diagonals of L and U all ones; A = (U[:r])^T
[in, r] and B = (P L[:, :r])^T [r, out] frozen, z [r] trained from z0 = D[:r]. Trained: r a matrix.

* The authors keep a residual, W - s A diag(z0) B, and add s A diag(z) B: the same function. Here the weight stays as it
  is, and the output starts as its. Their other starts of z differ then by nothing but what weight decay pulls towards.
* The leading columns of an LU are not the leading singular directions: which they are depends on the order of the
  features. Where a pivot is zero its row of U is kept as it is, undivided; only z0, which cancels, is not meaningful.
* Their trained scalar in the place of s is left out: their own list of trained parameters does not have it.

When to use it: for the fewest numbers to store, r a matrix where LoRA-XS has r^2. Ranks of hundreds are usual, and cost
what LoRA of that rank costs to run.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jlora.factors import Factors
from jlora.methods.base import Method, Site, check_rank, dropout, require, unsharded
from jlora.weight import Context, Dot, Params


@dataclasses.dataclass(frozen=True)
class LoLDU(Method):
    """The diagonal of an LDU decomposition. The formula and shapes are at the top of this file.

    Parameters of a leaf: trainable ``{"z": [*stack, r]}``; frozen ``{"a": [*stack, in, r], "b": [*stack, r, out], "z0":
    [*stack, r]}``.

    Attributes:
      rank: r.
      alpha: numerator of the scale alpha / r.
      dropout: rate, as for LoRA; the authors have none.
    """

    rank: int = 64
    alpha: float = 64.0
    _: dataclasses.KW_ONLY
    dropout: float = 0.0

    sliceable = frozenset({"in", "out"})

    def __post_init__(self):
        require(
            isinstance(self.rank, int) and self.rank > 0,
            f"LoLDU(rank={self.rank!r}): the rank is a positive integer, 15 to 768 as a rule.",
        )
        require(0.0 <= self.dropout < 1.0, f"LoLDU(dropout={self.dropout}): a rate in [0, 1) is wanted.")

    @property
    def scale(self) -> float:
        return float(self.alpha / self.rank)

    def check(self, site: Site) -> str | None:
        return check_rank(self.rank, site)

    def init(self, key: Any, w: Array, site: Site, dtype: Any) -> Params:
        wide = jnp.promote_types(jnp.promote_types(w.dtype, dtype), jnp.float32)
        lu, _, permutation = jax.lax.linalg.lu(unsharded(w).T.astype(wide))  # W^T[permutation] = L diag(D) U
        d = jnp.diagonal(lu)[: self.rank]
        u = jnp.triu(lu)[: self.rank] / jnp.where(d == 0, 1.0, d)[:, None]
        lower = jnp.tril(lu[:, : self.rank], -1) + jnp.eye(lu.shape[0], self.rank, dtype=wide)
        b = jnp.zeros_like(lower).at[permutation].set(lower)
        z, a, b = (part.astype(dtype) for part in (d, u.T, b.T))
        return Params({"z": z}, {"a": a, "b": b, "z0": z})

    def count(self, site: Site) -> int:
        return site.stack * self.rank

    def dims(self, p: Params) -> Params:
        return Params({"z": "rank"}, {"a": "in rank", "b": "rank out", "z0": "rank"})

    def factors(self, w: Array, p: Params) -> Factors:
        a, b, change = self.parts(p)
        return Factors(a * change, b, self.scale)

    def parts(self, p: Params) -> tuple[Array, Array, Array]:
        """A, B and z - z0."""
        z = p.trainable["z"]
        return p.frozen["a"].astype(z.dtype), p.frozen["b"], z - p.frozen["z0"].astype(z.dtype)

    def forward(self, dot: Dot, x: Array, w: Array, p: Params, ctx: Context) -> tuple[Array, Any]:
        if dot.kind != "linear":
            return super().forward(dot, x, w, p, ctx)
        a, b, change = self.parts(p)  # the diagonal on r features: then no gradient has the size of a factor
        h = dot.inner(dropout(x, self.dropout, ctx.key), a)
        return dot(x, w) + dot.outer(h * (self.scale * change).astype(h.dtype), b), None

    def describe(self) -> dict[str, str]:
        return {"rank": str(self.rank), "scale": f"{self.scale:g}"}
