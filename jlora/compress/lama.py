r"""LAMA: attention over a text by a low-rank form for every head, linear in its length.

Low Rank Factorization for Compact Multi-Head Self-Attention. Mehta et al., 2019. https://arxiv.org/abs/1912.00835

.. math::  F_{m t} = \tanh\bigl( (c P)_m\, (h_t Q)_m \bigr), \qquad
           a_{m t} = \mathrm{softmax}_t F_{m t}, \qquad y_m = \sum_t a_{m t} h_t

h_t [d] are the states of T tokens, c [d'] a vector of the whole text (learned, or a last state), P [d', M] and Q [d, M]
the weights of M heads. Head m scores a token by c^T (p_m q_m^T) h_t, a bilinear form of rank 1 in the place of a full
matrix [d', d]: M (d + d') parameters for M d d', and T M d products, with no T x T anywhere. The heads' results y_m [d]
go on side by side.

Verified from the abstract: the low-rank factorization of the affinities and the query by one vector. Where the tanh is,
and whether F is normalized before the softmax, is from memory and unverified.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def lowrank_pooling(
    h: Float[Array, "*batch T d"],
    c: Float[Array, "*#batch e"],
    p: Float[Array, "e heads"],
    q: Float[Array, "d heads"],
    *,
    where: Bool[Array, "*batch T"] | None = None,
) -> Float[Array, "*batch heads d"]:
    """A text as one weighted mean of its states a head.

    Args:
      h, c, p, q: states, the vector of the whole, and the two weights.
      where: the tokens that there are; padding is False, and at least one of each text is True.
    """
    if h.shape[-1] != q.shape[0] or c.shape[-1] != p.shape[0] or p.shape[1] != q.shape[1]:
        raise ValueError(
            f"States [..., T, d], a vector [..., e] and weights [e, heads] and [d, heads] are wanted; got {h.shape}, "
            f"{c.shape}, {p.shape} and {q.shape}."
        )
    scores = jnp.tanh((c @ p)[..., None, :] * (h @ q))
    if where is not None:
        scores = jnp.where(where[..., None], scores, -jnp.inf)
    return jnp.einsum("...tm,...td->...md", jax.nn.softmax(scores, axis=-2), h)
