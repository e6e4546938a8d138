"""Linear algebra that several rooms need, at the highest matmul precision and in at least float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray


@jax.custom_batching.custom_vmap
def _qr(w: Float[Array, "m n"]) -> tuple[Float[Array, "m k"], Float[Array, "k n"]]:
    return tuple(jnp.linalg.qr(w))


@_qr.def_vmap
def _qr_of_many(size: int, batched: list[bool], w: Float[Array, "b m n"]) -> tuple[tuple[Array, Array], tuple]:
    # `_qr`, so that what is mapped again from outside is not a stack inside the loop.
    one_by_one = lambda w: jax.lax.map(_qr, w)
    out = jax.lax.platform_dependent(w, cpu=one_by_one, default=lambda w: tuple(jnp.linalg.qr(w)))
    return out, (True, True)


def qr(w: Float[Array, "*n m p"]) -> tuple[Float[Array, "*n m k"], Float[Array, "*n k p"]]:
    """Q and R of each matrix, k the smaller of m and p. Without derivatives in reverse.

    In the place of ``jnp.linalg.qr``, whose decompositions of stacks can wait for each other without end on CPU when a
    program has several: each holds a thread until others have done its parts (jaxlib 0.10.2, two cores: eight of
    8 x 512 x 64 do each time). So there the matrices of a stack are decomposed one after the other.
    """
    fn = _qr
    for _ in range(w.ndim - 2):
        fn = jax.vmap(fn)
    return fn(w)


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
            q = qr(w @ jax.random.normal(key, (w.shape[1], width), w.dtype))[0]
            for _ in range(iterations):
                q = qr(w @ qr(w.T @ q)[0])[0]
            u, s, vh = jnp.linalg.svd(q.T @ w, full_matrices=False)
            u = q @ u
    return fixed_signs(u[:, :rank], s[:rank], vh[:rank])


@jax.jit
def factor_svd(
    a: Float[Array, "*n m r"], b: Float[Array, "*n r p"]
) -> tuple[Float[Array, "*n m k"], Float[Array, "*n k"], Float[Array, "*n k p"]]:
    """All singular triples of ``a @ b``, which is not formed: of the core ``R_a R_b^T`` for ``a = Q_a R_a`` and
    ``b^T = Q_b R_b``, in O((m + p) r^2). k is the smallest of m, r and p. Signs are those of ``fixed_signs``."""
    dtype = jnp.promote_types(jnp.result_type(a, b), jnp.float32)
    with jax.default_matmul_precision("highest"):
        qa, ra = qr(a.astype(dtype))
        qb, rb = qr(b.astype(dtype).mT)
        u, s, vh = jnp.linalg.svd(ra @ rb.mT, full_matrices=False)
        return fixed_signs(qa @ u, s, vh @ qb.mT)


def fixed_signs(
    u: Float[Array, "*n m k"], s: Float[Array, "*n k"], vh: Float[Array, "*n k p"]
) -> tuple[Float[Array, "*n m k"], Float[Array, "*n k"], Float[Array, "*n k p"]]:
    """Singular triples with the largest entry of every column of u positive: then they do not depend on the platform's
    choice of signs."""
    largest = jnp.take_along_axis(u, jnp.argmax(jnp.abs(u), axis=-2, keepdims=True), axis=-2)
    sign = jnp.where(largest < 0, -1.0, 1.0).astype(u.dtype)
    return u * sign, s, vh * sign.mT


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


def rank_from_spectrum(s: Float[np.ndarray, " k"], energy: float | None = 0.95, *, elbow: bool = False) -> int:
    """How many singular values are worth keeping, on the host; at least one.

    >>> rank_from_spectrum(np.array([3.0, 1.0, 0.1]), energy=0.9)
    1

    Args:
      s: singular values, descending.
      energy: the fewest that hold this share of the sum of all squares; None for no such limit.
      elbow: no more than those before the point farthest below the line from the first value to the last.
    """
    s = np.asarray(s, np.float64)
    if s.ndim != 1 or not s.size or not np.all(np.isfinite(s)) or np.any(np.diff(s) > 0) or s[-1] < 0:
        raise ValueError("rank_from_spectrum wants singular values: finite, not negative, in descending order.")
    if energy is not None and not 0.0 < energy <= 1.0:
        raise ValueError(f"rank_from_spectrum(energy={energy}): a share in (0, 1] is wanted, 0.9 to 0.99 as a rule.")
    total, rank = np.cumsum(np.square(s)), len(s)
    if energy is not None:
        rank = int(np.searchsorted(total, energy * total[-1] * (1 - 1e-12))) + 1
    if elbow:
        rank = min(rank, int(np.argmax(np.linspace(s[0], s[-1], len(s)) - s)))
    return max(rank, 1)
