r"""GraLoRA: the weight cut into k x k blocks, a small LoRA for each.

GraLoRA: Granular Low-Rank Adaptation for Parameter-Efficient Fine-Tuning. Jung et al., 2025.
https://arxiv.org/abs/2505.20355

.. math::  \Delta W_{ji} = s\,A_{ji} B_{ji}, \quad i, j = 1..k, \qquad s = \alpha / (r + r_h)

W [in, out] frozen. Block (j, i) of it is [in / k, out / k]; its pair is A_ji [in / k, r / k] and B_ji [r / k, out / k].
All of them together are kept as a [in, r] and b [r, out]: A_ji is in rows j and columns i of a, B_ji in rows j and
columns i of b, each cut into k equal parts. A hybrid adds one ordinary pair of rank r_h under the same scale. Trained:
(r + r_h) (in + out) a matrix, as LoRA of rank r + r_h.

* The update has rank up to k r for the count, and the FLOPs, of rank r: x a is taken part by part, its [k, r / k]
  numbers for each part are exchanged between the parts, and then b is taken part by part. No [in, out] temporary.
* a and the hybrid's A are uniform in +-1/sqrt(fan in) (in / k, and in), b and the hybrid's B start at 0.
* Where a product does not have its features in one last axis (a convolution, a ragged product, a lookup), it runs as
  the ordinary pair of rank k r + r_h that it equals: exact, k times the cost of the branch.
* The hybrid shares the branch's dropped input; PEFT draws a second mask for it.

When to use it: larger ranks (k = 2 up to rank 32, 4 above), and inputs with a few features much larger than the rest,
whose gradient would swamp a single pair's: here they reach the pairs of their own rows only.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jlora.factors import Factors
from jlora.methods.base import Method, Site, check_rank, dropout, require
from jlora.weight import Context, Dot, Params


@dataclasses.dataclass(frozen=True)
class GraLoRA(Method):
    """Granular low-rank adaptation. The formula and shapes are at the top of this file.

    Parameters of a leaf: trainable ``{"a": [*stack, in, r], "b": [*stack, r, out]}``, with a hybrid also
    ``"hybrid": Factors(a [*stack, in, r_h], b [*stack, r_h, out])``.

    Attributes:
      rank: r, a multiple of ``blocks``.
      alpha: numerator of the scale.
      blocks: k, which divides in and out. More blocks fit finer detail with pairs of smaller rank r / k each.
      hybrid_rank: r_h, of an ordinary pair beside the blocks. Useful at small ranks, where r / k is very small.
      dropout: rate, as for LoRA.
    """

    rank: int = 32
    alpha: float = 64.0
    _: dataclasses.KW_ONLY
    blocks: int = 2
    hybrid_rank: int = 0
    dropout: float = 0.0

    def __post_init__(self):
        for field, least in (("rank", 1), ("blocks", 1), ("hybrid_rank", 0)):
            value = getattr(self, field)
            require(
                isinstance(value, int) and value >= least,
                f"GraLoRA({field}={value!r}): an integer of at least {least} is wanted.",
            )
        below = self.rank - self.rank % self.blocks
        require(
            self.rank % self.blocks == 0,
            f"GraLoRA(rank={self.rank}, blocks={self.blocks}): the rank is a multiple of the blocks, for instance "
            f"{below or self.blocks}.",
        )
        require(0.0 <= self.dropout < 1.0, f"GraLoRA(dropout={self.dropout}): a rate in [0, 1) is wanted.")

    @property
    def scale(self) -> float:
        return float(self.alpha / (self.rank + self.hybrid_rank))

    def check(self, site: Site) -> str | None:
        _, n_in, n_out = site.canonical_shape
        if n_in % self.blocks or n_out % self.blocks:
            fits = [k for k in range(1, min(n_in, n_out) + 1) if n_in % k == n_out % k == self.rank % k == 0]
            nearest = min(fits, key=lambda k: abs(k - self.blocks))
            return f"blocks={self.blocks} does not divide both in = {n_in} and out = {n_out}; {nearest} does"
        return check_rank(max(self.rank, self.hybrid_rank), site)

    def init(self, key: Any, w: Array, site: Site, dtype: Any) -> Params:
        n_in, n_out = w.shape
        key, key_hybrid = jax.random.split(key)
        uniform = lambda key, rank, fan_in: jax.random.uniform(key, (n_in, rank), dtype, -(fan_in**-0.5), fan_in**-0.5)
        own = {"a": uniform(key, self.rank, n_in // self.blocks), "b": jnp.zeros((self.rank, n_out), dtype)}
        if self.hybrid_rank:
            a = uniform(key_hybrid, self.hybrid_rank, n_in)
            own["hybrid"] = Factors(a, jnp.zeros((self.hybrid_rank, n_out), dtype), self.scale)
        return Params(trainable=own)

    def count(self, site: Site) -> int:
        _, n_in, n_out = site.canonical_shape
        return site.stack * (self.rank + self.hybrid_rank) * (n_in + n_out)

    def dims(self, p: Params) -> Params:
        own: dict[str, Any] = {"a": "in rank", "b": "rank out"}
        if self.hybrid_rank:
            own["hybrid"] = Factors("in rank", "rank out", p.trainable["hybrid"].scale)
        return Params(trainable=own)

    def factors(self, w: Array, p: Params) -> Factors:
        """The one pair that all blocks come to; its rank axis is (part of in, part of out, rank of a block)."""
        a, b = p.trainable["a"], p.trainable["b"]
        k, s = self.blocks, self.rank // self.blocks
        same = jnp.eye(k, dtype=a.dtype)
        a = jnp.einsum("jpr,jJ->jpJr", a.reshape(k, -1, k * s), same).reshape(len(a), k * k * s)
        b = jnp.einsum("jsiq,iI->jIsiq", b.reshape(k, s, k, -1), same).reshape(k * k * s, -1)
        if not self.hybrid_rank:
            return Factors(a, b, self.scale)
        pair = p.trainable["hybrid"]
        return Factors(jnp.concatenate([a, pair.a], axis=1), jnp.concatenate([b, pair.b]), self.scale)

    def forward(self, dot: Dot, x: Array, w: Array, p: Params, ctx: Context) -> tuple[Array, Any]:
        if not dot.features_last(x):
            return super().forward(dot, x, w, p, ctx)
        y = dot(x, w)
        x = dropout(x, self.dropout, ctx.key)
        return y + self._branch(dot, x, p.trainable["a"], p.trainable["b"], p.trainable.get("hybrid"), y.dtype), None

    def forward_transposed(self, dot: Dot, x: Array, wt: Float[Array, "out in"], p: Params, ctx: Context) -> Array:
        if not dot.features_last(x):
            return super().forward_transposed(dot, x, wt, p, ctx)
        y, pair = dot(x, wt), p.trainable.get("hybrid")
        a, b = p.trainable["b"].T, p.trainable["a"].T
        return y + self._branch(dot, x, a, b, None if pair is None else pair.swap(), y.dtype)

    def _branch(self, dot: Dot, x: Array, a: Array, b: Array, pair: Factors | None, dtype: Any) -> Array:
        k, s = self.blocks, self.rank // self.blocks
        a, b = jnp.split(a, k), b.reshape(k, s, k, -1)
        # Products of plain matrices, k from the inputs and k to the outputs: a batched one would transpose activations.
        h = [dot.inner(part, a[j]).reshape(*x.shape[:-1], k, s) for j, part in enumerate(jnp.split(x, k, axis=-1))]
        h = jnp.stack(h, axis=-2)  # [..., part of out, part of in, rank of a block]
        rows = [h[..., i, :, :].reshape(*x.shape[:-1], k * s) for i in range(k)]
        y = jnp.concatenate([dot.outer(rows[i], b[:, :, i].reshape(k * s, -1)) for i in range(k)], axis=-1)
        if pair is not None:
            y = y + dot.outer(dot.inner(x, pair.a), pair.b)
        return (y * self.scale).astype(dtype)

    def describe(self) -> dict[str, str]:
        rank = f"{self.rank}/{self.blocks}" + (f"+{self.hybrid_rank}" if self.hybrid_rank else "")
        return {"rank": rank, "scale": f"{self.scale:g}"}
