r"""PELA: a product of two smaller matrices in the place of a weight.

PELA: Learning Parameter-Efficient Models with Low-Rank Approximation. Guo et al., 2023.
https://arxiv.org/abs/2310.10700

.. math::  y = (x A) B, \qquad A = U_r S_r^{1/2}, \quad B = S_r^{1/2} V_r^\top \text{ at the start}

A [in, r], B [r, out] trained; U_r S_r V_r^T are the leading singular triples of W [in, out], which the product does not
use. r = floor(in out / (c (in + out))) for a compression ratio c: the weight's parameters shrink by c or a little more.
Trained: r (in + out) a matrix.

* The output starts displaced, by what the best matrix of rank r leaves of W: the squares of the singular values beyond
  the r-th. Where c is so small that r is min(in, out), nothing is left.
* The weight itself is still in ``adapted.base``, as the teacher of PELA's training: task loss, plus the mean squared
  difference between the features of ``adapted.base`` and of ``adapted.bind(trainable)`` where the two are captured,
  plus ``(max |A B - W| - eps)^2`` if wanted. ``jlora.factorize`` gives the small model without the teacher.
* The authors' code passes over layers of fewer than 10 outputs, heads among them, and over names given to it: here
  that is for ``targets`` and ``exclude``. It decomposes with full matrices, to the same result.

When to use it: not as an adapter. It makes a smaller and faster model of a large one, to be trained for a while on the
large one's features and then fine-tuned, fully or with an adapter on ``jlora.merge`` of it.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from jlora.factors import Factors
from jlora.linalg import truncated_svd
from jlora.methods.base import Method, Site, require, sharded_as, unsharded
from jlora.weight import Context, Dot, Params


@dataclasses.dataclass(frozen=True)
class PELA(Method):
    """A pair of factors instead of a weight. The formula is at the top of this file.

    Parameters of a leaf: trainable ``Factors(a [*stack, in, r], b [*stack, r, out])``.

    Attributes:
      ratio: c. 2 to 3 as a rule; the larger, the smaller the model.
    """

    ratio: float = 2.0

    sliceable = frozenset({"in", "out"})

    def __post_init__(self):
        require(self.ratio > 0, f"PELA(ratio={self.ratio!r}): a positive number is wanted, 2 to 3 as a rule.")

    def rank(self, n_in: int, n_out: int) -> int:
        return min(int(n_in * n_out // (self.ratio * (n_in + n_out))), n_in, n_out)

    def check(self, site: Site) -> str | None:
        _, n_in, n_out = site.canonical_shape
        if self.rank(n_in, n_out) == 0:
            most = n_in * n_out / (n_in + n_out)
            return (
                f"a ratio of {self.ratio:g} leaves no rank of {n_in} x {n_out}; the ratio is at most {most:.3g} there"
            )

    def init(self, key: Any, w: Float[Array, "in out"], site: Site, dtype: Any) -> Params:
        u, s, vh = truncated_svd(unsharded(w), self.rank(*w.shape), key=key)
        root = jnp.sqrt(s)
        return Params(Factors((u * root).astype(dtype), (root[:, None] * vh).astype(dtype)))

    def count(self, site: Site) -> int:
        _, n_in, n_out = site.canonical_shape
        return site.stack * self.rank(n_in, n_out) * (n_in + n_out)

    def dims(self, p: Params) -> Params:
        return Params(Factors("in rank", "rank out"))

    # The pair is in the place of the weight and not added to it: these are no ``factors``.

    def weight(self, w: Float[Array, "in out"], p: Params) -> Float[Array, "in out"]:
        return sharded_as(w, p.trainable.product().astype(w.dtype))

    def forward(self, dot: Dot, x: Array, w: Array, p: Params, ctx: Context) -> tuple[Array, Any]:
        y = dot.outer(dot.inner(x, p.trainable.a), p.trainable.b)
        return (y.astype(w.dtype) if dot.kind == "lookup" else y), None

    def forward_transposed(self, dot: Dot, x: Array, wt: Float[Array, "out in"], p: Params, ctx: Context) -> Array:
        swapped = p.trainable.swap()
        return dot.outer(dot.inner(x, swapped.a), swapped.b)

    def describe(self) -> dict[str, str]:
        return {"rank": f"1/{self.ratio:g} of the size"}
