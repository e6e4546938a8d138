r"""VeRA: random projections shared by the whole model, two trained vectors a matrix.

VeRA: Vector-based Random Matrix Adaptation. Kopiczko, Blankevoort and Asano, 2023. https://arxiv.org/abs/2310.11454

.. math::  y = x W + \bigl((\mathrm{drop}(x) A) \odot d\bigr) B \odot b

W [in, out] frozen; A [in, r] and B [r, out] frozen, the leading rows and columns of one pair A [max in, r],
B [r, max out] for the whole model; d [r] and b [out] trained. There is no alpha / r. Trained: r + out a matrix.

A and B are uniform in +-sqrt(6 / fan in) (max in, and r); d starts at ``d_initial`` and b at 0, so the output starts as
the base's and the first gradient of d is zero. The pair exists once, whatever the depth: it is a constant of a scan's
body, not one of its slices.

When to use it: many adapters to store, each a few kilobytes. As a pair of plain LoRA it has the full rank r, 256 by
default: it costs what LoRA of rank 256 costs to run.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jlora.factors import Factors
from jlora.methods.base import Method, Site, require
from jlora.weight import Params


@dataclasses.dataclass(frozen=True)
class VeRA(Method):
    """Vector-based random matrix adaptation. The formula and shapes are at the top of this file.

    Parameters of a leaf: trainable ``{"d": [*stack, r], "b": [*stack, out]}``; of the group: frozen
    ``{"a": [max in, r], "b": [r, max out]}``.

    Attributes:
      rank: r, which may exceed the matrices'.
      d_initial: where d starts. Smaller is closer to the base for longer.
      dropout: rate, as for LoRA.
      group: name of the shared pair. Two VeRA rules of different rank need two names.
    """

    rank: int = 256
    _: dataclasses.KW_ONLY
    d_initial: float = 0.1
    dropout: float = 0.0
    group: str = "vera"

    sliceable = frozenset({"in", "out"})

    def __post_init__(self):
        require(
            isinstance(self.rank, int) and self.rank > 0,
            f"VeRA(rank={self.rank!r}): the rank is a positive integer, 64 to 1024 as a rule.",
        )
        require(0.0 <= self.dropout < 1.0, f"VeRA(dropout={self.dropout}): a rate in [0, 1) is wanted.")

    def init(self, key: Any, w: Array, site: Site, dtype: Any) -> Params:
        d = jnp.full((self.rank,), self.d_initial, dtype)
        return Params(trainable={"d": d, "b": jnp.zeros((w.shape[1],), dtype)})

    def init_shared(self, key: Any, sites: dict[str, Site], dtype: Any) -> Params:
        n_in = max(site.canonical_shape[1] for site in sites.values())
        n_out = max(site.canonical_shape[2] for site in sites.values())
        key_a, key_b = jax.random.split(key)
        uniform = lambda key, shape: jax.random.uniform(
            key, shape, dtype, -((6 / shape[0]) ** 0.5), (6 / shape[0]) ** 0.5
        )
        return Params(frozen={"a": uniform(key_a, (n_in, self.rank)), "b": uniform(key_b, (self.rank, n_out))})

    def count(self, site: Site) -> int:
        return site.stack * (self.rank + site.canonical_shape[2])

    def dims(self, p: Params) -> Params:
        return Params(trainable={"d": "rank", "b": "out"}, shared={"a": "in rank", "b": "rank out"})

    def factors(self, w: Array, p: Params) -> Factors:
        d, b = p.trainable["d"], p.trainable["b"]
        a = p.shared["a"][: w.shape[0]].astype(d.dtype) * d
        return Factors(a, p.shared["b"][:, : w.shape[1]].astype(b.dtype) * b)

    def describe(self) -> dict[str, str]:
        return {"rank": str(self.rank), "scale": "1"}
