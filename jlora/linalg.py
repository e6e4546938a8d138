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
    ``4 (iterations + 1) m n (rank + 10)`` FLOPs. Signs are those of ``fixed_signs``.
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
    return fixed_signs(u[:, :rank], s[:rank], vh[:rank])


def fixed_signs(
    u: Float[Array, "m k"], s: Float[Array, " k"], vh: Float[Array, "k n"]
) -> tuple[Float[Array, "m k"], Float[Array, " k"], Float[Array, "k n"]]:
    """Singular triples with the largest entry of every column of u positive: then they do not depend on the platform's
    choice of signs."""
    largest = jnp.take_along_axis(u, jnp.argmax(jnp.abs(u), axis=0)[None], axis=0)[0]
    sign = jnp.where(largest < 0, -1.0, 1.0).astype(u.dtype)
    return u * sign, s, vh * sign[:, None]


@jax.custom_jvp
def inverse(m: Float[Array, "*n k k"]) -> Float[Array, "*n k k"]:
    """Of small matrices that need no pivoting: positive definite ones, symmetric or not (I + a skew matrix, say), and
    triangular ones. Gauss-Jordan elimination, all matrices together.

    In the place of ``jnp.linalg.inv``, whose batched triangular solves can wait for each other without end on CPU, when
    a program has several of them (jaxlib 0.10.2, two cores: fourteen of 8 x 32 x 32 do each time).
    """

    def eliminate(i: Array, m: Array) -> Array:
        unit = jnp.arange(m.shape[-1]) == i
        column, row = m[..., :, i], m[..., i, :]
        pivot = row[..., i, None]
        rest = jnp.where(unit | unit[:, None], 0, m)
        return rest + jnp.where(unit, 1, -column)[..., None] * (jnp.where(unit, 1, row) / pivot)[..., None, :]

    return jax.lax.fori_loop(0, m.shape[-1], eliminate, m)


@inverse.defjvp
def _inverse_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    inverted = inverse(*primals)
    return inverted, -(inverted @ tangents[0] @ inverted)
