"""Lengths of the columns of W + s A B, in one pass over W and without forming it.

    ||W_o + s (AB)_o||^2 = ||W_o||^2 + sum_k b_ko (2 (A^T W)_ko + (A^T A b)_ko)      with b = s B

Cost: 2 in out (r + 1) operations, and one read of W. XLA reads it twice, for the squares and for A^T W.
"""

from __future__ import annotations

from functools import partial

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jlora.kernels.lora_linear import _check_implementation, _varying_together


def column_norm(
    w: Float[Array, "in out"],
    a: Float[Array, "in r"],
    b: Float[Array, "r out"],
    scale: float | Float[Array, ""] = 1.0,
    *,
    implementation: str | None = None,
) -> Float[Array, " out"]:
    """Euclidean norms of the columns of `w + scale * a @ b`, as DoRA takes them, in float32 or wider.

    A constant of the differentiation, as in DoRA's paper: no gradient flows to what it is computed of. A column that is
    zero has the root of the smallest number, so that one may divide by it.

    **Arguments:**

    - `w`, `a`, `b`, `scale`: as in `lora_linear`. Products are exact to float32, whatever the dtypes are.
    - `implementation`: `"plain"`, `"custom_vjp"` and `None` are XLA's. `"pallas"` is a TPU kernel, for `w` in bfloat16
        and float32; over several devices, call it inside `jax.shard_map`. `"pallas_interpret"` is the same emulated on
        any platform. For tests; it is slow.
    """
    w, a, b, scale = (lax.stop_gradient(jnp.asarray(v)) for v in (w, a, b, scale))
    _check(w, a, b, scale)
    _check_implementation(implementation, w.dtype)
    wide = jnp.promote_types(jnp.result_type(w, a, b), jnp.float32)
    squares = _squares
    if implementation in ("pallas", "pallas_interpret") and 0 not in (w.size, a.size):
        # Imported on demand: Pallas would be a large part of the time that `import jlora` takes.
        from jlora.kernels import column_norm_tpu

        squares = partial(column_norm_tpu.squares, interpret=implementation == "pallas_interpret")
    w, a, b, scale = _varying_together(w, a.astype(wide), b.astype(wide), scale.astype(wide))
    return jnp.sqrt(jnp.maximum(squares(w, a, scale * b), jnp.finfo(wide).tiny))


def _check(w, a, b, scale) -> None:
    got = f"got w {w.shape}, a {a.shape}, b {b.shape}, scale {scale.shape}"
    want = "want w [in, out], a [in, r], b [r, out] and a scalar scale"
    if not w.ndim == a.ndim == b.ndim == 2 or scale.ndim:
        raise ValueError(f"{got}; {want}. Stacked layers go through jax.vmap; several in or out axes are merged first.")
    if not (w.shape == (a.shape[0], b.shape[1]) and a.shape[1] == b.shape[0]):
        raise ValueError(f"{got}, which do not fit together; {want}. A weight stored as [out, in] is passed as w.T.")
    if not jnp.issubdtype(w.dtype, jnp.floating):
        raise ValueError(f"got w of {w.dtype}; want floating point. A quantized weight is passed as its matrix().")


def _squares(w, a, b) -> Float[Array, " out"]:
    product = partial(jnp.matmul, precision=lax.Precision.HIGHEST)
    square = jnp.sum(jnp.square(w.astype(a.dtype)), axis=0)  # fused by XLA into one pass over w
    return square + jnp.sum(b * (2 * product(a.T, w.astype(a.dtype)) + product(product(a.T, a), b)), axis=0)
