"""Numbers in blocks that share a magnitude, each stored as its place in a table: what quantized weights and quantized
optimizer states have in common."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8


def dynamic_code(signed: bool = True) -> np.ndarray:
    """bitsandbytes' table of 256 numbers that is fine near zero: for every power of ten from 1e-6 to 1 the middles of
    1, 2, 4 ... 64 equal parts of [0.1, 1] times it, with both signs, or of twice as many, without; and 0 and 1."""
    entries = [0.0, 1.0]
    for e in range(7):
        edges = np.linspace(0.1, 1.0, 2 ** (e if signed else e + 1) + 1)
        middles = (edges[1:] + edges[:-1]) / 2 * 10.0 ** (e - 6)
        entries += [*middles, *(-middles if signed else ())]
    return np.sort(np.float32(entries))


def nearest(x: Float[Array, "*n"], code: np.ndarray) -> UInt8[Array, "*n"]:
    """The place of the nearest entry of a sorted table of 2^k, the lower of two at the same distance."""
    edges = (code[1:] + code[:-1]) / 2
    if len(code) <= 16:  # comparisons that XLA fuses
        return sum((x > edge).astype(jnp.uint8) for edge in edges)
    step = len(code) // 2
    place = jnp.where(x > edges[step - 1], step, 0)
    while step := step // 2:  # by halves, unrolled: this too is fused
        place = jnp.where(x > look_up(edges, place + (step - 1)), place + step, place)
    return place.astype(jnp.uint8)


def look_up(code: np.ndarray, places: Array) -> Float[Array, "*n"]:
    """Entries of a table, sharded as the places are."""
    sharding = jax.typeof(places).sharding
    out = None if sharding.mesh.empty else sharding
    return jnp.asarray(code).at[places].get(mode="promise_in_bounds", out_sharding=out)


def blocks(x: Float[Array, "*n k"], size: int) -> Float[Array, "*n b size"]:
    """The last axis in blocks, the last of them filled up with zeros."""
    if x.shape[-1] % size:
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % size)])
    return x.reshape(*x.shape[:-1], x.shape[-1] // size, size)
