"""Pallas TPU kernels of `quantized_dot`. With R [rows, columns] what is stored, W^T as a rule, there are two:

| kernel       | computes | is, of y = x R^T                 |
|--------------|----------|----------------------------------|
| over_columns | x R^T    | the forward pass                 |
| over_rows    | dy R     | the backward pass, dx            |

A block of codes comes from memory, becomes a block of R in the dtype of the product, and goes into the matrix unit; the
sum is in float32.

NF4 holds two columns in a byte, 2j in the high half and 2j + 1 in the low half. To bring the two together again lane by
lane would cost more than all the rest. It is not done: of 128 bytes the high halves come first, then the low halves,
and x has its columns put in that order before, and dx put back after its sum. A product with a permutation does both,
exactly, and once for each x and dx: a share of 256 / rows of the work.

An entry of the table is looked up by a gather along the lanes of a register that holds the table, which is exact, and
keeps the shuffle unit busy rather than the vector unit: 3 cycles a register in the compiler's schedule for v5e, against
5 of a tree of 15 selects on the four bits. (The matrix unit would take 16 times the product for it, and no polynomial
of few terms is exact.)

A magnitude belongs to block_size columns. They are handed over transposed, [blocks, rows], since a block of a few of
them would be filled up to 128 lanes the other way round, and spread to the columns by a product with zeros and ones:
split into three numbers of bfloat16, which are all its bits, it is exact in one pass of the matrix unit.

By the same schedule, for none of this has been timed on a TPU, a block [512, 512] takes 4,900 cycles in NF4 and 3,900
to 4,600 in Int8 with 1024 tokens, and 1,600 and 370 with 8: NF4 adds little to a product of many tokens, and with few
it is most of the time.

Edges are as in `lora_linear_tpu`, and a block of columns may be wider than the array.
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

# Blocks of tokens, in bfloat16, and of rows and columns, of which there are whole registers of codes. Taking codes
# apart costs as much as the product of 300 tokens, so that blocks of tokens are large.
_TOKENS = 1024
_ROWS = 512
_COLUMNS = 512
_LANES = 128


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
        (tokens, _), (rows, columns) = x.shape, w.codes.shape
        bt, br, bc = self._blocks(tokens, rows, columns, layout)
        width = layout.numbers * bc
        if layout.numbers > 1:
            x = self._in_order(x, layout, bt, width)
        return self._call(
            partial(_over_columns_kernel, layout=layout, dot=self._kernel_dot, n=x.shape[1]),
            grid=(pl.cdiv(tokens, bt), pl.cdiv(rows, br), pl.cdiv(columns, bc)),
            in_specs=[
                pl.BlockSpec((bt, width), lambda t, r, c: (t, c)),
                pl.BlockSpec((br, bc), lambda t, r, c: (r, c)),
                pl.BlockSpec((layout.scales_of(bc), br), lambda t, r, c: (c if layout.by_columns else 0, r)),
            ],
            out_specs=pl.BlockSpec((bt, br), lambda t, r, c: (t, r)),
            out_shape=_like(x, (tokens, rows), self._written),
            scratch_shapes=[pltpu.VMEM((bt, br), self.accumulate)],
        )(x, w.codes, layout.scales(w, bc))

    def _over_rows(self, dy, w, layout):
        tokens, (rows, columns) = dy.shape[0], w.codes.shape
        bt, br, bc = self._blocks(tokens, rows, columns, layout)
        width = layout.numbers * bc
        return self._call(
            partial(_over_rows_kernel, layout=layout, dot=self._kernel_dot, rows=rows),
            grid=(pl.cdiv(tokens, bt), pl.cdiv(columns, bc), pl.cdiv(rows, br)),
            in_specs=[
                pl.BlockSpec((bt, br), lambda t, c, r: (t, r)),
                pl.BlockSpec((br, bc), lambda t, c, r: (r, c)),
                pl.BlockSpec((layout.scales_of(bc), br), lambda t, c, r: (c if layout.by_columns else 0, r)),
            ],
            out_specs=pl.BlockSpec((bt, width), lambda t, c, r: (t, c)),
            out_shape=_like(dy, (tokens, layout.numbers * columns), self._written),
            scratch_shapes=[pltpu.VMEM((bt, width), self.accumulate)],
        )(dy, w.codes, layout.scales(w, bc))

    def _in_order(self, x, layout, bt: int, width: int):
        """x in the order of `layout.values`, with zeros up to the end of the last block."""
        (tokens, n), count = x.shape, pl.cdiv(x.shape[1], width)
        return self._call(
            partial(_in_order_kernel, layout=layout, n=n),
            grid=(pl.cdiv(tokens, bt), count),
            in_specs=[pl.BlockSpec((bt, width), lambda t, c: (t, c))],
            out_specs=pl.BlockSpec((bt, width), lambda t, c: (t, c)),
            out_shape=_like(x, (tokens, count * width), x.dtype),
        )(x)

    def _blocks(self, tokens: int, rows: int, columns: int, layout) -> tuple[int, int, int]:
        """Of tokens, and of rows and columns of codes."""
        wide, whole = max(1, jnp.dtype(self.compute).itemsize // 2), pl.cdiv(columns, _LANES) * _LANES
        return min(tokens, _TOKENS // wide), min(rows, _ROWS), min(whole, _COLUMNS // layout.numbers)

    @property
    def _written(self):
        """The dtype of y and of dx: wide enough for either to be cast from."""
        return jnp.promote_types(self.compute, self.out)

    def _call(self, kernel, *, grid, **specs):
        semantics = ("parallel", "parallel", "arbitrary")[: len(grid)]
        return pl.pallas_call(
            kernel,
            grid=grid,
            compiler_params=pltpu.CompilerParams(dimension_semantics=semantics),
            interpret=self.interpret,
            name="quantized_dot" + kernel.func.__name__.removesuffix("_kernel"),
            **specs,
        )

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

    numbers: ClassVar[int] = 1  # in a byte
    by_columns: ClassVar[bool] = False  # whether other columns have other scales

    def scales_of(self, columns: int) -> int:
        """How many scales a row of a block of so many columns has."""
        return 1

    def scales(self, w, columns: int) -> Float[Array, "scales rows"]:
        """Those of all blocks, one after the other."""
        return w.scale[None]

    def values(self, codes, scales, column):
        """A block of R, the `column`-th, without what `scaled` puts in."""
        return codes.astype(jnp.float32)

    def scaled(self, v, scales):
        """A block [tokens, rows], times what is left of the scales."""
        return v.astype(jnp.float32) * scales

    def in_order(self, x, back: bool = False):
        """A block [tokens, columns of R] in the order of `values`, or back from there."""
        return x


@dataclasses.dataclass(frozen=True)
class _Nibbles:
    """NF4: two numbers a byte, and a magnitude for every `block_size` columns of a row."""

    block_size: int
    dtype: Any  # of W, to which it is rounded
    numbers: ClassVar[int] = 2
    by_columns: ClassVar[bool] = True

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
        codes, m = codes.astype(jnp.int32), self._spread(scales, column, codes.shape[1])
        high, low = ((_entries(places) * m).astype(self.dtype) for places in (codes >> 4, codes & 15))
        starts = range(0, codes.shape[1], _LANES)
        return jnp.concatenate([v[:, i : i + _LANES] for i in starts for v in (high, low)], axis=1)

    def scaled(self, v, scales):
        return v

    def in_order(self, x, back=False):
        n = 2 * _LANES
        row, column = (lax.broadcasted_iota(jnp.int32, (n, n), axis) for axis in (0, 1))
        place = jnp.where(column < _LANES, 2 * column, 2 * (column - _LANES) + 1)
        permutation = jnp.where(row == place, 1.0, 0.0).astype(x.dtype)
        parts = [
            lax.dot_general(
                x[:, i : i + n],
                permutation,
                (((1,), (1 if back else 0,)), ((), ())),
                precision=None if x.dtype == jnp.bfloat16 else lax.Precision.HIGHEST,  # all bits of float32
                preferred_element_type=jnp.promote_types(x.dtype, jnp.float32),
            ).astype(x.dtype)
            for i in range(0, x.shape[1], n)
        ]
        return jnp.concatenate(parts, axis=1)

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


def _entries(places) -> Float[Array, "rows columns"]:
    """`CODE.values(places)`, in registers."""
    lane = lax.broadcasted_iota(jnp.int32, (1, _LANES), 1)
    table = jnp.zeros(lane.shape, jnp.float32)
    for i, entry in enumerate(CODE.entries.tolist()):
        table = jnp.where(lane == i, entry, table)
    table = jnp.broadcast_to(table, (places.shape[0], _LANES))
    starts = range(0, places.shape[1], _LANES)
    return jnp.concatenate([jnp.take_along_axis(table, places[:, i : i + _LANES], axis=1) for i in starts], axis=1)


def _magnitudes(w: NF4) -> Float[Array, "rows blocks"]:
    """m in float32. What is in 8 bits is computed: a TPU would look up every single one of them in memory."""
    if not w.double:
        return w.magnitudes.astype(jnp.float32)
    apart = blocks(_dynamic(w.magnitudes.reshape(-1)), BLOCK_OF_MAGNITUDES) * w.norms[:, None]
    return (w.mean + apart.reshape(-1)[: w.magnitudes.size]).reshape(w.magnitudes.shape)


def _dynamic(places: UInt8[Array, "*n"]) -> Float[Array, "*n"]:
    """`DYNAMIC_CODE.values(places)` by arithmetic. Its entry 127 is zero; k places from there is the middle of the
    part k - 2^e, of the 2^e equal parts of [0.1, 1], times 10^(e - 6), with e the number of bits of k less 1."""
    signed = places.astype(jnp.int32) - 127
    k = jnp.abs(signed)
    value = jnp.where(k == 128, 1.0, 0.0).astype(jnp.float32)
    for e in range(7):
        within = ((k - 2**e).astype(jnp.float32) + 0.5) / 2**e
        value = jnp.where(k >> e == 1, 10.0 ** (e - 6) * (0.1 + 0.9 * within), value)
    return jnp.where(signed < 0, -value, value)


# ---- The kernels ----


def _in_order_kernel(x, y, *, layout, n):
    y[...] = layout.in_order(_inside(x[...], 1, pl.program_id(1), n))


def _over_columns_kernel(x, codes, scales, y, total, *, layout, dot, n):
    k = pl.program_id(2)

    @pl.when(k == 0)
    def _():
        total[...] = jnp.zeros_like(total)

    total[...] += dot(_inside(x[...], 1, k, n), layout.values(codes[...], scales[...], k), 1, 1)

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
    total[...] += dot(dy_block, layout.values(codes[...], inside, column), 1, 0)

    @pl.when(k == pl.num_programs(2) - 1)
    def _():
        dx[...] = layout.in_order(total[...].astype(dx.dtype), back=True)
