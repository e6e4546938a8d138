"""Pallas TPU kernels of `quantized_dot`. With R [rows, columns] what is stored, W^T as a rule, there are two:

| kernel       | computes | is, of y = x R^T                 |
|--------------|----------|----------------------------------|
| over_columns | x R^T    | the forward pass                 |
| over_rows    | dy R     | the backward pass, dx            |

A block of codes comes from memory, becomes a block of R in the dtype of the product, and goes into the matrix unit; the
sum is in float32.

NF4 holds two columns in a byte, 2j in the high half and 2j + 1 in the low half. Both halves are taken apart as two
blocks, of the even and of the odd columns, and never put together again: it is x that is split into its even and odd
columns before, and dx that is put together after. Both are small beside R times the number of its rows.

An entry of the table is looked up by a tree of selects on the four bits of a code: exact, with 4 comparisons and 15
selects, in any shape. (The matrix unit would take 16 times the product for it, and no polynomial short of degree 15 is
exact.)

A magnitude belongs to block_size columns. They are handed over transposed, [blocks, rows], since a block of a few of
them would be filled up to 128 lanes the other way round, and spread to the columns by a product with zeros and ones:
split into three numbers of bfloat16, which are all its bits, it is exact in one pass of the matrix unit.

Edges are as in `lora_linear_tpu`.
"""

import dataclasses
from functools import partial
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, UInt8

from jlora.blockwise import blocks
from jlora.kernels.lora_linear_tpu import _dot, _inside, _like, _matrix
from jlora.kernels.quantized_dot import QuantizedPieces
from jlora.quant.nf4 import BLOCK_OF_MAGNITUDES, CODE, NF4

# Blocks of tokens, in bfloat16, and of rows and columns of codes. Taking codes apart costs about what the product of
# 256 tokens does, so that blocks of tokens are large.
_TOKENS = 1024
_ROWS = 512
_COLUMNS = 256


@dataclasses.dataclass(frozen=True, kw_only=True)
class PallasPieces(QuantizedPieces):
    """The products as TPU kernels. Leading axes are merged: inside `shard_map` activations are local."""

    interpret: ClassVar[bool] = False

    def multiply(self, x, w, axis, like=None):
        layout = _Nibbles(w.block_size, w.dtype) if isinstance(w, NF4) else _Bytes()
        v = _matrix(x).astype(self.compute)
        tokens = v.shape[0]
        if tokens < 8:  # the matrix unit takes rows by the eight
            v = jnp.pad(v, ((0, 8 - tokens), (0, 0)))
        over_columns = (axis == 0) == (w.layout.kind != "embedding")
        y = self._over_columns(v, w, layout) if over_columns else self._over_rows(v, w, layout)
        return y[:tokens].reshape(*x.shape[:-1], y.shape[-1])

    def _over_columns(self, x, w, layout):
        tokens, (rows, columns) = x.shape[0], w.codes.shape
        bt, br, bc = self._blocks(tokens, rows, columns)
        return pl.pallas_call(
            partial(_over_columns_kernel, layout=layout, dot=self._kernel_dot, columns=columns),
            grid=(pl.cdiv(tokens, bt), pl.cdiv(rows, br), pl.cdiv(columns, bc)),
            in_specs=[
                pl.BlockSpec((layout.parts, bt, bc), lambda t, r, c: (0, t, c)),
                pl.BlockSpec((br, bc), lambda t, r, c: (r, c)),
                pl.BlockSpec((layout.scales_of(bc), br), lambda t, r, c: (c if layout.by_columns else 0, r)),
            ],
            out_specs=pl.BlockSpec((bt, br), lambda t, r, c: (t, r)),
            out_shape=_like(x, (tokens, rows), self._written),
            scratch_shapes=[pltpu.VMEM((bt, br), self.accumulate)],
            name="quantized_dot_over_columns",
            **self._options,
        )(layout.split(x), w.codes, layout.scales(w, bc))

    def _over_rows(self, dy, w, layout):
        tokens, (rows, columns) = dy.shape[0], w.codes.shape
        bt, br, bc = self._blocks(tokens, rows, columns)
        dx = pl.pallas_call(
            partial(_over_rows_kernel, layout=layout, dot=self._kernel_dot, rows=rows),
            grid=(pl.cdiv(tokens, bt), pl.cdiv(columns, bc), pl.cdiv(rows, br)),
            in_specs=[
                pl.BlockSpec((bt, br), lambda t, c, r: (t, r)),
                pl.BlockSpec((br, bc), lambda t, c, r: (r, c)),
                pl.BlockSpec((layout.scales_of(bc), br), lambda t, c, r: (c if layout.by_columns else 0, r)),
            ],
            out_specs=pl.BlockSpec((layout.parts, bt, bc), lambda t, c, r: (0, t, c)),
            out_shape=_like(dy, (layout.parts, tokens, columns), self._written),
            scratch_shapes=[pltpu.VMEM((layout.parts, bt, bc), self.accumulate)],
            name="quantized_dot_over_rows",
            **self._options,
        )(dy, w.codes, layout.scales(w, bc))
        return layout.join(dx)

    def _blocks(self, tokens: int, rows: int, columns: int) -> tuple[int, int, int]:
        wide = max(1, jnp.dtype(self.compute).itemsize // 2)
        return min(tokens, _TOKENS // wide), min(rows, _ROWS), min(columns, _COLUMNS)

    @property
    def _written(self):
        """The dtype of y and of dx: wide enough for either to be cast from."""
        return jnp.promote_types(self.compute, self.out)

    @property
    def _options(self):
        semantics = ("parallel", "parallel", "arbitrary")
        return {"compiler_params": pltpu.CompilerParams(dimension_semantics=semantics), "interpret": self.interpret}

    def _kernel_dot(self, lhs, rhs, lhs_axis, rhs_axis):
        return _dot(self, lhs, rhs, lhs_axis, rhs_axis)


@dataclasses.dataclass(frozen=True, kw_only=True)
class InterpretedPieces(PallasPieces):
    """The kernels run by Pallas' interpreter, which fills what lies beyond an edge, and fresh memory, with NaN."""

    interpret: ClassVar[bool] = True


# ---- What a block of codes and one of scales stand for ----


@dataclasses.dataclass(frozen=True)
class _Bytes:
    """Int8: one number a byte, and a scale for every row, which can wait until the product is done."""

    parts: ClassVar[int] = 1  # numbers in a byte
    by_columns: ClassVar[bool] = False  # whether other columns have other scales

    def split(self, x):
        """[tokens, columns of R] as [parts, tokens, columns of codes]."""
        return x[None]

    def join(self, x):
        """The inverse."""
        return x[0]

    def scales_of(self, columns: int) -> int:
        """How many scales a block of so many columns has."""
        return 1

    def scales(self, w, columns: int) -> Float[Array, "scales rows"]:
        """Those of all blocks, one after the other."""
        return w.scale[None]

    def values(self, codes, scales, column):
        """The parts of a block, without what `scaled` puts in."""
        return [codes.astype(jnp.float32)]

    def scaled(self, v, scales):
        """A block [tokens, rows], times what is left of the scales."""
        return v.astype(jnp.float32) * scales


@dataclasses.dataclass(frozen=True)
class _Nibbles:
    """NF4: two numbers a byte, and a magnitude for every `block_size` columns of a row."""

    block_size: int
    dtype: Any  # of W, to which it is rounded
    parts: ClassVar[int] = 2
    by_columns: ClassVar[bool] = True

    def split(self, x):
        return jnp.stack([x[:, ::2], x[:, 1::2]])

    def join(self, x):
        return jnp.moveaxis(x, 0, -1).reshape(x.shape[1], -1)

    def scales_of(self, columns):
        half = self.block_size // 2
        touched = columns // half if columns % half == 0 else (columns - 1) // half + 2
        return -(-touched // 8) * 8

    def scales(self, w, columns):
        # As many for every block of columns as it can touch. Mostly blocks are cut where a magnitude ends, and this is
        # every one of them once.
        count, half = self.scales_of(columns), self.block_size // 2
        first = np.arange(pl.cdiv(w.codes.shape[1], columns)) * columns // half
        which = (first[:, None] + np.arange(count)).reshape(-1)
        m = _magnitudes(w).T
        if np.array_equal(which, np.arange(which.size)):
            return jnp.pad(m, ((0, max(0, which.size - m.shape[0])), (0, 0)))[: which.size]
        return m[np.minimum(which, m.shape[0] - 1)]

    def values(self, codes, scales, column):
        codes = codes.astype(jnp.int32)
        m = self._spread(scales, column, codes.shape[1])
        high, low = (_tree([(codes & (bit << shift)) != 0 for bit in (1, 2, 4, 8)], CODE.tolist()) for shift in (4, 0))
        return [(v * m).astype(self.dtype) for v in (high, low)]

    def scaled(self, v, scales):
        return v

    def _spread(self, scales, column, columns: int) -> Float[Array, "rows columns"]:
        """Every magnitude to the columns that it belongs to."""
        half, count = self.block_size // 2, scales.shape[0]
        place = lax.broadcasted_iota(jnp.int32, (count, columns), 1) + lax.rem(column * columns, half)
        start = lax.broadcasted_iota(jnp.int32, (count, columns), 0) * half
        belongs = jnp.where((start <= place) & (place < start + half), 1.0, 0.0).astype(jnp.float32)
        left, thirds = scales, []
        for _ in range(3):
            thirds.append(left.astype(jnp.bfloat16).astype(jnp.float32))
            left = left - thirds[-1]
        thirds, belongs = (jnp.concatenate(v).astype(jnp.bfloat16) for v in (thirds, [belongs] * 3))
        return lax.dot_general(thirds, belongs, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)


def _tree(bits, entries: list[float]):
    """The entry of a table of 2^k at the place that k masks give, the lowest bit first."""
    pairs = zip(entries[::2], entries[1::2], strict=True)
    level = [jnp.where(bits[0], high, low) for low, high in pairs]
    return level[0] if len(level) == 1 else _tree(bits[1:], level)


def _magnitudes(w: NF4) -> Float[Array, "rows blocks"]:
    """m in float32. What is in 8 bits is computed: a TPU would look up every single one of them in memory."""
    if not w.double:
        return w.magnitudes.astype(jnp.float32)
    apart = blocks(_dynamic(w.magnitudes.reshape(-1)), BLOCK_OF_MAGNITUDES) * w.norms[:, None]
    return (w.mean + apart.reshape(-1)[: w.magnitudes.size]).reshape(w.magnitudes.shape)


def _dynamic(places: UInt8[Array, "*n"]) -> Float[Array, "*n"]:
    """`look_up(DYNAMIC_CODE, places)` by arithmetic. Its entry 127 is zero; k places from there is the middle of the
    part k - 2^e, of the 2^e equal parts of [0.1, 1], times 10^(e - 6), with e the number of bits of k less 1."""
    signed = places.astype(jnp.int32) - 127
    k = jnp.abs(signed)
    value = jnp.where(k == 128, 1.0, 0.0)
    for e in range(7):
        within = (k - 2**e + 0.5).astype(jnp.float32) / 2**e
        value = jnp.where(k >> e == 1, 10.0 ** (e - 6) * (0.1 + 0.9 * within), value)
    return jnp.where(signed < 0, -value, value).astype(jnp.float32)


# ---- The kernels ----


def _over_columns_kernel(x, codes, scales, y, total, *, layout, dot, columns):
    k = pl.program_id(2)

    @pl.when(k == 0)
    def _():
        total[...] = jnp.zeros_like(total)

    for part, values in enumerate(layout.values(codes[...], scales[...], k)):
        total[...] += dot(_inside(x[part], 1, k, columns), values, 1, 1)

    @pl.when(k == pl.num_programs(2) - 1)
    def _():
        y[...] = layout.scaled(total[...], scales[...]).astype(y.dtype)


def _over_rows_kernel(dy, codes, scales, dx, total, *, layout, dot, rows):
    column, k = pl.program_id(1), pl.program_id(2)

    @pl.when(k == 0)
    def _():
        total[...] = jnp.zeros_like(total)

    inside = _inside(scales[...], 1, k, rows)
    dy_block = layout.scaled(_inside(dy[...], 1, k, rows), inside)
    for part, values in enumerate(layout.values(codes[...], inside, column)):
        total[part] += dot(dy_block, values, 1, 0)

    @pl.when(k == pl.num_programs(2) - 1)
    def _():
        dx[...] = total[...].astype(dx.dtype)
