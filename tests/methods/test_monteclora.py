"""MonteCLoRA: the distribution of what it draws, what it reports, and the divergence."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from jlora.methods.monteclora import variational_loss

pytestmark = pytest.mark.usefixtures("x64")
METHOD = jlora.MonteCLoRA(3, 6.0, samples=4, noise=0.5, prior=0.7)
KEY = jax.random.key(0)


def setting(shape=(6, 5)):
    w = jax.random.normal(KEY, shape)
    axes = jlora.Axes((len(shape) - 2,), (len(shape) - 1,), tuple(range(len(shape) - 2)))
    adapted = jlora.adapt({"w": w}, METHOD, "w", axes={"w": axes}, key=KEY)
    return adapted, jax.tree.map(lambda leaf: leaf + 0.1, adapted.trainable)


def test_draws():
    """As in the formula, with all of its N normal matrices, by moments over many keys."""
    _, trainable = setting()
    own, keys = trainable["w"], jax.random.split(KEY, 10_000)
    drawn = jax.vmap(lambda key: METHOD.draw(list(jax.random.split(key, 3)), own)[0].a)(keys) - own["factors"].a

    def written(key):
        keys = jax.random.split(key, 4)
        chi = jnp.sum(jnp.square(jax.random.normal(keys[0], (3, 3))), axis=0)
        beta = jnp.exp(own["log_mixture"])
        spread = jnp.sqrt((1 - 2 / 4) / beta + jnp.sum(1 / beta) / 16)
        mixture = jax.nn.softmax(jnp.log(beta) + spread * jax.random.normal(keys[1], (4,)))
        z = jax.random.normal(keys[2], (4, 6, 3)) * jnp.exp(own["log_std"]) * jnp.sqrt(chi)
        return 0.5 * jnp.einsum("n,nij->ij", mixture, z)

    wanted = jax.vmap(written)(keys)
    np.testing.assert_allclose(drawn.mean(0), 0.0, atol=0.06)
    for power in (2, 4):
        got, want = (jnp.mean(x**power, axis=(0, 1)) for x in (drawn, wanted))
        np.testing.assert_allclose(got, want, rtol=0.06 * power)


def test_divergence_is_one():
    """Zero where the distribution is the prior, positive elsewhere, and so is its gradient."""
    at_prior = jnp.zeros(3), jnp.full(4, jnp.log(0.7)), jnp.ones(3)
    np.testing.assert_allclose(METHOD.divergence(*at_prior), 0.0, atol=1e-12)
    for grad in jax.grad(lambda args: METHOD.divergence(*args))(at_prior):
        np.testing.assert_allclose(grad, 0.0, atol=1e-12)
    for seed in range(5):
        random = np.random.default_rng(seed)
        tau, gamma, variance = random.normal(size=3), random.normal(size=4), random.uniform(0.1, 3, size=3)
        assert METHOD.divergence(tau, gamma, variance) > 0.01


def test_what_is_reported():
    adapted, trainable = setting((2, 6, 6))
    f = lambda params, x: jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["w"])[0]
    x = jnp.ones((4, 6))
    bound = lambda key: adapted.bind(trainable, context={"key": key} if key is not None else {})
    y, reported = jlora.lift(f, aux=True)(bound(KEY), x)
    again, _ = jlora.lift(f, aux=True)(bound(KEY), x)
    other, _ = jlora.lift(f, aux=True)(bound(jax.random.key(1)), x)
    np.testing.assert_array_equal(y, again)
    assert np.abs(y - other).max() > 1e-3
    (report,) = reported["w"]
    assert report["kl"].shape == report["squares"].shape == (2,)
    wanted = np.mean(0.5 * np.asarray(report["kl"]) + 2.0 * np.asarray(report["squares"]))
    np.testing.assert_allclose(variational_loss(reported, 0.5, 2.0), wanted)
    mean, silent = jlora.lift(f, aux=True)(bound(None), x)
    np.testing.assert_allclose(mean, f(jlora.merge(adapted.replace(trainable=trainable)), x), atol=1e-12)
    with pytest.raises(ValueError, match="lift with aux=True, and bind with a key"):
        variational_loss(silent)
