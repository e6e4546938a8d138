"""Kernels that the compiler partitions: without this it gathers the operands of one, since it does not know what is in
it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import lax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import Mesh, NamedSharding, PartitionSpec

Part = Callable[[str], tuple[Any, int]]
"""Of a factor: the first index of the part that a device has, and how many there are."""


def partitioned(
    fn: Callable[..., tuple[jax.Array, ...]],
    rule: str,
    *,
    sums: Sequence[str],
    whole: str = "",
    local: Callable[[Part, tuple], tuple] = lambda part, args: args,
) -> Callable[..., tuple[jax.Array, ...]]:
    """`fn`, of which each device of a mesh computes what it has the operands of. Inside `jax.shard_map` it is `fn`, and
    under `jax.vmap` it is not partitioned.

    **Arguments:**

    - `fn`: of arrays, to a tuple of arrays.
    - `rule`: the factors of all axes, "t i, i o -> t o". An axis that is cut in one operand is cut in all.
    - `sums`: for each result the factors that it is the sum over, where they are cut.
    - `whole`: factors that are never cut.
    - `local`: changes a device's operands by which parts it has, before `fn` gets them.
    """
    ins, outs = ([tuple(names.split()) for names in side.split(",")] for side in rule.split("->"))

    def axes_of(mesh: Mesh, args: Sequence[Any]) -> dict[str, tuple[str, ...]]:
        found: dict[str, tuple[str, ...]] = {}
        for names, arg in zip(ins, args, strict=True):
            for name, entry, size in zip(names, arg.sharding.spec, arg.shape, strict=True):
                axes = (entry,) if isinstance(entry, str) else tuple(entry or ())
                taken = set(itertools.chain(*found.values()))
                if name in found or name in whole.split() or not axes or taken & set(axes):
                    continue
                if size % math.prod(mesh.shape[axis] for axis in axes) == 0:
                    found[name] = axes
        return found

    def partition(mesh: Mesh, args: Sequence[Any], results: Any) -> tuple:
        axes = axes_of(mesh, args)
        named = lambda names: NamedSharding(mesh, PartitionSpec(*(axes.get(name) for name in names)))

        def lower(*args: jax.Array) -> tuple[jax.Array, ...]:
            sizes = {n: s for names, arg in zip(ins, args, strict=True) for n, s in zip(names, arg.shape, strict=True)}
            part = lambda name: (lax.axis_index(axes[name]) * sizes[name] if name in axes else 0, sizes[name])
            found = fn(*local(part, args))
            over = [tuple(itertools.chain(*(axes.get(name, ()) for name in names.split()))) for names in sums]
            return tuple(lax.psum(out, some) if some else out for out, some in zip(found, over, strict=True))

        return mesh, lower, tuple(map(named, outs)), tuple(map(named, ins))

    def infer(mesh: Mesh, args: Sequence[Any], results: Any) -> tuple:
        axes = axes_of(mesh, args)
        return tuple(NamedSharding(mesh, PartitionSpec(*(axes.get(name) for name in names))) for names in outs)

    split = custom_partitioning(lambda *args: fn(*args))
    summed = tuple(dict.fromkeys(itertools.chain(*(names.split() for names in sums))))
    split.def_partition(
        partition,
        infer_sharding_from_operands=infer,
        sharding_rule=rule,
        reduction_factors=tuple(name for name in summed if not any(name in names for names in outs)),
        need_replication_factors=tuple(name for name in whole.split() if any(name in names for names in ins)),
    )

    mapped = jax.custom_batching.custom_vmap(split)

    @mapped.def_vmap
    def many(size: int, batched: list[bool], *args: jax.Array) -> tuple[tuple, tuple]:
        out = jax.vmap(fn, [0 if yes else None for yes in batched])(*args)
        return out, (True,) * len(outs)

    def call(*args: jax.Array) -> tuple[jax.Array, ...]:
        # The kernels of a simulated TPU have effects, which the compiler would not carry along.
        return fn(*args) if jax.make_jaxpr(fn)(*args).effects else mapped(*args)

    return call
