"""Linear algebra that several rooms need, at the highest matmul precision and in at least float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray


def truncated_svd(
    w: Float[Array, "m n"], rank: int, *, key: PRNGKeyArray | None = None, iterations: int = 10
) -> tuple[Float[Array, "m rank"], Float[Array, " rank"], Float[Array, "rank n"]]:
    """The leading singular triples, ``w ~ u @ diag(s) @ vh``.

    Small matrices, and those of which much is wanted, are decomposed exactly. Others by subspace iteration from a
    random start (Halko, Martinsson and Tropp, 2009, https://arxiv.org/abs/0909.4061), which costs
    ``4 (iterations + 1) m n (rank + 10)`` FLOPs. The largest entry of every column of u is made positive: then the
    triples do not depend on the platform's choice of signs.
    """
    w = w.astype(jnp.promote_types(w.dtype, jnp.float32))
    width = rank + 10
    with jax.default_matmul_precision("highest"):
        if min(w.shape) <= 4 * width:
            u, s, vh = jnp.linalg.svd(w, full_matrices=False)
        else:
            key = jax.random.key(0) if key is None else key
            q = jnp.linalg.qr(w @ jax.random.normal(key, (w.shape[1], width), w.dtype))[0]
            for _ in range(iterations):
                q = jnp.linalg.qr(w @ jnp.linalg.qr(w.T @ q)[0])[0]
            u, s, vh = jnp.linalg.svd(q.T @ w, full_matrices=False)
            u = q @ u
    u, s, vh = u[:, :rank], s[:rank], vh[:rank]
    largest = jnp.take_along_axis(u, jnp.argmax(jnp.abs(u), axis=0)[None], axis=0)[0]
    sign = jnp.where(largest < 0, -1.0, 1.0).astype(w.dtype)
    return u * sign, s, vh * sign[:, None]
