"""Pallas TPU kernels of `multi_lora`. Slots stay where they are: the table of slots is read before a kernel starts, and
says which block of the stacked factors to fetch. Four kernels, of which forward and backward each use two:

| kernel  | computes                       | forward           | backward                          |
|---------|--------------------------------|-------------------|-----------------------------------|
| shrink  | v_e F_e^T                      | h = x A           | -                                 |
| read_dy | v_e F_e^T and g_e^T v_e        | -                 | u = dy B^T and h^T dy, dy read once |
| fused   | v m + g_e F_e                  | y = x W + (s h) B | dx = dy W^T + ds A^T              |
| expand  | base + g_e F_e                 | y, few rows       | dx, few rows                      |

"fused" starts the accumulator of the base's product with the branch. It reads W once for every block of rows of one
entry, and so is for entries of 128 rows and more; with fewer, the base is XLA's product of all rows and "expand" adds
the branch to it. Entries of one slot that follow each other fetch it once.

Gradients of factors come as one part for each entry, r / P of the size of the activations, and XLA sums them by slot.
Adding them up inside the kernel would want the entries sorted by slot, which a batch of sequences is not. x^T ds gains
nothing from a kernel, and is XLA's batched product.

Layout and edges are as in `lora_linear_tpu`.
"""

import dataclasses
import math
from functools import partial
from typing import ClassVar

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jlora.kernels.lora_linear_tpu import _dot, _inside, _like
from jlora.kernels.multi_lora import EntryPieces

# Blocks of rows, and of `in` and `out`, as in lora_linear_tpu. Where entries have few rows, an adapter is the larger
# operand, and wider blocks of it make fewer steps; _FACTOR is how many of its numbers a block holds at most.
_TOKENS = 256
_FEATURES = 512
_WIDE = 2048
_WIDEST = 8192
_FACTOR = 2**19
_FEW = 16  # rows of an entry
_FUSED = 128  # rows of an entry from which the branch is fused into the base's product


@dataclasses.dataclass(frozen=True, kw_only=True)
class PallasPieces(EntryPieces):
    """The products as TPU kernels, over activations [entries, rows, n]: inside `shard_map` they are local."""

    interpret: ClassVar[bool] = False

    def shrink(self, v, f, slot, rank):
        v3 = _entries(v, slot)
        (entries, rows, n), r = v3.shape, f.shape[1]
        bt, bn = _blocks(rows, n, r)
        columns = pl.cdiv(n, bn)
        h = self._call(
            partial(_shrink_kernel, dot=self._kernel_dot, n=n),
            grid=(columns, entries, pl.cdiv(rows, bt)),
            in_specs=[
                pl.BlockSpec((None, bt, bn), lambda c, e, t, *_: (e, t, c)),
                pl.BlockSpec((None, r, bn), lambda c, e, t, slot, rank: (slot[e], 0, c)),
            ],
            out_specs=pl.BlockSpec((None, None, bt, r), lambda c, e, t, *_: (c, e, t, 0)),
            out_shape=_like(v, (columns, entries, rows, r), self.accumulate),
            semantics=("parallel", "parallel", "parallel"),
        )(slot, rank, v3, f)
        return h.sum(0).reshape(*v.shape[:-1], r)

    def shrink_and_outer(self, v, f, g, slot, rank):
        v3, g3 = _entries(v, slot), _entries(g, slot)
        (entries, rows, n), r = v3.shape, f.shape[1]
        if rows < _FEW:  # a product over so few rows is none for the matrix unit
            return super().shrink_and_outer(v, f, g, slot, rank)
        bt, bn = _blocks(rows, n, r)
        columns = pl.cdiv(n, bn)
        # Row blocks are the inner axis of the grid, so that g^T v gathers in one block after the other. v F^T comes in
        # one partial sum for each block of columns.
        u, g_v = self._call(
            partial(_read_dy_kernel, dot=self._kernel_dot, rows=rows, n=n),
            grid=(columns, entries, pl.cdiv(rows, bt)),
            in_specs=[
                pl.BlockSpec((None, bt, bn), lambda c, e, t, *_: (e, t, c)),
                pl.BlockSpec((None, r, bn), lambda c, e, t, slot, rank: (slot[e], 0, c)),
                pl.BlockSpec((None, bt, r), lambda c, e, t, *_: (e, t, 0)),
            ],
            out_specs=[
                pl.BlockSpec((None, None, bt, r), lambda c, e, t, *_: (c, e, t, 0)),
                pl.BlockSpec((None, r, bn), lambda c, e, t, *_: (e, 0, c)),
            ],
            out_shape=[
                _like(v, (columns, entries, rows, r), self.accumulate),
                _like(v, (entries, r, n), self.accumulate),
            ],
            semantics=("parallel", "parallel", "arbitrary"),
        )(slot, rank, v3, f, g3)
        return u.sum(0).reshape(*v.shape[:-1], r), g_v.reshape(*slot.shape, r, n)

    def expand_onto(self, v, m, axis, g, f, slot, rank):
        g3, n = _entries(g, slot), f.shape[2]
        if m is not None and g3.shape[1] >= _FUSED:
            y = self._fused(_entries(v, slot), m, axis, g3, f, slot, rank)
        else:
            base = None if m is None else _entries(self.dot(v, m, -1, axis), slot)
            y = self._expand(base, g3, f, slot, rank)
        return y.reshape(*g.shape[:-1], n)

    def _expand(self, base, g, f, slot, rank):
        (entries, rows, r), n = g.shape, f.shape[2]
        bt, bn = _blocks(rows, n, r)
        block = pl.BlockSpec((None, bt, bn), lambda c, e, t, *_: (e, t, c))
        return self._call(
            partial(_expand_kernel, dot=self._kernel_dot),
            grid=(pl.cdiv(n, bn), entries, pl.cdiv(rows, bt)),
            in_specs=[
                pl.BlockSpec((None, bt, r), lambda c, e, t, *_: (e, t, 0)),
                pl.BlockSpec((None, r, bn), lambda c, e, t, slot, rank: (slot[e], 0, c)),
                *([] if base is None else [block]),
            ],
            out_specs=block,
            out_shape=_like(g, (entries, rows, n), self._written),
            semantics=("parallel", "parallel", "parallel"),
        )(slot, rank, g, f, *([] if base is None else [base]))

    def _fused(self, v, m, axis, g, f, slot, rank):
        (entries, rows, k), (_, r, n) = v.shape, f.shape
        bt, bk, bn = min(rows, _TOKENS), min(k, _FEATURES), min(n, _FEATURES)
        if axis == 0:
            weight = pl.BlockSpec((bk, bn), lambda e, t, c, i, *_: (i, c))
        else:
            weight = pl.BlockSpec((bn, bk), lambda e, t, c, i, *_: (c, i))
        return self._call(
            partial(_fused_kernel, dot=self._kernel_dot, axis=axis, k=k),
            grid=(entries, pl.cdiv(rows, bt), pl.cdiv(n, bn), pl.cdiv(k, bk)),
            in_specs=[
                pl.BlockSpec((None, bt, bk), lambda e, t, c, i, *_: (e, t, i)),
                weight,
                pl.BlockSpec((None, bt, r), lambda e, t, c, i, *_: (e, t, 0)),
                pl.BlockSpec((None, r, bn), lambda e, t, c, i, slot, rank: (slot[e], 0, c)),
            ],
            out_specs=pl.BlockSpec((None, bt, bn), lambda e, t, c, i, *_: (e, t, c)),
            out_shape=_like(v, (entries, rows, n), self._written),
            scratch_shapes=[pltpu.VMEM((bt, bn), self.accumulate)],
            semantics=("parallel", "parallel", "parallel", "arbitrary"),
        )(slot, rank, v.astype(self.compute), m.astype(self.compute), g, f)

    @property
    def _written(self):
        """The dtype of y and of dx: wide enough for either to be cast from."""
        return jnp.promote_types(self.compute, self.out)

    def _call(self, kernel, *, grid, in_specs, out_specs, out_shape, semantics, scratch_shapes=()):
        """The kernel, to be called with slots and ranks of the entries before its operands."""
        call = pl.pallas_call(
            kernel,
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=2, grid=grid, in_specs=in_specs, out_specs=out_specs, scratch_shapes=scratch_shapes
            ),
            out_shape=out_shape,
            compiler_params=pltpu.CompilerParams(dimension_semantics=semantics),
            interpret=self.interpret,
            name="multi_lora" + kernel.func.__name__.removesuffix("_kernel"),
        )
        return lambda slot, rank, *operands: call(slot.reshape(-1), rank.reshape(-1), *operands)

    def _kernel_dot(self, lhs, rhs, lhs_axis, rhs_axis):
        return _dot(self, lhs, rhs, lhs_axis, rhs_axis)


@dataclasses.dataclass(frozen=True, kw_only=True)
class InterpretedPieces(PallasPieces):
    """The kernels run by Pallas' interpreter, which fills what lies beyond an edge, and fresh memory, with NaN."""

    interpret: ClassVar[bool] = True


def _entries(v, slot):
    """[entries, rows, n]"""
    return v.reshape(slot.size, math.prod(v.shape[slot.ndim : -1]), v.shape[-1])


def _blocks(rows: int, n: int, r: int) -> tuple[int, int]:
    return min(rows, _TOKENS), min(n, _WIDEST if rows < _FEW else _WIDE, max(128, _FACTOR // r // 128 * 128))


def _true_ranks(f, rank):
    return jnp.where(lax.broadcasted_iota(jnp.int32, f.shape, 0) < rank, f, jnp.zeros_like(f))


def _shrink_kernel(slot, rank, v, f, h, *, dot, n):
    column, entry = pl.program_id(0), pl.program_id(1)
    factor = _true_ranks(_inside(f[...], 1, column, n), rank[entry])
    h[...] = dot(_inside(v[...], 1, column, n), factor, 1, 1)


def _read_dy_kernel(slot, rank, v, f, g, u, g_v, *, dot, rows, n):
    column, entry, row = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    v_block = _inside(_inside(v[...], 0, row, rows), 1, column, n)

    @pl.when(row == 0)
    def _():
        g_v[...] = jnp.zeros_like(g_v)

    u[...] = dot(v_block, _true_ranks(_inside(f[...], 1, column, n), rank[entry]), 1, 1)
    g_v[...] += dot(_inside(g[...], 0, row, rows), v_block, 0, 0)


def _expand_kernel(slot, rank, g, f, *base_and_y, dot):
    *base, y = base_and_y
    branch = dot(g[...], _true_ranks(f[...], rank[pl.program_id(1)]), 1, 0)
    y[...] = (branch + base[0][...] if base else branch).astype(y.dtype)


def _fused_kernel(slot, rank, v, m, g, f, y, total, *, dot, axis, k):
    i = pl.program_id(3)
    factor_rank = rank[pl.program_id(0)]

    @pl.when(i == 0)
    def _():
        total[...] = dot(g[...], _true_ranks(f[...], factor_rank), 1, 0)

    total[...] += dot(_inside(v[...], 1, i, k), _inside(m[...], axis, i, k), 1, axis)

    @pl.when(i == pl.num_programs(3) - 1)
    def _():
        y[...] = total[...].astype(y.dtype)
