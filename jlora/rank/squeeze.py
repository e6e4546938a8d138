r"""LoRA-Squeeze during training: from a high rank to a low one, by the best approximation at each stage.

LoRA-Squeeze: Simple and Effective Post-Tuning and In-Tuning Compression of LoRA Modules. Vulić et al., 2026.
https://arxiv.org/abs/2602.10993

For ``jlora.LoRA`` of rank R. At a stage, A B = P S Q^T becomes

.. math::  A' = P_{:k} S_{:k}^{1/2}, \qquad B' = S_{:k}^{1/2} Q_{:k}^\top, \qquad A'_{k:} = 0, \quad B'_{k:} = 0

the best pair of rank k (Eckart and Young), balanced, A'^T A' = B' B'^T = S, by two QR decompositions and one singular
value decomposition of R x R, where the authors form the product or sketch it. The scale stays alpha / R. What was cut
off is held at zero until ``jlora.repack`` drops it, so that all stages are one compilation.

* The moments of an optimizer are of the old basis. The paper does not say what becomes of them; here they stay as they
  are and are forgotten at their own rate, unless the caller starts them anew, ``tx.init(adapted.trainable)``.
* After training, ``jlora.to_lora(adapted, rank)`` is the same compression, of any method; a few more steps then are the
  paper's Cont-Squeeze.

When to use it: in place of training at the low rank from the start, for the price of the high one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from jlora.adapt import Adapted
from jlora.factors import Factors
from jlora.linalg import factor_svd
from jlora.methods.base import Site, require
from jlora.methods.lora import LoRA
from jlora.rank.allocator import Allocator, params_of, sites_of, with_params


def squeeze(stages: Sequence[tuple[int, int]]) -> Allocator:
    """Ranks of ``jlora.LoRA`` adapters that fall in stages. The formulas are at the top of this file.

    >>> ranks = jlora.rank.squeeze([(200, 16), (400, 8), (600, 4)])  # from rank 32, say

    Args:
      stages: (step, rank from then on), steps rising and ranks falling.
    """
    steps, ranks = zip(*stages, strict=True) if stages else ((), ())
    require(
        bool(stages) and list(steps) == sorted(set(steps)) and list(ranks) == sorted(set(ranks), reverse=True),
        f"squeeze({stages}): pairs (step, rank) are wanted, with rising steps and falling ranks.",
    )
    require(ranks[-1] >= 1, f"squeeze({stages}): a rank is at least 1.")

    def of(adapted: Adapted) -> dict[str, Site]:
        sites = sites_of(adapted, LoRA, "squeeze")
        for path, site in sites.items():
            method = site.method
            require(
                type(method) is LoRA and not method.subtracts and not method.varies,
                f"{path!r}: squeeze is for LoRA with one rank and without a start that is subtracted; got {method}. "
                "jlora.to_lora(adapted, rank) compresses any method after training.",
            )
            require(
                method.rank > ranks[0], f"{path!r}: the first stage has rank {ranks[0]}, and the adapter {method.rank}."
            )
        return sites

    def init(adapted: Adapted) -> tuple[Int[Array, ""], Adapted]:
        return jnp.asarray(max(site.method.rank for site in of(adapted).values())), adapted

    def update(rank: Int[Array, ""], adapted: Adapted, grads: Any, step: Any) -> tuple[Int[Array, ""], Adapted]:
        step = jnp.asarray(step)
        for at, wanted in stages:
            rank = jnp.where(step == at, wanted, rank)
        due = jnp.isin(step, jnp.asarray(steps))
        changed = {}
        for path in sites_of(adapted, LoRA, "squeeze"):
            p = params_of(adapted, path)
            f = jax.lax.cond(due, balanced, lambda f: f, p.trainable)
            live = (jnp.arange(f.rank) < rank).astype(f.a.dtype)
            changed[path] = p._replace(trainable=Factors(f.a * live, f.b * live[:, None], f.scale))
        return rank, with_params(adapted, changed)

    return Allocator(init, update)


def balanced(f: Factors) -> Factors:
    """The same product, with orthogonal columns and rows, the largest first: its singular value decomposition, the root
    of the values in each factor. The shapes stay."""
    u, s, vh = factor_svd(f.a, f.b)
    k, root = s.shape[-1], jnp.sqrt(s)  # fewer than the rank, where the matrix has no more
    a = jnp.zeros_like(f.a).at[..., :k].set((u * root[..., None, :]).astype(f.a.dtype))
    b = jnp.zeros_like(f.b).at[..., :k, :].set((root[..., None] * vh).astype(f.b.dtype))
    return Factors(a, b, f.scale)
