"""SoKA against numpy's Kronecker product, in both of its forms, and its start against the best approximation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from jlora.methods.soka import terms_for

KEY = jax.random.key(0)
apply = jlora.lift(lambda params, x: x @ params["kernel"], on_materialize="error")
transposed = jlora.lift(lambda params, x: x @ params["kernel"].T, on_materialize="error")


def weight(shape):
    return np.random.default_rng(0).normal(size=shape)


def sum_of_products(u, v):
    return sum(np.kron(a, b) for a, b in zip(u, v, strict=True))


@pytest.mark.parametrize("terms", [1, 5])  # as products along two axes, and formed
@pytest.mark.parametrize("shape", [(36, 64), (64, 24)])
def test_is_a_sum_of_kronecker_products(shape, terms, x64):
    w, rng = weight(shape), np.random.default_rng(1)
    soka = jlora.adapt({"kernel": jnp.asarray(w)}, jlora.SoKA(terms), "*", key=KEY)
    own = {name: leaf + 0.3 * rng.normal(size=leaf.shape) for name, leaf in soka.trainable["kernel"].items()}
    start = soka.frozen["kernel"]
    wanted = w + sum_of_products(own["u"], own["v"]) - sum_of_products(start["u"], start["v"])
    moved = soka.replace(trainable={"kernel": own})
    np.testing.assert_allclose(jlora.merge(moved)["kernel"], wanted, atol=1e-11)
    for fn, x in ((apply, rng.normal(size=(3, shape[0]))), (transposed, rng.normal(size=(3, shape[1])))):
        y = x @ (wanted if fn is apply else wanted.T)
        np.testing.assert_allclose(fn(moved.bind(), jnp.asarray(x)), y, atol=1e-10)


def test_starts_at_the_best_approximation(x64):
    """All terms give the weight back, some leave the rest of the spectrum, and a weight of two has two."""
    w = weight((6, 8))
    start = lambda terms: jlora.adapt({"kernel": jnp.asarray(w)}, jlora.SoKA(terms), "*", key=KEY).frozen["kernel"]
    np.testing.assert_allclose(sum_of_products(**start(4)), w, atol=1e-12)
    rearranged = w.reshape(2, 3, 2, 4).transpose(0, 2, 1, 3).reshape(4, 12)
    rest = np.linalg.svd(rearranged, compute_uv=False)[2:]
    np.testing.assert_allclose(np.linalg.norm(w - sum_of_products(**start(2))) ** 2, (rest**2).sum(), rtol=1e-12)


def test_number_of_terms():
    rng = np.random.default_rng(2)
    few = sum_of_products(rng.normal(size=(2, 4, 4)), rng.normal(size=(2, 4, 4)))
    assert terms_for(few, 1.0) == 2
    assert terms_for(few + 1e-3 * rng.normal(size=few.shape), 0.999) == 2
    assert terms_for(weight((16, 16)), 1e-6) == 1
    with pytest.raises(ValueError, match="at most 16"):
        jlora.adapt({"kernel": jnp.ones((16, 16))}, jlora.SoKA(17), "*", key=KEY)
