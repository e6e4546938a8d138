r"""Whole channels: which neurons and heads a model can do without, training without them, and going back to all.

LoRAPrune: Pruning Meets Low-Rank Parameter-Efficient Fine-Tuning. Zhang et al., 2023. https://arxiv.org/abs/2305.18403
Train Small, Infer Large: Memory-Efficient LoRA Training for Large Language Models (LoRAM). Zhang et al., 2025.
https://arxiv.org/abs/2502.13533

A unit is what leaves a model as one: a neuron of an MLP, which is an output channel of the weights before it and an
input channel of the one after it; a head, which is as many channels as it has features. LoRAPrune's score of a unit
needs no gradient by the weight W [in, out], but those by A [in, r] and B [r, out], which stand for it:

.. math::
    \hat G = g_A B + A g_B - g_A g_B, \qquad I_{io} = |\hat G_{io}\,(W + s A B)_{io}|

summed over a weight's channel and a unit's channels; a weight's vector of these divided by its norm; the vectors of the
weights that share the units added; and a running mean over steps, 0.9 of the old. With G the gradient by W + s A B,
:math:`\hat G = s (G B^\top B + A A^\top G) - s^2 G B^\top A^\top G`: what the adapter can see of it.

>>> mlp = jlora.rank.Channels(outputs={"layers/up/kernel": 1}, inputs={"layers/down/kernel": 1})
>>> ranks = jlora.rank.loraprune(mlp)  # an allocator, of units: its state is their scores
>>> keep = mlp.keep(scores, share=0.5)
>>> small = mlp.cut(params, keep)  # LoRAM: adapt this, train, and then
>>> adapted = mlp.recover(adapted_small, params, keep)

* The authors score before the optimizer's step; here as all allocators do, with the parameters from after it. They set
  masks that grow while they train, and spare the first and last layers. Here one cut is made of the scores, and what is
  cut is trained on: make several for a gradual one.
* LoRAM prunes a model, trains LoRA on what is left, and puts the columns of B and rows of A back where they came from,
  zeros elsewhere (its default), for the model that was not pruned. It helps if the pruned model was trained a little
  before (its alignment), which is the caller's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from jlora import paths
from jlora.adapt import Adapted
from jlora.factors import Factors
from jlora.methods.base import Site, require
from jlora.methods.lora import LoRA
from jlora.rank.allocator import Allocator


@dataclasses.dataclass(frozen=True)
class Channels:
    """The weights that share units. Outputs are the last axis of a leaf, inputs the one before; all others are stacked.

    >>> jlora.rank.Channels(outputs={"q/kernel": 128, "k/kernel": 64, "v/kernel": 64}, inputs={"o/kernel": 128})

    Attributes:
      outputs: leaves, biases too, that have the units as outputs: path -> channels of a unit. Where two heads of
        queries share one of keys and values, a unit is two heads of the former.
      inputs: those that have them as inputs.
    """

    outputs: Mapping[str, int]
    inputs: Mapping[str, int]

    @property
    def _members(self) -> list[tuple[str, int, int]]:
        """(path, axis, channels of a unit)."""
        return [(path, -1, n) for path, n in self.outputs.items()] + [(path, -2, n) for path, n in self.inputs.items()]

    def units(self, params: PyTree) -> tuple[int, ...]:
        """[*stack, units]: their number, checked."""
        leaves, found = dict(paths.flatten(params)[0]), {}
        for path, axis, size in self._members:
            require(
                path in leaves, f"Channels: there is no leaf {path!r}. Nearest: {paths.nearest(path, list(leaves))}."
            )
            shape = leaves[path].shape
            require(
                len(shape) >= -axis and shape[axis] % size == 0,
                f"Channels: {path!r} {shape} does not divide into units of {size} channels along axis {axis}.",
            )
            found[path] = shape[axis] // size
        require(len(set(found.values())) == 1, f"Channels: all members have as many units; got {found}.")
        stack = max((leaves[path].shape[:-2] for path, *_ in self._members), key=len)
        return (*stack, next(iter(found.values())))

    def scores(self, adapted: Adapted, grads: PyTree) -> Float[Array, "*stack units"]:
        """LoRAPrune's, of this step alone, from the members that ``LoRA`` adapts."""
        leaves, total = dict(paths.flatten(adapted.base)[0]), 0.0
        for path, axis, size in self._members:
            site = adapted.sites.get(path)
            if site is None:
                continue
            require(
                type(site.method) is LoRA and not site.method.subtracts and not site.method.varies,
                f"{path!r}: scores of channels are for LoRA of one rank, without a start; got {site.method}.",
            )
            f, g, w = adapted.trainable[path], grads[path], leaves[path]
            with jax.default_matmul_precision("highest"):
                proxy = g.a @ f.b + f.a @ g.b - g.a @ g.b
                each = jnp.abs(proxy * (w.astype(f.a.dtype) + f.product()))
            each = each.sum(axis=-2 if axis == -1 else -1)
            each = each.reshape(*each.shape[:-1], -1, size).sum(axis=-1)
            total += each / (jnp.linalg.norm(each, axis=-1, keepdims=True) + 1e-8)
        require(not isinstance(total, float), f"Channels: none of {[m[0] for m in self._members]} is adapted.")
        return total

    def keep(self, scores: Float[Array, "*stack units"], share: float) -> Int[np.ndarray, "*stack kept"]:
        """The units of the highest scores, of every layer as many, in their order."""
        scores = np.asarray(scores)
        number = int(scores.shape[-1] * share + 1e-9)
        require(0.0 < share <= 1.0 and number >= 1, f"keep(share={share}) keeps none of {scores.shape[-1]} units.")
        require(bool(np.all(np.isfinite(scores))), "keep: the scores are not all numbers.")
        return np.sort(np.argsort(-scores, axis=-1, kind="stable")[..., :number], axis=-1)

    def cut(self, params: PyTree, keep: Int[np.ndarray, "*stack kept"]) -> PyTree:
        """The parameters with the kept units alone."""
        self.units(params)
        sides = {path: (axis, size) for path, axis, size in self._members}
        leaves, treedef = paths.flatten(params)
        take = lambda path, leaf: jnp.take_along_axis(leaf, _indices(keep, *sides[path], leaf.ndim), sides[path][0])
        return jax.tree.unflatten(treedef, [take(path, leaf) if path in sides else leaf for path, leaf in leaves])

    def recover(self, adapted: Adapted, params: PyTree, keep: Int[np.ndarray, "*stack kept"]) -> Adapted:
        """``LoRA`` adapters of the cut model as adapters of ``params``, the whole one: zeros where it was cut."""
        self.units(params)
        leaves, sides = dict(paths.flatten(params)[0]), {path: (axis, size) for path, axis, size in self._members}
        trainable, sites = dict(adapted.trainable), {}
        for path, site in adapted.sites.items():
            sites[path] = site
            if path not in sides:
                continue
            require(
                type(site.method) is LoRA and not site.method.subtracts,
                f"{path!r}: recover is for LoRA without a start that is subtracted, and this is {site.method}.",
            )
            (axis, size), f = sides[path], trainable[path]
            part = f.b if axis == -1 else f.a
            shape = list(part.shape)
            shape[axis] = leaves[path].shape[axis]
            at = jnp.broadcast_to(_indices(keep, axis, size, part.ndim), part.shape)
            whole = jnp.put_along_axis(jnp.zeros(shape, part.dtype), at, part, axis, inplace=False)
            trainable[path] = Factors(f.a, whole, f.scale) if axis == -1 else Factors(whole, f.b, f.scale)
            sites[path] = Site(site.method, site.axes, tuple(leaves[path].shape))
        return Adapted(params, trainable, adapted.frozen, tuple(sites.items()))


def _indices(keep: Int[np.ndarray, "*stack kept"], axis: int, size: int, ndim: int) -> Array:
    """Of channels along an axis of a leaf, from those of units."""
    each = (keep[..., None] * size + np.arange(size)).reshape(*keep.shape[:-1], -1)
    each = each if axis == -1 else each[..., None]
    return jnp.asarray(
        each.reshape(each.shape[: keep.ndim - 1] + (1,) * (ndim - each.ndim) + each.shape[keep.ndim - 1 :])
    )


def loraprune(channels: Channels, *, decay: float = 0.9) -> Allocator:
    """The running mean of LoRAPrune's scores; ``channels.keep`` chooses by it. The adapters stay as they are.

    Args:
      channels: whose units are scored.
      decay: of the mean.
    """
    require(0.0 <= decay < 1.0, f"loraprune(decay={decay}): in [0, 1).")

    def init(adapted: Adapted) -> tuple[Float[Array, "*stack units"], Adapted]:
        return jnp.zeros(channels.units(adapted.base)), adapted

    def update(state: Array, adapted: Adapted, grads: PyTree, step: Any) -> tuple[Array, Adapted]:
        new = channels.scores(adapted, grads)
        return decay * state + (1 - decay) * new, adapted

    return Allocator(init, update)
