r"""KaSA: the smallest singular components of a weight make room for a pair with singular values of its own.

KaSA: Knowledge-Aware Singular-Value Adaptation of Large Language Models. Wang et al., 2024.
https://arxiv.org/abs/2412.06071

.. math::  y = x\,(W - U_r S_r V_r^\top) + s\,\bigl((\mathrm{drop}(x) A) \odot \sigma\bigr) B, \qquad s = \alpha / r

W [in, out] frozen; U_r [in, r], S_r [r], V_r^T [r, out] its r smallest singular triples, frozen. A [in, r], B [r, out]
and sigma [r], the singular values of the change, trained. Trained: r (in + out) + r a matrix.

* A and B start as LoRA's, sigma normal with deviation 1. The output does not start as the base's, but as that of the
  base without its smallest components, which the paper holds to be noise.
* W itself stays as it is: what is taken away is a second, frozen pair, of the adapter. (PEFT changes the base weight
  and cannot give it back.)
* The paper adds beta |sigma|^2 + gamma (|A^T A - I| + |B B^T - I|) to the loss (Frobenius norms; in PEFT beta = 1e-4
  and gamma = 1e-3). That is the training's business.
* Starting takes a full singular value decomposition of each matrix.

When to use it: in the place of LoRA where the base is thought to hold knowledge that is in the way. A pass costs two
pairs; merged it costs nothing.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jlora.factors import Factors
from jlora.methods.base import Method, Site, at_most, dropout, require, unsharded
from jlora.methods.lora import LoRA
from jlora.weight import Context, Dot, Params


@dataclasses.dataclass(frozen=True)
class KaSA(Method):
    """A pair with singular values over a truncated weight. The formula and shapes are at the top of this file.

    Parameters of a leaf: trainable ``{"factors": Factors(a [*stack, in, r], b [*stack, r, out]), "sigma": [*stack,
    r]}``, frozen ``{"cut_a": [*stack, in, r], "cut_b": [*stack, r, out]}``, U_r S_r and V_r^T.

    Attributes:
      rank: r, of what is taken away and of what is put in its place. Below min(in, out).
      alpha: numerator of the scale.
      rslora: divide by sqrt(r) instead of r.
      dropout: rate, on the input of the trained branch.
    """

    rank: int = 8
    alpha: float = 16.0
    _: dataclasses.KW_ONLY
    rslora: bool = False
    dropout: float = 0.0

    sliceable = frozenset({"in", "out"})

    def __post_init__(self):
        require(
            isinstance(self.rank, int) and self.rank > 0,
            f"KaSA(rank={self.rank!r}): the rank is a positive integer, 4 to 64 as a rule.",
        )
        require(0.0 <= self.dropout < 1.0, f"KaSA(dropout={self.dropout}): a rate in [0, 1) is wanted.")

    @property
    def scale(self) -> float:
        return LoRA(self.rank, self.alpha, rslora=self.rslora).scale

    def check(self, site: Site) -> str | None:
        most = min(site.canonical_shape[1:]) - 1
        if self.rank > most:
            return f"rank {self.rank} leaves nothing of a weight of rank {most + 1}; {at_most(most)}"
        return None

    def init(self, key: Any, w: Array, site: Site, dtype: Any) -> Params:
        key_pair, key_sigma = jax.random.split(key)
        pair = LoRA(self.rank, self.alpha, rslora=self.rslora).init(key_pair, w, site, dtype).trainable
        w = unsharded(w)
        with jax.default_matmul_precision("highest"):
            u, s, vh = jnp.linalg.svd(w.astype(jnp.promote_types(w.dtype, jnp.float32)), full_matrices=False)
        r = self.rank
        frozen = {"cut_a": (u[:, -r:] * s[-r:]).astype(dtype), "cut_b": vh[-r:].astype(dtype)}
        return Params({"factors": pair, "sigma": jax.random.normal(key_sigma, (r,), dtype)}, frozen)

    def count(self, site: Site) -> int:
        _, n_in, n_out = site.canonical_shape
        return site.stack * self.rank * (n_in + n_out + 1)

    def dims(self, p: Params) -> Params:
        scale = p.trainable["factors"].scale
        own = {"factors": Factors("in rank", "rank out", scale), "sigma": "rank"}
        return Params(own, {"cut_a": "in rank", "cut_b": "rank out"})

    def pair(self, p: Params) -> Factors:
        """What is put in."""
        f = p.trainable["factors"]
        return Factors(f.a * (f.scale * p.trainable["sigma"]).astype(f.a.dtype), f.b)

    def factors(self, w: Array, p: Params) -> Factors:
        f = self.pair(p)
        a, b = -p.frozen["cut_a"].astype(f.a.dtype), p.frozen["cut_b"].astype(f.b.dtype)
        return Factors(jnp.concatenate([f.a, a], axis=1), jnp.concatenate([f.b, b], axis=0))

    def forward(self, dot: Dot, x: Array, w: Array, p: Params, ctx: Context) -> tuple[Array, Any]:
        if ctx.key is None or self.dropout == 0.0 or dot.kind == "lookup":
            return super().forward(dot, x, w, p, ctx)
        f = dot.per_matrix(lambda w, p: self.pair(p), w, p)
        kept = dot(x, w) - dot.outer(dot.inner(x, p.frozen["cut_a"]), p.frozen["cut_b"])
        return kept + dot.outer(dot.inner(dropout(x, self.dropout, ctx.key), f.a), f.b), None

    def describe(self) -> dict[str, str]:
        return {"rank": str(self.rank), "scale": f"{self.scale:g}"}
