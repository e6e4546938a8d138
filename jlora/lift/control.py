"""Rules for equations that hold other jaxprs: entered, and rebuilt around the same interpreter.

A weight that enters a scan as one of its slices brings its stacked parameters along, sliced with it. What is shared and
the context are not sliced: they are constants of the body. A weight that is a carry or a result is formed, unless it is
handed back as it came in: flax.nnx returns the modules that its transformations were given.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.extend.core as jex
import numpy as np
from jax.sharding import PartitionSpec

from jlora import _compat
from jlora.lift.core import Run, evaluate, is_adapted, plain_jaxpr, rule
from jlora.storage import Take, is_stored
from jlora.weight import STACK, AdaptedWeight


@rule(*_compat.JIT_NAMES)
def jit(run: Run, eqn: Any, values: list) -> list | None:
    jaxpr = eqn.params["jaxpr"]
    constrain = lambda value, sharding: (
        jax.lax.with_sharding_constraint(value, sharding)
        if isinstance(sharding, jax.sharding.Sharding) and not is_adapted(value)
        else value
    )
    values = list(map(constrain, values, eqn.params["in_shardings"]))
    return list(map(constrain, evaluate(run, jaxpr, values), eqn.params["out_shardings"]))


@rule("closed_call", "core_call")
def call(run: Run, eqn: Any, values: list) -> list | None:
    return evaluate(run, _compat.closed(eqn.params["call_jaxpr"]), values)


@rule(*_compat.REMAT_NAMES)
def remat(run: Run, eqn: Any, values: list) -> list | None:
    jaxpr = _compat.closed(eqn.params["jaxpr"])

    arrays, whole = _arrays_of(values)
    back = {i: values[j] for i, j in _handed_back(jaxpr, values).items()}

    def body(arrays: list) -> tuple[list, dict]:
        inner = run.inner()
        return _others(inner, jaxpr, whole(arrays), back, "output of a checkpointed function"), inner.aux

    checkpointed = jax.checkpoint(body, prevent_cse=eqn.params["prevent_cse"], policy=eqn.params["policy"])
    out, aux = checkpointed(arrays)
    run.absorb(aux)
    return _joined(back, out)


def _handed_back(jaxpr: jex.ClosedJaxpr, values: Sequence[Any]) -> dict[int, int]:
    """The results that are adapted weights just as they came in: number of the result -> number of the operand."""
    given = {var: j for j, (var, value) in enumerate(zip(jaxpr.jaxpr.invars, values, strict=True)) if is_adapted(value)}
    outvars = enumerate(jaxpr.jaxpr.outvars)
    return {i: given[var] for i, var in outvars if not isinstance(var, jex.Literal) and var in given}


def _others(run: Run, jaxpr: jex.ClosedJaxpr, args: Sequence[Any], back: Mapping[int, Any], where: str) -> list:
    """``evaluate``, without the results in ``back``, and every other an array."""
    return [run.materialize(out, where) for i, out in enumerate(evaluate(run, jaxpr, args)) if i not in back]


def _joined(back: Mapping[int, Any], others: Iterable[Any]) -> list:
    """``others`` in their order, with those of ``back`` at their places."""
    others = list(others)
    rest = iter(others)
    return [back[i] if i in back else next(rest) for i in range(len(back) + len(others))]


@rule("scan")
def scan(run: Run, eqn: Any, values: list) -> list | None:
    p = eqn.params
    n_consts, n_carry = p["num_consts"], p["num_carry"]
    consts, init, xs = values[:n_consts], values[n_consts : n_consts + n_carry], values[n_consts + n_carry :]
    # A carry that stays is a constant of the body; slices that come out again are what went in.
    handed = _handed_back(p["jaxpr"], values)
    back = {i: values[j] for i, j in handed.items() if j == n_consts + i or i >= n_carry <= j - n_consts}
    stays = {i: w for i, w in back.items() if i < n_carry}
    init = {i: run.materialize(v, "carry of a scan") for i, v in enumerate(init) if i not in stays}
    if run.implementation != "plain":  # the one with a forward mode
        trained = _inexact([(w.own, w.shared) for w in values if is_adapted(w)])
        init |= {i: _beside(init[i], trained) for i in _reached(p["jaxpr"], values, n_consts, n_carry) if i in init}
    init = list(init.values())
    sliced = [_Sliced.of(run, v, "scan") for v in xs]

    def body(carry: list, xs: list) -> tuple[list, tuple[list, dict]]:
        inner = run.inner(repeat=p["length"])
        xs = [s.rebuild(x) for s, x in zip(sliced, xs, strict=True)]
        out = _others(inner, p["jaxpr"], [*consts, *_joined(stays, carry), *xs], back, "output of a scan's body")
        return out[: len(init)], (out[len(init) :], inner.aux)

    carry, (ys, aux) = jax.lax.scan(
        body, init, [s.arrays for s in sliced], length=p["length"], reverse=p["reverse"], unroll=p["unroll"]
    )
    run.absorb(aux)
    return _joined(back, [*carry, *ys])


def _reached(jaxpr: jex.ClosedJaxpr, values: Sequence[Any], n_consts: int, n_carry: int) -> set[int]:
    """The carries of a scan's body whose values depend on adapted weights, and differentiably so."""
    invars, outvars = jaxpr.jaxpr.invars, dict(enumerate(jaxpr.jaxpr.outvars[:n_carry]))
    live = {var for var, value in zip(invars, values, strict=True) if is_adapted(value)}
    is_live = lambda v: not isinstance(v, jex.Literal) and v in live
    while True:
        for eqn in jaxpr.jaxpr.eqns:
            if eqn.primitive.name != "stop_gradient" and any(map(is_live, eqn.invars)):
                live.update(eqn.outvars)
        carries = {invars[n_consts + i] for i, v in outvars.items() if is_live(v)}
        if carries <= live:
            return {i for i, v in outvars.items() if is_live(v) and _inexact(v.aval)}
        live |= carries


def _inexact(tree: Any) -> list:
    """The leaves that have derivatives."""
    return [leaf for leaf in jax.tree.leaves(tree) if jax.numpy.issubdtype(leaf.dtype, np.inexact)]


@jax.custom_vjp
def _beside(x: Any, trained: list) -> Any:
    """x, with a derivative wherever one of ``trained`` has one.

    JAX finds out by trying which carries of a scan have derivatives: it differentiates the body with those that come in
    with one, and again with those that come out with one. What enters the layers has none if the embedding is frozen,
    and what leaves a layer has one. Told so from the start, it differentiates the body once, to the same program.
    """
    return x


_beside.defvjp(lambda x, trained: (x, None), lambda _, dy: (dy, None))


class _Sliced:
    """What a scan slices of a value along its leading axis, and how the body gets its value back."""

    def __init__(self, arrays: Any, rebuild: Any):
        self.arrays, self.rebuild = arrays, rebuild

    @classmethod
    def of(cls, run: Run, w: Any, where: str) -> "_Sliced":
        if not is_adapted(w):
            return cls(w, lambda x: x)
        label = w.labels[0]
        if len(label) != 1 or label[0].group not in (STACK, "axis"):
            return cls(run.materialize(w, f"{where} along an axis that is not stacked"), lambda x: x)
        at = w.group(STACK).index(label[0]) if label[0].group == STACK else 0
        move = lambda leaf: jax.numpy.moveaxis(leaf, at, 0) if at else leaf
        base = jax.tree.map(move, w.base) if is_stored(w.base) else w.base
        arrays = base, jax.tree.map(move, w.own), jax.tree.map(move, w.keys)

        def rebuild(x: Any) -> AdaptedWeight:
            base, own, keys = x
            return AdaptedWeight(base, own, w.shared, keys, w.values, w.method, w.labels[1:], w.path)

        return cls(arrays, rebuild)


@rule("while")
def while_loop(run: Run, eqn: Any, values: list) -> list | None:
    p = eqn.params
    nc, nb = p["cond_nconsts"], p["body_nconsts"]
    cond_consts, body_consts = values[:nc], values[nc : nc + nb]
    handed = _handed_back(p["body_jaxpr"], values[nc:])
    stays = {i: values[nc + j] for i, j in handed.items() if j == nb + i}
    init = [run.materialize(v, "carry of a while loop") for i, v in enumerate(values[nc + nb :]) if i not in stays]

    def loop(jaxpr: jex.ClosedJaxpr, consts: list, carry: list, back: Mapping[int, Any]) -> list:
        inner = run.inner()
        out = _others(inner, jaxpr, [*consts, *_joined(stays, carry)], back, "output of a while loop's body")
        _refuse_aux(inner, "a while loop")
        return out

    carry = jax.lax.while_loop(
        lambda carry: loop(p["cond_jaxpr"], cond_consts, carry, {})[0],
        lambda carry: loop(p["body_jaxpr"], body_consts, carry, stays),
        init,
    )
    return _joined(stays, carry)


@rule("cond")
def cond(run: Run, eqn: Any, values: list) -> list | None:
    index, *operands = values
    arrays, whole = _arrays_of(operands)

    def branch(jaxpr: jex.ClosedJaxpr) -> Any:
        def fn(arrays: list) -> list:
            inner = run.inner()
            out = plain_jaxpr(inner, jaxpr, whole(arrays), "output of a branch")
            _refuse_aux(inner, "a branch of a cond")
            return out

        return fn

    return jax.lax.switch(index, [branch(jaxpr) for jaxpr in eqn.params["branches"]], arrays)


def _arrays_of(values: Any) -> tuple[list, Callable[[list], Any]]:
    """The arrays among ``values``, and the way back from them. What else a context may hold, names of tasks and numbers
    that stay known, is not handed on by JAX and goes with the function."""
    leaves, treedef = jax.tree.flatten(values)
    at = [i for i, leaf in enumerate(leaves) if isinstance(leaf, (jax.Array, np.ndarray))]

    def whole(arrays: list) -> Any:
        filled = dict(enumerate(leaves)) | dict(zip(at, arrays, strict=True))
        return jax.tree.unflatten(treedef, filled.values())

    return [leaves[i] for i in at], whole


def _refuse_aux(run: Run, where: str) -> None:
    if run.aux:
        raise ValueError(
            f"aux=True, and {sorted(run.aux)} report something inside {where}, where reports have no fixed number. "
            "Move the layer out of it, or lift without aux."
        )


@rule("shard_map")
def shard_map(run: Run, eqn: Any, values: list) -> list | None:
    """Parameters enter with the sharding of the weight's axes that they have: ``a`` with that of the in axes.

    What is stored of a base is sharded along the stack only. Where an in or out axis is sharded, every device is given
    all that is stored, and takes its part of each matrix when it forms it.
    """
    p = eqn.params
    jaxpr = _compat.closed(p["jaxpr"])
    specs = p["in_specs"]
    entered = [_Sharded.of(run, v, spec) for v, spec in zip(values, specs, strict=True)]

    def body(*args: Any) -> tuple:
        inner = run.inner()
        out = plain_jaxpr(
            inner, jaxpr, [e.rebuild(x) for e, x in zip(entered, args, strict=True)], "output of shard_map"
        )
        _refuse_aux(inner, "shard_map")
        return tuple(out)

    mapped = jax.shard_map(
        body,
        mesh=p["mesh"],
        in_specs=tuple(e.specs for e in entered),
        out_specs=tuple(p["out_specs"]),
        axis_names=_compat.manual_axes(p),
        check_vma=p["check_vma"],
    )
    return list(mapped(*(e.arrays for e in entered)))


class _Sharded:
    """How a value enters a shard_map: arrays, a spec for each, and the value of the local shards."""

    def __init__(self, arrays: Any, specs: Any, rebuild: Any):
        self.arrays, self.specs, self.rebuild = arrays, specs, rebuild

    @classmethod
    def of(cls, run: Run, w: Any, spec: PartitionSpec) -> "_Sharded":
        same = lambda x: x
        if not is_adapted(w):
            return cls(w, spec, same)
        entries = [*spec, *(None,) * (len(w.shape) - len(spec))]
        split = {axis for axis, entry in enumerate(entries) if entry is not None}
        groups = {atom.group for axis in split for atom in w.labels[axis]} - {STACK, "axis"}
        uneven = any(len(w.labels[axis]) > 1 or axis in w.backwards for axis in split)
        if uneven or not groups <= set(w.method.sliceable):
            return cls(run.materialize(w, f"shard_map with {spec}"), spec, same)
        by_atom = {w.labels[axis][0]: entry for axis, entry in enumerate(entries) if len(w.labels[axis]) == 1}
        n_stack = len(w.stack_shape)
        stack_spec = [by_atom.get(atom) for atom in w.group(STACK)]

        def enter(leaf: Any, dims: str, n_head: int) -> "_Leaf":
            return _Leaf.of(w, leaf, dims.split(), n_head, stack_spec[:n_head], groups, by_atom)

        dims = w.method.dims(w.params())
        own = jax.tree.map(lambda leaf, d: enter(leaf, d, n_stack), w.own, dims._replace(shared=None))
        shared = jax.tree.map(lambda leaf, d: enter(leaf, d, 0), w.shared, dims.shared)
        leaves, treedef = jax.tree.flatten((own, shared), is_leaf=lambda x: isinstance(x, _Leaf))
        keys_spec = jax.tree.map(lambda _: PartitionSpec(*stack_spec), w.keys)
        given, whole = _arrays_of(w.values)
        values_spec = [PartitionSpec() for _ in given]

        base_spec = jax.tree.map(lambda _: PartitionSpec(*stack_spec), w.base) if is_stored(w.base) else spec

        def rebuild(x: Any) -> AdaptedWeight:
            base, arrays, keys, values = x
            own, shared = jax.tree.unflatten(treedef, [leaf.local(x) for leaf, x in zip(leaves, arrays, strict=True)])
            local = {axis: w.shape[axis] // jax.lax.axis_size(entries[axis]) for axis in split}
            for axis in split if is_stored(base) else ():
                (atom,) = w.labels[axis]
                if atom.group != STACK:
                    start = jax.lax.axis_index(entries[axis]) * local[axis]
                    base = w.cut_base(base, atom, Take(start, local[axis]))
            labels = [
                (label[0]._replace(size=local[axis]),) if axis in split else label
                for axis, label in enumerate(w.labels)
            ]
            return AdaptedWeight(base, own, shared, keys, whole(values), w.method, tuple(labels), w.path)

        arrays = w.base, [leaf.array for leaf in leaves], w.keys, given
        return cls(arrays, (base_spec, [leaf.spec for leaf in leaves], keys_spec, values_spec), rebuild)


@dataclasses.dataclass(frozen=True)
class _Leaf:
    """A parameter on its way into a shard_map. Where a group is sharded, its flattened axis is unfolded into the
    weight's own axes, each of which keeps its own sharding, and folded again inside."""

    array: Any
    spec: PartitionSpec
    folds: tuple[int, ...]  # how many axes each axis of the parameter became

    @classmethod
    def of(cls, w: AdaptedWeight, leaf: Any, dims: list, n_head: int, head_spec: list, groups: set, by_atom: dict):
        shape, spec, folds = list(leaf.shape[:n_head]), list(head_spec), [1] * n_head
        for axis, dim in enumerate(dims, n_head):
            atoms = w.group(dim) if dim in groups else []
            if atoms:  # what a group shares may be longer than this weight's part of it
                leaf = jax.lax.slice_in_dim(leaf, 0, math.prod(atom.size for atom in atoms), axis=axis)
            shape += [atom.size for atom in atoms] or [leaf.shape[axis]]
            spec += [by_atom.get(atom) for atom in atoms] or [None]
            folds.append(len(atoms) or 1)
        return cls(leaf.reshape(shape), PartitionSpec(*spec), tuple(folds))

    def local(self, array: Any) -> Any:
        shape, sizes = [], list(array.shape)
        for n in self.folds:
            shape.append(math.prod(sizes[:n]))
            del sizes[:n]
        return array.reshape(shape)
