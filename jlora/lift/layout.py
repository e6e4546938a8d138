"""Rules for equations that only change how a weight lies: the adapted value is carried along.

A stored base stays as it is stored: the labels say how the weight lies, and a cast or a cut waits for the product.
"""

from typing import Any

import jax
import jax.numpy as jnp

from jlora.lift.core import Run, is_adapted, plain, rule
from jlora.storage import Take, is_stored
from jlora.weight import STACK, AdaptedWeight


def _relaid(eqn: Any, w: AdaptedWeight) -> Any:
    """The base after an equation that moves its entries and does nothing else."""
    return w.base if is_stored(w.base) else plain(eqn, [w.base])[0]


@rule(
    "convert_element_type", "copy", "copy_p", "reduce_precision", "sharding_constraint", "name", "pvary", "reshard",
    layout=True,
)  # fmt: skip
def same_layout(run: Run, eqn: Any, values: list) -> list | None:
    (w,) = values
    if is_stored(w.base):
        return _stored_same_layout(eqn, w)
    (base,) = plain(eqn, [w.base])
    if not jnp.issubdtype(base.dtype, jnp.floating):
        return None
    return [w.with_base(base)]


def _stored_same_layout(eqn: Any, w: AdaptedWeight) -> list | None:
    match eqn.primitive.name:
        case "convert_element_type":
            dtype = eqn.params["new_dtype"]
            return [w.cast(dtype)] if jnp.issubdtype(dtype, jnp.floating) else None
        case "reduce_precision":
            return None
        case "pvary":
            return [w.with_base(jax.tree.map(lambda leaf: plain(eqn, [leaf])[0], w.base))]
    return [w]  # a name or a sharding is of the weight, and the weight is not formed


@rule("stop_gradient")
def stop_gradient(run: Run, eqn: Any, values: list) -> list | None:
    return [jax.tree.map(jax.lax.stop_gradient, values[0])]


@rule("optimization_barrier")
def optimization_barrier(run: Run, eqn: Any, values: list) -> list | None:
    bases = jax.lax.optimization_barrier([v.base if is_adapted(v) else v for v in values])
    return [v.with_base(base) if is_adapted(v) else base for v, base in zip(values, bases, strict=True)]


@rule("transpose", layout=True)
def transpose(run: Run, eqn: Any, values: list) -> list | None:
    (w,) = values
    return [w.with_base(_relaid(eqn, w), [w.labels[axis] for axis in eqn.params["permutation"]])]


@rule("rev", layout=True)
def rev(run: Run, eqn: Any, values: list) -> list | None:
    """The window of a transposed convolution. Only convolutions take what runs backwards."""
    (w,) = values
    turned = eqn.params["dimensions"]
    if any(atom.group == STACK for axis in turned for atom in w.labels[axis]):
        return None
    turn = lambda label: tuple(atom._replace(backwards=not atom.backwards) for atom in label)
    labels = [turn(label) if axis in turned else label for axis, label in enumerate(w.labels)]
    return [w.with_base(_relaid(eqn, w), labels)]


@rule("reshape", layout=True)
def reshape(run: Run, eqn: Any, values: list) -> list | None:
    w, *rest = values
    if rest or eqn.params["dimensions"] is not None:
        return None
    reshaped = w.reshaped(_relaid(eqn, w), eqn.params["new_sizes"])
    return None if reshaped is None else [reshaped]


@rule("squeeze", layout=True)
def squeeze(run: Run, eqn: Any, values: list) -> list | None:
    (w,) = values
    drop = {axis % len(w.shape) for axis in eqn.params["dimensions"]}
    return [w.with_base(_relaid(eqn, w), [label for axis, label in enumerate(w.labels) if axis not in drop])]


@rule("broadcast_in_dim", layout=True)
def broadcast_in_dim(run: Run, eqn: Any, values: list) -> list | None:
    """``expand_dims``: a broadcast that only adds axes of size 1."""
    w, *rest = values
    dims, shape = eqn.params["broadcast_dimensions"], eqn.params["shape"]
    if rest or tuple(shape[d] for d in dims) != w.shape or any(s != 1 for d, s in enumerate(shape) if d not in dims):
        return None
    at = dict(zip(dims, w.labels, strict=True))
    return [w.with_base(_relaid(eqn, w), [at.get(axis, ()) for axis in range(len(shape))])]


@rule("slice", layout=True)
def slice_(run: Run, eqn: Any, values: list) -> list | None:
    (w,) = values
    starts, limits = eqn.params["start_indices"], eqn.params["limit_indices"]
    strides = eqn.params["strides"] or (1,) * len(starts)
    out: AdaptedWeight | None = w
    for axis, (start, limit, stride) in enumerate(zip(starts, limits, strides, strict=True)):
        if (start, limit, stride) == (0, w.shape[axis], 1):
            continue
        out = out.sliced(axis, Take(start, -(-(limit - start) // stride), stride))
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
        out = out.sliced(axis, Take(jnp.asarray(start), size))
        if out is None:
            return None
    return [out]


@rule("split", layout=True)
def split(run: Run, eqn: Any, values: list) -> list | None:
    (w,) = values
    axis, parts, start = eqn.params["axis"], [], 0
    for size in eqn.params["sizes"]:
        part = w.sliced(axis, Take(start, int(size)))
        if part is None:
            return None
        parts.append(part)
        start += int(size)
    return parts
