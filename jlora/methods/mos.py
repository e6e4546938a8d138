r"""MoS: every row of every factor is put together from shards of one global pool.

MoS: Unleashing Parameter Efficiency of Low-Rank Adaptation with Mixture of Shards. Wang et al., 2024.
https://arxiv.org/abs/2410.00938

.. math::  y = x W + s\,(\mathrm{drop}(x) A) B, \quad A_{:j} = [P^A_{k(j,1)}, .., P^A_{k(j,c)}], \quad s = \alpha / r

W [in, out] frozen, A [in, r]; B [r, out] row by row likewise from P^B and places of its own. Pools P^A [e L c, in / c]
and P^B [e L c, out / c] trained, one pair for the L matrices of the same shape; k the places, frozen. Trained: what
LoRA of rank e has, e (in + out) a matrix, at any rank r.

* Of the e L c shards of a pool, p c belong to each matrix alone and make its last p rows; the other r - p rows take
  shards of the public rest, each matrix drawing its own without replacement, for A and B apart.
* There is no routing at run time: the places are drawn once.
* P^A starts uniform in +-1/sqrt(in) and P^B at 0, so the output starts as the base's. p = e = r with c = 1 is LoRA.

When to use it: many layers of equal shape, and fewer parameters than LoRA of the rank that the task wants: r = 4 e to
8 e. It costs what LoRA of rank r costs to run, and a gather of the factors.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jlora.factors import Factors
from jlora.methods.base import Method, Site, require
from jlora.methods.tied import shape_name
from jlora.weight import Params


@dataclasses.dataclass(frozen=True)
class MoS(Method):
    """Mixture of shards. The formula and shapes are at the top of this file.

    Parameters of a leaf: no trainable ones; frozen ``{"a": [*stack, r, c], "b": [*stack, r, c]}``, the places. Of the
    group: trainable ``{"8x16": {"a": [e L c, 8 / c], "b": [e L c, 16 / c]}, ...}`` for each shape.

    Attributes:
      rank: r.
      alpha: numerator of the scale.
      budget: e, the rank of the LoRA with as many parameters.
      shards: c, in how many pieces a row is cut. It divides in and out of every adapted matrix.
      private: p, how many rows of each matrix are its own; less than ``budget``, or equal to both it and ``rank``.
      dropout: rate, as for LoRA.
      group: name of the pools. Whatever has the same shape and group shares one.
    """

    rank: int = 16
    alpha: float = 16.0
    _: dataclasses.KW_ONLY
    budget: int = 4
    shards: int = 4
    private: int = 1
    dropout: float = 0.0
    group: str = "mos"

    def __post_init__(self):
        for field in ("rank", "budget", "shards"):
            value = getattr(self, field)
            require(isinstance(value, int) and value > 0, f"MoS({field}={value!r}): a positive integer is wanted.")
        require(
            0 <= self.private < min(self.budget, self.rank + 1) or self.private == self.budget == self.rank,
            f"MoS(rank={self.rank}, budget={self.budget}, private={self.private}): private is wanted below budget and "
            "at most rank, or equal to both.",
        )
        require(0.0 <= self.dropout < 1.0, f"MoS(dropout={self.dropout}): a rate in [0, 1) is wanted.")

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def check(self, site: Site) -> str | None:
        _, n_in, n_out = site.canonical_shape
        if n_in % self.shards or n_out % self.shards:
            fits = [c for c in range(1, min(n_in, n_out) + 1) if n_in % c == 0 == n_out % c]
            nearest = min(fits, key=lambda c: (abs(c - self.shards), c))
            return (
                f"shards {self.shards} does not divide in = {n_in} and out = {n_out}; the nearest that does: {nearest}"
            )
        return None

    def pools(self, sites: dict[str, Site]) -> dict[tuple[int, int], int]:
        """How many matrices there are of each shape."""
        sizes: dict[tuple[int, int], int] = {}
        for site in sites.values():
            shape = site.canonical_shape[1:]
            sizes[shape] = sizes.get(shape, 0) + site.stack
        for (n_in, n_out), n in sizes.items():
            public = (self.budget - self.private) * n
            require(
                public >= self.rank - self.private,
                f"{_like(sites, (n_in, n_out))}: {n} matrices of {n_in} x {n_out} share {public} public rows, and each "
                f"wants {self.rank - self.private}; choose a rank of at most {public + self.private} ({self}).",
            )
        return sizes

    def init(self, key: Any, w: Array, site: Site, dtype: Any) -> Params:
        return Params(trainable={})

    def init_shared(self, key: Any, sites: dict[str, Site], dtype: Any) -> Params:
        pools = {}
        for (n_in, n_out), n in self.pools(sites).items():
            rows, bound = self.budget * n * self.shards, n_in**-0.5
            key_a = jax.random.fold_in(jax.random.fold_in(key, n_in), n_out)
            a = jax.random.uniform(key_a, (rows, n_in // self.shards), dtype, -bound, bound)
            pools[shape_name(n_in, n_out)] = {"a": a, "b": jnp.zeros((rows, n_out // self.shards), dtype)}
        return Params(trainable=pools)

    def init_members(self, key: Any, sites: dict[str, Site], dtype: Any) -> dict[str, dict[str, Array]]:
        sizes, seen, out = self.pools(sites), {}, {}
        own, drawn = self.private * self.shards, (self.rank - self.private) * self.shards
        for path, site in sites.items():
            stack, *shape = site.canonical_shape
            shape, start = tuple(shape), seen.get(tuple(shape), 0)
            public = (self.budget - self.private) * sizes[shape] * self.shards

            def places(i: Array, side: int, shape: tuple = shape, public: int = public) -> Array:
                """Of the i-th matrix of its shape."""
                here = functools.reduce(jax.random.fold_in, (1, *shape, i, side), key)
                shared = jax.random.permutation(here, public)[:drawn]
                private = public + i * own + jnp.arange(own)
                return jnp.concatenate([shared, private]).astype(jnp.int32).reshape(self.rank, self.shards)

            which = start + jnp.arange(site.stack)
            each = {name: jax.vmap(functools.partial(places, side=side))(which) for side, name in enumerate("ab")}
            out[path] = {name: p.reshape(*stack, self.rank, self.shards) for name, p in each.items()}
            seen[shape] = start + site.stack
        return out

    def count(self, site: Site) -> int:
        return 0

    def count_shared(self, sites: dict[str, Site]) -> int:
        return sum(self.budget * n * sum(shape) for shape, n in self.pools(sites).items())

    def dims(self, p: Params) -> Params:
        places = None if p.frozen is None else {"a": "rank _", "b": "rank _"}
        return Params(trainable={}, frozen=places, shared=jax.tree.map(lambda leaf: "_ _", p.shared))

    def factors(self, w: Array, p: Params) -> Factors:
        pool = p.shared[shape_name(*w.shape)]
        a, b = (pool[name][p.frozen[name]].reshape(self.rank, -1) for name in "ab")
        return Factors(a.T, b, self.scale)

    def describe(self) -> dict[str, str]:
        return {"rank": str(self.rank), "scale": f"{self.scale:g}"}


def _like(sites: dict[str, Site], shape: tuple[int, int]) -> str:
    """The first leaf with matrices of this shape, as errors name one."""
    path, site = next((path, site) for path, site in sites.items() if site.canonical_shape[1:] == shape)
    return f"{path!r} {site.shape}"
