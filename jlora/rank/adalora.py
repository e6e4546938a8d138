r"""AdaLoRA's budget: terms of the whole model compete, and fewer and fewer of them keep their singular value.

AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning. Zhang et al., 2023.
https://arxiv.org/abs/2303.10512
Efficient and Scalable Fine-Tune of Language Models for Genome Understanding (Lingo). Zhan et al., 2024.
https://arxiv.org/abs/2402.08075

For ``jlora.AdaLoRA``, A diag(e) B with A [in, r], e [r], B [r, out]. The score of term k of a matrix, s(.) that of a
parameter (``Sensitivity``, of the parameters after the optimizer's step and the gradients from before it):

.. math::  S_k = s(e_k) + \tfrac1{in} \sum_i s(A_{ik}) + \tfrac1{out} \sum_o s(B_{ko})

and the number of terms that keep their e_k, those with the highest scores, the others' being set to zero:

.. math::
    b(t) = b_1 + (b_0 - b_1)\Bigl(1 - \frac{t - t_0}{T - t_1 - t_0}\Bigr)^3

b_0 all terms, b_1 the target. Until t_0 (``warmup_steps``) nothing is set to zero; then at every ``every``-th step. A
term with e_k = 0 has a gradient, and may come back. At step T - t_1 (``total_steps - final_steps``) the choice becomes
final: it goes into the adapter's mask, and ``jlora.repack`` drops the rest.

* Exactly b(t) terms are kept. PEFT sets to zero what is not above the largest score that is to go, more than it should
  where scores are equal (as at the very first step, with every e = 0), and nothing but an error if none is to go.
* With ``parameters`` the budget counts parameters in the place of terms: the highest scores that it pays for.
* Lingo: each time, a term that is to go is spared by lottery, and one that is to stay is set to zero by lottery. As in
  its code the spared have e = 0, too, and are in the final choice with the chance to grow.

``orthogonality`` is the penalty that makes e singular values, to be added to the loss, 0.1 (the authors) or 0.5 (PEFT)
times. It leaves out terms that are masked for good, so that training goes on alike after ``repack``; PEFT keeps them
in.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PRNGKeyArray

from jlora import paths
from jlora.adapt import Adapted
from jlora.methods.adalora import AdaLoRA
from jlora.methods.base import Site, require
from jlora.rank.allocator import (
    Allocator,
    Sensitivity,
    costs_of,
    params_of,
    sites_of,
    term_scores,
    top,
    total_rank,
    with_params,
)
from jlora.weight import Params


def adalora(
    target_rank: float | None = 8,
    *,
    total_steps: int,
    warmup_steps: int = 0,
    final_steps: int = 0,
    every: int = 1,
    b1: float = 0.85,
    b2: float = 0.85,
    parameters: int | None = None,
    lottery: float = 0.0,
    key: PRNGKeyArray | None = None,
) -> Allocator:
    """Ranks of ``jlora.AdaLoRA`` adapters under a falling budget. The formulas are at the top of this file.

    >>> ranks = jlora.rank.adalora(target_rank=4, total_steps=1000, warmup_steps=100, final_steps=300, every=10)

    Args:
      target_rank: the mean rank of a matrix at the end; the methods' own, at the start, is half as much again as a
        rule. At least 1.
      total_steps: T, the steps of the whole training.
      warmup_steps: t_0, PEFT's tinit; a tenth of all as a rule.
      final_steps: t_1, PEFT's tfinal: steps with the ranks of the end; a third of all as a rule.
      every: PEFT's deltaT, how often terms are set to zero.
      b1, b2: decay of the mean and of the deviation of what a parameter matters.
      parameters: the budget at the end in trainable parameters, in the place of ``target_rank``, which is then None.
      lottery: Lingo's chance of either kind, 0.1 in its code.
      key: for the lottery.
    """
    last = total_steps - final_steps
    require(
        0 <= warmup_steps < last <= total_steps and every >= 1,
        f"adalora(total_steps={total_steps}, warmup_steps={warmup_steps}, final_steps={final_steps}, every={every}): "
        "the warm-up ends before the final steps begin, and every is at least 1.",
    )
    require(0.0 <= b1 < 1.0 and 0.0 <= b2 < 1.0, f"adalora(b1={b1}, b2={b2}): decays in [0, 1) are wanted.")
    require(0.0 <= lottery < 1.0, f"adalora(lottery={lottery}): a chance in [0, 1) is wanted.")
    require(lottery == 0.0 or key is not None, "adalora(lottery=...) draws: pass key=jax.random.key(seed).")
    require(
        (target_rank is None) != (parameters is None),
        f"adalora(target_rank={target_rank}, parameters={parameters}): one of the two is wanted, the other None.",
    )

    def of(adapted: Adapted) -> tuple[dict[str, Site], dict[str, int], int, int]:
        """Leaves, what a term of each costs, and the budgets at the start and at the end."""
        sites = sites_of(adapted, AdaLoRA, "adalora")
        if parameters is not None:
            return sites, costs_of(sites), sum(site.method.count(site) for site in sites.values()), parameters
        matrices = sum(site.stack for site in sites.values())
        return sites, dict.fromkeys(sites, 1), total_rank(sites), math.floor(target_rank * matrices)

    def init(adapted: Adapted) -> tuple[Sensitivity, Adapted]:
        sites, costs, first, target = of(adapted)
        least = sum(costs[path] * site.stack for path, site in sites.items())
        unit = "ranks" if parameters is None else "parameters"
        require(
            target >= least, f"adalora: the budget, {target:,} {unit}, is below one rank for each matrix, {least:,}."
        )
        require(
            target <= first, f"adalora: the budget, {target:,} {unit}, is above what there is to begin with, {first:,}."
        )
        return Sensitivity.zeros({path: adapted.trainable[path] for path in sites}), adapted

    def update(state: Sensitivity, adapted: Adapted, grads: Any, step: Any) -> tuple[Sensitivity, Adapted]:
        sites, costs, first, target = of(adapted)
        step = jnp.asarray(step)
        own = {path: params_of(adapted, path) for path in sites}
        values = {path: jax.tree.map(lambda p, g: jnp.abs(p * g), own[path].trainable, grads[path]) for path in sites}
        choose = lambda condition, a, b: jax.tree.map(lambda x, y: jnp.where(condition, x, y), a, b)
        state = choose(step < last, state.update(values, b1, b2), state)
        each = state.scores()
        scores = {path: term_scores(site, own[path], each[path]) for path, site in sites.items()}
        rest = jnp.clip(1 - (step - warmup_steps) / (last - warmup_steps), 0.0, 1.0)
        keep = top(scores, jnp.floor(target + (first - target) * rest**3), costs)
        final, stays = keep, keep
        if lottery:
            drawn = {path: _draw(key, step, path, score, lottery) for path, score in scores.items()}
            stays = {path: keep[path] * ~drawn[path] for path in sites}
            final = {path: stays[path] + (1 - keep[path]) * drawn[path] for path in sites}
        masking = ((step > warmup_steps) & (step < last) & (step % every == 0)) | (step == last)
        changed = {}
        for path, p in own.items():
            mask, e = p.frozen["mask"], p.trainable["e"]
            mask = jnp.where(step == last, final[path].astype(mask.dtype), mask)
            e = jnp.where(masking, e * stays[path].astype(e.dtype), e) * (mask != 0).astype(e.dtype)
            changed[path] = Params(p.trainable | {"e": e}, p.frozen | {"mask": mask})
        return choose(step < last, state, jax.tree.map(jnp.zeros_like, state)), with_params(adapted, changed)

    return Allocator(init, update)


def _draw(key: PRNGKeyArray, step: Array, path: str, like: Array, chance: float) -> Array:
    return jax.random.bernoulli(paths.fold_path(jax.random.fold_in(key, step), path), chance, like.shape)


def orthogonality(adapted: Adapted) -> Float[Array, ""]:
    r"""The mean of :math:`\|A^\top A - I\|_F` and :math:`\|B B^\top - I\|_F` over all matrices of ``AdaLoRA`` adapters.

    >>> loss = task_loss + 0.1 * jlora.rank.orthogonality(adapted.replace(trainable=trainable))
    """
    sites = sites_of(adapted, AdaLoRA, "orthogonality")

    def one(gram: Float[Array, "r r"], mask: Float[Array, " r"]) -> Array:
        live = (mask != 0).astype(gram.dtype)
        off = (gram - jnp.eye(len(live), dtype=gram.dtype)) * live[:, None] * live
        return optax.safe_norm(off, jnp.finfo(gram.dtype).tiny)

    total, count = 0.0, 0.0
    for path, site in sites.items():
        p = params_of(adapted, path)
        mask, a, b = p.frozen["mask"], p.trainable["a"], p.trainable["b"]
        norm = one
        for _ in site.canonical_shape[0]:
            norm = jax.vmap(norm)
        grams = [jnp.einsum("...ik,...il->...kl", x, x, precision="highest") for x in (a, b.swapaxes(-1, -2))]
        total += sum(norm(gram, mask).sum() for gram in grams)
        count += 2.0 * (mask != 0).any(axis=-1).sum()
    return total / jnp.maximum(count, 1.0)
