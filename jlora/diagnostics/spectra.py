r"""How many directions a matrix uses, from its singular values s_1 >= s_2 >= ..., and what an adapter is worth at
several ranks.

.. math::  \text{effective}_p = \exp\Bigl(-\sum_i q_i \ln q_i\Bigr),\; q_i = \frac{s_i^p}{\sum_j s_j^p}; \qquad
           \text{stable} = \frac{\sum_i s_i^2}{s_1^2}; \qquad
           \text{nuclear} = \frac{(\sum_i s_i)^2}{\sum_i s_i^2}

The energy rank is the smallest k of which s_1^2 + ... + s_k^2 is the share tau of all squares. Effective rank with
p = 1: Roy and Vetterli, 2007, The effective rank: a measure of effective dimensionality; some papers take p = 2. All
are 1 for a matrix of rank 1, k where k singular values are equal and the others zero, 0 for a matrix of zeros, and do
not change when the matrix is scaled; 1 <= stable <= effective_2 <= rank.

The area under the rank-accuracy curve (AURAC): MatryoshkaLoRA, Modoranu, Safaryan and Alistarh, 2026,
https://arxiv.org/abs/2605.07850.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jlora.factors import Factors
from jlora.linalg import factor_svd


def singular_values(change: Factors | Float[Array, "*stack in out"]) -> Float[Array, "*stack k"]:
    """In descending order. Those of a pair are found without its product: k is then at most the pair's rank."""
    if isinstance(change, Factors):
        return abs(change.scale) * factor_svd(change.a, change.b)[1]
    change = jnp.asarray(change)
    return jnp.linalg.svd(change.astype(jnp.promote_types(change.dtype, jnp.float32)), compute_uv=False)


def effective_rank(s: Float[Array, "*stack k"], power: int = 1) -> Float[Array, "*stack"]:
    """The exponential of the entropy of the singular values to this power, as shares."""
    s = _checked(s) ** power
    total = jnp.sum(s, axis=-1)
    shares = s / jnp.where(total > 0, total, 1)[..., None]
    return jnp.where(total > 0, jnp.exp(jnp.sum(jax.scipy.special.entr(shares), axis=-1)), 0)


def stable_rank(s: Float[Array, "*stack k"]) -> Float[Array, "*stack"]:
    """The squared Frobenius norm over the squared spectral norm."""
    return _ratio(jnp.sum(jnp.square(_checked(s)), axis=-1), jnp.square(jnp.max(s, axis=-1)))


def nuclear_rank(s: Float[Array, "*stack k"]) -> Float[Array, "*stack"]:
    """The squared nuclear norm over the squared Frobenius norm."""
    return _ratio(jnp.square(jnp.sum(_checked(s), axis=-1)), jnp.sum(jnp.square(s), axis=-1))


def energy_rank(s: Float[Array, "*stack k"], share: float = 0.9) -> Int[Array, "*stack"]:
    """The smallest k whose best approximation has this share of the squared Frobenius norm."""
    if not 0.0 < share <= 1.0:
        raise ValueError(f"energy_rank(share={share}): a share above 0 and up to 1 is wanted, 0.9 as a rule.")
    energy = jnp.cumsum(jnp.square(-jnp.sort(-_checked(s), axis=-1)), axis=-1)
    total = energy[..., -1]
    return jnp.where(total > 0, 1 + jnp.sum(energy < share * total[..., None], axis=-1), 0)


def aurac(accuracies: Sequence[float], ranks: Sequence[float], *, log: bool = True) -> float:
    """Area under the rank-accuracy curve: the mean accuracy over the ranks, by trapezoids over log2 of the rank (the
    authors' second version) or over the rank itself."""
    accuracies, at = np.asarray(accuracies, np.float64), np.asarray(ranks, np.float64)
    if accuracies.shape != at.shape or at.ndim != 1 or not at.size:
        raise ValueError(f"aurac wants one accuracy a rank; got {accuracies.shape} accuracies and {at.shape} ranks.")
    if np.any(at <= 0) or np.any(np.diff(at) <= 0):
        raise ValueError(f"aurac wants positive ranks, each once and rising; got {list(ranks)}.")
    if not np.all(np.isfinite(accuracies)):
        raise ValueError(f"aurac: of the accuracies {accuracies} some are not finite.")
    if at.size == 1:
        return float(accuracies[0])
    at = np.log2(at) if log else at
    return float(np.trapezoid(accuracies, at) / (at[-1] - at[0]))


def _ratio(over: Array, under: Array) -> Array:
    return jnp.where(under > 0, over / jnp.where(under > 0, under, 1), 0)


def _checked(s: Array) -> Array:
    """``s``, of which every number is one that a singular value can be; inside of ``jit`` nobody can look."""
    s = jnp.asarray(s)
    if s.ndim == 0 or s.shape[-1] == 0:
        raise ValueError(f"singular values are wanted along the last axis, at least one; got the shape {s.shape}.")
    if not isinstance(s, jax.core.Tracer):
        numbers = np.asarray(s)
        bad = numbers[~(np.isfinite(numbers) & (numbers >= 0))]
        if bad.size:
            raise ValueError(
                f"{bad.size} of {numbers.size} singular values are negative or not finite, {bad.flat[0]} for one: has "
                "the training diverged? singular_values(change) gives them of a pair or a matrix."
            )
    return s
