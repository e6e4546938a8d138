"""How a model uses each of its leaves: the interpreter of ``core.py`` with probes for weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import Array, PyTree

from jlora import paths
from jlora.lift.core import Run, _is_array, run_traced
from jlora.lift.products import Use
from jlora.storage import is_stored
from jlora.weight import AdaptedWeight, Atom, Axes, MethodLike, Params

_KINDS = {"linear": "linear", "ragged": "linear", "conv": "conv", "lookup": "embedding"}


@dataclasses.dataclass(frozen=True)
class _Probe(MethodLike):
    """A method that changes nothing. Its weight's atoms are in no group yet: that is what is to be found out."""

    sliceable = frozenset({"axis"})
    lookup_only = False

    def weight(self, w: Array, p: Params) -> Array:
        return w

    def dims(self, p: Params) -> Params:
        return Params()


@dataclasses.dataclass(frozen=True)
class LeafUsage:
    """How one leaf is used.

    Attributes:
      axes: which of its axes are stacked, contracted, produced; None if different uses disagree.
      kinds: of every use, in order: "linear", "conv", "lookup", "ragged". A tied head is a "lookup" and a "linear".
      flops: of one forward pass through this leaf, multiply and add counted as 2, scans counted by their length.
      other: what else the leaf meets (names of primitives) that would form the effective weight if it were adapted.
    """

    axes: Axes | None
    kinds: tuple[str, ...]
    flops: float
    other: tuple[str, ...] = ()


def usage(fn: Callable, params: PyTree, *args: Any, **kwargs: Any) -> dict[str, LeafUsage]:
    """Find out how ``fn(params, *args, **kwargs)`` uses the leaves of ``params``, without running it.

    >>> jlora.usage(lambda p, x: model.apply({"params": p}, x), params, ids)["layers/q_proj/kernel"].axes
    Axes(inputs=(1,), outputs=(2,), stack=(0,), kind='linear')

    Args:
      fn: the model, traced once, abstractly. Arrays among its arguments may be ``jax.ShapeDtypeStruct``.

    Returns:
      ``{path: LeafUsage}`` of the leaves with two and more axes that some product, convolution or lookup uses.
    """
    shapes = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype) if is_stored(x) else x
    params, args, kwargs = jax.tree.map(shapes, (params, args, kwargs), is_leaf=is_stored)
    named, treedef = paths.flatten(params)
    ranks = {path: len(leaf.shape) for path, leaf in named if _is_array(leaf) and len(leaf.shape) > 1}
    uses: dict[str, list[Use]] = {}
    others: dict[str, dict[str, None]] = {}

    def observe(w: AdaptedWeight, use: Use | str) -> None:
        if isinstance(use, str):
            others.setdefault(w.path, {})[use] = None
        else:
            uses.setdefault(w.path, []).append(use)

    leaves, outer = jax.tree.flatten(([leaf for _, leaf in named], args, kwargs))
    arrays = [leaf for leaf in leaves if _is_array(leaf)]

    def traced(arrays: list) -> Any:
        given = iter(arrays)
        plain, args, kwargs = jax.tree.unflatten(outer, [next(given) if _is_array(v) else v for v in leaves])
        probes = [_probe(path, leaf) if path in ranks else leaf for (path, _), leaf in zip(named, plain, strict=True)]
        return run_traced(Run(observe=observe), fn, (jax.tree.unflatten(treedef, probes), *args), kwargs)

    jax.eval_shape(traced, arrays)
    return {
        path: LeafUsage(
            _axes(found, ranks[path]),
            tuple(use.kind for use in found),
            sum(use.flops for use in found),
            tuple(others.get(path, ())),
        )
        for path, found in uses.items()
    }


def _probe(path: str, leaf: Array) -> AdaptedWeight:
    labels = tuple((Atom("axis", (i,), size),) for i, size in enumerate(leaf.shape))
    return AdaptedWeight(leaf, Params(), None, None, None, _Probe(), labels, path)


def _axes(uses: list[Use], n_axes: int) -> Axes | None:
    """The axes that the uses agree on, up to a transposition. A lookup says what the inputs are, if there is one."""
    found = []
    for use in sorted(uses, key=lambda use: use.kind != "lookup"):
        inputs, outputs = ({atom.pos[0] for atom in atoms} for atoms in (use.contracted, use.produced))
        stack = set(range(n_axes)) - inputs - outputs  # sliced by a scan or a loop, or batched over
        if inputs & outputs or not inputs or not outputs or {atom.pos[0] for atom in use.batched} - stack:
            return None
        axes = Axes(*(tuple(sorted(axes)) for axes in (inputs, outputs, stack)), kind=_KINDS[use.kind])
        features = next((atom.pos[0] for atom in use.features), None)
        if features not in (None, axes.features_axis):
            axes = dataclasses.replace(axes, features=features)
        found.append(axes)
    first = found[0]
    same = {(a.inputs, a.outputs) for a in found} <= {(first.inputs, first.outputs), (first.outputs, first.inputs)}
    return first if same else None
