"""Several LoRA linears of one x (queries, keys and values; gate and up), which share the products with it.

For layers i of the same activations x [..., in], with A = [A_1 | A_2 | ...] of all their ranks together:

    h = x A    y_i = x W_i + s_i h_i B_i    ds_i = s_i dy_i B_i^T    dx = sum of dy_i W_i^T + ds A^T    dA = x^T ds

The FLOPs are those of the layers one by one. Read and written are fewer: x once for all h and once for all dA, and dx
has one addition for all branches. Products of r columns are too narrow for most hardware; of 3 r less so.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial, reduce
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float

from jlora.kernels.lora_linear import Pieces, _check_shapes, _varying_together, lora_linear


def lora_linears(
    x: Float[Array, "*tokens in"],
    ws: Sequence[Float[Array, "in out_i"]],
    as_: Sequence[Float[Array, "in r_i"]],
    bs: Sequence[Float[Array, "r_i out_i"]],
    scales: Sequence[float | Float[Array, ""]],
    *,
    frozen_w: bool = True,
    implementation: str | None = None,
    precision: Any = None,
    preferred_element_type: Any = None,
) -> tuple[Float[Array, "*tokens out_i"], ...]:
    """`lora_linear` for several layers of the same `x`: `x @ w + scale * (x @ a) @ b` of each.

    The arguments are those of `lora_linear`, a sequence in the place of each that a layer has of its own; ranks, widths
    and scales may differ. Dropout is not among them: a layer drops entries of its own, and then there is no one x.

    The products with x are shared in `"custom_vjp"` (and None), where the weights have one dtype and the `as_` are
    sharded alike. The other implementations run the layers one by one.
    """
    arrays = [list(map(jnp.asarray, group)) for group in (ws, as_, bs)]
    layers = list(zip(*arrays, scales, strict=True))
    for layer in layers:
        _check_shapes(x, *layer)
    options = dict(precision=precision, preferred_element_type=preferred_element_type)
    kinds = {(w.dtype, jax.typeof(a).sharding) for w, a, _, _ in layers}
    if implementation not in (None, "custom_vjp") or len(layers) == 1 or len(kinds) > 1 or not x.size:
        one_by_one = partial(lora_linear, x, frozen_w=frozen_w, implementation=implementation, **options)
        return tuple(one_by_one(*layer) for layer in layers)
    pieces = Pieces.of(jnp.result_type(x, arrays[0][0]), **options)
    scales = [jnp.asarray(scale, pieces.accumulate) for scale in scales]
    x, *flat = _varying_together(x, *arrays[0], *arrays[1], *arrays[2], *scales)
    n = len(layers)
    return _with_gradient(pieces, frozen_w, jax.typeof(x), x, *(tuple(flat[i : i + n]) for i in range(0, 4 * n, n)))


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _with_gradient(pieces: Pieces, frozen_w: bool, x_type, x, ws, as_, bs, scales):
    return _forward(pieces, x, ws, as_, bs, scales)[0]


def _together(pieces: Pieces, as_) -> Float[Array, "in r"]:
    return lax.concatenate([a.astype(pieces.compute) for a in as_], 1)


def _apart(array: Float[Array, "*n r"], as_) -> list[Float[Array, "*n r_i"]]:
    return lax.split(array, [a.shape[1] for a in as_], axis=array.ndim - 1)


def _forward(pieces: Pieces, x, ws, as_, bs, scales):
    h = checkpoint_name(pieces.dot(x, _together(pieces, as_), -1, 0), "lora_h")
    layers = zip(ws, bs, scales, _apart(h, as_), strict=True)
    branch = lambda b, scale, h: pieces.dot(lax.mul(scale, h), b, -1, 0)
    return tuple(pieces.joined(pieces.base(x, w), branch(b, scale, h_i)) for w, b, scale, h_i in layers), h


def _fwd(pieces, frozen_w, x_type, x, ws, as_, bs, scales):
    # Under symbolic_zeros every argument says whether it is being differentiated.
    keep_x = any(a.perturbed for a in as_) or (not frozen_w and any(w.perturbed for w in ws))
    x, ws, as_, bs, scales = jax.tree.map(lambda v: v.value, (x, ws, as_, bs, scales))
    ys, h = _forward(pieces, x, ws, as_, bs, scales)
    return ys, (x if keep_x else None, ws, as_, bs, scales, h.astype(pieces.compute))


def _bwd(pieces, frozen_w, x_type, residuals, dys):
    x, ws, as_, bs, scales, h = residuals
    used = [i for i, dy in enumerate(dys) if not isinstance(dy, SymbolicZero)]
    hs = _apart(h, as_)
    nothing: list[Any] = [None] * len(ws)
    das, dws, dbs, dscales, dss, dxs = (list(nothing) for _ in range(6))
    for i in used:
        dy, w, b, scale = dys[i].astype(pieces.compute), ws[i], bs[i], scales[i]
        u, h_dy = pieces.read_dy(dy, hs[i], b)
        dss[i] = lax.mul(scale, u).astype(pieces.compute)
        dbs[i], dscales[i] = lax.mul(scale, h_dy).astype(b.dtype), pieces.grad_scale(hs[i], u)
        dxs[i] = pieces.dot(dy, w, -1, 1, like=x_type)
        dws[i] = None if frozen_w or x is None else pieces.grad_w(x, dy, w).astype(w.dtype)
    if not used:
        return None, *(tuple(nothing) for _ in range(4))
    live = [as_[i] for i in used]
    ds, a = lax.concatenate([dss[i] for i in used], x_type.ndim - 1), _together(pieces, live)
    dx = reduce(lax.add, [*(dxs[i] for i in used), pieces.dot(ds, a, -1, 1, like=x_type)])
    if x is not None:
        for i, da in zip(used, _apart(pieces.grad_a(x, ds, a), live), strict=True):
            das[i] = da.astype(as_[i].dtype)
    return dx.astype(x_type.dtype), *(tuple(parts) for parts in (dws, das, dbs, dscales))


_with_gradient.defvjp(_fwd, _bwd, symbolic_zeros=True)
