"""`x @ m` for a matrix that is trained, whose gradient is a product that moves the smaller operand.

JAX's own rule puts the cotangent first in the product that gives the gradient of m. Summing over several token axes,
XLA then transposes all of it on CPU, which costs as much as the products of a narrow m.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float

from jlora.kernels.lora_linear import Pieces, _varying_together


def product(
    x: Float[Array, "*tokens k"],
    m: Float[Array, "k n"],
    *,
    implementation: str | None = None,
    precision: Any = None,
    preferred_element_type: Any = None,
) -> Float[Array, "*tokens n"]:
    """`x @ m` in the dtype of `x`, `m` being cast inside; `m` has its gradient in its own dtype.

    **Arguments:**

    - `implementation`: `"plain"` leaves the gradient to JAX, which has forward mode then; anything else means the one
        written by hand. Only what is differentiated is kept for it: no x for a constant m.
    - `precision`, `preferred_element_type`: as in `jax.lax.dot_general`.
    """
    pieces = Pieces.of(x.dtype, precision, preferred_element_type)
    if implementation == "plain":
        return _product(pieces, x, m)
    return _with_gradient(pieces, jax.typeof(x), *_varying_together(x, m))


def _product(pieces: Pieces, x, m):
    return pieces.dot(x, m, -1, 0).astype(pieces.out)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _with_gradient(pieces: Pieces, x_type, x, m):
    return _product(pieces, x, m)


def _fwd(pieces, x_type, x, m):
    y = _product(pieces, x.value, m.value)
    return y, (x.value if m.perturbed else None, m.value)


def _bwd(pieces, x_type, residuals, dy):
    if isinstance(dy, SymbolicZero):
        return None, None
    x, m = residuals
    dy = dy.astype(pieces.compute)
    dx = pieces.dot(dy, m, -1, 1, like=x_type).astype(x_type.dtype)
    if x is None:
        return dx, None
    # The wider operand stays as it is: it is the second one.
    dm = pieces.grad_w(x, dy, m) if m.shape[0] <= m.shape[1] else pieces.grad_a(x, dy, m)
    return dx, dm.astype(m.dtype)


_with_gradient.defvjp(_fwd, _bwd, symbolic_zeros=True)
