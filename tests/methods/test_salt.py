"""SALT against its formula, a change of the matrix of singular values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora


@pytest.mark.parametrize("shape", [(7, 9), (9, 6)])
def test_is_the_formula(shape, x64):
    rng = np.random.default_rng(0)
    w, d, k = rng.normal(size=shape), min(shape), 2
    salt = jlora.adapt({"kernel": jnp.asarray(w)}, jlora.SALT(3, top=k), "*", key=jax.random.key(0))
    own = {name: leaf + 0.3 * rng.normal(size=leaf.shape) for name, leaf in salt.trainable["kernel"].items()}
    frozen = salt.frozen["kernel"]
    np.testing.assert_allclose(frozen["u"].T @ frozen["u"], np.eye(d), atol=1e-12)
    np.testing.assert_allclose(frozen["vh"] @ frozen["vh"].T, np.eye(d), atol=1e-12)
    middle = np.array(frozen["u"].T @ w @ frozen["vh"].T)
    np.testing.assert_allclose(middle[:k, :k], np.diag(frozen["s"]), atol=1e-12)
    middle[:k, :k] = np.diag(own["scale"] * frozen["s"] + own["shift"])
    middle[k:, k:] += own["x"] @ own["y"]
    got = jlora.merge(salt.replace(trainable={"kernel": own}))["kernel"]
    np.testing.assert_allclose(got, frozen["u"] @ middle @ frozen["vh"], atol=1e-12)


@pytest.mark.parametrize(("method", "message"), [(jlora.SALT(2, top=6), "at most 5"), (jlora.SALT(4, top=3), "the 3")])
def test_refused(method, message):
    with pytest.raises(ValueError, match=message):
        jlora.adapt({"kernel": jnp.ones((6, 9))}, method, "*", key=jax.random.key(0))
