r"""EVA: A starts at the directions in which a weight's inputs vary most, and ranks go where they explain most.

Parameter Efficient Fine-tuning via Explained Variance Adaptation (EVA). Paischer et al., 2024.
https://arxiv.org/abs/2410.07170

.. math::
    C = \tfrac1n \sum_t (x_t - \bar x)(x_t - \bar x)^\top = V\,\mathrm{diag}(\lambda)\,V^\top, \qquad
    A_0 = V_{\cdot,1..r}, \qquad B_0 = 0

x_t [in] the inputs of the weight, over the tokens that ``calibrate`` counted; V [in, in], lambda descending. The share
of the variance that component j of matrix i explains is lambda_ij / trace(C_i). All shares, the first rho r of every
matrix, are put in one list, and the ranks are how many of a matrix are among the largest: as many as there were ranks
to give. A leaf that gets none is not adapted. With its rank, alpha changes so that the scale stays (``keep_scale``).

* The authors and PEFT run an incremental decomposition that keeps rho r components after each batch. Here the whole
  covariance is summed and decomposed once: leading components agree to a cosine of 0.999, the last ones to 0.9. It
  does not depend on the batches, and needs no criterion of convergence.
* Weights with the same inputs (query, key, value) have equal shares; ties go to the weight that comes first.
* ``whiten`` divides component j by the square root of its singular value in the centred inputs, sqrt(n lambda_j), as
  PEFT does; it depends on how many tokens were seen.

When to use it: the statistics cost forward passes only. Where ranks are scarce the redistribution matters most.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jlora.linalg import fixed_signs
from jlora.methods.base import Site, Start, require


@dataclasses.dataclass(frozen=True)
class EVA(Start):
    """Explained variance adaptation. The formula and shapes are at the top of this file.

    Attributes:
      rho: a matrix gets at most rho times its rank; 1 leaves the ranks as they are.
      whiten: see above.
      keep_scale: change alpha with the rank.
    """

    rho: float = 2.0
    _: dataclasses.KW_ONLY
    whiten: bool = False
    keep_scale: bool = True

    needs = ("n", "x", "xx")
    subtracts = False
    nested = True

    def __post_init__(self):
        require(self.rho >= 1, f"EVA(rho={self.rho}): at least 1 is wanted, which leaves the ranks as they are.")

    def check_stats(self, rank: int, site: Site, stats: Mapping[str, Array]) -> str | None:
        few = float(np.min(stats["n"]))
        if few < self.most(rank, site):
            return (
                f"{self.most(rank, site)} directions are wanted of {few:g} tokens; calibrate on more of them, or lower "
                "the rank or rho"
            )

    def most(self, rank: int, site: Site) -> int:
        """The largest rank that a matrix may get."""
        return min(round(rank * self.rho), *site.canonical_shape[1:])

    def allocate(self, sites: dict[str, Site], stats: Mapping[str, Mapping[str, Array]]) -> dict[str, Site]:
        if self.rho == 1:
            return sites
        owners, shares, budget = [], [], 0
        for path, site in sites.items():
            method, stack = site.method, site.canonical_shape[0]
            require(
                len(stack) <= 1 and not method.varies,
                f"{path!r}: EVA(rho={self.rho}) gives each matrix of a leaf a rank of its own, which LoRA has for one "
                f"stack axis and from a single rank; here are {len(stack)} and {method}. EVA(rho=1) keeps the ranks.",
            )
            most = self.most(method.rank, site)
            ratios = np.asarray(_shares({name: stats[path][name] for name in self.needs}))
            for index, ratio in enumerate(ratios.reshape(-1, ratios.shape[-1])):
                owners += [(path, index)] * most
                shares += ratio[:most].tolist()
                budget += method.rank
        order = np.argsort(-np.asarray(shares), kind="stable")[:budget]
        ranks: dict[str, list[int]] = {path: [0] * site.stack for path, site in sites.items()}
        for i in order:
            path, index = owners[i]
            ranks[path][index] += 1
        given = {path: self._with_ranks(site, tuple(ranks[path])) for path, site in sites.items()}
        return {path: site for path, site in given.items() if site is not None}

    def _with_ranks(self, site: Site, ranks: tuple[int, ...]) -> Site | None:
        method, most = site.method, max(ranks)
        if most == 0:
            return None
        ratio = (lambda r: r / method.rank) if not method.rslora else (lambda r: math.sqrt(r / method.rank))
        alpha = (lambda r: method.alpha * ratio(r)) if self.keep_scale else (lambda r: method.alpha)
        changes: dict[str, Any] = {"rank": most, "alpha": alpha(most)}
        if len(set(ranks)) > 1:
            changes |= {"ranks": ranks, "alphas": tuple(alpha(r) if r else method.alpha for r in ranks)}
        return dataclasses.replace(site, method=dataclasses.replace(method, **changes))

    def pair(self, key: Any, w: Array, rank: int, scale: float, stats: Any) -> tuple[Array, Array]:
        values, vectors = _components(stats)
        a, values, _ = fixed_signs(vectors[:, :rank], values[:rank], vectors[:, :rank].T)
        if self.whiten:
            a = a / jnp.maximum(stats["n"] * values, jnp.finfo(a.dtype).tiny) ** 0.25
        return a, jnp.zeros((rank, w.shape[1]), w.dtype)


def _centred(stats: Mapping[str, Array]) -> Float[Array, "in in"]:
    mean = stats["x"] / stats["n"]
    return stats["xx"] / stats["n"] - mean[:, None] * mean


def _components(stats: Mapping[str, Array]) -> tuple[Float[Array, " in"], Float[Array, "in in"]]:
    """Variances, descending and not negative, and directions, the columns."""
    values, vectors = jnp.linalg.eigh(_centred(stats))
    return jnp.maximum(values[::-1], 0.0), vectors[:, ::-1]


@jax.jit
def _shares(stats: Mapping[str, Array]) -> Float[Array, "*stack in"]:
    def one(stats):
        covariance = _centred(stats)
        return jnp.linalg.eigvalsh(covariance)[::-1] / jnp.maximum(
            jnp.trace(covariance), jnp.finfo(covariance.dtype).tiny
        )

    for _ in stats["n"].shape:
        one = jax.vmap(one)
    return one(stats)
