"""Numbers in blocks that share a magnitude, each stored as its place in a table: what quantized weights and quantized
optimizer states have in common."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Num, UInt8


class Table:
    """2^k numbers in ascending order."""

    def __init__(self, entries: Float[np.ndarray, " n"]):
        self.entries = entries

    def nearest(self, x: Float[Array, "*n"]) -> UInt8[Array, "*n"]:
        """The place of the nearest entry, the lower of two at the same distance."""
        edges = (self.entries[1:] + self.entries[:-1]) / 2
        if len(edges) < 16:  # comparisons that XLA fuses
            return sum((x > edge).astype(jnp.uint8) for edge in edges)
        step = len(self.entries) // 2
        place = jnp.where(x > edges[step - 1], step, 0)
        while step := step // 2:  # by halves, unrolled: this too is fused
            place = jnp.where(x > _look_up(edges, place + (step - 1)), place + step, place)
        return place.astype(jnp.uint8)

    def values(self, places: Num[Array, "*n"]) -> Float[Array, "*n"]:
        return _look_up(self.entries, places)


class Dynamic(Table):
    """bitsandbytes' table of 256 numbers that is fine near zero: for every power of ten from 1e-6 to 1 the middles of
    1, 2, 4 ... 64 equal parts of [0.1, 1] times it, with both signs, or of twice as many, without; and 0 and 1.

    The nearest is found by arithmetic: eight look-ups for a number, each of which waits for the one before, take five
    times as long on a CPU, and a TPU has no fast ones. A number in the middle between two entries, to the last bits of
    float32, goes to either.
    """

    def __init__(self, signed: bool = True):
        self._signed = signed
        self._parts = [2 ** (e if signed else e + 1) for e in range(7)]
        middles = [(np.arange(n) + 0.5) / n * 0.9 + 0.1 for n in self._parts]
        positive = [middle * 10.0 ** (e - 6) for e, middle in enumerate(middles)]
        self._positive = np.concatenate([[0.0], *positive, [1.0]]).astype(np.float32)
        negative = -self._positive[-2:0:-1] if signed else self._positive[:0]
        super().__init__(np.concatenate([negative, self._positive]))

    def nearest(self, x: Float[Array, "*n"]) -> UInt8[Array, "*n"]:
        size = jnp.abs(x) if self._signed else x
        edges = (self._positive[1:] + self._positive[:-1]) / 2
        place, first = 0, 1
        for e, n in enumerate(self._parts):
            part = jnp.ceil((size * 10.0 ** (6 - e) - 0.1) * (n / 0.9)).astype(jnp.int32) - 1
            place = jnp.where(size > edges[first - 1], first + jnp.clip(part, 0, n - 1), place)
            first += n
        if not self._signed:
            return jnp.where(size > edges[-1], first, place).astype(jnp.uint8)
        place = jnp.where(x > edges[-1], first, place)  # 1 has no counterpart below zero
        return (first - 1 + jnp.where(x < 0, -place, place)).astype(jnp.uint8)


def _look_up(entries: np.ndarray, places: Array) -> Float[Array, "*n"]:
    """Entries of a table, sharded as the places are."""
    sharding = jax.typeof(places).sharding
    out = None if sharding.mesh.empty else sharding
    return jnp.asarray(entries).at[places].get(mode="promise_in_bounds", out_sharding=out)


def blocks(x: Float[Array, "*n k"], size: int) -> Float[Array, "*n b size"]:
    """The last axis in blocks, the last of them filled up with zeros."""
    if x.shape[-1] % size:
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % size)])
    return x.reshape(*x.shape[:-1], x.shape[-1] // size, size)
