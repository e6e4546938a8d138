r"""TriAdaptLoRA's growth: matrices whose change is large get more ranks, as a threshold allows.

TriAdaptLoRA: Brain-Inspired Triangular Adaptive Low-Rank Adaptation for Parameter-Efficient Fine-Tuning. Liang et al.,
2025. https://arxiv.org/abs/2501.08008

For ``jlora.TriAdaptLoRA``, of whose rank R the first n are in use. The importance of a matrix is the norm of its
change, known without forming it,

.. math::
    \|A B\|_F^2 = \sum_{kl} (A^\top A)_{kl} (B B^\top)_{kl}, \qquad
    I = \frac{s \|A B\|_F}{\sqrt{in \cdot out}}, \qquad \bar I \leftarrow \beta \bar I + (1 - \beta) I

and every ``every`` steps a matrix gets one rank if its mean, divided by the largest of all, reaches a threshold that
goes linearly from ``threshold[0]`` to ``threshold[1]`` over ``steps``; those with the highest first, until the
budget is used up.

There is no code, and the paper was read as an abstract: triangles, normalized Frobenius norms and a linear threshold
are the paper's; the mean, what the threshold is relative to, and that a matrix grows by one are derived.

When to use it: growth that needs no gradients, at the price of a few r x r products.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from jlora.adapt import Adapted
from jlora.methods.base import Site, require
from jlora.methods.split import TriAdaptLoRA
from jlora.rank.allocator import Allocator, grown, params_of, sites_of, total_rank, with_params
from jlora.weight import Params


class TriAdaptState(NamedTuple):
    """What the allocator remembers."""

    ranks: dict[str, Int[Array, "*stack"]]
    mean: dict[str, Float[Array, "*stack"]]


def triadapt(
    target_rank: float = 4,
    *,
    steps: int,
    threshold: tuple[float, float] = (0.9, 0.1),
    initial_rank: int = 1,
    every: int = 1,
    warmup_steps: int = 0,
    decay: float = 0.85,
) -> Allocator:
    """Ranks of ``jlora.TriAdaptLoRA`` adapters that grow. The formulas are at the top of this file.

    Args:
      target_rank: the mean rank of a matrix at the end. The methods' own rank is the most that a matrix can get.
      steps: over which the threshold goes from its first to its second value.
      threshold: shares of the largest importance; the lower, the more matrices grow at a time.
      initial_rank: of every matrix.
      every, warmup_steps: the steps between, and before the first.
      decay: of the mean importance.
    """
    require(
        min(initial_rank, every, steps) >= 1 and warmup_steps >= 0 and 0 <= decay < 1,
        f"triadapt(initial_rank={initial_rank}, every={every}, steps={steps}, decay={decay}): numbers of at least 1 "
        "are wanted, and a decay in [0, 1).",
    )

    def of(adapted: Adapted) -> tuple[dict[str, Site], int]:
        sites = sites_of(adapted, TriAdaptLoRA, "triadapt")
        return sites, math.floor(target_rank * sum(site.stack for site in sites.values()))

    def init(adapted: Adapted) -> tuple[TriAdaptState, Adapted]:
        sites, target = of(adapted)
        matrices, room = sum(site.stack for site in sites.values()), total_rank(sites)
        require(
            initial_rank * matrices <= target <= room,
            f"triadapt: the budget, a rank of {target_rank} for each of {matrices} matrices, is to be at least what "
            f"they start with, {initial_rank} each, and at most what the adapters hold, {room} together.",
        )
        ranks = {path: jnp.full(site.canonical_shape[0], initial_rank) for path, site in sites.items()}
        state = TriAdaptState(ranks, {path: jnp.zeros(n.shape) for path, n in ranks.items()})
        return state, masked(adapted, ranks)

    def masked(adapted: Adapted, ranks: dict[str, Array]) -> Adapted:
        changed = {}
        for path, n in ranks.items():
            p = params_of(adapted, path)
            mask = p.frozen["mask"]
            changed[path] = p._replace(frozen={"mask": (jnp.arange(mask.shape[-1]) < n[..., None]).astype(mask.dtype)})
        return with_params(adapted, changed)

    def update(state: TriAdaptState, adapted: Adapted, grads: PyTree, step: Any) -> tuple[TriAdaptState, Adapted]:
        sites, target = of(adapted)
        step = jnp.asarray(step)
        values = {path: importance(site, params_of(adapted, path)) for path, site in sites.items()}
        mean = {path: decay * state.mean[path] + (1 - decay) * value for path, value in values.items()}
        largest = jnp.stack([m.max() for m in mean.values()]).max()
        at = threshold[0] + (threshold[1] - threshold[0]) * jnp.clip(step / steps, 0.0, 1.0)
        scores = {path: jnp.where(m < at * largest, -jnp.inf, m) for path, m in mean.items()}
        free = target - sum(n.sum() for n in state.ranks.values())
        due = (step > warmup_steps) & (step % every == 0)
        most = {path: site.method.rank for path, site in sites.items()}
        ranks = grown(state.ranks, scores, jnp.where(due, free, 0), 1, most)
        return TriAdaptState(ranks, mean), masked(adapted, ranks)

    return Allocator(init, update)


def importance(site: Site, p: Params) -> Float[Array, "*stack"]:
    """The norm of the change of every matrix, over the root of its size."""
    _, n_in, n_out = site.canonical_shape
    a, b = jnp.tril(p.trainable.a), jnp.triu(p.trainable.b) * p.frozen["mask"][..., :, None]
    left = jnp.einsum("...ik,...il->...kl", a, a, precision="highest")
    right = jnp.einsum("...ko,...lo->...kl", b, b, precision="highest")
    return site.method.scale * jnp.sqrt(jnp.maximum((left * right).sum((-1, -2)), 0.0) / (n_in * n_out))
