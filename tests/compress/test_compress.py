"""DSFormer, LR2VQ and LAMA against NumPy and loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora import compress

pytestmark = pytest.mark.usefixtures("x64")


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


def best(w: np.ndarray, rank: int) -> np.ndarray:
    u, s, vh = np.linalg.svd(w, full_matrices=False)
    return u[:, :rank] * s[:rank] @ vh[:rank]


# DSFormer.


def test_dense_sparse():
    w = normal(0, 14, 18)
    error = lambda found: float(jnp.sum((found.product() - w) ** 2))
    whole = compress.dense_sparse(w, 5, 5)
    np.testing.assert_allclose(whole.product(), best(w, 5), atol=1e-8)  # the special case of low rank
    errors = [error(compress.dense_sparse(w, 5, t)) for t in (1, 2, 5)]
    assert errors == sorted(errors, reverse=True) and errors[0] < float(np.sum(w**2))
    found, last = compress.dense_sparse(w, 5, 2, iterations=0), np.inf
    for _ in range(4):  # warm starts go on, and never back
        assert error(found) <= last + 1e-9
        last, found = error(found), compress.dense_sparse(w, 5, 2, iterations=1, start=found)
    # Every column's values are the least-squares ones for its places.
    for o in range(18):
        assert len(set(np.asarray(found.places[:, o]))) == 2
        wanted = np.linalg.lstsq(np.asarray(found.d)[:, found.places[:, o]], w[:, o], rcond=None)[0]
        np.testing.assert_allclose(found.values[:, o], wanted, atol=1e-6)
    assert np.count_nonzero(found.sparse()) == 36
    x = normal(1, 3, 14)
    np.testing.assert_allclose(found.apply(x), x @ found.product(), atol=1e-12)


def test_beats_a_product_of_the_same_size():
    """Of columns that are sparse in a dictionary of 8, two entries each: 24 x 8 + 2 x 40 numbers find them; a product
    of rank 4, with 4 x 64, does not."""
    rng = np.random.default_rng(2)
    s = np.zeros((8, 40))
    for o in range(40):
        s[rng.choice(8, 2, replace=False), o] = rng.choice([-1, 1], 2) * rng.uniform(1, 2, 2)
    w = normal(3, 24, 8) @ s
    found = compress.dense_sparse(w, 8, 2, iterations=60)
    assert float(jnp.sum((found.product() - w) ** 2)) < 0.7 * float(np.sum((best(w, 4) - w) ** 2))


def test_straight_through():
    w, g = jnp.asarray(normal(4, 6, 7)), normal(5, 6, 7)
    found = compress.dense_sparse(w, 3, 2)
    value, grad = jax.value_and_grad(lambda w: jnp.sum(jnp.sin(compress.straight_through(w, found)) * g))(w)
    assert value == pytest.approx(float(jnp.sum(jnp.sin(found.product()) * g)))
    np.testing.assert_allclose(grad, np.cos(found.product()) * g, atol=1e-12)
    with pytest.raises(ValueError, match="1 <= entries <= size <= 6"):
        compress.dense_sparse(w, 3, 4)


# LR2VQ.


def test_codes():
    w, key = normal(6, 12, 20), jax.random.key(0)
    vectors = w.reshape(60, 4)
    every = compress.low_rank_codes(w, length=4, dim=2, codes=60, key=key)
    np.testing.assert_allclose(every.product().reshape(60, 4), best(vectors, 2), atol=1e-9)  # low rank alone
    plain = compress.low_rank_codes(w, length=4, dim=4, codes=7, key=key, iterations=100)
    centres = plain.codebook @ plain.lift  # in the space of the vectors: k-means of these, at rest
    at = np.array([np.argmin(((v - centres) ** 2).sum(1)) for v in vectors])
    np.testing.assert_array_equal(at, plain.codes)
    for k in range(7):
        np.testing.assert_allclose(vectors[at == k].mean(0), centres[k], atol=1e-9)
    error = lambda codes: float(
        np.sum((compress.low_rank_codes(w, length=4, dim=2, codes=codes, key=key).product() - w) ** 2)
    )
    assert error(60) < error(15) < error(2)
    with pytest.raises(ValueError, match="a length that divides the outputs, 1 <= dim"):
        compress.low_rank_codes(w, length=3, dim=2, codes=4, key=key)


def test_nearest():
    z, codebook, g = jnp.asarray(normal(7, 5, 2)), jnp.asarray(normal(8, 3, 2)), normal(9, 5, 2)
    got, back = jax.vjp(lambda z, c: compress.nearest(z, c, 0.5), z, codebook)
    np.testing.assert_allclose(got, [min(codebook, key=lambda c: float(jnp.sum((c - v) ** 2))) for v in z], atol=1e-12)

    def soft(z, c):
        weights = jnp.exp(-jnp.sum((z[:, None] - c) ** 2, -1) / 0.5)
        return weights / weights.sum(1, keepdims=True) @ c

    for grad, wanted in zip(back(jnp.asarray(g)), jax.vjp(soft, z, codebook)[1](jnp.asarray(g)), strict=True):
        np.testing.assert_allclose(grad, wanted, atol=1e-10)


# LAMA.


def test_lowrank_pooling():
    h, c, p, q = normal(10, 2, 7, 6), normal(11, 2, 5), normal(12, 5, 3), normal(13, 6, 3)
    where = np.arange(7) < np.array([[7], [4]])
    got = compress.lowrank_pooling(h, c, p, q, where=where)
    assert got.shape == (2, 3, 6)
    for b, length in enumerate((7, 4)):
        for m in range(3):
            scores = np.array([np.tanh(c[b] @ np.outer(p[:, m], q[:, m]) @ h[b, t]) for t in range(length)])
            weights = np.exp(scores) / np.exp(scores).sum()
            np.testing.assert_allclose(got[b, m], weights @ h[b, :length], atol=1e-12)
    order = np.random.default_rng(0).permutation(7)
    np.testing.assert_allclose(compress.lowrank_pooling(h[:, order], c, p, q, where=where[:, order]), got, atol=1e-12)
    one = compress.lowrank_pooling(h, c, p[:, 1:2], q[:, 1:2], where=where)
    np.testing.assert_allclose(one[:, 0], got[:, 1], atol=1e-12)  # heads do not see each other
    with pytest.raises(ValueError, match=r"weights \[e, heads\]"):
        compress.lowrank_pooling(h, c, p.T, q)
