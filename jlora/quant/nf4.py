r"""NF4: four bits a weight, by quantiles of a normal distribution, in blocks that share a magnitude.

QLoRA: Efficient Finetuning of Quantized LLMs. Dettmers et al., 2023. https://arxiv.org/abs/2305.14314

.. math::  W_k \approx m_b\,c_{q_k}, \qquad m_b = \max_{k \in b} |W_k|, \qquad q_k = \arg\min_j |W_k / m_b - c_j|

W_k are the entries of PyTorch's matrix [out, in] row by row, b the blocks of 64 in that order, the last as long as it
comes out; c [16] the table below; q of 4 bits, two in a byte, the first in the high half. What lies in the middle of
two entries of the table goes to the lower.

With double quantization (``double``) the magnitudes themselves take a byte each:

.. math::  m_b \approx \mu + n_d\,t_{p_b}, \qquad \mu = \mathrm{mean}(m), \qquad n_d = \max_{b \in d} |m_b - \mu|

d are blocks of 256 magnitudes, t [256] a table that is fine near zero, p of 8 bits; n and mu float32. That makes
4 + 8/64 + 32/(64 * 256) = 4.127 bits a weight, and 4.5 without.

This is the order, the tables and the rounding of bitsandbytes: a checkpoint of PyTorch's quantizes to the same numbers
there and here. (For convolutions, which bitsandbytes leaves alone, the order is that of the leaf's own window.)
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, UInt8

from jlora.blockwise import Dynamic, Table, blocks
from jlora.methods.base import unsharded
from jlora.quant.leaf import Quantized, over

CODE = Table(
    np.float32(
        """
        -1 -0.6961928009986877 -0.5250730514526367 -0.39491748809814453 -0.28444138169288635 -0.18477343022823334
        -0.09105003625154495 0 0.07958029955625534 0.16093020141124725 0.24611230194568634 0.33791524171829224
        0.44070982933044434 0.5626170039176941 0.7229568362236023 1
        """.split()
    )
)
DYNAMIC_CODE = Dynamic()
BLOCK_OF_MAGNITUDES = 256


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("codes", "magnitudes", "norms", "mean"),
    meta_fields=("layout", "of_shape", "dtype", "block_size", "double"),
)
@dataclasses.dataclass(frozen=True, repr=False)
class NF4(Quantized):
    """A weight in 4 bits. The formulas are at the top of this file.

    Where ``block_size`` divides the columns of PyTorch's matrix, what is stored keeps its rows; else blocks go on from
    one row to the next, as in bitsandbytes, and it is stored as one row.

    Attributes:
      block_size: entries that share a magnitude, an even number. Fewer cost more bits and round less.
      double: store the magnitudes in 8 bits.
      codes: q, two in a byte.
      magnitudes: m; with ``double``, p.
      norms, mean: n and mu of ``double``, else None.
    """

    block_size: int = 64
    double: bool = True
    codes: UInt8[Array, "*stack rows half_columns"] | None = None
    magnitudes: Array | None = None
    norms: Float[Array, "*stack d"] | None = None
    mean: Float[Array, "*stack"] | None = None

    options = ("block_size", "double")

    def __post_init__(self):
        if not isinstance(self.block_size, int) or self.block_size < 2 or self.block_size % 2:
            raise ValueError(f"NF4(block_size={self.block_size!r}): a positive even number is wanted, 64 as a rule.")

    @property
    def stack_shape(self) -> tuple[int, ...]:
        return self.codes.shape[:-2]

    @property
    def _by_rows(self) -> bool:
        return self.row_shape[1] % self.block_size == 0

    def encode(self, w: Float[Array, "in out"]) -> NF4:
        sharded = self.to_rows(w)
        rows = unsharded(sharded).astype(self.wide)
        if not self._by_rows:
            rows = rows.reshape(1, -1)
        n = rows.shape[1]
        parts = blocks(rows, self.block_size)
        magnitudes = jnp.max(jnp.abs(parts), axis=-1)
        places = CODE.nearest(over(parts, magnitudes[..., None])).reshape(len(rows), -1)[:, : n + n % 2]
        codes = places[:, ::2] << 4 | places[:, 1::2]
        norms = mean = None
        if self.double:
            mean = jnp.mean(magnitudes)
            apart = blocks((magnitudes - mean).reshape(-1), BLOCK_OF_MAGNITUDES)
            norms = jnp.max(jnp.abs(apart), axis=-1)
            places = DYNAMIC_CODE.nearest(over(apart, norms[:, None]))
            magnitudes = places.reshape(-1)[: magnitudes.size].reshape(magnitudes.shape)
            norms, mean = norms.astype(jnp.float32), mean.astype(jnp.float32)
        else:
            magnitudes = magnitudes.astype(jnp.float32)
        codes = _in_parts(codes, sharded) if self._by_rows else codes
        return dataclasses.replace(self, codes=codes, magnitudes=magnitudes, norms=norms, mean=mean)

    def _magnitudes(self) -> Float[Array, "rows blocks"]:
        """m."""
        if not self.double:
            return self.magnitudes.astype(self.wide)
        apart = DYNAMIC_CODE.values(blocks(self.magnitudes.reshape(-1), BLOCK_OF_MAGNITUDES)).astype(self.wide)
        apart = apart * self.norms[:, None].astype(self.wide)
        m = self.mean.astype(self.wide) + apart.reshape(-1)[: math.prod(self.magnitudes.shape)]
        return m.reshape(self.magnitudes.shape)

    def _values(self, codes: UInt8[Array, "*n half"], magnitudes: Float[Array, "*n blocks"]) -> Array:
        """[*n, 2 half]."""
        values = jnp.stack([CODE.values(codes >> 4), CODE.values(codes & 15)], axis=-1).astype(self.wide)
        values = values.reshape(*codes.shape[:-1], -1)
        return values * jnp.repeat(magnitudes, self.block_size, axis=-1)[..., : values.shape[-1]]

    def matrix(self) -> Float[Array, "in out"]:
        shape = self.row_shape
        values = self._values(unsharded(self.codes), self._magnitudes())
        if not self._by_rows:
            values = values[:, : shape[0] * shape[1]].reshape(shape)
        return self.from_rows(values)

    def rows(self, take: Callable[[Array], Array]) -> Array | None:
        if self.layout.kind != "embedding" or not self._by_rows:
            return None
        rows = self._values(take(unsharded(self.codes)), take(self._magnitudes()))
        return jax.lax.stop_gradient(rows.astype(self.dtype))


def _in_parts(codes: UInt8[Array, "rows half_columns"], rows: Array) -> UInt8[Array, "rows half_columns"]:
    """The codes of rows that are sharded by their type (explicit sharding), sharded alike where that cuts them evenly:
    each device keeps its part, and a product brings the codes together, never the weights."""
    sharding = jax.typeof(rows).sharding
    parts = lambda axis: math.prod(sharding.mesh.shape[name] for name in jax.tree.leaves(axis))
    spec = [axis if n % parts(axis) == 0 else None for axis, n in zip(sharding.spec, codes.shape, strict=True)]
    return codes if all(axis is None for axis in spec) else jax.reshard(codes, PartitionSpec(*spec))
