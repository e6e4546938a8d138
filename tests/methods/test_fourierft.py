"""FourierFT: both of its forms against numpy's transform, and PyTorch's shuffle."""

import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from jlora.torch_random import randperm
from jlora.weight import Params


@pytest.mark.parametrize("shape", [(70, 90), (6, 9), (8, 4)])
@pytest.mark.parametrize("n", [5, 20])
def test_is_the_transform(shape, n, x64):
    rng = np.random.default_rng(0)
    method, w, c = jlora.FourierFT(n, scaling=30.0, seed=3), rng.normal(size=shape), rng.normal(size=n)
    p, q = method.frequencies(*shape)
    spectrum = np.zeros(shape)
    spectrum[p, q] = c
    wanted = w + 30.0 * np.fft.ifft2(spectrum).real
    parameters = Params({"spectrum": jnp.asarray(c)})
    assert (method.factors(jnp.asarray(w), parameters) is None) == (5 * n * sum(shape) > shape[0] * shape[1])
    np.testing.assert_allclose(method.weight(jnp.asarray(w), parameters), wanted, atol=1e-12)


def test_all_places_of_a_shuffle():
    for n in (1, 2, 7, 30):
        every = randperm(n, n, seed=5)
        assert sorted(every) == list(range(n))
        np.testing.assert_array_equal(randperm(n, n // 2, seed=5), every[: n // 2])
