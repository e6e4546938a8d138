"""PVeRA: the mean and the covariance of what it draws, against the formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora

pytestmark = pytest.mark.usefixtures("x64")
RNG = np.random.default_rng(0)
W, X = RNG.normal(size=(6, 4)), RNG.normal(size=(3, 6))
apply = jlora.lift(lambda params, x: x @ params["w"], on_materialize="error")


@pytest.fixture
def it() -> jlora.Adapted:
    it = jlora.adapt({"w": jnp.asarray(W)}, jlora.PVeRA(3), "w", key=jax.random.key(0))
    return it.replace(trainable=jax.tree.map(lambda leaf: jnp.asarray(RNG.normal(size=leaf.shape)), it.trainable))


def pieces(it: jlora.Adapted) -> tuple[np.ndarray, ...]:
    """Mean [batch, 3] and deviation [batch, 3] of the features, and what they are multiplied with."""
    own, (shared,) = it.trainable["w"], [p for path, p in it.frozen.items() if path != "w"]
    mean, log_variance = np.split(X @ np.asarray(shared["a"])[:6] * own["d"], 2, axis=-1)
    return mean, np.exp(log_variance / 2), np.asarray(shared["b"])[:, :4] * own["b"]


def test_without_a_key_it_is_the_mean(it) -> None:
    mean, _, b = pieces(it)
    np.testing.assert_allclose(apply(it.bind(), X), X @ W + mean @ b, atol=1e-12)
    np.testing.assert_allclose(X @ jlora.merge(it)["w"], X @ W + mean @ b, atol=1e-12)


def test_draws_have_the_mean_and_the_covariance(it) -> None:
    n = 40_000
    keys = jax.random.split(jax.random.key(1), n)
    draws = np.asarray(jax.jit(jax.vmap(lambda key: apply(it.bind(context={"key": key}), X)))(keys))
    mean, deviation, b = pieces(it)
    for row in range(len(X)):
        wanted = b.T @ np.diag(deviation[row] ** 2) @ b
        spread = np.sqrt(np.diag(wanted))
        off = (draws[:, row].mean(0) - (X[row] @ W + mean[row] @ b)) / spread
        assert np.abs(off).max() < 5 / np.sqrt(n)
        np.testing.assert_allclose(
            np.cov(draws[:, row].T) / np.outer(spread, spread), wanted / np.outer(spread, spread), atol=0.04
        )
    rows = [(draws[:, i] - draws[:, i].mean(0)) / draws[:, i].std(0) for i in range(2)]
    assert np.abs(rows[0].T @ rows[1] / n).max() < 0.03  # each token has its own noise


def test_a_gradient_is_of_the_draw(it) -> None:
    """Reparametrized: the gradient by d, against differences with the noise held."""
    loss = lambda t: jnp.sum(jnp.sin(apply(it.bind(t, {"key": jax.random.key(2)}), X)))
    step = jax.tree.map(lambda leaf: 1e-6 * jnp.asarray(RNG.normal(size=leaf.shape)), it.trainable)
    moved = lambda sign: loss(jax.tree.map(lambda leaf, d: leaf + sign * d, it.trainable, step))
    slope = sum(
        jnp.sum(g * d) for g, d in zip(*map(jax.tree.leaves, (jax.grad(loss)(it.trainable), step)), strict=True)
    )
    np.testing.assert_allclose((moved(1) - moved(-1)) / 2, slope, rtol=1e-6)
