"""SHiRA: its places, and that nothing else of the weight changes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from jlora.methods.shira import places

W = jnp.asarray(np.random.default_rng(0).normal(size=(12, 20)))


def adapted(rank: int = 3) -> jlora.Adapted:
    return jlora.adapt({"w": W}, jlora.SHiRA(rank), "w", key=jax.random.key(0))


def test_places_are_different_and_in_order():
    rows, columns = np.asarray(adapted().frozen["w"]["places"])
    flat = rows * 20 + columns
    assert len(flat) == 3 * 32 and np.all(np.diff(flat) > 0) and flat.min() >= 0 and flat.max() < 240


def test_only_the_places_change():
    it = adapted()
    it = it.replace(trainable={"w": {"values": 1.0 + jnp.arange(96.0)}})
    rows, columns = np.asarray(it.frozen["w"]["places"])
    wanted = np.asarray(W).copy()
    wanted[rows, columns] += 1.0 + np.arange(96.0)
    np.testing.assert_allclose(jlora.merge(it)["w"], wanted, rtol=1e-6)


def test_a_mask_of_ones_own():
    mask = jnp.abs(W) >= jnp.sort(jnp.abs(W).ravel())[-90]
    at = places(mask, 96)  # of 96, six are nowhere
    it = adapted().replace(frozen={"w": {"places": at}}, trainable={"w": {"values": jnp.ones(96)}})
    np.testing.assert_allclose(jlora.merge(it)["w"], W + mask, rtol=1e-6)


def test_too_many_places():
    with pytest.raises(ValueError, match="choose a rank of at most 7"):
        adapted(8)
