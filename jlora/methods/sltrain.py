r"""SLTrain: a low-rank product and a few free entries in the place of a weight, trained from scratch.

SLTrain: a sparse plus low-rank approach for parameter and memory efficient pretraining. Han et al., 2024.
https://arxiv.org/abs/2406.02214

.. math::  y = x \Bigl( \frac{\alpha}{r} A B + S \Bigr), \qquad S_{i_k o_k} = v_k, \quad k = 1 \ldots K,
           \qquad K = \lfloor \delta\, \mathrm{in}\, \mathrm{out} \rfloor

A [in, r], B [r, out] and v [K] trained; the places (i_k, o_k), drawn at random, all different, frozen. Trained:
r (in + out) + K a matrix, and 2 K integers are stored. There is no weight [in, out] beside, and none in the optimizer;
yet the rank can be full.

* A starts uniform in +-1/sqrt(in), B at zero, v uniform in +-1/sqrt(in): the product of the model starts as that of S
  alone, whatever the weight was.
* The matrix is formed for the product, for the forward pass and again for the backward one, and not kept. Its gradient
  is formed too, and v takes K entries of it: the FLOPs of full training and a little more, and the memory of less.
* ``jlora.factorize(params, jlora.SLTrain(...), key=key)`` gives the model without its weights; with ``adapt`` they stay
  in ``base`` unused.
* Verified against the authors' code: formula, start, scale. There the places are one flat index; a trained scale, which
  it has as an option, is not here. Drawn at random, places scatter over devices where the weight is sharded.

When to use it: pretraining in less memory than full training, at r of a quarter of the width and delta of 0.01 to 0.05.
The paper comes close to full-rank perplexity with it, where a product alone does not.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jlora.factors import Factors
from jlora.methods.base import Method, Site, check_rank, laid_as, require
from jlora.methods.shira import scatter
from jlora.weight import Context, Dot, Params


@dataclasses.dataclass(frozen=True)
class SLTrain(Method):
    """Sparse plus low rank. The formula and shapes are at the top of this file.

    Parameters of a leaf: trainable ``{"pair": Factors(a [*stack, in, r], b [*stack, r, out]), "values": [*stack, K]}``,
    frozen ``{"places": [*stack, 2, K]}``, int32, rows above columns, in order.

    Attributes:
      rank: r.
      density: delta, the share of free entries.
      alpha: numerator of the scale alpha / r.
    """

    rank: int = 128
    density: float = 0.03
    _: dataclasses.KW_ONLY
    alpha: float = 32.0

    replaces = True

    def __post_init__(self):
        require(
            isinstance(self.rank, int) and self.rank > 0,
            f"SLTrain(rank={self.rank!r}): the rank is a positive integer, a quarter of the width as a rule.",
        )
        require(
            0.0 < self.density < 1.0,
            f"SLTrain(density={self.density!r}): a share between 0 and 1 is wanted, 0.01 to 0.05 as a rule.",
        )

    def free(self, n_in: int, n_out: int) -> int:
        """K."""
        return int(self.density * n_in * n_out)

    def check(self, site: Site) -> str | None:
        _, n_in, n_out = site.canonical_shape
        if self.free(n_in, n_out) == 0:
            return f"a density of {self.density:g} leaves no free entry of {n_in * n_out}; use PELA for a product alone"
        return check_rank(self.rank, site)

    def init(self, key: Any, w: Array, site: Site, dtype: Any) -> Params:
        n_in, n_out = w.shape
        of_a, of_v, of_places = jax.random.split(key, 3)
        uniform = lambda key, shape: jax.random.uniform(key, shape, dtype, -(n_in**-0.5), n_in**-0.5)
        count = self.free(n_in, n_out)
        chosen = jnp.sort(jax.random.choice(of_places, n_in * n_out, (count,), replace=False))
        pair = Factors(uniform(of_a, (n_in, self.rank)), jnp.zeros((self.rank, n_out), dtype), self.alpha / self.rank)
        at = jnp.stack([chosen // n_out, chosen % n_out]).astype(jnp.int32)
        return Params({"pair": pair, "values": uniform(of_v, (count,))}, {"places": at})

    def count(self, site: Site) -> int:
        _, n_in, n_out = site.canonical_shape
        return site.stack * (self.rank * (n_in + n_out) + self.free(n_in, n_out))

    def dims(self, p: Params) -> Params:
        pair = Factors("in rank", "rank out", self.alpha / self.rank)
        return Params({"pair": pair, "values": "_"}, {"places": "_ _"})

    def weight(self, w: Float[Array, "in out"], p: Params) -> Float[Array, "in out"]:
        pair = p.trainable["pair"]
        a, b = laid_as(w, pair.a, pair.b)
        product = pair.scale * jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
        return scatter(product, p.frozen["places"], p.trainable["values"]).astype(w.dtype)

    def forward(self, dot: Dot, x: Array, w: Array, p: Params, ctx: Context) -> tuple[Array, Any]:
        return jax.checkpoint(lambda x, w, p: dot(x, dot.per_matrix(self.weight, w, p)))(x, w, p), None

    def forward_transposed(self, dot: Dot, x: Array, wt: Float[Array, "out in"], p: Params, ctx: Context) -> Array:
        return jax.checkpoint(lambda x, wt, p: dot(x, self.weight(wt.T, p).T))(x, wt, p)

    def describe(self) -> dict[str, str]:
        return {"rank": f"{self.rank} + {self.density:.0%}", "scale": f"{self.alpha / self.rank:g}"}
