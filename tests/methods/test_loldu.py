"""LoLDU against an LU decomposition written out in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora

pytestmark = pytest.mark.usefixtures("x64")

RANDOM = np.random.default_rng(0)


def ldu(m: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(P L, D, U) of Gaussian elimination with row pivoting, the diagonals of L and U ones."""
    u, k = m.copy(), min(m.shape)
    lower, order = np.zeros((m.shape[0], k)), np.arange(m.shape[0])
    for j in range(k):
        pivot = j + np.argmax(np.abs(u[j:, j]))
        for array in (u, lower, order):
            array[[j, pivot]] = array[[pivot, j]]
        lower[j, j] = 1.0
        lower[j + 1 :, j] = u[j + 1 :, j] / u[j, j]
        u[j + 1 :] -= np.outer(lower[j + 1 :, j], u[j])
    d = np.diag(u[:k]).copy()
    placed = np.zeros_like(lower)
    placed[order] = lower
    return placed, d, u[:k] / d[:, None]


@pytest.mark.parametrize("shape", [(7, 5), (5, 7)])
@pytest.mark.parametrize("rank", [2, 5])
def test_formula(shape, rank) -> None:
    w = RANDOM.normal(size=shape)
    lower, d, upper = ldu(w.T)
    np.testing.assert_allclose(lower @ np.diag(d) @ upper, w.T, atol=1e-12)
    adapted = jlora.adapt({"kernel": jnp.asarray(w)}, jlora.LoLDU(rank, alpha=3.0), key=jax.random.key(0))
    a, b = upper[:rank].T, lower[:, :rank].T
    np.testing.assert_allclose(adapted.frozen["kernel"]["a"], a, atol=1e-12)
    np.testing.assert_allclose(adapted.frozen["kernel"]["b"], b, atol=1e-12)
    np.testing.assert_allclose(adapted.trainable["kernel"]["z"], d[:rank], atol=1e-12)
    z = RANDOM.normal(size=rank)
    moved = jlora.merge(adapted.replace(trainable={"kernel": {"z": jnp.asarray(z)}}))["kernel"]
    scale = 3.0 / rank
    residual = w - scale * a @ np.diag(d[:rank]) @ b  # the authors' form: a residual base
    np.testing.assert_allclose(moved, residual + scale * a @ np.diag(z) @ b, atol=1e-12)


def test_whole_rank_at_scale_one_holds_the_weight() -> None:
    """A diag(z0) B is all of W, so z = 0 takes the weight away."""
    w = RANDOM.normal(size=(6, 6))
    adapted = jlora.adapt({"kernel": jnp.asarray(w)}, jlora.LoLDU(6, alpha=6.0), key=jax.random.key(0))
    nothing = jlora.merge(adapted.replace(trainable={"kernel": {"z": jnp.zeros(6)}}))["kernel"]
    np.testing.assert_allclose(nothing, 0.0, atol=1e-12)


def test_zero_pivots() -> None:
    """A weight of low rank has pivots of zero; nothing is divided by them."""
    for w in (np.zeros((4, 4)), np.ones((4, 4)), np.diag([1.0, 0.0, 2.0, 0.0])):
        adapted = jlora.adapt({"kernel": jnp.asarray(w)}, jlora.LoLDU(4), key=jax.random.key(0))
        assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(adapted))
        np.testing.assert_array_equal(jlora.merge(adapted)["kernel"], w)
