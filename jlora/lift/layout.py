"""Rules for equations that only change how a weight lies: the adapted value is carried along."""

from typing import Any

import jax
import jax.numpy as jnp

from jlora.lift.core import Run, is_adapted, plain, rule
from jlora.weight import AdaptedWeight


@rule("convert_element_type", "copy", "copy_p", "reduce_precision", "sharding_constraint", "name", "pvary", "reshard")
def same_layout(run: Run, eqn: Any, values: list) -> list | None:
    (w,) = values
    (base,) = plain(eqn, [w.base])
    if not jnp.issubdtype(base.dtype, jnp.floating):
        return None
    return [w.with_base(base)]


@rule("stop_gradient")
def stop_gradient(run: Run, eqn: Any, values: list) -> list | None:
    return [jax.tree.map(jax.lax.stop_gradient, values[0])]


@rule("optimization_barrier")
def optimization_barrier(run: Run, eqn: Any, values: list) -> list | None:
    bases = plain(eqn, [v.base if is_adapted(v) else v for v in values])
    return [v.with_base(base) if is_adapted(v) else base for v, base in zip(values, bases, strict=True)]


@rule("transpose")
def transpose(run: Run, eqn: Any, values: list) -> list | None:
    (w,) = values
    (base,) = plain(eqn, [w.base])
    return [w.with_base(base, [w.labels[axis] for axis in eqn.params["permutation"]])]


@rule("reshape")
def reshape(run: Run, eqn: Any, values: list) -> list | None:
    w, *rest = values
    if rest or eqn.params["dimensions"] is not None:
        return None
    (base,) = plain(eqn, [w.base])
    return _one(w.reshaped(base))


@rule("squeeze")
def squeeze(run: Run, eqn: Any, values: list) -> list | None:
    (w,) = values
    (base,) = plain(eqn, [w.base])
    drop = {axis % len(w.shape) for axis in eqn.params["dimensions"]}
    return [w.with_base(base, [label for axis, label in enumerate(w.labels) if axis not in drop])]


@rule("broadcast_in_dim")
def broadcast_in_dim(run: Run, eqn: Any, values: list) -> list | None:
    """``expand_dims``: a broadcast that only adds axes of size 1."""
    w, *rest = values
    dims, shape = eqn.params["broadcast_dimensions"], eqn.params["shape"]
    if rest or tuple(shape[d] for d in dims) != w.shape or any(s != 1 for d, s in enumerate(shape) if d not in dims):
        return None
    (base,) = plain(eqn, [w.base])
    at = dict(zip(dims, w.labels, strict=True))
    return [w.with_base(base, [at.get(axis, ()) for axis in range(len(shape))])]


@rule("slice")
def slice_(run: Run, eqn: Any, values: list) -> list | None:
    (w,) = values
    starts, limits = eqn.params["start_indices"], eqn.params["limit_indices"]
    strides = eqn.params["strides"] or (1,) * len(starts)
    out: AdaptedWeight | None = w
    for axis, (start, limit, stride) in enumerate(zip(starts, limits, strides, strict=True)):
        if (start, limit, stride) == (0, w.shape[axis], 1):
            continue
        take = lambda leaf, at, start=start, limit=limit, stride=stride: jax.lax.slice_in_dim(
            leaf, start, limit, stride, axis=at
        )
        out = out.sliced(axis, take(out.base, axis), take)
        if out is None:
            return None
    return [out]


@rule("dynamic_slice")
def dynamic_slice(run: Run, eqn: Any, values: list) -> list | None:
    w, *starts = values
    if not is_adapted(w) or any(map(is_adapted, starts)):
        return None
    out: AdaptedWeight | None = w
    for axis, (start, size) in enumerate(zip(starts, eqn.params["slice_sizes"], strict=True)):
        if size == w.shape[axis]:
            continue
        take = lambda leaf, at, start=start, size=size: jax.lax.dynamic_slice_in_dim(leaf, start, size, axis=at)
        out = out.sliced(axis, take(out.base, axis), take)
        if out is None:
            return None
    return [out]


@rule("split")
def split(run: Run, eqn: Any, values: list) -> list | None:
    (w,) = values
    axis, parts, start = eqn.params["axis"], [], 0
    for size in eqn.params["sizes"]:
        take = lambda leaf, at, start=start, size=int(size): jax.lax.slice_in_dim(leaf, start, start + size, axis=at)
        part = w.sliced(axis, take(w.base, axis), take)
        if part is None:
            return None
        parts.append(part)
        start += int(size)
    return parts


def _one(w: AdaptedWeight | None) -> list | None:
    return None if w is None else [w]
