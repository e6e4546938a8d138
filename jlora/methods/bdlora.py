r"""BD-LoRA: LoRA with one block-diagonal factor, for models whose layers are cut over devices.

Block-Diagonal LoRA for Eliminating Communication Overhead in Tensor Parallel LoRA Serving. Wang et al., 2025.
https://arxiv.org/abs/2510.23346

.. math::  y = x W + s\,(\mathrm{drop}(x) A) B, \quad s = \alpha / r, \quad
           A = \mathrm{diag}(A_1, \dots, A_n) \ \text{ or } \ B = \mathrm{diag}(B_1, \dots, B_n)

W [in, out] frozen, A [in, r], B [r, out]; A_i [in / n, r / n] or B_i [r / n, out / n]. Only the blocks are kept.
Trained: r in / n + r out a matrix, or r in + r out / n.

* Where W is cut along its inputs over n devices (row parallel: the output projection, the down projection), block A so
  that a device needs its own features only; where along its outputs (column parallel: queries, keys, values, up, gate),
  block B. The sum over devices that W asks for anyway is then the only one.
* It starts as LoRA does: the A_i uniform in +-1/sqrt(in / n), B zero.
* It is LoRA of rank r with zeros in it: each input feature reaches r / n ranks, or each output feature hears r / n.

When to use it: to serve many adapters on a cut model. At the count of LoRA of rank r it affords about twice the rank.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jlora.factors import Factors
from jlora.methods.base import Method, Site, check_rank, dropout, require
from jlora.methods.lora import LoRA
from jlora.weight import Context, Dot, Params


@dataclasses.dataclass(frozen=True)
class BDLoRA(Method):
    """LoRA with a block-diagonal factor. The formula and shapes are at the top of this file.

    Parameters of a leaf: trainable ``{"a": [*stack, in, r / n], "b": [*stack, r, out]}`` with blocks in A, the row of a
    feature being its row of the block that it is in; ``{"a": [*stack, in, r], "b": [*stack, r / n, out]}`` with blocks
    in B, likewise with columns.

    Attributes:
      rank: r.
      alpha: numerator of the scale.
      blocks: n, which divides r and the side that is blocked: the number of devices that the weight is cut over.
      blocked: "in": A has the blocks; "out": B has.
      rslora: divide by sqrt(r) instead of r.
      dropout: rate, as for LoRA.
    """

    rank: int = 16
    alpha: float = 16.0
    _: dataclasses.KW_ONLY
    blocks: int = 2
    blocked: str = "out"
    rslora: bool = False
    dropout: float = 0.0

    def __post_init__(self):
        for field in ("rank", "blocks"):
            value = getattr(self, field)
            require(isinstance(value, int) and value > 0, f"BDLoRA({field}={value!r}): a positive integer is wanted.")
        below = self.rank - self.rank % self.blocks
        require(
            self.rank % self.blocks == 0,
            f"BDLoRA(rank={self.rank}, blocks={self.blocks}): the rank is a multiple of the blocks, for instance "
            f"{below or self.blocks}.",
        )
        require(self.blocked in ("in", "out"), f"BDLoRA(blocked={self.blocked!r}): 'in' or 'out' is wanted.")
        require(0.0 <= self.dropout < 1.0, f"BDLoRA(dropout={self.dropout}): a rate in [0, 1) is wanted.")

    @property
    def scale(self) -> float:
        return LoRA(self.rank, self.alpha, rslora=self.rslora).scale

    @property
    def sliceable(self) -> frozenset[str]:
        return frozenset({"in", "out"} - {self.blocked})  # a slice of the other would cut blocks

    def check(self, site: Site) -> str | None:
        size = dict(zip(("in", "out"), site.canonical_shape[1:], strict=True))[self.blocked]
        if size % self.blocks:
            nearest = min((n for n in range(1, size + 1) if size % n == 0), key=lambda n: abs(n - self.blocks))
            return f"blocks={self.blocks} does not divide {self.blocked} = {size}; {nearest} does"
        return check_rank(self.rank, site)

    def init(self, key: Any, w: Array, site: Site, dtype: Any) -> Params:
        (n_in, n_out), r, k = w.shape, self.rank, self.rank // self.blocks
        fan_in, k_in, k_out = (n_in // self.blocks, k, r) if self.blocked == "in" else (n_in, r, k)
        a = jax.random.uniform(key, (n_in, k_in), dtype, -(fan_in**-0.5), fan_in**-0.5)
        return Params(trainable={"a": a, "b": jnp.zeros((k_out, n_out), dtype)})

    def count(self, site: Site) -> int:
        _, n_in, n_out = site.canonical_shape
        k = self.rank // self.blocks
        return site.stack * (k * n_in + self.rank * n_out if self.blocked == "in" else self.rank * n_in + k * n_out)

    def dims(self, p: Params) -> Params:
        return Params(trainable={"a": "in rank", "b": "rank out"})

    def spread(self, compact: Float[Array, "n k"]) -> Float[Array, "n r"]:
        """Rows of blocks with the zeros beside them: the block-diagonal matrix."""
        own = jnp.repeat(jnp.eye(self.blocks, dtype=compact.dtype), compact.shape[0] // self.blocks, axis=0)
        return (own[:, :, None] * compact[:, None, :]).reshape(-1, self.rank)

    def factors(self, w: Array, p: Params) -> Factors:
        a, b = p.trainable["a"], p.trainable["b"]
        if self.blocked == "in":
            return Factors(self.spread(a), b, self.scale)
        return Factors(a, self.spread(b.T).T, self.scale)

    def forward(self, dot: Dot, x: Array, w: Array, p: Params, ctx: Context) -> tuple[Array, Any]:
        """Block by block where the axis may be cut."""
        if not dot.features_last(x):
            return super().forward(dot, x, w, p, ctx)
        y, a, b, n = dot(x, w), p.trainable["a"], p.trainable["b"], self.blocks
        x = dropout(x, self.dropout, ctx.key)
        cut = lambda x: x.reshape(*x.shape[:-1], n, -1)
        if self.blocked == "in":
            h = dot.einsum("...np,npk->...nk", cut(x), a.reshape(n, -1, a.shape[1]))
            return y + dot.outer(h.reshape(*x.shape[:-1], -1).astype(x.dtype) * self.scale, b), None
        h = cut(dot.inner(x, a) * self.scale)
        branch = dot.einsum("...nk,nkq->...nq", h, b.reshape(len(b), n, -1).swapaxes(0, 1)).reshape(y.shape)
        return y + branch.astype(y.dtype), None

    def describe(self) -> dict[str, str]:
        return {"rank": f"{self.blocks}x{self.rank // self.blocks}", "scale": f"{self.scale:g}"}
