"""Pallas TPU kernel of `column_norm`: a block of W comes from memory once, for its squares and for A^T W.

A and B are handed over in float32. Of a W in bfloat16, A^T W is exact in one pass of the matrix unit: A is split into
three numbers of bfloat16, which are all its bits, and the three stand below each other as so many more rows.

Layout and edges are as in `lora_linear_tpu`.
"""

from functools import partial

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from jlora.kernels.lora_linear_tpu import _inside, _like

_FEATURES = 512


def squares(w, a, b, *, interpret: bool) -> Float[Array, " out"]:
    """Squares of the norms of the columns of W + A B."""
    (n_in, n_out), wide = w.shape, a.dtype
    gram = jnp.matmul(a.T, a, precision=lax.Precision.HIGHEST)
    # Ranks by the eight, as registers hold them.
    more = -a.shape[1] % 8
    at, b, gram = (jnp.pad(v, ((0, more), (0, more * square))) for v, square in ((a.T, 0), (b, 0), (gram, 1)))
    rank, bi, bo = len(b), min(n_in, _FEATURES), min(n_out, _FEATURES)
    return pl.pallas_call(
        partial(_kernel, n_in=n_in),
        grid=(pl.cdiv(n_out, bo), pl.cdiv(n_in, bi)),
        in_specs=[
            pl.BlockSpec((bi, bo), lambda o, i: (i, o)),
            pl.BlockSpec((rank, bi), lambda o, i: (0, i)),
            pl.BlockSpec((rank, bo), lambda o, i: (0, o)),
            pl.BlockSpec((rank, rank), lambda o, i: (0, 0)),
        ],
        out_specs=pl.BlockSpec((1, bo), lambda o, i: (0, o)),
        out_shape=_like(w, (1, n_out), wide),
        scratch_shapes=[pltpu.VMEM((rank, bo), wide), pltpu.VMEM((1, bo), wide)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        interpret=interpret,
        name="column_norm",
    )(w, at, b, gram)[0]


def _kernel(w, at, b, gram, y, cross, square, *, n_in):
    k = pl.program_id(1)

    @pl.when(k == 0)
    def _():
        cross[...] = jnp.zeros_like(cross)
        square[...] = jnp.zeros_like(square)

    w_block, at_block = _inside(w[...], 0, k, n_in), _inside(at[...], 1, k, n_in)
    square[...] += jnp.sum(jnp.square(w_block.astype(square.dtype)), axis=0, keepdims=True)
    cross[...] += _product(at_block, w_block)

    @pl.when(k == pl.num_programs(1) - 1)
    def _():
        y[...] = square[...] + jnp.sum(b[...] * (2 * cross[...] + _product(gram[...], b[...])), axis=0, keepdims=True)


def _product(lhs: Float[Array, "m k"], rhs: Float[Array, "k n"]) -> Float[Array, "m n"]:
    """In the dtype of lhs, float32 or wider."""
    dot = partial(lax.dot_general, dimension_numbers=(((1,), (0,)), ((), ())), preferred_element_type=lhs.dtype)
    if rhs.dtype != jnp.bfloat16 or lhs.dtype != jnp.float32:
        return dot(lhs, rhs.astype(lhs.dtype), precision=lax.Precision.HIGHEST)
    left, thirds = lhs, []
    for _ in range(3):
        thirds.append(left.astype(jnp.bfloat16).astype(jnp.float32))
        left = left - thirds[-1]
    products = dot(jnp.concatenate(thirds).astype(jnp.bfloat16), rhs)
    m = len(lhs)
    return products[:m] + products[m : 2 * m] + products[2 * m :]
