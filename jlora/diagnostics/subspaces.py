r"""How much of a subspace two adapters share.

LoRA: Low-Rank Adaptation of Large Language Models, section 7.2. Hu et al., 2021. https://arxiv.org/abs/2106.09685

.. math::  \phi(i, j) = \frac{\| U_{:i}^\top V_{:j} \|_F^2}{\min(i, j)} \in [0, 1]

U [n, k] and V [n, l] have orthonormal columns, the strongest direction first; phi(i, j) is 1 where the smaller of the
two leading subspaces lies within the other, and 0 where they are orthogonal. Two subspaces at random in n dimensions
have ij / n to be expected of the squared norm: phi is then max(i, j) / n, and only what is above it means something.

The paper compares the A's of two adapters ("a"). A pair (A M, M^{-1} B) is the same change of the weight, so what an
adapter does is in the singular vectors of its product: "in" and "out", the directions it reads and those it writes.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jlora.factors import Factors
from jlora.linalg import factor_svd, fixed_signs

SIDES = ("in", "out", "a", "b")


def directions(change: Factors | Float[Array, "*stack in out"], of: str = "in") -> Float[Array, "*stack n k"]:
    """Singular vectors of a change of weights, as columns, the strongest first.

    Args:
      change: a pair, or a matrix.
      of: "in" and "out": of the change, on the side of the inputs, n = in, or of the outputs, n = out; "a" and "b": of
        a pair's A or B alone.
    """
    if of not in SIDES:
        raise ValueError(f"directions(of={of!r}): one of {', '.join(map(repr, SIDES))} is wanted.")
    if of in ("a", "b"):
        if not isinstance(change, Factors):
            raise ValueError(f"directions(of={of!r}) are those of a factor, and a {type(change).__name__} has none.")
        u, _, vh = _svd(change.a if of == "a" else change.b)
        return u if of == "a" else vh.mT
    u, _, vh = factor_svd(change.a, change.b) if isinstance(change, Factors) else _svd(jnp.asarray(change))
    return u if of == "in" else vh.mT


def subspace_similarity(u: Float[Array, "*stack n k"], v: Float[Array, "*stack n l"]) -> Float[Array, "*stack k l"]:
    """phi of every two leading subspaces: entry [i - 1, j - 1] is phi(i, j).

    >>> phi = subspace_similarity(directions(first), directions(second))
    >>> phi[-1, -1]  # of the whole of the two adapters
    """
    u, v = jnp.asarray(u), jnp.asarray(v)
    if u.shape[:-1] != v.shape[:-1] or u.ndim < 2:
        raise ValueError(
            f"The directions are columns of {u.shape} and of {v.shape}: the same stack and number of features are "
            "wanted. Are they of the same leaf and the same side?"
        )
    for name, each in (("first", u), ("second", v)):
        _check_orthonormal(name, each)
    return _phi(u, v)


@jax.jit
def _phi(u: Array, v: Array) -> Array:
    overlap = jnp.square(jnp.matmul(u.mT, v, precision=jax.lax.Precision.HIGHEST))
    i, j = (jnp.arange(1, each.shape[-1] + 1) for each in (u, v))
    return jnp.cumsum(jnp.cumsum(overlap, axis=-2), axis=-1) / jnp.minimum(i[:, None], j)


def _svd(w: Array) -> tuple[Array, Array, Array]:
    return fixed_signs(*jnp.linalg.svd(w.astype(jnp.promote_types(w.dtype, jnp.float32)), full_matrices=False))


def _check_orthonormal(name: str, u: Array) -> None:
    if isinstance(u, jax.core.Tracer):
        return
    gram = jnp.matmul(u.mT, u, precision=jax.lax.Precision.HIGHEST)
    worst = float(jnp.max(jnp.abs(gram - jnp.eye(u.shape[-1])), initial=0.0))
    if not worst < 1e-3:
        raise ValueError(
            f"The columns of the {name} are no orthonormal directions (off by {worst:.2g}): directions(pair) gives "
            "those of an adapter, jnp.linalg.qr(m)[0] those of any matrix m."
        )
