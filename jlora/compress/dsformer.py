r"""DSFormer: a weight as a small dense dictionary times a sparse matrix.

DSFormer: Effective Compression of Text-Transformers by Dense-Sparse Weight Factorization. Chand et al., 2023.
https://arxiv.org/abs/2312.13211

.. math::  W \approx D S, \qquad \| S_{:, o} \|_0 = t \ \text{ for every column } o

D [in, c] is dense; S [c, out] has t entries in every column, stored as values [t, out] and places [t, out]. Stored:
in c + t out numbers and t out small integers, for in out. With t = c it is a product of rank c; with less, every column
chooses its own t of the c directions, and D S may have the rank c all the same.

Trained by a straight-through factorization: a dense W is kept and updated, the model runs with D S of it, factorized
anew in every step from where the last one ended, and the gradient of D S goes to W as it is.

Verified from the abstract: the form and the straight-through factorization. How the paper factorizes is not known here;
this alternates two least-squares problems, over S with the places of the largest correlations (kept where they fit
better than the new ones) and over D, and neither step makes the error larger.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jlora.linalg import inverse


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DenseSparse:
    """D, and S by its entries.

    Attributes:
      d: the dictionary.
      values: the entries of every column of S.
      places: their rows.
    """

    d: Float[Array, "in c"]
    values: Float[Array, "t out"]
    places: Int[Array, "t out"]

    def sparse(self) -> Float[Array, "c out"]:
        """S, formed."""
        columns = jnp.arange(self.places.shape[1])
        return jnp.zeros((self.d.shape[1], len(columns)), self.values.dtype).at[self.places, columns].add(self.values)

    def product(self) -> Float[Array, "in out"]:
        return jnp.matmul(self.d, self.sparse(), precision=jax.lax.Precision.HIGHEST)

    def apply(self, x: Float[Array, "*n in"]) -> Float[Array, "*n out"]:
        """x D S, of which D S is not formed."""
        return (x @ self.d) @ self.sparse()


@functools.partial(jax.jit, static_argnames=("size", "entries"))
def dense_sparse(
    w: Float[Array, "in out"], size: int, entries: int, *, iterations: int = 10, start: DenseSparse | None = None
) -> DenseSparse:
    """A dictionary and sparse columns near ``w``.

    Args:
      size: c.
      entries: t, at most c.
      iterations: how often the two problems are solved.
      start: where to begin, of the same sizes; by default the leading singular vectors. In training, the last step's,
        and one iteration.
    """
    n_in, n_out = w.shape
    if not 1 <= entries <= size <= min(n_in, n_out):
        raise ValueError(
            f"dense_sparse(size={size}, entries={entries}) of {n_in} x {n_out}: 1 <= entries <= size <= "
            f"{min(n_in, n_out)} is wanted."
        )
    w = w.astype(jnp.promote_types(w.dtype, jnp.float32))
    with jax.default_matmul_precision("highest"):
        if start is None:
            d = jnp.linalg.svd(w, full_matrices=False)[0][:, :size]
            places = jax.lax.top_k(jnp.abs(d.T @ w).T, entries)[1].T
        else:
            d, places = start.d.astype(w.dtype), start.places
        step = lambda _, found: _columns(w, _dictionary(w, found))
        return jax.lax.fori_loop(0, iterations, step, _solved(w, d, places))


@jax.custom_jvp
def straight_through(w: Float[Array, "in out"], found: DenseSparse) -> Float[Array, "in out"]:
    """D S, whose gradient is ``w``'s as if it were ``w``."""
    return found.product().astype(w.dtype)


@straight_through.defjvp
def _straight_through_jvp(primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    return straight_through(*primals), tangents[0]


def _solved(w: Array, d: Array, places: Array) -> DenseSparse:
    """The best values at these places, for every column."""
    gram, right = d.T @ d, d.T @ w
    of_column = jnp.take_along_axis(right, places, axis=0).T
    of_pairs = gram[places.T[:, :, None], places.T[:, None, :]]
    floor = jnp.finfo(w.dtype).eps * jnp.max(jnp.abs(gram)) * jnp.eye(places.shape[0], dtype=w.dtype)
    values = jnp.einsum("oij,oj->io", inverse(of_pairs + floor), of_column)
    return DenseSparse(d, values, places)


def _columns(w: Array, found: DenseSparse) -> DenseSparse:
    """New places by the correlations with what is left of a column, where they fit better than the old ones."""
    d = found.d
    scores = jnp.abs(d.T @ (w - found.product()) + found.sparse() * jnp.sum(jnp.square(d), axis=0)[:, None])
    new = _solved(w, d, jax.lax.top_k(scores.T, len(found.places))[1].T)
    old = _solved(w, d, found.places)
    error = lambda each: jnp.sum(jnp.square(w - each.product()), axis=0)
    better = error(new) < error(old)
    return DenseSparse(d, jnp.where(better, new.values, old.values), jnp.where(better, new.places, old.places))


def _dictionary(w: Array, found: DenseSparse) -> DenseSparse:
    """The best dictionary for these columns."""
    s = found.sparse()
    d = jnp.linalg.lstsq(s.T, w.T)[0].T
    used = jnp.any(s != 0, axis=1)
    return dataclasses.replace(found, d=jnp.where(used, d, found.d))
