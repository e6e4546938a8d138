"""Tied-LoRA, NOLA, MoS and Uni-LoRA against their formulas in numpy, and what their papers promise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from jlora.methods.nola import random_matrix

pytestmark = pytest.mark.usefixtures("x64")
AXES = {"w": jlora.Axes((1,), (2,), (0,))}


def merged(method, layers=3, n_in=8, n_out=4):
    """(adapted with all trainables moved, its change of the weights [layers, in, out])."""
    params = {"w": jnp.zeros((layers, n_in, n_out))}
    adapted = jlora.adapt(params, method, "w", axes=AXES, key=jax.random.key(0))
    rng = np.random.default_rng(1)
    adapted = adapted.replace(trainable=jax.tree.map(lambda t: t + rng.normal(size=t.shape), adapted.trainable))
    return adapted, np.asarray(jlora.merge(adapted)["w"])


def test_tied_is_one_pair_with_two_vectors_a_layer() -> None:
    adapted, delta = merged(jlora.TiedLoRA(2, alpha=3.0))
    own, shared = adapted.trainable["w"], adapted.trainable["tied_lora"]
    a, b = np.asarray(shared["a"]["8x4"]), np.asarray(shared["b"]["8x4"])
    wanted = 1.5 * np.einsum("ir,lr,ro,lo->lio", a, own["u"], b, own["v"])
    np.testing.assert_allclose(delta, wanted, atol=1e-12)


def test_nola_is_a_combination_of_matrices_that_are_not_kept() -> None:
    adapted, delta = merged(jlora.NOLA(2, alpha=3.0, terms=5))
    own, seeds = adapted.trainable["w"], adapted.frozen["w"]["seed"]
    assert sum(leaf.size for leaf in jax.tree.leaves(adapted.frozen)) == 3 * 4
    for layer in range(3):
        draw = lambda side, i, shape, at=seeds[layer]: np.asarray(random_matrix(at[side], i, shape), np.float64)
        a = draw(0, 5, (8, 2)) / 8**0.5 + sum(own["a"][layer, i] * draw(0, i, (8, 2)) for i in range(5)) / 5**0.5
        b = sum(own["b"][layer, i] * draw(1, i, (2, 4)) for i in range(5)) / 5**0.5
        np.testing.assert_allclose(delta[layer], 1.5 * np.asarray(a) @ np.asarray(b), atol=1e-12)


def test_mos_gathers_shards() -> None:
    adapted, delta = merged(jlora.MoS(4, alpha=6.0, budget=2, shards=2, private=1))
    pool, places = adapted.trainable["mos"]["8x4"], jax.tree.map(np.asarray, adapted.frozen["w"])
    assert pool["a"].shape == (12, 4) and pool["b"].shape == (12, 2)  # as LoRA of rank 2 in three layers
    for name in "ab":
        public, private = places[name][:, :3].reshape(3, 6), places[name][:, 3]
        assert (public < 6).all() and all(len(set(row)) == 6 for row in public)
        np.testing.assert_array_equal(private, 6 + np.arange(6).reshape(3, 2))
    for layer in range(3):
        a, b = (np.asarray(pool[name])[places[name][layer]].reshape(4, -1) for name in "ab")
        np.testing.assert_allclose(delta[layer], 1.5 * a.T @ b, atol=1e-12)
    with pytest.raises(ValueError, match="a rank of at most 4"):
        merged(jlora.MoS(5, budget=2, shards=2, private=1))


def test_unilora_is_an_isometry() -> None:
    adapted, _ = merged(jlora.UniLoRA(2, length=7))
    theta, scale = (np.asarray(p["unilora"][n]) for p, n in ((adapted.trainable, "theta"), (adapted.frozen, "scale")))
    places = np.concatenate([np.asarray(p).ravel() for p in adapted.frozen["w"].values()])
    assert np.ptp(np.bincount(places)) <= 1 and places.size == 3 * 2 * 12
    np.testing.assert_allclose(np.linalg.norm((theta * scale)[places]), np.linalg.norm(theta), rtol=1e-12)
