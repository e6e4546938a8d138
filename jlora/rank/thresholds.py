r"""Thresholds that rise while gates are trained: SoRA's sparsifying schedule and CoDyRA's, and its tasks in a row.

Sparse Low-rank Adaptation of Pre-trained Language Models (SoRA). Ding et al., 2023. https://arxiv.org/abs/2311.11696
Adaptive Rank, Reduced Forgetting: Knowledge Retention in Continual Learning Vision-Language Models with Dynamic
Rank-Selective LoRA (CoDyRA). Lu et al., 2024.

For ``jlora.SoRA``, A diag(g) B, with ``jlora.optim.soft_threshold`` after the optimizer, whose threshold is a schedule:

.. math::  \lambda_j, \quad j = 0 \dots n - 1, \qquad j = \lfloor (t - t_0) / \mathrm{every} \rfloor

from the first to the last, evenly ("linear"), by equal factors ("geometric"), or as the logarithms of an even grid
between their exponentials ("log"); none before t_0, and the last one for good.

* SoRA trains once in full at each threshold and goes on from there, which shows how much quality each sparsity costs:
  1e-3 to 10 in 10 stages. ``jlora.repack``, or ``jlora.rank.prune`` for plain LoRA, takes out what is zero.
* CoDyRA, for one task after another: the second half of the steps has thresholds of 0 to 5e-3, with the authors'
  operator (``reference=True``). Then ``next_task`` folds what is left into the base, and starts new gates and factors:
  the output does not change. The authors' scale is 1 (``SoRA(rank, alpha=rank)``).

>>> kappa = jlora.rank.stages(0.0, 5e-3, number=10, every=25, begin=250)
>>> tx = optax.chain(optax.adamw(5e-4), jlora.optim.soft_threshold(kappa, reference=True))
>>> ...  # 500 steps
>>> adapted, learned = jlora.rank.next_task(adapted, key=key)
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import PRNGKeyArray

from jlora.adapt import Adapted, build
from jlora.merge import merge
from jlora.methods.base import require
from jlora.methods.sora import SoRA
from jlora.rank.allocator import sites_of
from jlora.rank.truncate import prune


def stages(
    start: float, stop: float, *, number: int = 10, every: int, begin: int = 0, kind: str = "linear"
) -> optax.Schedule:
    """A threshold for each step, for ``jlora.optim.soft_threshold``.

    Args:
      start, stop: the first and the last threshold.
      number: of stages.
      every: steps of a stage.
      begin: t_0.
      kind: "linear", "geometric" or "log".
    """
    require(
        number >= 2 and every >= 1 and begin >= 0 and 0 <= start <= stop,
        f"stages({start}, {stop}, number={number}, every={every}, begin={begin}): at least 2 thresholds "
        "that do not fall, and at least one step each are wanted.",
    )
    require(
        kind != "geometric" or start > 0, "stages(kind='geometric') starts above 0: factors do not lead away from 0."
    )
    grids = {
        "linear": lambda: np.linspace(start, stop, number),
        "geometric": lambda: np.geomspace(start, stop, number),
        "log": lambda: stop + np.log(np.linspace(np.exp(start - stop), 1.0, number)),  # exp(stop) may be too large
    }
    require(kind in grids, f"stages(kind={kind!r}): one of {', '.join(grids)} is wanted.")
    grid = grids[kind]()

    def schedule(step: jax.Array) -> jax.Array:
        j = jnp.clip((step - begin) // every, 0, number - 1)
        return jnp.where(step < begin, 0.0, jnp.asarray(grid)[j])

    return schedule


def next_task(adapted: Adapted, *, key: PRNGKeyArray) -> tuple[Adapted, Adapted]:
    """Fold what ``SoRA`` adapters learned into the base, and start new ones: CoDyRA's end of a task.

    Quantized weights become arrays. Every adapted leaf is folded in, whatever its method. Call it before ``repack``,
    for the new adapters have the ranks of these.

    Returns:
      The new adapters, whose output is that of the old ones; and what the task learned, as plain LoRA beside the base
      from before it.
    """
    sites_of(adapted, SoRA, "next_task")
    return build(merge(adapted), adapted.sites, key=key), prune(adapted)
