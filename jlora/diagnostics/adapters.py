"""The diagnostics of adapters: every matrix of every leaf, as tables."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlora import paths
from jlora.adapt import Adapted
from jlora.convert import _matrices, _own_pair
from jlora.diagnostics import intruder, spectra
from jlora.diagnostics.norms import EntryNorms
from jlora.diagnostics.subspaces import directions, subspace_similarity
from jlora.factors import Factors
from jlora.lift import lift
from jlora.methods.base import Method, Site
from jlora.paths import Pattern
from jlora.storage import dense, is_abstract
from jlora.tables import table
from jlora.weight import Context, Dot, Params


@dataclasses.dataclass(frozen=True, eq=False)
class Change:
    """What an adapter changes of one leaf, every array with the leaf's stack axes first.

    Attributes:
      method: what the leaf is adapted by.
      base: the Frobenius norm of the weight.
      spectrum: the singular values of the change, [*stack, k].
      intruders: the strongest directions of the weight after the change, if they were asked for.
    """

    method: str
    base: np.ndarray
    spectrum: np.ndarray
    intruders: intruder.Intruders | None = None

    @property
    def norm(self) -> np.ndarray:
        """The Frobenius norm of the change."""
        return np.sqrt(np.sum(np.square(self.spectrum), axis=-1))

    @property
    def relative(self) -> np.ndarray:
        """That over the weight's; NaN where the weight is zero."""
        return np.divide(self.norm, self.base, out=np.full_like(self.base, np.nan), where=self.base > 0)

    def effective_rank(self, power: int = 1) -> np.ndarray:
        return np.asarray(spectra.effective_rank(self.spectrum, power))

    def stable_rank(self) -> np.ndarray:
        return np.asarray(spectra.stable_rank(self.spectrum))

    def energy_rank(self, share: float = 0.9) -> np.ndarray:
        return np.asarray(spectra.energy_rank(self.spectrum, share))


@dataclasses.dataclass(frozen=True, eq=False)
class Report:
    """What ``report`` found. Printed, it is a table with a row a matrix.

    Attributes:
      leaves: path -> what is changed there.
      others: path -> what else is adapted, and why there is no spectrum of it.
    """

    leaves: dict[str, Change]
    others: dict[str, str]

    def __str__(self) -> str:
        header = ["path", "method", "change", "change/weight", "largest", "effective", "stable", "90 %", "of"]
        searched = any(leaf.intruders is not None for leaf in self.leaves.values())
        rows = [[*header, "intruders"] if searched else header]
        for path, leaf in self.leaves.items():
            columns = (
                [f"{x:.3g}" for x in leaf.norm.flat],
                [f"{x:.3g}" for x in leaf.relative.flat],
                [f"{x:.3g}" for x in leaf.spectrum.max(-1).flat],
                [f"{x:.2f}" for x in leaf.effective_rank().flat],
                [f"{x:.2f}" for x in leaf.stable_rank().flat],
                [str(x) for x in leaf.energy_rank().flat],
                [str(leaf.spectrum.shape[-1])] * leaf.base.size,
            )
            if leaf.intruders is not None:
                of = leaf.intruders.similarity.shape[-1]
                columns += ([f"{x} of {of}" for x in np.asarray(leaf.intruders.count).flat],)
            for index, *cells in zip(np.ndindex(leaf.base.shape), *columns, strict=True):
                rows.append([path + "".join(f"[{i}]" for i in index), leaf.method, *cells])
        lines = [table(rows, right=rows[0][2:])] if self.leaves else []
        return "\n".join([*lines, *(f"{path}: {why}" for path, why in self.others.items())])


def report(adapted: Adapted, *, intruders: int = 0, threshold: float = 0.5, side: str = "out") -> Report:
    """How large the change of every weight is, and of how many directions.

    >>> print(jlora.diagnostics.report(adapted, intruders=10))

    A pair of factors is decomposed as a pair, and its product not formed. Any other change is the effective weight less
    the weight, one matrix at a time, in float32 or the weight's dtype if that is wider. Call it outside of ``jit``.

    Args:
      adapted: with any methods. Leaves that are trained whole and methods that act on activations are named, without a
        spectrum.
      intruders: how many of the strongest directions after the change are looked for in the weight before it
        (``jlora.diagnostics.intruders``); 0 saves the decomposition of the weights.
      threshold, side: as there.

    Raises:
      ValueError: a change that is not finite, with the leaf and the place in its stack.
    """
    if intruders:
        intruder.check(intruders, threshold, side)
    arrays = dict(paths.flatten(adapted.base)[0])
    leaves, others = {}, {}
    for path, site in adapted.sites.items():
        method, leaf, p = site.method, arrays[path], adapted.params_of(path, site)
        if is_abstract((leaf, p)):
            raise ValueError(f"{path!r} is a shape without numbers: there is nothing to report.")
        if method.whole_leaf:
            moved = jnp.linalg.norm(jnp.ravel(method.weight(dense(leaf), p) - dense(leaf)))
            others[path] = f"{method.name}, trained as a whole, moved by {moved:.3g}"
            continue
        if not method.mergeable:
            others[path] = f"{method.name} acts on activations: it is no change of the weight"
            continue
        norms, spectrum, found = [], [], []
        for index, w, change in _changes(path, leaf, site, p):
            values = np.asarray(spectra.singular_values(change))
            if not np.all(np.isfinite(values)):
                raise ValueError(f"{_name(path, index)}: the change is not finite. Has the training diverged?")
            norms.append(np.asarray(jnp.linalg.norm(w)))
            spectrum.append(values)
            if intruders:
                after = w + (change.product() if isinstance(change, Factors) else change)
                found.append(intruder.intruders(w, after, k=intruders, threshold=threshold, side=side))
        stack = site.canonical_shape[0]
        together = jax.tree.map(lambda *each, stack=stack: _shaped(each, stack), *found) if found else None
        leaves[path] = Change(method.name, _shaped(norms, stack), _shaped(spectrum, stack), together)
    return Report(leaves, others)


def _shaped(each: Sequence[Any], stack: tuple[int, ...]) -> np.ndarray:
    """What there is of every matrix, with the stack axes."""
    return np.stack(each).reshape((*stack, *np.shape(each[0])))


def _changes(
    path: str, leaf: Any, site: Site, p: Params
) -> Iterator[tuple[tuple[int, ...], jax.Array, Factors | jax.Array]]:
    """Every matrix of a leaf: its place in the stack, the weight, and the change."""
    for index, (w, own) in zip(np.ndindex(site.canonical_shape[0]), _matrices(leaf, site, p), strict=True):
        pair = _own_pair(site.method, w, own)
        change = site.method.weight(w, own) - w if pair is None else Factors(*map(jnp.asarray, pair))
        yield index, w, change


def _name(path: str, index: tuple[int, ...]) -> str:
    return repr(path) + "".join(f"[{i}]" for i in index)


@dataclasses.dataclass(frozen=True, eq=False)
class Similarity:
    """What ``similarity`` found. Printed, it is a table with a row a matrix.

    Attributes:
      leaves: path -> phi of every two leading subspaces, [*stack, k, l].
      features: path -> n, of which the directions are.
    """

    leaves: dict[str, np.ndarray]
    features: dict[str, int]

    def __str__(self) -> str:
        rows = [("path", "first directions", "all directions", "at random")]
        for path, phi in self.leaves.items():
            most = max(phi.shape[-2:])
            for index in np.ndindex(phi.shape[:-2]):
                each, name = phi[index], path + "".join(f"[{i}]" for i in index)
                rows.append((name, f"{each[0, 0]:.3f}", f"{each[-1, -1]:.3f}", f"{most / self.features[path]:.3f}"))
        return table(rows, right=rows[0][1:])


def similarity(first: Adapted, second: Adapted, *, of: str = "in", rank: int | None = None) -> Similarity:
    """How much of the subspaces that two adapters of the same leaves use is the same.

    >>> print(jlora.diagnostics.similarity(adapted, other))

    Args:
      of: which directions are compared: see ``jlora.diagnostics.directions``.
      rank: how many, at most. All singular vectors of a change that is no pair span everything, and all such changes
        are then alike: there it is wanted.

    Raises:
      ValueError: adapters of different leaves or shapes.
    """
    sites, others = first.sites, second.sites
    if sites.keys() != others.keys():
        only = sorted(sites.keys() ^ others.keys())
        raise ValueError(f"The adapters are of different leaves: only one of them has {', '.join(only[:5])}.")
    bases = [dict(paths.flatten(adapted.base)[0]) for adapted in (first, second)]
    leaves, features = {}, {}
    for path, site in sites.items():
        if site.method.whole_leaf or not site.method.mergeable:
            continue
        if others[path].method.whole_leaf or not others[path].method.mergeable:
            continue
        if site.canonical_shape != others[path].canonical_shape:
            raise ValueError(f"{path!r} is {site.shape} in one and {others[path].shape} in the other.")
        each, n = [], 0
        both = (
            _changes(path, base[path], adapted.sites[path], adapted.params_of(path, adapted.sites[path]))
            for base, adapted in zip(bases, (first, second), strict=True)
        )
        for (index, _, one), (_, _, two) in zip(*both, strict=True):
            used = []
            for change in (one, two):
                if not isinstance(change, Factors) and rank is None:
                    raise ValueError(f"{path!r}: {site.method.name} is no pair, so say how many directions: rank=8.")
                if not np.all(np.isfinite(spectra.singular_values(change))):
                    raise ValueError(f"{_name(path, index)}: the change is not finite. Has the training diverged?")
                used.append(directions(change, of)[:, :rank])
            each.append(np.asarray(subspace_similarity(*used)))
            n = len(used[0])
        leaves[path] = _shaped(each, site.canonical_shape[0])
        features[path] = n
    if not leaves:
        raise ValueError("There is nothing to compare: no leaf has a method in both that changes its weight.")
    return Similarity(leaves, features)


def _measured(method: Method, share: float) -> Method:
    """The method, reporting the largest entries of what it returns, times ``share``."""

    class Measured(type(method)):
        def forward(self, dot: Dot, x: Any, w: Any, p: Params, ctx: Context) -> tuple[Any, Any]:
            base, (y, _) = dot(x, w), super().forward(dot, x, w, p, ctx)
            return y, tuple(share * jnp.max(jnp.abs(each)) for each in (base, y - base, y))

    return Measured(**{field.name: getattr(method, field.name) for field in dataclasses.fields(method)})


def attention_norms(
    fn: Callable,
    adapted: Adapted,
    args: Sequence[Any],
    length: int,
    *,
    targets: Pattern | Sequence[Pattern] = ("**/*{q_proj,query}/**", "**/*{k_proj,key}/**"),
    head_dim: int | None = None,
    context: Mapping[str, Any] | None = None,
) -> dict[str, EntryNorms]:
    """The largest entries of queries and keys in a model, with and without the adapters: see ``EntryNorms``.

    >>> norms = jlora.diagnostics.attention_norms(model, adapted, (ids,), length=ids.shape[1])

    Args:
      fn: the model's function, not lifted; ``fn(params, *args)`` is run once.
      length: L, the tokens of a sequence.
      targets: which adapted leaves project to queries and keys.
      head_dim: see ``entry_norms``.
      context: as for ``Adapted.bind``.

    Returns:
      For each leaf, the norms with its stack axes first; of several uses of a leaf, the last.
    """
    patterns = list(targets) if isinstance(targets, (list, tuple)) else [targets]
    share = 1.0 if head_dim is None else head_dim**-0.25
    sites, found = {}, []
    for path, site in adapted.sites.items():
        chosen = not site.method.whole_leaf and any(paths.matches(pattern, path, None) for pattern in patterns)
        sites[path] = Site(_measured(site.method, share), site.axes, site.shape) if chosen else site
        found += [path] * chosen
    if not found:
        raise ValueError(
            f"No adapted leaf is a query's or key's by {patterns}: targets says which of {list(sites)} are."
        )
    measured = adapted.replace(_sites=tuple(sites.items()))
    _, seen = lift(fn, aux=True)(measured.bind(context=context), *args)
    missing = [path for path in found if path not in seen]
    if missing:
        raise ValueError(
            f"The model takes no product with {', '.join(missing)} as a whole: there is nothing to measure."
        )
    return {path: EntryNorms(*seen[path][-1], length) for path in found}
