r"""MiSS: one trained matrix whose rows are shared by the rows of the weight; and Bat, which the weight guides.

MiSS: Revisiting the Trade-off in LoRA with an Efficient Shard-Sharing Structure. Kang and Yin, 2024 (first as Bone:
Block-Affine Adaptation of Large Language Models). https://arxiv.org/abs/2409.15371

.. math::  \text{MiSS:}\quad y_o = (x W)_o + \sum_{q} u_q D_{qo}, \qquad u_q = \sum_{i \equiv q\ (r)} \mathrm{drop}(x)_i

.. math::  \text{Bat:}\quad W'_{ac} = (I + D_c)\, W_{ac} + D_c, \qquad W_{ac} \text{ a block of } r \times r

x [..., in], W [in, out] frozen, u [..., r]. MiSS: D [r, out] trained; or, with ``mini``, d [r, mini] that is repeated
out / mini times along the outputs. Bat: D_c [r, r] for each of the out / r block columns c. Trained: r out a matrix, or
r mini. D starts at zero, so the output starts as the base's. There is no scale.

* MiSS is LoRA with a frozen A of zeros and ones, A[i, q] = 1 where i = q modulo r, that exists nowhere: u is a sum of
  slices of x. It takes 2 T r out FLOPs for T tokens and is a plain pair of LoRA with that A. r need not divide in.
* With W = 0, Bat is MiSS. It forms the effective weight, with in out r multiplications, as much as r more tokens would
  cost; on activations it would cost as much as a second weight.
* u sums in / r inputs: learning rates are smaller than LoRA's.

When to use them: MiSS instead of LoRA where speed and memory count, at a large rank (64 to 256), since one matrix
trains. Bat gives more for its count than MiSS, and has the cost of a weight that is formed at each step.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from jlora.factors import Factors
from jlora.methods.base import Method, Site, dropout, from_blocks, require, to_blocks
from jlora.weight import Context, Dot, Params


def _check_rank_type(name: str, rank: Any) -> None:
    require(
        isinstance(rank, int) and rank > 0,
        f"{name}(rank={rank!r}): the rank is a positive integer, 16 to 256 as a rule.",
    )


def nearest_divisor(n: int, wanted: int) -> int:
    """The divisor of n that is closest to a wanted one."""
    return min((d for d in range(1, n + 1) if n % d == 0), key=lambda d: abs(d - wanted))


@dataclasses.dataclass(frozen=True)
class MiSS(Method):
    """Shard sharing. The formula and shapes are at the top of this file.

    Parameters of a leaf: trainable ``{"block": [*stack, r, out]}``, or ``[*stack, r, mini]``.

    Attributes:
      rank: r, at most in.
      mini: number of columns of the trained matrix, which divides out; None for all. PEFT's mode "mini".
      dropout: rate, as for LoRA.
    """

    rank: int = 64
    _: dataclasses.KW_ONLY
    mini: int | None = None
    dropout: float = 0.0

    def __post_init__(self):
        _check_rank_type(self.name, self.rank)
        require(
            self.mini is None or (isinstance(self.mini, int) and self.mini > 0),
            f"MiSS(mini={self.mini!r}): a positive number of columns is wanted, or None for all outputs.",
        )
        require(0.0 <= self.dropout < 1.0, f"MiSS(dropout={self.dropout}): a rate in [0, 1) is wanted.")

    @property
    def sliceable(self) -> frozenset[str]:
        return frozenset({"out"} if self.mini is None else ())

    def check(self, site: Site) -> str | None:
        _, n_in, n_out = site.canonical_shape
        if self.rank > n_in:
            return f"rank {self.rank} is above in = {n_in}; choose a rank of at most {n_in}"
        if self.mini is not None and n_out % self.mini:
            return f"mini={self.mini} does not divide out = {n_out}; the nearest is {nearest_divisor(n_out, self.mini)}"

    def init(self, key: Any, w: Array, site: Site, dtype: Any) -> Params:
        return Params(trainable={"block": jnp.zeros((self.rank, self.mini or w.shape[1]), dtype)})

    def count(self, site: Site) -> int:
        return site.stack * self.rank * (self.mini or site.canonical_shape[2])

    def dims(self, p: Params) -> Params:
        return Params(trainable={"block": "rank out" if self.mini is None else "rank _"})

    def _columns(self, n_out: int, block: Float[Array, "r cols"]) -> Float[Array, "r out"]:
        return block if self.mini is None else jnp.tile(block, n_out // self.mini)

    def factors(self, w: Array, p: Params) -> Factors:
        block = p.trainable["block"]
        a = jnp.arange(w.shape[0])[:, None] % self.rank == jnp.arange(self.rank)
        return Factors(a.astype(block.dtype), self._columns(w.shape[1], block))

    def weight(self, w: Array, p: Params) -> Array:
        d = self._columns(w.shape[1], p.trainable["block"]).astype(w.dtype)
        return w + d[jnp.arange(w.shape[0]) % self.rank]

    def forward(self, dot: Dot, x: Array, w: Array, p: Params, ctx: Context) -> tuple[Array, Any]:
        if not dot.features_last(x):
            return super().forward(dot, x, w, p, ctx)
        u, (n_in, n_out) = dropout(x, self.dropout, ctx.key), w.shape
        if n_in % self.rank:
            u = jnp.pad(u, [(0, 0)] * (u.ndim - 1) + [(0, -n_in % self.rank)])
        u = u.reshape(*u.shape[:-1], -1, self.rank).sum(-2)
        z = dot.outer(u, p.trainable["block"])
        return dot(x, w) + self._columns(n_out, z), None

    def describe(self) -> dict[str, str]:
        return {"rank": str(self.rank), "scale": "1"}


@dataclasses.dataclass(frozen=True)
class Bat(Method):
    """Block-affine adaptation, guided by the weight. The formula and shapes are at the top of this file.

    Parameters of a leaf: trainable ``{"block": [*stack, out / r, r, r]}``.

    Attributes:
      rank: r, the side of the blocks. It divides in and out.
    """

    rank: int = 64

    def __post_init__(self):
        _check_rank_type(self.name, self.rank)

    def check(self, site: Site) -> str | None:
        _, n_in, n_out = site.canonical_shape
        both = math.gcd(n_in, n_out)
        if both % self.rank:
            nearest = nearest_divisor(both, self.rank)
            return f"rank {self.rank} does not divide both in = {n_in} and out = {n_out}; the nearest is {nearest}"

    def init(self, key: Any, w: Array, site: Site, dtype: Any) -> Params:
        return Params(trainable={"block": jnp.zeros((w.shape[1] // self.rank, self.rank, self.rank), dtype)})

    def count(self, site: Site) -> int:
        return site.stack * self.rank * site.canonical_shape[2]

    def dims(self, p: Params) -> Params:
        return Params(trainable={"block": "_ _ _"})

    def weight(self, w: Array, p: Params) -> Array:
        r, d = self.rank, p.trainable["block"].astype(w.dtype)
        blocks = to_blocks(w, r, r)
        if (columns := jax.typeof(blocks).sharding.spec[2]) is not None:
            d = jax.reshard(d, PartitionSpec(columns, None, None))
        change = jnp.einsum("cij,ajck->aick", d, blocks) + d.transpose(1, 0, 2)
        return w + from_blocks(change, w)

    def describe(self) -> dict[str, str]:
        return {"rank": str(self.rank), "scale": "1"}
