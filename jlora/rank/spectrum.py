r"""Ranks from singular values: of what adapters learned, or of weights that are to become pairs of factors.

LoRA-Squeeze: Simple and Effective Post-Tuning and In-Tuning Compression of LoRA Modules. Vulić et al., 2026.
https://arxiv.org/abs/2602.10993
From GaLore to WeLore: How Low-Rank Weights Non-uniformly Emerge from Low-Rank Gradients. Jaiswal et al., 2024.
https://arxiv.org/abs/2407.11239

The change s A B of an adapter has the singular values of s R_A R_B^T, with A = Q_A R_A and B^T = Q_B R_B: r numbers,
and nothing of the weight's size is formed. Of a matrix cut at rank k, what is lost is the sum of the squares beyond k:

* ``best_ranks`` cuts all matrices together where the largest values that a budget pays for end: the least loss at that
  total rank, or at that number of parameters.
* ``rank_from_spectrum`` cuts one at a share of its squares, at the elbow, or both (SoKA's criteria; the first is
  LoRA-Squeeze's and PEFT's ``convert_to_lora``'s). LoRA-Squeeze recommends one rank for all, the least at which the
  shares of all matrices are 0.95 in the mean: ``recommended_rank``.
* ``welore``: the values of each weight are taken from [min, max] to [0, 1], and those below one threshold for all
  weights are dropped; the threshold is found by bisection, where the authors' code has a table for two models. Weights
  whose spectrum has a heavy tail lose little, others much. The weights that lose more than ``least`` of their rank
  become pairs, the others stay as they are.

``jlora.to_lora(adapted, rank)`` then is LoRA-Squeeze's compression after training; ``jlora.rank.squeeze`` is the one
during training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, PyTree

from jlora import paths
from jlora.adapt import Adapted
from jlora.factors import Factors
from jlora.linalg import factor_svd
from jlora.methods.base import Site, require
from jlora.methods.pela import PELA
from jlora.paths import Pattern
from jlora.weight import Axes, Params

Spectra = Mapping[str, Float[np.ndarray, "*stack k"]]


def spectra(adapted: Adapted) -> dict[str, Float[np.ndarray, "*stack r"]]:
    """The singular values of the change of every matrix that is adapted by a pair of factors, descending."""
    found = {}
    for path, site in adapted.sites.items():
        if site.method.whole_leaf:
            continue
        f = pair_of(adapted, path, site)
        if f is not None:
            found[path] = np.asarray(abs(f.scale) * factor_svd(f.a, f.b)[1])
    require(bool(found), f"spectra: no leaf of {adapted} is adapted by a pair of factors.")
    return found


def pair_of(adapted: Adapted, path: str, site: Site) -> Factors | None:
    """The pair that is added to the matrices of a leaf, [*stack, ...]; None for methods that have none."""
    shape = jax.ShapeDtypeStruct(site.canonical_shape[1:], jnp.float32)
    p = adapted.params_of(path, site)

    def one(own: Params) -> Factors | None:
        w = jnp.zeros(shape.shape, shape.dtype)  # methods look at its shape
        own = own._replace(shared=p.shared)
        return None if site.method.output_gain(w, own) is not None else site.method.factors(w, own)

    for _ in site.canonical_shape[0]:
        one = jax.vmap(one)
    return one(p._replace(shared=None))


def best_ranks(
    spectra: Spectra, total_rank: int | None = None, *, parameters: int | None = None,
    costs: Mapping[str, int] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The rank of every matrix (an integer, or an array over the stack) at which all together lose least.

    >>> ranks = jlora.rank.best_ranks(jlora.rank.spectra(adapted), total_rank=64)

    Args:
      spectra: singular values by path, [*stack, k].
      total_rank: the budget, over all matrices.
      parameters: or the budget in parameters, which wants ``costs``: what a rank of a leaf costs, in + out. Then the
        values are weighed by what they cost.

    Raises:
      ValueError: a budget below one rank for each matrix, or values that are not numbers.
    """
    require(
        (total_rank is None) != (parameters is None) and (parameters is None) == (costs is None),
        "best_ranks: the budget is total_rank=, or parameters= with costs=.",
    )
    arrays = {path: np.asarray(s, np.float64) for path, s in spectra.items()}
    for path, s in arrays.items():
        require(bool(np.all(np.isfinite(s))), f"best_ranks: the singular values of {path!r} are not all numbers.")
    price = {path: 1 if costs is None else costs[path] for path in arrays}
    matrices = {path: int(np.prod(s.shape[:-1], dtype=int)) for path, s in arrays.items()}
    least, budget = sum(price[path] * n for path, n in matrices.items()), total_rank if costs is None else parameters
    require(
        budget >= least, f"best_ranks: a budget of {budget:,} is below one rank for each matrix, which takes {least:,}."
    )
    gains = np.concatenate([np.square(s[..., 1:]).ravel() / price[path] for path, s in arrays.items()])
    cost = np.concatenate([np.full(s[..., 1:].size, price[path]) for path, s in arrays.items()])
    order = np.argsort(-gains, kind="stable")
    kept = np.zeros(len(gains), bool)
    kept[order] = np.cumsum(cost[order]) <= budget - least
    ranks, start = {}, 0
    for path, s in arrays.items():
        own = kept[start : start + s[..., 1:].size].reshape(s[..., 1:].shape)
        start += own.size
        count = 1 + own.sum(axis=-1)
        ranks[path] = int(count) if count.ndim == 0 else count
    return ranks


def recommended_rank(spectra: Spectra, energy: float = 0.95) -> int:
    """The least rank for all matrices that keeps, in the mean, this share of the squares of each."""
    require(0.0 < energy <= 1.0, f"recommended_rank(energy={energy}): a share in (0, 1] is wanted.")
    each = [row for s in spectra.values() for row in np.asarray(s, np.float64).reshape(-1, np.shape(s)[-1])]
    longest = max(map(len, each))
    shares = []
    for row in each:
        total = np.cumsum(np.square(row))
        share = total / total[-1] if total[-1] > 0 else np.ones(len(row))
        shares.append(np.pad(share, (0, longest - len(row)), constant_values=1.0))
    return int(np.argmax(np.mean(shares, axis=0) >= energy * (1 - 1e-12))) + 1


def welore(
    params: PyTree,
    reduction: float,
    targets: Pattern | Sequence[Pattern] = "**",
    *,
    axes: Mapping[str, Axes] | None = None,
    least: float = 0.0,
) -> dict[str, PELA]:
    """WeLore's ranks: rules for the weights that are to become pairs of factors, all under one threshold.

    >>> small = jlora.factorize(params, jlora.rank.welore(params, reduction=0.5, targets="**/kernel"))

    Args:
      params: the parameter tree. No data is looked at.
      reduction: the mean share of the rank that is dropped, in (0, 1).
      targets: patterns of the weights.
      axes: which axes of a weight are what, by path; a leaf of two axes needs none. Matrices of a stack have one rank,
        that of the one that needs most.
      least: only weights that lose more than this share of their rank become pairs: 0.5 where they are to be trained,
        in the authors' runs. A pair is smaller than its weight only if it loses more than about a half.
    """
    require(0.0 < reduction < 1.0, f"welore(reduction={reduction}): a share in (0, 1) is wanted.")
    wanted = list(targets) if isinstance(targets, (list, tuple)) else [targets]
    values, sizes = {}, {}
    for path, leaf in paths.flatten(params)[0]:
        own = (axes or {}).get(path)
        if not any(paths.matches(pattern, path, leaf) for pattern in wanted) or (own is None and leaf.ndim != 2):
            continue
        w = leaf if own is None else own.to_canonical(leaf)
        s = np.asarray(jnp.linalg.svd(w.astype(jnp.promote_types(w.dtype, jnp.float32)), compute_uv=False), np.float64)
        require(bool(np.all(np.isfinite(s))), f"welore: {path!r} has entries that are not finite.")
        low, high = s[..., -1:], s[..., :1]
        values[path], sizes[path] = (s - low) / np.where(high > low, high - low, 1.0), w.shape[-2:]
    require(bool(values), f"welore: {targets!r} matches no weight of two axes, and none of more that axes= has.")
    dropped = lambda theta: np.mean(np.concatenate([np.ravel((v < theta).mean(axis=-1)) for v in values.values()]))
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if dropped(middle) <= reduction else (low, middle)
    rules = {}
    for path, v in values.items():
        rank, (n_in, n_out) = int(np.max((v >= low).sum(axis=-1))), sizes[path]
        if 1 - rank / v.shape[-1] > least:
            rules[path] = PELA(n_in * n_out / ((rank + 0.5) * (n_in + n_out)))  # half a rank more, and rounded down
    return rules
