"""Where adapters go on a mesh of devices, from where their weights go.

A factor inherits what its weight says of the axes it has, and the rank is whole:

    W [in, out]           A [in, r]          B [r, out]
    P(None, "model")      P(None, None)      P(None, "model")       the outputs sharded (query, gate, up)
    P("model", None)      P("model", None)   P(None, None)          the inputs sharded (output, down)
    P("fsdp", "model")    P("fsdp", None)    P(None, "model")       both
    P("expert", None, None) of [E, in, out]: the stack axis comes first in A and B, too, and keeps its sharding

Then what adapters add to the communication of a step are sums of [tokens, r] and of gradients of factors; no weight is
gathered for them. `jlora.adapt` of weights that lie on a mesh puts its parameters so. What is here is for trees that do
not lie there yet: to place them, to restore a checkpoint onto another mesh, to compile a step of shapes alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from jlora import paths
from jlora.adapt import Adapted, placement
from jlora.methods.base import Site
from jlora.paths import Pattern
from jlora.storage import is_stored
from jlora.weight import Params


def of_params(params: PyTree, mesh: Mesh, specs: Mapping[Pattern, PartitionSpec]) -> PyTree:
    """A sharding for every leaf, by the first pattern that matches its path; whole on every device where none does.

    >>> shardings = jlora.shard.of_params(params, mesh, {"**/up_proj/kernel": P(None, "fsdp", "model")})
    >>> params = jax.device_put(params, shardings)

    A quantized leaf (``jlora.quant``) is sharded along the axes over which its matrices are stacked, and no others.

    Raises:
      ValueError: a spec that does not fit a leaf, or a pattern that decides for none.
    """
    leaves, treedef = paths.flatten(params)
    out, used = [], set()
    for path, leaf in leaves:
        pattern = next((pattern for pattern in specs if paths.matches(pattern, path, leaf)), None)
        used.add(pattern)
        out.append(_of_leaf(path, leaf, mesh, PartitionSpec() if pattern is None else specs[pattern]))
    for pattern in specs:
        if pattern not in used:
            raise ValueError(
                f"The spec of {paths.describe(pattern)} decides for no leaf. Nearest: "
                f"{paths.nearest(pattern, [path for path, _ in leaves])}."
            )
    return jax.tree.unflatten(treedef, out)


def specs(
    adapted: Adapted, mesh: Mesh | None = None, base_specs: Mapping[Pattern, PartitionSpec] | None = None
) -> Adapted:
    """A sharding for every array of an adapted tree, as a tree of the same structure.

    >>> shardings = jlora.shard.specs(adapted, mesh, {"**/up_proj/kernel": P(None, "fsdp", "model")})
    >>> adapted = jax.device_put(adapted, shardings)
    >>> step = jax.jit(step, in_shardings=(shardings, ...), out_shardings=(shardings, ...))

    Args:
      adapted: arrays, or shapes (``jlora.adapt`` of shapes, or ``jax.eval_shape`` of it).
      mesh, base_specs: of the base, as for ``of_params``. Without them the base lies on a mesh already, and stays.

    Returns:
      An ``Adapted`` of ``NamedSharding``. What a group shares is whole on every device.

    Raises:
      ValueError: a spec that does not fit a weight, or one that cuts a factor unevenly; the base lies on no mesh.
    """
    leaves, treedef = paths.flatten(adapted.base)
    if base_specs is not None:
        if mesh is None:
            raise ValueError("base_specs are of a mesh: pass mesh=jax.make_mesh(...), too.")
        base = of_params(adapted.base, mesh, base_specs)
    else:
        base = jax.tree.unflatten(treedef, [_own(path, leaf, mesh) for path, leaf in leaves])
    of_base = dict(paths.flatten(base)[0])
    mesh = jax.tree.leaves(base)[0].mesh if mesh is None else mesh
    whole = lambda tree: jax.tree.map(lambda _: NamedSharding(mesh, PartitionSpec()), tree)
    trainable, frozen = whole(adapted.trainable), whole(adapted.frozen)
    for path, site in adapted.sites.items():
        own = Params(adapted.trainable[path], adapted.frozen.get(path))
        placed = _of_site(path, site, own, _shared(adapted, site), of_base[path])
        trainable[path] = placed.trainable
        if placed.frozen is not None:
            frozen[path] = placed.frozen
    return Adapted(base, trainable, frozen, adapted._sites)


def of_state(tx: optax.GradientTransformation, trainable: PyTree, shardings: PyTree) -> PyTree:
    """A sharding for every array of ``tx.init(trainable)``: what mirrors the parameters goes where they go, by
    ``shardings`` (``specs(adapted).trainable``), and the rest is whole.

    >>> state = jax.jit(tx.init, out_shardings=jlora.shard.of_state(tx, adapted.trainable, shardings.trainable))(
    ...     adapted.trainable
    ... )

    What lies at the end of a path that is a parameter's, and has its shape, is the parameter's. Projections and
    factored moments are whole.
    """
    of_param = dict(jax.tree.leaves_with_path(shardings))
    shapes = {path: leaf.shape for path, leaf in jax.tree.leaves_with_path(trainable)}
    whole = NamedSharding(next(iter(of_param.values())).mesh, PartitionSpec())

    def place(path: tuple, leaf: Any) -> NamedSharding:
        ends = (path[i:] for i in range(len(path) + 1))
        return next((of_param[end] for end in ends if shapes.get(end) == leaf.shape), whole)

    return jax.tree.map_with_path(place, jax.eval_shape(tx.init, trainable))


def _of_leaf(path: str, leaf: Any, mesh: Mesh, spec: PartitionSpec) -> Any:
    names = [name for name in jax.tree.leaves(tuple(spec)) if name not in mesh.shape]
    if names:
        raise ValueError(f"{path!r}: {spec} names {names}, and the mesh has the axes {dict(mesh.shape)}.")
    if len(spec) > len(leaf.shape):
        raise ValueError(f"{path!r} {tuple(leaf.shape)}: {spec} is for {len(spec)} axes, and it has {len(leaf.shape)}.")
    if is_stored(leaf):
        stack = PartitionSpec(*([*spec, *(None,) * len(leaf.shape)][axis] for axis in leaf.axes.stack))
        return jax.tree.map(lambda part: _fitting(path, part, mesh, stack), leaf)
    return _fitting(path, leaf, mesh, spec)


def _fitting(path: str, leaf: Any, mesh: Mesh, spec: PartitionSpec) -> NamedSharding:
    sharding = NamedSharding(mesh, spec)
    for axis, entry in enumerate(spec):
        parts = 1
        for name in jax.tree.leaves(entry):
            parts *= mesh.shape[name]
        if leaf.shape[axis] % parts:
            raise ValueError(
                f"{path!r} {tuple(leaf.shape)}: axis {axis} of {leaf.shape[axis]} entries is not divisible by the "
                f"{parts} devices of {entry!r} in {spec}. Leave {entry!r} out of its spec, or make that axis of the "
                "mesh smaller."
            )
    return sharding


def _own(path: str, leaf: Any, mesh: Mesh | None) -> Any:
    """Where a leaf lies."""

    def of(part: Any) -> NamedSharding:
        sharding = getattr(part, "sharding", None)
        if not isinstance(sharding, NamedSharding) or mesh not in (None, sharding.mesh):
            where = "another mesh" if isinstance(sharding, NamedSharding) else f"no mesh ({sharding})"
            raise ValueError(
                f"{path!r} lies on {where}. Place it first (jlora.shard.of_params), or pass mesh= and base_specs= here."
            )
        return sharding

    return jax.tree.map(of, leaf)


def _shared(adapted: Adapted, site: Site) -> Any:
    group = site.method.group
    return None if group is None else {**adapted.trainable.get(group, {}), **adapted.frozen.get(group, {})}


def _of_site(path: str, site: Site, own: Params, shared: Any, weight: Any) -> Params:
    """Shardings of a leaf's own parameters, by that of its weight (of what is stored of it: along the stack)."""
    mesh, spec = (lambda first: (first.mesh, first.spec))(jax.tree.leaves(weight)[0])
    if site.method.whole_leaf:
        like = lambda part: weight if part.shape == site.shape else NamedSharding(mesh, PartitionSpec())
        return Params(*(jax.tree.map(like, part) for part in (own.trainable, own.frozen)))
    if is_stored(weight):
        by_axis = dict(zip(site.axes.stack, spec, strict=False))
        spec = PartitionSpec(*(by_axis.get(axis) for axis in range(len(site.shape))))
    place = placement(site, mesh, spec)
    dims = site.method.dims(own._replace(shared=shared))
    put = lambda leaf, names: _fitting(path, leaf, mesh, place(names).spec)
    return Params(*(jax.tree.map(put, part, names) for part, names in zip(own[:2], dims[:2], strict=True)))
