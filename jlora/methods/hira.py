r"""HiRA: a change of weight that is the weight itself times a low-rank matrix, entry by entry.

HiRA: Parameter-Efficient Hadamard High-Rank Adaptation for Large Language Models. Huang et al., 2025.
https://openreview.net/forum?id=TwJrTz9cRS

.. math::  y = x \bigl(W + W \odot (A B)\bigr)

x [..., in], W [in, out] frozen, A [in, r], B [r, out] trained. There is no alpha / r. Trained: r (in + out) a matrix.

The change has as a rule the rank of W, or r times it where that is less than full: it reaches what no pair of LoRA of
this count does, but only along W's own entries, and an entry of W that is zero stays zero.

* The effective weight is one [in, out] temporary a layer, formed again for the gradient rather than kept: there is no
  cheaper exact form than r products with W. One step costs a third product, x^T dy, beside the frozen layer's two.
* A lookup multiplies the looked up row of W by one plus that of A B; no table is formed.
* A linear weight starts with A uniform in +-1/sqrt(in) and B = 0; an embedding with A = 0 and B normal of deviation 1.
* A convolution's A is [window * features, r].

When to use it: where LoRA's rank is what limits it, and larger ranks of LoRA cost too many parameters. It converts to
plain LoRA only truncated.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jlora.methods.base import Method, Site, check_rank, dropout, laid_as, require
from jlora.weight import Context, Dot, Params


@dataclasses.dataclass(frozen=True)
class HiRA(Method):
    """Hadamard high-rank adaptation. The formula and shapes are at the top of this file.

    Parameters of a leaf: trainable ``{"a": [*stack, in, r], "b": [*stack, r, out]}``.

    Attributes:
      rank: r.
      dropout: rate, on the input of the change only. Active exactly when the tree was bound with a key.
      lookup_only: adapt the lookups of a tied embedding and not its use as the output head, as PEFT does.
    """

    rank: int = 32
    _: dataclasses.KW_ONLY
    dropout: float = 0.0
    lookup_only: bool = False

    sliceable = frozenset({"in", "out"})

    def __post_init__(self):
        require(
            isinstance(self.rank, int) and self.rank > 0,
            f"HiRA(rank={self.rank!r}): the rank is a positive integer, 8 to 64 as a rule.",
        )
        require(0.0 <= self.dropout < 1.0, f"HiRA(dropout={self.dropout}): a rate in [0, 1) is wanted.")

    def check(self, site: Site) -> str | None:
        return check_rank(self.rank, site)

    def init(self, key: Any, w: Array, site: Site, dtype: Any) -> Params:
        n_in, n_out = w.shape
        if site.axes.kind == "embedding":
            a, b = jnp.zeros((n_in, self.rank), dtype), jax.random.normal(key, (self.rank, n_out), dtype)
        else:
            a = jax.random.uniform(key, (n_in, self.rank), dtype, -(n_in**-0.5), n_in**-0.5)
            b = jnp.zeros((self.rank, n_out), dtype)
        return Params({"a": a, "b": b})

    def count(self, site: Site) -> int:
        _, n_in, n_out = site.canonical_shape
        return site.stack * self.rank * (n_in + n_out)

    def dims(self, p: Params) -> Params:
        return Params({"a": "in rank", "b": "rank out"})

    def change(self, w: Array, p: Params) -> Float[Array, "in out"]:
        a, b = laid_as(w, p.trainable["a"], p.trainable["b"])
        return (w * (a @ b)).astype(w.dtype)

    def weight(self, w: Array, p: Params) -> Array:
        a, b = laid_as(w, p.trainable["a"], p.trainable["b"])
        return (w * (1 + a @ b)).astype(w.dtype)

    def forward(self, dot: Dot, x: Array, w: Array, p: Params, ctx: Context) -> tuple[Array, Any]:
        if dot.kind == "lookup":
            y = dot(x, w)
            gain = 1 + dot.outer(dot.inner(x, p.trainable["a"]), p.trainable["b"])
            return (y * gain).astype(y.dtype), None
        if ctx.key is not None and self.dropout > 0.0:
            changed = jax.checkpoint(lambda x, w, p: dot(x, dot.per_matrix(self.change, w, p)))
            return dot(x, w) + changed(dropout(x, self.dropout, ctx.key), w, p), None
        return jax.checkpoint(lambda x, w, p: dot(x, dot.per_matrix(self.weight, w, p)))(x, w, p), None

    def forward_transposed(self, dot: Dot, x: Array, wt: Float[Array, "out in"], p: Params, ctx: Context) -> Array:
        return jax.checkpoint(lambda x, wt, p: dot(x, self.weight(wt.T, p).T))(x, wt, p)

    def describe(self) -> dict[str, str]:
        return {"rank": str(self.rank), "scale": "1"}
