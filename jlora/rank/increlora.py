r"""IncreLoRA: start at rank 1 everywhere, and give more to the matrices that matter.

IncreLoRA: Incremental Parameter Allocation Method for Parameter-Efficient Fine-tuning. Zhang et al., 2023.
https://arxiv.org/abs/2308.12043

For ``jlora.AdaLoRA``, A diag(e) B, whose rank is the most that a matrix can have. Of a matrix of n ranks, the first n
terms are in use; the next ``add`` are in reserve, with e held at 1e-5, so that their A and B learn in advance; the rest
is masked. The scale is alpha / (n + 1e-5), falling as n grows. The importance of a matrix, as in ``Sensitivity``, is of

.. math::  I = \frac{1}{\sqrt{in \cdot out}} \sum_{io} \Bigl|\Delta W_{io} \frac{\partial L}{\partial W_{io}}\Bigr|

Every ``every`` steps after the warm-up, the ``top_h`` matrices with the highest score get ``add`` ranks each, their
reserve, until the budget is used up; then what is in reserve is dropped.

* The gradient by the whole weight is dear. Without it, I is the sum over the terms of :math:`|e_k\,\partial L /
  \partial e_k|`, over the same root: the sum above with the signs kept within a term, which costs nothing. The authors'
  own takes ``update(..., weight_grads=jax.grad(loss)(jlora.merge(adapted)))``.
* The budget is never exceeded; in the authors' code it can be, where it does not divide by ``add``.
* They start a new optimizer state with each growth. Here A and B of a new reserve start theirs then, for before they
  have no gradient; e keeps the moments that it gathered in reserve.
* The output starts as the base's but for the reserve's 1e-5.

When to use it: as ``adalora``, from below: it costs less while ranks are few, after ``jlora.repack`` at the end.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from jlora import paths
from jlora.adapt import Adapted
from jlora.methods.adalora import AdaLoRA
from jlora.methods.base import Site, require
from jlora.rank.allocator import Allocator, Sensitivity, grown, params_of, sites_of, with_params
from jlora.weight import Params

_RESERVE = 1e-5


class IncreLoRAState(NamedTuple):
    """What the allocator remembers."""

    ranks: dict[str, Int[Array, "*stack"]]
    sensitivity: Sensitivity  # of matrices


def increlora(
    target_rank: float = 4,
    *,
    alpha: float = 16.0,
    initial_rank: int = 1,
    add: int = 1,
    top_h: int = 1,
    every: int = 1,
    warmup_steps: int = 0,
    b1: float = 0.85,
    b2: float = 0.85,
) -> Allocator:
    """Ranks of ``jlora.AdaLoRA`` adapters that grow. The formulas are at the top of this file.

    >>> rules = jlora.AdaLoRA(rank=16)
    >>> ranks = jlora.rank.increlora(target_rank=4, every=50, warmup_steps=100, top_h=4)

    Args:
      target_rank: the mean rank of a matrix at the end. The methods' own rank is the most that a matrix can get, its
        reserve included.
      alpha: numerator of the scale, in the place of the methods' own.
      initial_rank: of every matrix.
      add: ranks that a matrix gets at a time; 1 to 4 for a target of 2 to 8 in the authors' runs.
      top_h: how many matrices get some at a time.
      every, warmup_steps: the steps between, and before the first.
      b1, b2: as for ``adalora``.
    """
    require(
        min(initial_rank, add, top_h, every) >= 1 and warmup_steps >= 0,
        f"increlora(initial_rank={initial_rank}, add={add}, top_h={top_h}, every={every}): all are at least 1.",
    )

    def of(adapted: Adapted) -> tuple[dict[str, Site], int]:
        """Leaves, and the budget."""
        sites = sites_of(adapted, AdaLoRA, "increlora")
        return sites, math.floor(target_rank * sum(site.stack for site in sites.values()))

    def init(adapted: Adapted) -> tuple[IncreLoRAState, Adapted]:
        sites, target = of(adapted)
        matrices = sum(site.stack for site in sites.values())
        require(
            target >= initial_rank * matrices,
            f"increlora: the budget, a rank of {target_rank} for each of {matrices} matrices, is below what they start "
            f"with, {initial_rank} each.",
        )
        room = sum(site.stack * (site.method.rank - add) for site in sites.values())
        require(
            target <= room and all(site.method.rank >= initial_rank + add for site in sites.values()),
            f"increlora: the adapters hold {room} ranks beside a reserve of {add} for each matrix, and {target} are "
            "wanted: adapt with AdaLoRA of a higher rank.",
        )
        stacks = {path: site.canonical_shape[0] for path, site in sites.items()}
        ranks = {path: jnp.full(stack, initial_rank) for path, stack in stacks.items()}
        state = IncreLoRAState(ranks, Sensitivity.zeros({path: jnp.zeros(stack) for path, stack in stacks.items()}))
        return state, shaped(state.ranks, adapted, sites, target)

    def shaped(ranks: dict[str, Array], adapted: Adapted, sites: dict[str, Site], target: int) -> Adapted:
        """With what is in use, in reserve and masked where it belongs."""
        growing = target - sum(n.sum() for n in ranks.values()) >= add
        changed = {}
        for path, site in sites.items():
            p, n = params_of(adapted, path), ranks[path][..., None]
            at = jnp.arange(site.method.rank)
            active, reserve = at < n, (at >= n) & (at < n + add) & growing
            e = p.trainable["e"]
            e = jnp.where(active, e, jnp.where(reserve, jnp.asarray(_RESERVE, e.dtype), 0))
            mask = (active | reserve) * (alpha / (n + 1e-5) / site.method.scale)
            changed[path] = Params(p.trainable | {"e": e}, p.frozen | {"mask": mask.astype(p.frozen["mask"].dtype)})
        return with_params(adapted, changed)

    def update(
        state: IncreLoRAState, adapted: Adapted, grads: PyTree, step: Any, weight_grads: PyTree = None
    ) -> tuple[IncreLoRAState, Adapted]:
        sites, target = of(adapted)
        step, whole = jnp.asarray(step), dict(paths.flatten(weight_grads)[0]) if weight_grads is not None else {}
        values = {
            path: _value(site, params_of(adapted, path), grads[path], whole.get(path)) for path, site in sites.items()
        }
        sensitivity = state.sensitivity.update(values, b1, b2)
        free = target - sum(n.sum() for n in state.ranks.values())
        due = (step > warmup_steps) & (step % every == 0)
        number = jnp.where(due, jnp.minimum(top_h, free // add), 0)
        most = {path: site.method.rank - add for path, site in sites.items()}
        ranks = grown(state.ranks, sensitivity.scores(), number, add, most)
        return IncreLoRAState(ranks, sensitivity), shaped(ranks, adapted, sites, target)

    return Allocator(init, update)


def _value(site: Site, p: Params, grads: PyTree, whole: Array | None) -> Float[Array, "*stack"]:
    """I of every matrix."""
    _, n_in, n_out = site.canonical_shape
    if whole is None:
        return jnp.abs(p.trainable["e"] * grads["e"]).sum(axis=-1) / math.sqrt(n_in * n_out)
    g = site.axes.to_canonical(whole)

    def one(g: Float[Array, "in out"], p: Params) -> Array:
        return jnp.abs(site.method.factors(g, p).product() * g).sum() / math.sqrt(n_in * n_out)

    for _ in site.canonical_shape[0]:
        one = jax.vmap(one)
    return one(g, p)
