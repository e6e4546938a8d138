"""Super-Tuning: which entries it takes, and what becomes of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora

pytestmark = pytest.mark.usefixtures("x64")
RNG = np.random.default_rng(0)
W = RNG.normal(size=(6, 5))


@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("rank", [0, 2])
def test_is_the_formula(largest, rank) -> None:
    method = jlora.SuperTuning(0.7, largest=largest, rank=rank, alpha=3.0)
    it = jlora.adapt({"w": jnp.asarray(W)}, method, "w", key=jax.random.key(0))
    np.testing.assert_allclose(jlora.merge(it)["w"], W)
    it = it.replace(trainable=jax.tree.map(lambda leaf: jnp.asarray(RNG.normal(size=leaf.shape)), it.trainable))
    own = it.trainable["w"]
    order = np.argsort(np.abs(W).ravel())
    chosen = np.sort(order[-9:] if largest else order[:9])  # 9 = floor(30 * 0.3), in the order of the weight
    delta = np.zeros(W.size)
    delta[chosen] = own["values"]
    delta = delta.reshape(W.shape)
    if rank:
        delta += 1.5 * np.asarray(own["factors"].a @ own["factors"].b)
    np.testing.assert_allclose(jlora.merge(it)["w"], W + delta, atol=1e-12)


def test_places_are_kept() -> None:
    """A trained entry that falls below the others still is the one that is trained."""
    it = jlora.adapt({"w": jnp.asarray(W)}, jlora.SuperTuning(0.96), "w", key=jax.random.key(0))
    at = np.unravel_index(np.abs(W).argmax(), W.shape)
    wanted = W.copy()
    wanted[at] = 0.0
    it = it.replace(trainable={"w": {"values": jnp.asarray(-W[at])[None]}})
    np.testing.assert_allclose(jlora.merge(it)["w"], wanted, atol=1e-15)


def test_nothing_to_train() -> None:
    with pytest.raises(ValueError, match="at most 0.96"):
        jlora.adapt({"w": jnp.asarray(W)}, jlora.SuperTuning(0.99), "w", key=jax.random.key(0))
