r"""SHiRA: a few entries of the weight itself are trained, the rest stays.

Sparse High Rank Adapters. Bhardwaj et al., 2024. https://arxiv.org/abs/2406.13175

.. math::  W'_{i_k o_k} = W_{i_k o_k} + s\, v_k, \qquad k = 1 \ldots K, \qquad K = r (\mathrm{in} + \mathrm{out})

W [in, out] frozen; v [K] trained; the places (i_k, o_k), all different, frozen. Trained: r (in + out) a matrix, as
many as LoRA of rank r, but the change is of high rank. v starts at zero, so the output starts as the base's.

* The effective weight is formed, by a scatter of K numbers: nothing on top of the frozen model's FLOPs in the forward
  pass. The gradient of v are K entries of the gradient of W, which is formed for it, as in full training: 2 T in out
  FLOPs for T tokens; choosing the K products of activations one by one costs more on any accelerator.
* The places are drawn at random, or are those of the entries that are largest by size, by gradient or by the product
  of both: ``start=jlora.init.MagnitudeMask()``, ``GradientMask()`` or ``SNIPMask()``, the last two from what
  ``jlora.calibrate`` found. ``places`` gives the frozen parameter for any mask of one's own.
* Stored are v and the places, K numbers and 2 K integers a matrix. An adapter is switched in by a scatter, ``merge``,
  and out by going back to the base, which is exact. Adapters whose places are disjoint do not touch each other.
* In a bfloat16 model the sum is rounded to bfloat16, as it is when merged: use it with a float32 base, or in a model
  that casts its weights, where small steps have to count.

When to use it: adapters that are switched often or several at a time. It does not export to plain LoRA.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from jlora.methods.base import Method, Site, Start, at_most, check_start, require, unsharded
from jlora.weight import Params


def places(mask: Bool[Array, "in out"], count: int) -> Int[Array, "2 count"]:
    """The rows and columns of a mask's entries, for the frozen parameter of a leaf; ``count`` of them, K.

    >>> largest = jnp.abs(w) >= jnp.sort(jnp.abs(w).ravel())[-count]
    >>> frozen = adapted.frozen | {path: {"places": places(largest, count)}}
    """
    found = jnp.stack(jnp.nonzero(mask, size=count, fill_value=0)).astype(jnp.int32)
    k = jnp.arange(count, dtype=jnp.int32)
    nowhere = jnp.stack([mask.shape[0] + k, jnp.zeros_like(k)])
    return jnp.where(k < jnp.count_nonzero(mask), found, nowhere)


def scatter(w: Float[Array, "in out"], at: Int[Array, "2 k"], values: Float[Array, " k"]) -> Float[Array, "in out"]:
    """``w`` with the values added at places that are different and in order."""
    rows, columns = at
    spec = jax.typeof(w).sharding.spec
    sharding = None if all(axis is None for axis in spec) else PartitionSpec(*spec)
    return w.at[rows, columns].add(
        values.astype(w.dtype), mode="drop", indices_are_sorted=True, unique_indices=True, out_sharding=sharding
    )


@dataclasses.dataclass(frozen=True)
class SHiRA(Method):
    """Sparse high-rank adaptation. The formula and shapes are at the top of this file.

    Parameters of a leaf: trainable ``{"values": [*stack, K]}``, frozen ``{"places": [*stack, 2, K]}``, int32, rows
    above columns, in order. Places below the weight, all different, stand for none.

    Attributes:
      rank: r, for as many trained numbers as LoRA of this rank has.
      scale: s. Anything above 0 to train with; other values to weaken or strengthen a trained adapter.
      start: what chooses the places, a mask of ``jlora.init``; None for at random.
    """

    rank: int = 32
    _: dataclasses.KW_ONLY
    scale: float = 1.0
    start: Start | None = None

    def __post_init__(self):
        require(
            isinstance(self.rank, int) and self.rank > 0,
            f"SHiRA(rank={self.rank!r}): a positive integer is wanted, 4 to 64 as a rule.",
        )
        check_start(self.start, self.name)
        require(
            self.start is None or hasattr(self.start, "scores"),
            f"SHiRA(start={self.start}): jlora.init.MagnitudeMask(), GradientMask() or SNIPMask() is wanted.",
        )

    @property
    def needs(self) -> tuple[str, ...]:
        return () if self.start is None else self.start.needs

    def size(self, n_in: int, n_out: int) -> int:
        """K."""
        return self.rank * (n_in + n_out)

    def check(self, site: Site) -> str | None:
        _, n_in, n_out = site.canonical_shape
        if self.size(n_in, n_out) > n_in * n_out:
            return (
                f"rank {self.rank} asks for {self.size(n_in, n_out)} of {n_in * n_out} entries; "
                f"{at_most(n_in * n_out // (n_in + n_out))}"
            )

    def check_stats(self, site: Site, stats: Any) -> str | None:
        return self.start.check_stats(self.rank, site, stats)

    def init(self, key: Any, w: Array, site: Site, dtype: Any, stats: Any = None) -> Params:
        count = self.size(*w.shape)
        # At random: the places of the largest of in x out random numbers, as many as wanted, and none twice.
        scores = jax.random.bits(key, w.shape) if self.start is None else self.start.scores(unsharded(w), stats)
        chosen = jnp.sort(jax.lax.top_k(scores.ravel(), count)[1])
        at = jnp.stack([chosen // w.shape[1], chosen % w.shape[1]]).astype(jnp.int32)
        return Params(trainable={"values": jnp.zeros((count,), dtype)}, frozen={"places": at})

    def count(self, site: Site) -> int:
        _, n_in, n_out = site.canonical_shape
        return site.stack * self.size(n_in, n_out)

    def dims(self, p: Params) -> Params:
        return Params(trainable={"values": "_"}, frozen={"places": "_ _"})

    def weight(self, w: Float[Array, "in out"], p: Params) -> Float[Array, "in out"]:
        return scatter(w, p.frozen["places"], self.scale * p.trainable["values"])

    def describe(self) -> dict[str, str]:
        return {"rank": str(self.rank), "scale": f"{self.scale:g}"}
