r"""Uni-LoRA: all factors of the model are one trained vector, laid out by a fixed isometry.

Uni-LoRA: One Vector is All You Need. Li et al., 2025. https://arxiv.org/abs/2506.00799

.. math::  y = x W + (\mathrm{drop}(x) A) B, \quad A_{ij} = \theta_k / \sqrt{n_k}, \ k = k(i, j), \ B \text{ likewise}

W [in, out] frozen; theta [d] trained, one for the whole model; k a place in theta for every entry of A [in, r] and
B [r, out], frozen; n_k how many entries of the whole model have the place k. There is no alpha / r. Trained: d in all,
whatever the rank and the depth.

* The map from theta to all factors has orthonormal columns, so distances in theta are distances in the factors. The
  places are drawn so that the n_k differ by at most 1; 1 / sqrt(n_k) is kept once for the group, not for every entry.
* It does not start as the base: theta is uniform in +-0.02, and so both factors are not zero.
* Places are JAX's random numbers. PEFT's, which numpy draws from a seed, are read from its files, or drawn again.

When to use it: the smallest adapters to store, d numbers (and a seed). It costs what LoRA of rank r costs to run, and
in memory an integer for each entry of the factors.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jlora.factors import Factors
from jlora.methods.base import Method, Site, require
from jlora.weight import Params


@dataclasses.dataclass(frozen=True)
class UniLoRA(Method):
    """Low-rank adaptation by one vector. The formula and shapes are at the top of this file.

    Parameters of a leaf: no trainable ones; frozen ``{"a": [*stack, in, r], "b": [*stack, r, out]}``, the places. Of
    the group: trainable ``{"theta": [d]}``, frozen ``{"scale": [d]}``, which is 1 / sqrt(n).

    Attributes:
      rank: r.
      length: d, how many numbers are trained. The authors use tens of thousands.
      dropout: rate, as for LoRA.
      init_theta: bound of the uniform start.
      group: name of the vector. Two rules with vectors of their own need two names.
    """

    rank: int = 4
    _: dataclasses.KW_ONLY
    length: int = 256
    dropout: float = 0.0
    init_theta: float = 0.02
    group: str = "unilora"

    sliceable = frozenset({"in", "out"})

    def __post_init__(self):
        for field in ("rank", "length"):
            value = getattr(self, field)
            require(isinstance(value, int) and value > 0, f"UniLoRA({field}={value!r}): a positive integer is wanted.")
        require(0.0 <= self.dropout < 1.0, f"UniLoRA(dropout={self.dropout}): a rate in [0, 1) is wanted.")

    def sizes(self, sites: dict[str, Site]) -> dict[str, int]:
        """How many entries the factors of each leaf have."""
        return {path: self.rank * site.stack * sum(site.canonical_shape[1:]) for path, site in sites.items()}

    def init(self, key: Any, w: Array, site: Site, dtype: Any) -> Params:
        return Params(trainable={})

    def init_shared(self, key: Any, sites: dict[str, Site], dtype: Any) -> Params:
        theta = jax.random.uniform(key, (self.length,), dtype, -self.init_theta, self.init_theta)
        total = sum(self.sizes(sites).values())
        counts = jnp.full((self.length,), total // self.length) + (jnp.arange(self.length) < total % self.length)
        scale = jnp.maximum(counts, 1).astype(dtype) ** -0.5
        return Params(trainable={"theta": theta}, frozen={"scale": scale})

    def init_members(self, key: Any, sites: dict[str, Site], dtype: Any) -> dict[str, dict[str, Array]]:
        sizes = self.sizes(sites)
        places = jnp.arange(sum(sizes.values()), dtype=jnp.int32) % self.length
        places = jax.random.permutation(jax.random.fold_in(key, 1), places)
        out, start = {}, 0
        for path, site in sites.items():
            stack, n_in, n_out = site.canonical_shape
            middle = start + math.prod(stack) * n_in * self.rank
            end = start + sizes[path]
            a, b = places[start:middle], places[middle:end]
            out[path] = {"a": a.reshape(*stack, n_in, self.rank), "b": b.reshape(*stack, self.rank, n_out)}
            start = end
        return out

    def count(self, site: Site) -> int:
        return 0

    def count_shared(self, sites: dict[str, Site]) -> int:
        return self.length

    def dims(self, p: Params) -> Params:
        places = None if p.frozen is None else {"a": "in rank", "b": "rank out"}
        return Params(trainable={}, frozen=places, shared={"scale": "_", "theta": "_"})

    def factors(self, w: Array, p: Params) -> Factors:
        theta = p.shared["theta"] * p.shared["scale"].astype(p.shared["theta"].dtype)
        return Factors(theta[p.frozen["a"]], theta[p.frozen["b"]])

    def describe(self) -> dict[str, str]:
        return {"rank": str(self.rank), "scale": "1"}
