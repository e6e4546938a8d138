"""The product with a quantized weight, `y = x W` with W as `jlora.quant` stores it, in 4 or 8 bits.

    y = x W      dx = dy W^T

W is a constant: there is no dW. Written by hand, the gradient keeps what is stored of W and nothing else, neither x
nor W: for the backward pass W is formed again. In XLA it is formed whole, each time, and is gone after the product. The
TPU kernels form a block of it at a time, on the chip, in the place where the product wants it: what crosses the memory
is the codes, a quarter or a half of the bytes of W in bfloat16.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jlora.kernels.lora_linear import Pieces, _check_implementation, _varying_together

if TYPE_CHECKING:
    from jlora.quant import NF4, Int8


def quantized_dot(
    x: Float[Array, "*tokens in"],
    w: NF4 | Int8,
    *,
    transposed: bool = False,
    implementation: str | None = None,
    precision: Any = None,
    preferred_element_type: Any = None,
) -> Float[Array, "*tokens out"]:
    """`y = x @ w.matrix()` for a quantized `w`, with the gradient of `x`.

    The product runs in the result type of `x` and `w` and accumulates in float32 or wider.

    **Arguments:**

    - `x`: activations, with any number of leading axes.
    - `w`: a quantized weight of no stack, as `jlora.quant.quantize` makes it. Stacked layers are scanned over, or go
        through `jax.vmap`.
    - `transposed`: `x @ w.matrix().T` instead, for an embedding that is the head as well.
    - `implementation`:
        `"plain"`: the formula, differentiated by JAX. It defines the meaning, and has forward mode; it keeps the matrix
            for the backward pass.
        `"custom_vjp"`: XLA products, with the gradient written by hand.
        `"pallas"`: TPU kernels, for bfloat16 and float32, and for NF4 where `block_size` divides the axis along which
            blocks run. Over several devices, call it inside `jax.shard_map`.
        `"pallas_interpret"`: the same kernels emulated on any platform. For tests; it is slow.
        `None` means `"custom_vjp"` on every platform, until the kernels have been timed on a TPU.
    - `precision`: as in `jax.lax.dot_general`; for both products.
    - `preferred_element_type`: dtype of the result. By default, the result type of `x` and `w`.

    **Returns:** `y`, with the leading axes of `x`.

    Inside `jax.shard_map` a weight may be cut along its inputs or its outputs, `in_specs` being those of the arrays
    that are stored (rows are outputs), except that with `double` NF4 is cut nowhere: its norms run over all of it.
    """
    x = jnp.asarray(x)
    _check(x, w, transposed)
    compute = jnp.result_type(x, w.dtype)
    pieces_class = _pieces_class(implementation, compute, w)
    if 0 in (x.size, *_matrix_shape(w)):
        pieces_class = QuantizedPieces  # an empty operand has nothing to put in a block
    pieces = pieces_class.of(compute, precision, preferred_element_type)
    axis = 1 if transposed else 0
    if implementation == "plain":
        return pieces.multiply(x, w, axis).astype(pieces.out)
    leaves, treedef = jax.tree.flatten(w)
    x_varying, *leaves = _varying_together(x, *leaves)
    return _with_gradient(pieces, axis, jax.typeof(x_varying), x_varying, jax.tree.unflatten(treedef, leaves))


def _matrix_shape(w: NF4 | Int8) -> tuple[int, int]:
    """(in, out) by what is stored, which inside `shard_map` is a part."""
    from jlora.quant import NF4

    if isinstance(w, NF4):
        rows, columns = (w.codes.shape[0], 2 * w.codes.shape[1]) if _by_rows(w) else w.row_shape
    else:
        rows, columns = w.codes.shape
    return (rows, columns) if w.layout.kind == "embedding" else (columns, rows)


def _by_rows(w: NF4) -> bool:
    """Whether every block of NF4 lies in one row of what is stored."""
    return w.row_shape[1] % w.block_size == 0


def _check(x, w, transposed: bool) -> None:
    from jlora.quant import NF4, Int8

    if not isinstance(w, NF4 | Int8):
        raise TypeError(
            f"got w of type {type(w).__name__}; want NF4 or Int8 of jlora.quant. Multiply an array by `x @ w`, or "
            "store it with jlora.quant.quantize."
        )
    if not w.codes.ndim == 2:
        raise ValueError(
            f"got w with codes {w.codes.shape}; want those of one matrix, [rows, columns]. Stacked layers go through "
            "jax.vmap or are scanned over."
        )
    if isinstance(w, NF4) and w.double and w.norms.shape[0] != -(-w.magnitudes.size // 256):
        raise ValueError(
            f"got norms {w.norms.shape} for magnitudes {w.magnitudes.shape}; want one for every 256 of the whole "
            "weight. A weight that is cut up by shard_map is quantized with double=False."
        )
    n_in, n_out = _matrix_shape(w)
    wanted, other = (n_out, n_in) if transposed else (n_in, n_out)
    if x.ndim < 1 or x.shape[-1] != wanted:
        got = f"got x {x.shape} and w [{n_in}, {n_out}] with transposed={transposed}"
        hint = f" The other product has transposed={not transposed}." if x.shape[-1:] == (other,) else ""
        raise ValueError(f"{got}; want x [..., {wanted}].{hint}")


def _pieces_class(implementation: str | None, compute, w) -> type[QuantizedPieces]:
    _check_implementation(implementation, compute)
    if implementation in (None, "plain", "custom_vjp"):
        return QuantizedPieces
    from jlora.quant import NF4

    if isinstance(w, NF4) and not _by_rows(w):
        raise ValueError(
            f"got NF4 of block_size={w.block_size} over rows of {w.row_shape[1]}; the kernels want blocks that end "
            "with the rows. Use implementation=None or 'custom_vjp', or quantize with a block_size that divides "
            f"{w.row_shape[1]}."
        )
    # Imported on demand: Pallas would be a large part of the time that `import jlora` takes.
    from jlora.kernels import quantized_dot_tpu

    interpreted = implementation == "pallas_interpret"
    return quantized_dot_tpu.InterpretedPieces if interpreted else quantized_dot_tpu.PallasPieces


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantizedPieces(Pieces):
    """The product of the forward and of the backward pass, in XLA. The Pallas kernels override it."""

    def multiply(self, x, w: NF4 | Int8, axis: int, like=None) -> Float[Array, "*tokens n"]:
        """x and W [in, out], contracted along the last axis of x and this axis of W."""
        return self.dot(x, w.matrix(), -1, axis, like=like)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _with_gradient(pieces: QuantizedPieces, axis: int, x_type, x, w):
    return pieces.multiply(x, w, axis).astype(pieces.out)


def _fwd(pieces, axis, x_type, x, w):
    return _with_gradient(pieces, axis, x_type, x, w), w


def _bwd(pieces, axis, x_type, w, dy):
    # Where forward and backward pass are one program, XLA would find the matrix of the former and keep it for this. Of
    # six layers [4096, 4096] in NF4, compiled for TPU, that makes 392 MB at the peak in the place of 201.
    w, dy = lax.optimization_barrier((w, dy.astype(pieces.compute)))
    return pieces.multiply(dy, w, 1 - axis, like=x_type).astype(x_type.dtype), None


_with_gradient.defvjp(_fwd, _bwd)
