"""What an allocator of ranks is: a pair of pure functions, as optax has for optimizers.

``init(adapted)`` makes its state, and masks what is not in use from the start; ``update(state, adapted, grads, step)``,
after the optimizer's step and under jit like it, looks at the parameters and at the gradients from before the step,
gives terms of rank one or whole matrices a score, and writes which of them are in use into the adapters, whose arrays
keep their shapes. ``jlora.repack`` makes them smaller, outside of jit. Here is what allocators share: from parameters
to scores, and from scores to what is in use.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from jlora.adapt import Adapted
from jlora.methods.base import Method, Site
from jlora.weight import Params

Scores = dict[str, Float[Array, "*stack r"] | Float[Array, "*stack"]]
"""Of the terms of rank one of every leaf, or of its matrices."""


class Allocator(NamedTuple):
    """Two functions:

    >>> ranks = jlora.rank.adalora(target_rank=4, total_steps=1000)
    >>> state, adapted = ranks.init(adapted)
    >>> state, adapted = ranks.update(state, adapted, grads, step)  # after every step of the optimizer

    Attributes:
      init: ``init(adapted) -> (state, adapted)``. It checks that there is something to allocate, and the budget.
      update: ``update(state, adapted, grads, step) -> (state, adapted)``; ``step`` counts from 0 and may be traced.
    """

    init: Callable[[Adapted], tuple[Any, Adapted]]
    update: Callable[[Any, Adapted, PyTree, Int[Array, ""] | int], tuple[Any, Adapted]]


def sites_of(adapted: Adapted, kind: type[Method], name: str) -> dict[str, Site]:
    """The leaves that an allocator is for."""
    sites = {path: site for path, site in adapted.sites.items() if isinstance(site.method, kind)}
    if not sites:
        found = sorted({site.method.name for site in adapted.sites.values()})
        raise ValueError(f"{name} allocates the ranks of {kind.__name__}, and no leaf is adapted by it; got {found}.")
    return sites


def params_of(adapted: Adapted, path: str) -> Params:
    return Params(adapted.trainable[path], adapted.frozen.get(path))


def with_params(adapted: Adapted, changed: Mapping[str, Params]) -> Adapted:
    """``adapted`` with other parameters of some leaves."""
    frozen = {path: p.frozen for path, p in changed.items() if p.frozen is not None}
    return adapted.replace(
        trainable=adapted.trainable | {path: p.trainable for path, p in changed.items()}, frozen=adapted.frozen | frozen
    )


def total_rank(sites: Mapping[str, Site]) -> int:
    return sum(site.stack * site.method.rank for site in sites.values())


def costs_of(sites: Mapping[str, Site]) -> dict[str, int]:
    """Trainable parameters of a term of rank one, by leaf."""
    return {path: site.method.count(site) // (site.stack * site.method.rank) for path, site in sites.items()}


class Sensitivity(NamedTuple):
    r"""Running means of how much the loss depends on every parameter, shaped as the trainable tree, at least float32.

    With :math:`I = |p\,\partial L/\partial p|`:

    .. math::
        \bar I \leftarrow \beta_1 \bar I + (1 - \beta_1) I, \qquad
        \bar U \leftarrow \beta_2 \bar U + (1 - \beta_2) |I - \bar I|

    and the score of a parameter is :math:`\bar I \bar U`.
    """

    mean: PyTree
    deviation: PyTree

    @classmethod
    def zeros(cls, params: PyTree) -> Sensitivity:
        zeros = jax.tree.map(lambda p: jnp.zeros_like(p, jnp.promote_types(p.dtype, jnp.float32)), params)
        return cls(zeros, zeros)

    def update(self, values: PyTree, b1: float, b2: float) -> Sensitivity:
        """With new values of I."""
        mean = jax.tree.map(lambda m, i: b1 * m + (1 - b1) * i.astype(m.dtype), self.mean, values)
        spread = lambda u, i, m: b2 * u + (1 - b2) * jnp.abs(i.astype(m.dtype) - m)
        return Sensitivity(mean, jax.tree.map(spread, self.deviation, values, mean))

    def scores(self) -> PyTree:
        return jax.tree.map(jnp.multiply, self.mean, self.deviation)


def term_scores(site: Site, p: Params, scores: PyTree) -> Float[Array, "*stack r"]:
    """Of every term, the sum over its parts (a column of A, a row of B, a gate) of the mean score in each."""
    stack = len(site.canonical_shape[0])

    def part(score: Array, names: str) -> Array:
        return score.mean([axis for axis, name in enumerate(names.split(), stack) if name != "rank"])

    return sum(jax.tree.leaves(jax.tree.map(part, scores, site.method.dims(p).trainable)))


def top(scores: Scores, budget: Array | float, costs: Mapping[str, int] | None = None) -> Scores:
    """Ones for the highest scores that a budget pays for, over all leaves together, and zeros. Scores in, ranks out.

    Args:
      scores: of terms or of matrices.
      budget: a number, traced or not.
      costs: what one of a leaf costs; by default 1, and then exactly ``budget`` are chosen: among equal scores those
        that come first.

    Scores that are not numbers (NaN) are an error; inside of jit, where there are no errors, everything comes out NaN:
    the loss of the next step, too, so that what watches it stops.
    """
    flat = jnp.concatenate([score.reshape(-1) for score in scores.values()])
    bad = jnp.isnan(flat).any()
    if not isinstance(bad, jax.core.Tracer) and bad:
        paths = [path for path, score in scores.items() if bool(jnp.isnan(score).any())]
        raise ValueError(f"The scores of {paths} are not numbers (NaN): training has diverged, or a gradient has.")
    price = jnp.concatenate([jnp.full(s.size, 1 if costs is None else costs[path]) for path, s in scores.items()])
    order = jnp.argsort(-flat, stable=True)
    paid = jnp.cumsum(price[order]) <= budget
    keep = jnp.where(bad, jnp.nan, jnp.zeros_like(flat).at[order].set(paid))
    out, start = {}, 0
    for path, score in scores.items():
        out[path] = keep[start : start + score.size].reshape(score.shape)
        start += score.size
    return out


def grown(
    ranks: dict[str, Int[Array, "*stack"]], scores: Scores, number: Array | int, by: int, most: Mapping[str, int]
) -> dict[str, Int[Array, "*stack"]]:
    """Ranks of matrices, raised by ``by`` for the ``number`` with the highest scores: of those that have room up to
    ``most``, and whose score is not -inf. Within jit, scores that are not numbers raise none."""
    may = {path: jnp.where(n + by <= most[path], scores[path], -jnp.inf) for path, n in ranks.items()}
    chosen = top(may, number)
    return {path: n + by * ((chosen[path] == 1) & (may[path] > -jnp.inf)) for path, n in ranks.items()}
