r"""EGGROLL: evolution strategies whose perturbations are of low rank.

Evolution Strategies at the Hyperscale. Sarkar et al., 2025. https://arxiv.org/abs/2511.16652

.. math::  E_i = \frac{\sigma}{\sqrt r}\, s_i\, A_i B_i, \qquad
           y_i = x W + \frac{\sigma s_i}{\sqrt r} (x A_i) B_i, \qquad
           g = -\frac{\sqrt N}{N} \sum_{i=1}^N z_i E_i

A population of N members. Member i has A_i [in, r] and B_i [r, out] of independent standard normals and a sign s_i; the
members 2j and 2j + 1 have the same normals and the signs +1 and -1. z_i is its fitness, shifted and scaled over the
population. No gradient is taken and no E_i is formed: a member costs r (in + out) products on top of the base, whose
own product is one for the whole population, and all that is known of it is its key and its sign. What a step moves W by
is one product of the factors side by side, [in, N r / 2] times [N r / 2, out], and of any rank up to that.

For a linear fitness, tr(G^T W), the expectation of E tr(G^T E) / sigma^2 is G at every rank, since the entries of
A B / sqrt(r) are uncorrelated with variance 1; what is of higher order in sigma differs from the full Gaussian's by
O(1/r).

* Verified against the authors' code: the perturbation, its signs, the shaping of the fitness, the scale of g, which is
  ``scale="reference"``: it has sigma in it and grows as sqrt(N). ``scale="textbook"`` is -1/(N sigma^2) sum z_i E_i, an
  estimate of the gradient of the smoothed fitness, descending, where z is the fitness itself (``shape=False``).
* Noise is drawn again in every step (its ``noise_reuse=0`` with a new key); keys follow paths, as in ``adapt``, so the
  numbers are not those of the authors' program.
* Leaves that ``targets`` leave over stay as they are unless ``whole`` names them; those get normals of their own shape.
  In the authors' code vectors do so unless told not to.
* Their integer variant is not here.

When to use it: rewards without a gradient, models with rounding or discrete steps, batched inference that is cheaper
than backpropagation. For a differentiable loss, gradients learn far more a step.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key, PyTree

from jlora import paths
from jlora.adapt import ALL_LINEAR, Adapted, plan
from jlora.factors import Factors
from jlora.methods.base import Site
from jlora.methods.lora import LoRA
from jlora.paths import Pattern
from jlora.storage import is_stored
from jlora.weight import Axes


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Members:
    """A population, or with no axis in front a member of it: what ``jax.vmap`` maps over.

    Attributes:
      key: from which its normals are drawn; two members have the same.
      sign: +1 or -1.
    """

    key: Key[Array, "*n"]
    sign: Float[Array, "*n"]


@dataclasses.dataclass(frozen=True)
class EGGROLL:
    """A search by low-rank evolution, as pure functions of parameters: ``eggroll`` makes it. Static, hashable."""

    population: int
    sigma: float
    rank: int
    scale: str
    shape: bool
    groups: int
    _sites: tuple[tuple[str, Site], ...]
    _whole: tuple[str, ...]

    def ask(self, key: Key[Array, ""]) -> Members:
        """The members of a step. Give another key in every step."""
        half = self.population // 2
        keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(half))
        return Members(jnp.repeat(keys, 2), jnp.tile(jnp.array([1.0, -1.0], jnp.float32), half))

    def perturb(self, params: PyTree, member: Members) -> PyTree:
        """The parameters of one member, for a lifted function. Under ``vmap`` over members the base stays one."""
        leaves, treedef = paths.flatten(params)
        move = self.sigma * member.sign
        pairs, base = {}, []
        for path, leaf in leaves:
            if path in self._whole:
                leaf = leaf + (move * self._normal(member.key, path, leaf)).astype(leaf.dtype)
            base.append(leaf)
        for path, site in self._sites:
            a, b = self._factors(member.key, path, site)
            pairs[path] = Factors(a, b * (move / math.sqrt(self.rank)))
        return Adapted(jax.tree.unflatten(treedef, base), pairs, {}, self._sites).bind()

    def tell(self, members: Members, fitness: Float[Array, " n"], params: PyTree) -> PyTree:
        """What an optax transformation takes for a gradient, from how fit each member is: more is better. Zero where
        nothing is perturbed.

        Raises:
          ValueError: not one fitness a member, or one that is not finite (outside of ``jit``; inside, it is in all that
            comes out).
        """
        fitness = jnp.asarray(fitness)
        if fitness.shape != (self.population,):
            raise ValueError(f"One fitness a member is wanted, ({self.population},); got {fitness.shape}.")
        if not isinstance(fitness, jax.core.Tracer) and not np.all(np.isfinite(fitness)):
            worst = int(np.flatnonzero(~np.isfinite(fitness))[0])
            raise ValueError(f"The fitness of member {worst} is {fitness[worst]}: give such members a low number.")
        z = shaped(fitness, self.groups) if self.shape else fitness
        # The two members of a key together.
        weights = (z * members.sign).reshape(-1, 2).sum(1) * self._per_member()
        keys = members.key[::2]
        leaves, treedef = paths.flatten(params)
        sites = dict(self._sites)
        return jax.tree.unflatten(treedef, [self._update(keys, weights, path, leaf, sites) for path, leaf in leaves])

    def _per_member(self) -> float:
        """What -z E / sigma, of entries of variance 1, is multiplied by."""
        if self.scale == "reference":
            return -self.sigma / math.sqrt(self.population)
        return -1.0 / (self.population * self.sigma)

    def _update(self, keys: Array, weights: Array, path: str, leaf: Any, sites: Mapping[str, Site]) -> Any:
        if path in sites:
            site = sites[path]
            a, b = jax.vmap(lambda key: self._factors(key, path, site))(keys)
            b = b * (weights / math.sqrt(self.rank)).reshape(-1, *(1,) * (b.ndim - 1))
            moved = jnp.einsum("n...ir,n...ro->...io", a, b, precision=jax.lax.Precision.HIGHEST)
            return site.axes.from_canonical(moved, site.shape).astype(leaf.dtype)
        if path in self._whole:
            normal = jax.vmap(lambda key: self._normal(key, path, leaf))(keys)
            return jnp.tensordot(weights, normal, 1).astype(leaf.dtype)
        return jax.tree.map(jnp.zeros_like, leaf)

    def _factors(self, key: Array, path: str, site: Site) -> tuple[Array, Array]:
        """A and B of a leaf, without sigma, sign and rank."""
        stack, n_in, n_out = site.canonical_shape
        normal = jax.random.normal(paths.fold_path(key, path), (*stack, n_in + n_out, self.rank))
        return normal[..., :n_in, :], normal[..., n_in:, :].mT

    def _normal(self, key: Array, path: str, leaf: Any) -> Array:
        return jax.random.normal(paths.fold_path(key, path), leaf.shape)


def eggroll(
    params: PyTree,
    *,
    population: int,
    sigma: float,
    rank: int = 1,
    targets: Pattern | Sequence[Pattern] = ALL_LINEAR,
    whole: Pattern | Sequence[Pattern] = (),
    exclude: Pattern | Sequence[Pattern] = (),
    scale: str = "reference",
    shape: bool = True,
    groups: int = 0,
    fn: Callable | None = None,
    args: Sequence[Any] = (),
    usage: Mapping[str, Any] | None = None,
    axes: Mapping[Pattern, Axes] | None = None,
) -> EGGROLL:
    """A search for parameters by evolution with low-rank perturbations. The formula is at the top of this file.

    >>> search = jlora.evolve.eggroll(params, population=256, sigma=0.05, fn=model, args=(x,))
    >>> members = search.ask(key)
    >>> fitness = jax.vmap(lambda member: reward(jlora.lift(model)(search.perturb(params, member), x)))(members)
    >>> updates, state = tx.update(search.tell(members, fitness, params), state, params)

    Args:
      params: any tree of arrays, whole or ``adapted.trainable``, of which ``fn`` is the function. The factors of an
        adapter are matrices like others: lift the model with ``implementation="plain"`` inside of ``fn``, so that
        their products are seen; or name them in ``whole``.
      population: N, even.
      sigma: the size of a perturbation's entries.
      rank: r. 1 is enough as a rule: it is the number of members that counts.
      targets: which leaves are perturbed by pairs: see ``jlora.adapt``.
      whole: patterns of leaves that are perturbed in every entry, biases for one. An error if one matches nothing.
      scale: "reference", the authors', or "textbook".
      shape: subtract the mean fitness and divide by the standard deviation.
      groups: with it, the mean is that of each run of so many members (the deviation is still of all).
      exclude, fn, args, usage, axes: as for ``jlora.adapt``.
    """
    if not (isinstance(population, int) and population > 0 and population % 2 == 0):
        raise ValueError(
            f"eggroll(population={population!r}): members come in pairs, so a positive even number is wanted."
        )
    if not sigma > 0:
        raise ValueError(f"eggroll(sigma={sigma!r}): a positive number is wanted, 0.01 to 0.1 as a rule.")
    if scale not in ("reference", "textbook"):
        raise ValueError(f"eggroll(scale={scale!r}): 'reference' or 'textbook' is wanted.")
    if groups and population % groups:
        raise ValueError(f"eggroll(groups={groups}): a population of {population} does not divide by it.")
    method = LoRA(rank, alpha=float(rank))
    sites = plan(params, method, targets, exclude=exclude, fn=fn, args=args, usage=usage, axes=axes)
    leaves, _ = paths.flatten(params)
    stored = [path for path, leaf in leaves if path in sites and is_stored(leaf)]
    if stored:
        raise ValueError(f"{stored[0]!r} is quantized and cannot be moved: adapt it, and search adapted.trainable.")
    chosen = []
    for pattern in list(whole) if isinstance(whole, (list, tuple)) else [whole]:
        found = [path for path, leaf in leaves if paths.matches(pattern, path, leaf) and path not in sites]
        if not found:
            raise ValueError(f"whole: {paths.describe(pattern)} matches no leaf that targets leave over.")
        chosen += found
    return EGGROLL(population, sigma, rank, scale, shape, groups, tuple(sites.items()), tuple(dict.fromkeys(chosen)))


def shaped(fitness: Float[Array, " n"], groups: int = 0) -> Float[Array, " n"]:
    """The fitness less its mean, or the mean of its group, over the deviation of all."""
    mean = jnp.mean(fitness) if not groups else jnp.repeat(fitness.reshape(-1, groups).mean(1), groups)
    return (fitness - mean) / jnp.sqrt(jnp.var(fitness) + 1e-5)
