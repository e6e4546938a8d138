"""Any adapter that changes weights, as a plain LoRA: for engines that know nothing else."""

import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlora import paths
from jlora.adapt import Adapted, _placement, check_adapted
from jlora.factors import Factors
from jlora.linalg import truncated_svd
from jlora.methods.base import Method, Site
from jlora.methods.lora import LoRA
from jlora.methods.whole import Follow, Full
from jlora.storage import is_abstract, is_stored
from jlora.tables import table
from jlora.weight import Params


@dataclasses.dataclass(frozen=True)
class Converted:
    """What became of one leaf.

    Attributes:
      method: what it was adapted by.
      ranks: of the pair of every matrix, in the order of the stack.
      error: the norm of what was lost over the norm of the change, Frobenius, of the leaf as a whole.
      exact: nothing was decomposed: the pairs are the method's own, its scales multiplied in.
    """

    method: str
    ranks: tuple[int, ...]
    error: float
    exact: bool


@dataclasses.dataclass(frozen=True)
class Conversion:
    """What ``to_lora`` did. Printed, it is a table.

    Attributes:
      leaves: by path.
      kept: the leaves that are trained as they are and stay so, path -> method.
    """

    leaves: dict[str, Converted]
    kept: dict[str, str]

    @property
    def error(self) -> float:
        """The largest error of a leaf."""
        return max(leaf.error for leaf in self.leaves.values())

    def __str__(self) -> str:
        rows = [("path", "was", "rank", "error")]
        for path, leaf in self.leaves.items():
            low, high = min(leaf.ranks), max(leaf.ranks)
            error = "exact" if leaf.exact else f"{leaf.error:.2g}"
            rows.append((path, leaf.method, str(high) if low == high else f"{low}..{high}", error))
        rows += [(path, name, "-", "kept") for path, name in self.kept.items()]
        return table(rows, right=("rank", "error"))


def to_lora(adapted: Adapted, rank: int | float) -> tuple[Adapted, Conversion]:
    """The same base with plain ``LoRA`` adapters that come as close to the given ones as the rank allows.

    >>> lora, report = jlora.to_lora(adapted, rank=16)
    >>> print(report)
    >>> jlora.io.save_peft(lora, "adapter")

    Every matrix gets a rank of its own, at most the one asked for and no more than its change has. The change is taken

    * as it is, exactly, where the method is a pair of factors that is added to the weight and the pair's rank is within
      the one asked for;
    * from the pair, if its rank is higher: the best approximation there is, and the change is not formed;
    * else as effective weight less weight, decomposed one matrix at a time. The arithmetic is that of ``merge``: in
      float32, a change of a hundredth of the weight is known to about 1e-5 of itself.

    What is lost is in the report. Call it outside of ``jit``: the ranks depend on the numbers. A LoRA within the rank
    stays what it is; all other pairs have scale 1 (alpha is the rank), and the dropout of their method. In a stack,
    matrices of lower rank are padded by zeros; where there is a single stack axis, their true ranks are kept in
    ``LoRA.ranks`` and in what is saved. Leaves with ``Full`` or ``Offset`` stay as they are; one with ``Follow``
    becomes ``Full``, for what it followed is gone.

    Args:
      adapted: with methods that merge.
      rank: the largest rank; or, between 0 and 1, the share of the squared singular values of each matrix's change that
        is to be kept, by the smallest rank that does.

    Returns:
      The converted adapters, and a report.

    Raises:
      ValueError: no such rank, a method that has no weight to merge, or nothing to convert.
    """
    check_adapted(adapted, "to_lora")
    _check_rank(rank)
    arrays = dict(paths.flatten(adapted.base)[0])
    trainable, frozen, sites = {}, {}, {}
    leaves, kept = {}, {}
    for path, site in adapted.sites.items():
        method, leaf, p = site.method, arrays[path], adapted.params_of(path, site)
        if is_abstract((leaf, p)):
            raise ValueError(f"{path!r} is a shape without numbers, and ranks depend on numbers: to_lora wants arrays.")
        if isinstance(method, Follow):
            value = method.weight(leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32)), p)
            site, p = Site(Full(), site.axes, site.shape), Params(value)
        if method.whole_leaf:
            kept[path] = site.method.name
        elif not method.mergeable:
            raise ValueError(
                f"{path!r}: {method.name} is no change of the weight, so no LoRA comes close to it. Keep it as an "
                "adapter, with bind and lift; for engines that only know LoRA, train one of the methods that merge."
            )
        else:
            site, p, leaves[path] = _leaf(leaf, site, p, rank)
        sites[path], trainable[path] = site, p.trainable
        if p.frozen is not None:
            frozen[path] = p.frozen
    if not leaves:
        raise ValueError("There is nothing to convert: no weight has an adapter. jlora.merge gives the plain tree.")
    return Adapted(adapted.base, trainable, frozen, tuple(sites.items())), Conversion(leaves, kept)


def _check_rank(rank: Any) -> None:
    whole = isinstance(rank, (int, np.integer)) and not isinstance(rank, bool) and rank >= 1
    if not whole and not (isinstance(rank, (float, np.floating)) and 0.0 < rank < 1.0):
        raise ValueError(
            f"to_lora(rank={rank!r}): the largest rank as a whole number from 1 (16, say; the smaller side of the "
            "largest matrix loses nothing), or the share of the change to keep as a fraction between 0 and 1 (0.95)."
        )


def _leaf(leaf: Any, site: Site, p: Params, rank: int | float) -> tuple[Site, Params, Converted]:
    method, (stack, n_in, n_out) = site.method, site.canonical_shape
    if type(method) is LoRA and rank >= method.rank and not method.subtracts:
        ranks = [r for r, _ in method.per_index(site.stack)]
        return site, p._replace(shared=None), Converted(method.name, tuple(ranks), 0.0, True)
    pairs, lost, total, exact = [], 0.0, 0.0, True
    for w, own in _matrices(leaf, site, p):
        pair = _own_pair(method, w, own)
        if pair is not None:
            acts = pair[0].any(axis=0) & pair[1].any(axis=1)  # what is masked is not part of the rank
            pair = pair[0][:, acts], pair[1][acts]
        if pair is not None and pair[0].shape[1] <= min(rank if rank >= 1 else 0, n_in, n_out):
            pairs.append(pair)
            continue
        exact = False
        if pair is not None and pair[0].shape[1] < min(n_in, n_out):
            a, b, kept, all_of_it = _best_of_pair(*pair, rank)
            lost += all_of_it - kept
        else:
            change = np.asarray(method.weight(w, own) - w) if pair is None else pair[0] @ pair[1]
            a, b, all_of_it = _best_of_matrix(change, rank, _noise(w))
            lost += float(np.sum(np.square(change - a @ b, dtype=np.float64)))
        total += all_of_it
        pairs.append((a, b))
    ranks = tuple(a.shape[1] for a, _ in pairs)
    largest, dtype = max(1, *ranks), jnp.promote_types(leaf.dtype, jnp.float32)
    own_ranks = ranks if len(stack) == 1 and len(set(ranks)) > 1 else None
    lora = LoRA(
        largest,
        alpha=float(largest),
        dropout=method.dropout,
        lookup_only=method.lookup_only,
        ranks=own_ranks,
        alphas=own_ranks and tuple(map(float, own_ranks)),
    )
    a = np.stack([np.pad(a, [(0, 0), (0, largest - a.shape[1])]) for a, _ in pairs]).reshape(*stack, n_in, largest)
    b = np.stack([np.pad(b, [(0, largest - b.shape[0]), (0, 0)]) for _, b in pairs]).reshape(*stack, largest, n_out)
    site = Site(lora, site.axes, site.shape)
    new = lora.init_stack(Params(Factors(jnp.asarray(a, dtype), jnp.asarray(b, dtype))), site, dtype)
    place = _placement(leaf, site)
    if place is not None:
        new = jax.device_put(new, jax.tree.map(place, lora.dims(new)))
    return site, new, Converted(method.name, ranks, math.sqrt(max(lost, 0.0) / total) if total else 0.0, exact)


def _matrices(leaf: Any, site: Site, p: Params) -> Iterator[tuple[jax.Array, Params]]:
    """Every matrix of a leaf, and its parameters, whole on one device."""
    host = functools.partial(jax.tree.map, np.asarray)
    whole = host((leaf if is_stored(leaf) else site.axes.to_canonical(leaf), p._replace(shared=None)))
    shared = jax.tree.map(jnp.asarray, host(p.shared))
    wide = jnp.promote_types(leaf.dtype, jnp.float32)
    for index in np.ndindex(*site.canonical_shape[0]):
        w, own = jax.tree.map(lambda x, index=index: jnp.asarray(x[index]), whole)
        yield (w.matrix() if is_stored(w) else w).astype(wide), own._replace(shared=shared)


def _own_pair(method: Method, w: jax.Array, p: Params) -> tuple[np.ndarray, np.ndarray] | None:
    """The factors of what is added to the weight, if that is what the method does."""
    f = method.factors(w, p)
    if f is None or method.output_gain(w, p) is not None:
        return None
    return np.asarray(f.a, w.dtype), np.asarray(f.b, w.dtype) * f.scale


def _best_of_pair(a: np.ndarray, b: np.ndarray, rank: int | float) -> tuple[np.ndarray, np.ndarray, float, float]:
    """The best pair of lower rank, and the squared norms of its product and of a b. In float64."""
    qa, ra = np.linalg.qr(a.astype(np.float64))
    qb, rb = np.linalg.qr(b.astype(np.float64).T)
    u, s, vh = np.linalg.svd(ra @ rb.T)
    total = float(np.sum(np.square(s)))
    k = _cut(s, total, rank, floor=np.finfo(a.dtype).eps * s[0])
    root = np.sqrt(s[:k])
    return qa @ u[:, :k] * root, root[:, None] * vh[:k] @ qb.T, float(np.sum(np.square(s[:k]))), total


def _best_of_matrix(change: np.ndarray, rank: int | float, noise: float) -> tuple[np.ndarray, np.ndarray, float]:
    """The best pair of a matrix, and the squared norm of the matrix. Rows and columns of zeros have no part in it."""
    total = float(np.sum(np.square(change, dtype=np.float64)))
    rows, columns = (np.flatnonzero(change.any(axis=axis)) for axis in (1, 0))
    part = change[np.ix_(rows, columns)]
    full = min(part.shape)
    if not full:
        return np.zeros((change.shape[0], 0)), np.zeros((0, change.shape[1])), total
    tried = min(full, int(rank) if rank >= 1 else 16)
    while True:
        if full <= 4 * (tried + 10):
            u, s, vh = np.linalg.svd(part, full_matrices=False)
        else:
            u, s, vh = map(np.asarray, truncated_svd(jnp.asarray(part), tried))
        if rank >= 1 or len(s) == full or np.sum(np.square(s, dtype=np.float64)) >= rank * total:
            break
        tried = min(full, 4 * tried)  # not enough of it yet
    k = _cut(s, total, rank, noise)
    a, b = np.zeros((change.shape[0], k), change.dtype), np.zeros((k, change.shape[1]), change.dtype)
    a[rows], b[:, columns] = u[:, :k] * np.sqrt(s[:k]), np.sqrt(s[:k])[:, None] * vh[:k]
    return a, b, total


def _cut(s: np.ndarray, total: float, rank: int | float, floor: float) -> int:
    """How many singular values to keep."""
    if rank < 1:
        rank = np.searchsorted(np.cumsum(np.square(s, dtype=np.float64)), rank * total) + 1
    return int(min(rank, np.count_nonzero(s > floor)))


def _noise(w: jax.Array) -> float:
    """About the largest singular value of the rounding errors of a matrix like ``w``."""
    size = float(jnp.sqrt(jnp.mean(jnp.square(w))))
    return float(jnp.finfo(w.dtype).eps) * size * (w.shape[0] ** 0.5 + w.shape[1] ** 0.5)
