"""Pallas TPU kernels of the LoRA linear. Four kernels, one for each of the products in `lora_linear.Pieces`:

| kernel  | computes                        | what it saves over separate products                        |
|---------|---------------------------------|--------------------------------------------------------------|
| forward | y = x W + (s x A) B, and h = x A | x is read once for both; the branch never leaves the chip    |
| read_dy | u = dy B^T and h^T dy           | dy is read once for both                                     |
| grad_a  | (x^T ds)^T                      | -                                                            |
| grad_x  | ds A^T + dy W^T                 | the branch starts the accumulator and never leaves the chip  |

With dropout, forward, grad_a and grad_x make the mask of a block from the key and the place of the block: it is never
in memory. The numbers are those of `jax.random.bits` with JAX's default generator, Threefry, which enciphers the place
of an entry (Salmon et al., 2011, https://doi.org/10.1145/2063384.2063405).

Layout: the rank is far below the 128 lanes of a register, so A is handed over transposed, [r, in], with its long axis
on the lanes, and dA comes back the same way.

Shapes need not be multiples of the blocks. Where the last block of an axis hangs over the edge, it holds whatever was
in memory. Rows and columns of an output that hang over are dropped when they are written; along an axis that is summed,
both operands are set to zero first, since a stray NaN times zero is still NaN.
"""

import dataclasses
from functools import partial
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jlora.kernels.dropout import threshold
from jlora.kernels.lora_linear import Pieces
from jlora.kernels.partition import partitioned

# Blocks of tokens, and of `in` and `out`. Two buffers of each operand and the accumulator take about 3 MiB of VMEM in
# bfloat16. read_dy has no large weight to hold and takes wider blocks, so that its partial sums of u are few.
_TOKENS = 256
_FEATURES = 512
_WIDE = 2048


@dataclasses.dataclass(frozen=True, kw_only=True)
class PallasPieces(Pieces):
    """The products as TPU kernels. Each is partitioned with its operands; then the leading axes, local, are merged."""

    interpret: ClassVar[bool] = False

    def keep(self, x, key):
        """The two words of the key; and where a kernel could not make the mask from them, the mask."""
        makes = str(jax.random.key_impl(key)) == "threefry2x32" and jax.config.jax_threefry_partitionable
        if makes and x.size <= 2**32:
            return lax.bitcast_convert_type(jax.random.key_data(key), jnp.int32)
        return super().keep(x, key).astype(jnp.int8)

    def _mask(self, keep, n_in, block):
        """For a kernel that masks these blocks of [tokens, in]: (operands, their specs, how it masks a block)."""
        if keep is None:
            return (), (), lambda refs, block, row, column: block
        if keep.dtype == jnp.int8:
            read = lambda refs: refs[0][...].astype(jnp.int32) != 0  # Mosaic compares no bytes on all TPUs
            return (_matrix(keep),), (block,), lambda refs, block, row, column: _zeroed(block, read(refs))
        kept = lambda refs, block, row, column: _zeroed(
            block, _kept(refs[0], _places(block.shape, row, column, n_in), self.dropout)
        )
        return (keep,), (pl.BlockSpec(memory_space=pltpu.SMEM),), kept

    def forward(self, x, w, a, b, scale, keep=None):
        t, m = _tokens(x), _mask_names(x, keep)
        rule = f"s, {t} i, i o, i r, r o{m} -> {t} o, {t} r"
        fn = partitioned(self._forward, rule, sums=("i", "i"), whole="s r k", local=self._masked(t, x.shape, keep))
        y, h = fn(scale.reshape(1), x, w, a, b, *_some(keep))
        return y, checkpoint_name(h, "lora_h")

    def read_dy(self, dy, h, b):
        t = _tokens(dy)
        fn = partitioned(self._read_dy, f"{t} o, {t} r, r o -> {t} r, r o", sums=("o", t), whole="r")
        return fn(dy, h, b)

    def grad_a(self, x, ds, a, keep=None):
        t, m = _tokens(x), _mask_names(x, keep)
        local = self._masked(t, x.shape, keep)
        fn = partitioned(self._grad_a, f"{t} i, {t} r{m} -> i r", sums=(t,), whole="r k", local=local)
        return fn(x, ds, *_some(keep))[0]

    def grad_x(self, dy, ds, w, a, x_type, keep=None):
        t, m = _tokens(dy), _mask_names(dy, keep)
        masked = self._masked(t, x_type.shape, keep)

        def local(part, args):
            dy, ds, *rest = masked(part, args)
            first, _ = part("o")
            return dy, jnp.where(first == 0, ds, jnp.zeros_like(ds)), *rest  # once in the sum over o

        rule = f"{t} o, {t} r, i o, i r{m} -> {t} i"
        return partitioned(self._grad_x, rule, sums=("o",), whole="r k", local=local)(dy, ds, w, a, *_some(keep))[0]

    def _masked(self, t: str, whole: tuple[int, ...], keep):
        """A device's operands, the last of them its part of the mask in the place of the key of it all."""

        def local(part, args):
            if keep is None or keep.dtype == jnp.int8:
                return args
            starts, shape = zip(*map(part, (*t.split(), "i")), strict=True)
            place = jnp.zeros(shape, jnp.int32)
            for axis, start in enumerate(starts):
                place = place * whole[axis] + start + lax.broadcasted_iota(jnp.int32, shape, axis)
            return (*args[:-1], _kept(args[-1], place, self.dropout).astype(jnp.int8))

        return local

    def _forward(self, scale, x, w, a, b, keep=None):
        x2 = _matrix(x)
        (tokens, n_in), (rank, n_out) = x2.shape, b.shape
        bt, bi, bo = min(tokens, _TOKENS), min(n_in, _FEATURES), min(n_out, _FEATURES)
        of_x = pl.BlockSpec((bt, bi), lambda t, o, i: (t, i))
        masks, mask_specs, mask = self._mask(keep, n_in, of_x)
        y, h = pl.pallas_call(
            partial(_forward_kernel, dot=self._kernel_dot, mask=mask, n_in=n_in),
            grid=(pl.cdiv(tokens, bt), pl.cdiv(n_out, bo), pl.cdiv(n_in, bi)),
            in_specs=[
                pl.BlockSpec(memory_space=pltpu.SMEM),
                *mask_specs,
                of_x,
                pl.BlockSpec((bi, bo), lambda t, o, i: (i, o)),
                pl.BlockSpec((rank, bi), lambda t, o, i: (0, i)),
                pl.BlockSpec((rank, bo), lambda t, o, i: (0, o)),
            ],
            out_specs=[
                pl.BlockSpec((bt, bo), lambda t, o, i: (t, o)),
                pl.BlockSpec((bt, rank), lambda t, o, i: (t, 0)),
            ],
            out_shape=[
                _like(x, (tokens, n_out), self.out),
                _like(x, (tokens, rank), self.accumulate),
            ],
            scratch_shapes=[pltpu.VMEM((bt, bo), self.accumulate)],
            **self._options("parallel", "arbitrary", "arbitrary"),
        )(scale, *masks, *self._operands(x2, w, a.T, b))
        return y.reshape(*x.shape[:-1], n_out), h.reshape(*x.shape[:-1], rank)

    def _read_dy(self, dy, h, b):
        dy2, h2 = _matrix(dy), _matrix(h)
        (tokens, n_out), rank = dy2.shape, b.shape[0]
        bt, bo = min(tokens, _TOKENS), min(n_out, _WIDE)
        columns = pl.cdiv(n_out, bo)
        # Tokens are the inner axis of the grid: h^T dy gathers in one block after the other. u then comes in one
        # partial sum for each block of columns.
        u, h_dy = pl.pallas_call(
            partial(_read_dy_kernel, dot=self._kernel_dot, tokens=tokens, n_out=n_out),
            grid=(columns, pl.cdiv(tokens, bt)),
            in_specs=[
                pl.BlockSpec((bt, bo), lambda o, t: (t, o)),
                pl.BlockSpec((bt, rank), lambda o, t: (t, 0)),
                pl.BlockSpec((rank, bo), lambda o, t: (0, o)),
            ],
            out_specs=[
                pl.BlockSpec((None, bt, rank), lambda o, t: (o, t, 0)),
                pl.BlockSpec((rank, bo), lambda o, t: (0, o)),
            ],
            out_shape=[
                _like(dy, (columns, tokens, rank), self.accumulate),
                _like(dy, (rank, n_out), self.accumulate),
            ],
            **self._options("parallel", "arbitrary"),
        )(*self._operands(dy2, h2, b))
        return u.sum(0).reshape(h.shape), h_dy

    def _grad_a(self, x, ds, keep=None):
        x2, ds2 = _matrix(x), _matrix(ds)
        (tokens, n_in), rank = x2.shape, ds2.shape[1]
        bt, bi = min(tokens, _TOKENS), min(n_in, _WIDE)
        of_x = pl.BlockSpec((bt, bi), lambda i, t: (t, i))
        masks, mask_specs, mask = self._mask(keep, n_in, of_x)
        da_t = pl.pallas_call(
            partial(_grad_a_kernel, dot=self._kernel_dot, mask=mask, tokens=tokens),
            grid=(pl.cdiv(n_in, bi), pl.cdiv(tokens, bt)),
            in_specs=[*mask_specs, pl.BlockSpec((bt, rank), lambda i, t: (t, 0)), of_x],
            out_specs=pl.BlockSpec((rank, bi), lambda i, t: (0, i)),
            out_shape=_like(x, (rank, n_in), self.accumulate),
            **self._options("parallel", "arbitrary"),
        )(*masks, *self._operands(ds2, x2))
        return (da_t.T,)

    def _grad_x(self, dy, ds, w, a, keep=None):
        dy2, ds2 = _matrix(dy), _matrix(ds)
        (tokens, n_out), (n_in, rank) = dy2.shape, a.shape
        bt, bi, bo = min(tokens, _TOKENS), min(n_in, _FEATURES), min(n_out, _FEATURES)
        of_dx = pl.BlockSpec((bt, bi), lambda t, i, o: (t, i))
        masks, mask_specs, mask = self._mask(keep, n_in, of_dx)
        dx = pl.pallas_call(
            partial(_grad_x_kernel, dot=self._kernel_dot, mask=mask, n_out=n_out),
            grid=(pl.cdiv(tokens, bt), pl.cdiv(n_in, bi), pl.cdiv(n_out, bo)),
            in_specs=[
                *mask_specs,
                pl.BlockSpec((bt, bo), lambda t, i, o: (t, o)),
                pl.BlockSpec((bt, rank), lambda t, i, o: (t, 0)),
                pl.BlockSpec((bi, bo), lambda t, i, o: (i, o)),
                pl.BlockSpec((rank, bi), lambda t, i, o: (0, i)),
            ],
            out_specs=of_dx,
            out_shape=_like(dy, (tokens, n_in), self.compute),
            scratch_shapes=[pltpu.VMEM((bt, bi), self.accumulate)],
            **self._options("parallel", "parallel", "arbitrary"),
        )(*masks, *self._operands(dy2, ds2, w, a.T))
        return (dx.reshape(*dy.shape[:-1], n_in),)

    def _operands(self, *arrays):
        return (v.astype(self.compute) for v in arrays)

    def _options(self, *semantics):
        return {"compiler_params": pltpu.CompilerParams(dimension_semantics=semantics), "interpret": self.interpret}

    def _kernel_dot(self, lhs, rhs, lhs_axis, rhs_axis):
        return _dot(self, lhs, rhs, lhs_axis, rhs_axis)


@dataclasses.dataclass(frozen=True, kw_only=True)
class InterpretedPieces(PallasPieces):
    """The kernels run by Pallas' interpreter, which fills what lies beyond an edge, and fresh memory, with NaN."""

    interpret: ClassVar[bool] = True


def _tokens(x) -> str:
    """Names of the leading axes."""
    return " ".join(f"t{axis}" for axis in range(x.ndim - 1))


def _mask_names(x, keep) -> str:
    if keep is None:
        return ""
    return f", {_tokens(x)} i" if keep.dtype == jnp.int8 else ", k"


def _some(keep) -> tuple:
    return () if keep is None else (keep,)


def _matrix(v):
    return v.reshape(v.size // v.shape[-1], v.shape[-1])


def _like(v, shape, dtype):
    """An output that varies over the mesh axes of `shard_map` as `v` does."""
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(v).manual_axis_type)


def _dot(pieces: Pieces, lhs, rhs, lhs_axis: int, rhs_axis: int):
    if 1 in (*lhs.shape, *rhs.shape):  # Mosaic multiplies by a vector elementwise, and wants one dtype throughout
        lhs, rhs = (v.astype(pieces.compute).astype(pieces.accumulate) for v in (lhs, rhs))
        pieces = dataclasses.replace(pieces, compute=pieces.accumulate)
    return pieces._dot_general(lhs, rhs, (lhs_axis,), (rhs_axis,))


def _inside(block, axis: int, index, size: int):
    """The block, the `index`-th along `axis`, with zeros beyond the edge of an array of that `size`."""
    if size % block.shape[axis] == 0:
        return block
    position = index * block.shape[axis] + lax.broadcasted_iota(jnp.int32, block.shape, axis)
    return _zeroed(block, position < size)


def _zeroed(block, keep):
    # Of a few rows in bfloat16, less than a register, Mosaic has no select.
    wide = block.astype(jnp.promote_types(block.dtype, jnp.float32)) if block.shape[0] < 16 else block
    return jnp.where(keep, wide, jnp.zeros_like(wide)).astype(block.dtype)


# Rotations of a round of Threefry-2x32, twenty rounds in all, and what is mixed into its third key.
_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = 0x1BD11BDA


def _places(shape, row, column, width: int):
    """Of the entries of a block of this shape, by row and column among such blocks, the places in an array so wide."""
    place = (row * shape[0] + lax.broadcasted_iota(jnp.int32, shape, 0)) * width
    return place + column * shape[1] + lax.broadcasted_iota(jnp.int32, shape, 1)


def _kept(key, place, dropout: float):
    """`keep_mask` at these places, in whole numbers of 32 bits with a sign, which a TPU has; `key` is its two words."""
    keys = key[0], key[1], key[0] ^ key[1] ^ _PARITY
    a, b = jnp.full(place.shape, keys[0]), place + keys[1]
    for group in range(5):
        for bits in _ROTATIONS[group % 2]:
            a = a + b
            b = (lax.shift_left(b, bits) | lax.shift_right_logical(b, 32 - bits)) ^ a
        a, b = a + keys[(group + 1) % 3], b + keys[(group + 2) % 3] + (group + 1)
    # The comparison of numbers without a sign is that of numbers with one, when the highest bit is turned.
    turned = lambda number: int(np.uint32(number ^ 2**31).view(np.int32))
    return (a ^ b ^ turned(0)) >= turned(threshold(dropout))


def _forward_kernel(scale, *refs, dot, mask, n_in):
    *masks, x, w, at, b, y, h, total = refs
    row, column, k = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    x_block = _inside(x[...], 1, k, n_in)

    @pl.when(k == 0)
    def _():
        total[...] = jnp.zeros_like(total)

    @pl.when((column == 0) & (k == 0))
    def _():
        h[...] = jnp.zeros_like(h)

    # h is complete after the first column of blocks, and stays in VMEM for the others.
    @pl.when(column == 0)
    def _():
        h[...] += dot(mask(masks, x_block, row, k), _inside(at[...], 1, k, n_in), 1, 1)

    total[...] += dot(x_block, _inside(w[...], 0, k, n_in), 1, 0)

    @pl.when(k == pl.num_programs(2) - 1)
    def _():
        y[...] = (total[...] + dot(scale[0] * h[...], b[...], 1, 0)).astype(y.dtype)


def _read_dy_kernel(dy, h, b, u, h_dy, *, dot, tokens, n_out):
    column, row = pl.program_id(0), pl.program_id(1)
    dy_block = _inside(_inside(dy[...], 0, row, tokens), 1, column, n_out)

    @pl.when(row == 0)
    def _():
        h_dy[...] = jnp.zeros_like(h_dy)

    u[...] = dot(dy_block, _inside(b[...], 1, column, n_out), 1, 1)
    h_dy[...] += dot(_inside(h[...], 0, row, tokens), dy_block, 0, 0)


def _grad_a_kernel(*refs, dot, mask, tokens):
    *masks, ds, x, da_t = refs
    column, row = pl.program_id(0), pl.program_id(1)

    @pl.when(row == 0)
    def _():
        da_t[...] = jnp.zeros_like(da_t)

    x_block = mask(masks, _inside(x[...], 0, row, tokens), row, column)
    da_t[...] += dot(_inside(ds[...], 0, row, tokens), x_block, 0, 0)


def _grad_x_kernel(*refs, dot, mask, n_out):
    *masks, dy, ds, w, at, dx, total = refs
    row, column, k = pl.program_id(0), pl.program_id(1), pl.program_id(2)

    @pl.when(k == 0)
    def _():
        total[...] = mask(masks, dot(ds[...], at[...], 1, 0), row, column)

    total[...] += dot(_inside(dy[...], 1, k, n_out), _inside(w[...], 1, k, n_out), 1, 1)

    @pl.when(k == pl.num_programs(2) - 1)
    def _():
        dx[...] = total[...].astype(dx.dtype)
