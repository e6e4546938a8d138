r"""Which matrices are worth an adapter at all: DiffoRA's relaxed choice, and LoRA-drop's by what adapters put out.

DiffoRA: Enabling Parameter-Efficient LLM Fine-Tuning via Differential Low-Rank Matrix Adaptation. Jiang et al., 2025.
https://arxiv.org/abs/2502.08905
LoRA-drop: Efficient LoRA Parameter Pruning based on Output Evaluation. Zhou et al., 2024.
https://arxiv.org/abs/2402.07721

DiffoRA, for ``jlora.AdaLoRA``: every matrix m has a number w_m, and its change the factor

.. math::  g_m = \sigma(w_m), \qquad
    \frac{\partial L}{\partial w_m} = (1 - g_m) \sum_k e_k \frac{\partial L}{\partial e_k}

w follows that gradient while the factors are trained; the gradients given to ``update`` for it are to be of held-out
batches, every second step, say, as in differentiable architecture search (first order). At the end the matrices of the
highest g keep their adapters, at full size, and the others lose them.

LoRA-drop: the importance of a matrix is what its adapter puts out on data, the sum over tokens of squares,

.. math::  I_m = \sum_t \|x_t \Delta W_m\|^2 = \mathrm{tr}(\Delta W_m^\top C_m \Delta W_m), \qquad
    C_m = \sum_t x_t^\top x_t

with the sum of x^T x from ``jlora.calibrate(..., collect=("n", "xx"))``. The fewest matrices that together hold a share
of all are kept.

Both papers were read as abstracts, and neither has code that was read: that DiffoRA's choice is one factor for each
matrix, and its gradient that of held-out data, is derived. What is not chosen is dropped; the papers let it share one
adapter, which is not here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from jlora.adapt import Adapted
from jlora.calibrate import Calibration
from jlora.methods.adalora import AdaLoRA
from jlora.methods.base import require
from jlora.methods.lora import LoRA
from jlora.rank.allocator import Allocator, params_of, sites_of, top, with_params
from jlora.rank.spectrum import pair_of
from jlora.repack import repack


def diffora(share: float = 0.5, *, total_steps: int, learning_rate: float = 0.1) -> Allocator:
    """Which matrices of ``jlora.AdaLoRA`` adapters keep them. The formulas are at the top of this file.

    Args:
      share: of the matrices, that keep their adapter.
      total_steps: the step at which the choice is made.
      learning_rate: of the w, by plain gradient descent, in units of each step's largest gradient.
    """
    require(0.0 < share <= 1.0, f"diffora(share={share}): a share in (0, 1] is wanted.")
    require(total_steps >= 1, f"diffora(total_steps={total_steps}): at least 1 is wanted.")

    def init(adapted: Adapted) -> tuple[dict[str, Array], Adapted]:
        sites = sites_of(adapted, AdaLoRA, "diffora")
        logits = {path: jnp.zeros(site.canonical_shape[0]) for path, site in sites.items()}
        require(
            math.floor(share * sum(w.size for w in logits.values())) >= 1,
            f"diffora(share={share}) keeps none of {sum(w.size for w in logits.values())} matrices.",
        )
        return logits, gated(adapted, {path: jax.nn.sigmoid(w) for path, w in logits.items()})

    def gated(adapted: Adapted, gates: Mapping[str, Float[Array, "*stack"]]) -> Adapted:
        changed = {}
        for path, gate in gates.items():
            p = params_of(adapted, path)
            mask = jnp.broadcast_to(gate[..., None], p.frozen["mask"].shape).astype(p.frozen["mask"].dtype)
            changed[path] = p._replace(frozen={"mask": mask})
        return with_params(adapted, changed)

    def update(logits: dict[str, Array], adapted: Adapted, grads: PyTree, step: Any) -> tuple[dict, Adapted]:
        sites, step = sites_of(adapted, AdaLoRA, "diffora"), jnp.asarray(step)
        slopes = {}
        for path in sites:
            through = (adapted.trainable[path]["e"] * grads[path]["e"]).sum(axis=-1)
            slopes[path] = (1 - jax.nn.sigmoid(logits[path])) * through
        largest = jnp.stack([jnp.abs(s).max() for s in slopes.values()]).max()
        down = lambda w, s: w - learning_rate * s / jnp.where(largest > 0, largest, 1.0)
        new = {path: jnp.where(step < total_steps, down(logits[path], slopes[path]), logits[path]) for path in sites}
        chosen = top(new, math.floor(share * sum(w.size for w in new.values())))
        gates = {path: jnp.where(step < total_steps, jax.nn.sigmoid(new[path]), chosen[path]) for path in sites}
        return new, gated(adapted, gates)

    return Allocator(init, update)


def lora_drop(adapted: Adapted, stats: Calibration, share: float = 0.9) -> tuple[Adapted, dict[str, np.ndarray]]:
    """LoRA-drop: without the adapters that put out least. Outside of jit, after some training.

    >>> stats = jlora.calibrate(fn, params, batches, rules, collect=("n", "xx"))
    >>> adapted, importance = jlora.rank.lora_drop(adapted, stats, share=0.9)

    Leaves of which no matrix is kept are not adapted any more; in a stack the factors of the others are set to zero,
    and ``jlora.repack`` leaves only their padding. It is for ``jlora.LoRA``.

    Args:
      adapted: with ``LoRA``, trained for a while.
      stats: the inputs of its weights.
      share: of all output, that what is kept is to hold.

    Returns:
      The adapters, and the share of each matrix, by path.
    """
    require(0.0 < share <= 1.0, f"lora_drop(share={share}): a share in (0, 1] is wanted.")
    sites, found = sites_of(adapted, LoRA, "lora_drop"), {}
    for path, site in sites.items():
        own = stats.leaves.get(path, {})
        require(type(site.method) is LoRA, f"{path!r}: lora_drop is for LoRA, and this is {site.method}.")
        require(
            "xx" in own and "n" in own,
            f'{path!r}: lora_drop wants jlora.calibrate(..., collect=("n", "xx")) of this leaf, and has {sorted(own)}.',
        )
        few = float(np.min(own["n"]))
        require(
            few >= site.method.rank,
            f"{path!r}: {few:g} tokens are fewer than the rank, {site.method.rank}; calibrate on more.",
        )
        found[path] = np.asarray(_output(pair_of(adapted, path, site), jnp.asarray(own["xx"])), np.float64)
        require(bool(np.all(np.isfinite(found[path]))), f"{path!r}: the outputs of its adapter are not finite.")
    each = np.concatenate([np.ravel(value) for value in found.values()])
    require(each.sum() > 0, "lora_drop: no adapter puts anything out; train them for a while first.")
    order = np.argsort(-each, kind="stable")
    number = int(np.searchsorted(np.cumsum(each[order]), share * each.sum() * (1 - 1e-12))) + 1
    keep = top({path: jnp.asarray(value) for path, value in found.items()}, number)
    changed = {}
    for path in sites:
        p = params_of(adapted, path)
        zero = lambda leaf, on=keep[path]: leaf * on[..., None, None].astype(leaf.dtype)
        changed[path] = p._replace(trainable=jax.tree.map(zero, p.trainable))
    return repack(with_params(adapted, changed)), {path: value / each.sum() for path, value in found.items()}


@jax.jit
def _output(f: Any, xx: Float[Array, "*stack in in"]) -> Float[Array, "*stack"]:
    with jax.default_matmul_precision("highest"):
        inner = f.a.swapaxes(-1, -2) @ xx.astype(f.a.dtype) @ f.a
        return f.scale**2 * (inner * (f.b @ f.b.swapaxes(-1, -2))).sum((-1, -2))
