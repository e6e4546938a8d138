r"""Super-Tuning: the entries of a weight that are largest are trained, the rest stays; with a pair beside them, Supra.

Super-Tuning, 2026. https://arxiv.org/abs/2607.09287
Its names Super and Supra are also those of: Supra-Tuning: Combining Outlier and Low-Rank Adaptation for Sparse and
Efficient LLM Fine-Tuning. 2025. https://openreview.net/forum?id=FFIn2TH7aU

.. math::  W'_{i_k o_k} = W_{i_k o_k} + v_k, \quad k = 1 \ldots K, \qquad
           y = x W' + s\,(\mathrm{drop}(x) A) B, \quad s = \alpha / r

W [in, out] frozen; v [K] trained, K = floor(in out (1 - sparsity)); the places (i_k, o_k), those of the K entries of W
that are largest by size, frozen; A [in, r], B [r, out] of Supra trained. Trained: K + r (in + out) a matrix.

* v and B start at zero, so the output starts as the base's.
* It is SHiRA (``shira.py``, whose notes on cost hold here) with other places and a pair.
* The places are of W as it is when the adapter is made, and are kept: they do not move with training.

When to use it: sparse updates where a mask by size is wanted; without the places in its file, an adapter is K numbers.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jlora.factors import Factors
from jlora.methods.base import Method, Site, check_rank, dropout, laid_as, require, unsharded
from jlora.methods.lora import LoRA
from jlora.methods.shira import scatter
from jlora.weight import Context, Dot, Params


@dataclasses.dataclass(frozen=True)
class SuperTuning(Method):
    """Training of the largest entries. The formula and shapes are at the top of this file.

    Parameters of a leaf: trainable ``{"values": [*stack, K]}``, with a rank also ``"factors": Factors``; frozen
    ``{"places": [*stack, 2, K]}`` as SHiRA's.

    Attributes:
      sparsity: the part of the entries that is not trained.
      largest: train the largest entries; False for the smallest.
      rank: r of the pair beside them (Supra), or 0.
      alpha: numerator of the pair's scale; by default 2 r.
      dropout: rate, on the input of the pair.
    """

    sparsity: float = 0.99
    _: dataclasses.KW_ONLY
    largest: bool = True
    rank: int = 0
    alpha: float | None = None
    dropout: float = 0.0

    def __post_init__(self):
        require(0.0 <= self.sparsity < 1.0, f"SuperTuning(sparsity={self.sparsity}): a number in [0, 1) is wanted.")
        require(
            isinstance(self.rank, int) and self.rank >= 0,
            f"SuperTuning(rank={self.rank!r}): 0 or a positive integer is wanted.",
        )
        require(0.0 <= self.dropout < 1.0, f"SuperTuning(dropout={self.dropout}): a rate in [0, 1) is wanted.")

    @property
    def scale(self) -> float:
        return float((2 * self.rank if self.alpha is None else self.alpha) / self.rank)

    def size(self, n_in: int, n_out: int) -> int:
        """K."""
        return int(n_in * n_out * (1 - self.sparsity))

    def check(self, site: Site) -> str | None:
        _, n_in, n_out = site.canonical_shape
        if not self.size(n_in, n_out):
            return (
                f"sparsity {self.sparsity} leaves none of {n_in * n_out} entries to train; choose one of at most "
                f"{1 - 1 / (n_in * n_out):.4g}"
            )
        return check_rank(self.rank, site)

    def init(self, key: Any, w: Array, site: Site, dtype: Any) -> Params:
        count, sizes = self.size(*w.shape), jnp.abs(unsharded(w)).ravel()
        chosen = jnp.sort(jax.lax.top_k(sizes if self.largest else -sizes, count)[1])
        own: dict[str, Any] = {"values": jnp.zeros((count,), dtype)}
        if self.rank:
            pair = LoRA(self.rank).init(key, w, site, dtype).trainable
            own["factors"] = Factors(pair.a, pair.b, self.scale)
        return Params(own, {"places": jnp.stack([chosen // w.shape[1], chosen % w.shape[1]]).astype(jnp.int32)})

    def count(self, site: Site) -> int:
        _, n_in, n_out = site.canonical_shape
        return site.stack * (self.size(n_in, n_out) + self.rank * (n_in + n_out))

    def dims(self, p: Params) -> Params:
        own: dict[str, Any] = {"values": "_"}
        if self.rank:
            own["factors"] = Factors("in rank", "rank out", self.scale)
        return Params(own, {"places": "_ _"})

    def sparse(self, w: Float[Array, "in out"], p: Params) -> Float[Array, "in out"]:
        return scatter(w, p.frozen["places"], p.trainable["values"])

    def weight(self, w: Float[Array, "in out"], p: Params) -> Float[Array, "in out"]:
        out = self.sparse(w, p)
        if not self.rank:
            return out
        a, b = laid_as(w, *(part.astype(w.dtype) for part in (p.trainable["factors"].a, p.trainable["factors"].b)))
        return out + self.scale * (a @ b)

    def forward(self, dot: Dot, x: Array, w: Array, p: Params, ctx: Context) -> tuple[Array, Any]:
        w = dot.per_matrix(self.sparse, w, p)
        if not self.rank:
            return dot(x, w), None
        pair = p.trainable["factors"]  # apart from w: the fused kernel has no gradient for what it takes to be frozen
        h = dot.inner(x if dot.kind == "lookup" else dropout(x, self.dropout, ctx.key), pair.a)
        return dot(x, w) + dot.outer(h * self.scale, pair.b).astype(w.dtype), None

    def forward_transposed(self, dot: Dot, x: Array, wt: Float[Array, "out in"], p: Params, ctx: Context) -> Array:
        y = dot(x, self.sparse(wt.T, p).T)
        if not self.rank:
            return y
        pair = p.trainable["factors"].swap()
        return y + dot.outer(dot.inner(x, pair.a) * self.scale, pair.b)

    def describe(self) -> dict[str, str]:
        return {"rank": f"{1 - self.sparsity:.3g} of the entries" + (f" + {self.rank}" if self.rank else "")}
