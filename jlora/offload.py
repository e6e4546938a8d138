"""The frozen base in the host's memory: what a product needs of it comes to the device when it is needed.

A model whose layers are scanned then has the weights of one layer on its device at a time, in the forward pass and once
more in the backward pass, beside its adapters, their optimizer's state and the activations. It costs the transfer of
the base twice a step, which the compiler overlaps with the products as far as it can.
"""

from __future__ import annotations

from typing import Any

import jax

from jlora import paths
from jlora.adapt import Adapted
from jlora.storage import is_abstract


def offload(adapted: Adapted, memory: str = "pinned_host") -> Adapted:
    """The same, with the base of every adapted matrix in the host's memory; ``jlora.lift`` fetches it.

    >>> adapted = jlora.offload(jlora.adapt(params, jlora.LoRA(16), key=key))
    >>> logits = jlora.lift(apply)(adapted.bind(trainable), batch)

    Leaves that are looked up in (embeddings) stay, since a lookup would bring all of the table, and so does what is not
    adapted, like norms, and what is trained whole. Quantized weights are offloaded as they are. Shardings are kept. Do
    it last: after calibration, and after ``adapt``, which reads the weights. ``merge`` gives leaves in the same memory.

    Args:
      memory: the kind of memory, of those that the devices have.

    Raises:
      ValueError: the devices have no such memory, or no leaf was moved.
    """
    sites = adapted.sites
    leaves, treedef = paths.flatten(adapted.base)
    moves = {p for p, site in sites.items() if not site.method.whole_leaf and site.axes.kind != "embedding"}
    if not moves:
        raise ValueError(
            f"offload found no adapted matrix to move, of {len(sites)} adapted leaves: embeddings and leaves that are "
            "trained whole stay on the device."
        )
    move = lambda leaf: jax.tree.map(lambda part: _moved(part, memory), leaf)
    return adapted.replace(base=jax.tree.unflatten(treedef, [move(x) if path in moves else x for path, x in leaves]))


def _moved(part: Any, memory: str) -> Any:
    sharding = part.sharding
    if sharding is None:
        raise ValueError("offload wants to know where leaves lie: give jax.ShapeDtypeStruct a sharding.")
    device = next(iter(sharding.device_set))
    kinds = [kind.kind for kind in device.addressable_memories()]
    if memory not in kinds:
        raise ValueError(f"memory={memory!r}: {device.device_kind} has {', '.join(kinds)}.")
    there = sharding.with_memory_kind(memory)
    if is_abstract(part):
        return jax.ShapeDtypeStruct(part.shape, part.dtype, sharding=there)
    return jax.device_put(part, there)
