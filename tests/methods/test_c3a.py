"""C3A against the circulant matrices written out, by products with waves and by fast transforms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from jlora.methods import c3a


@pytest.mark.parametrize("longest", [512, 0])
@pytest.mark.parametrize("b", [1, 3, 4, 12])
def test_is_block_circulant(b, longest, x64, monkeypatch):
    monkeypatch.setattr(c3a, "_LONGEST", longest)
    rng = np.random.default_rng(0)
    kernel, w = rng.normal(size=(24 // b, 12 // b, b)), rng.normal(size=(12, 24))
    wanted = w.copy()
    for i in range(12):
        for o in range(24):
            wanted[i, o] += kernel[o // b, i // b, (i % b - o % b) % b] / 12
    adapted = jlora.adapt({"w": jnp.asarray(w)}, jlora.C3A(b), "w", key=jax.random.key(0))
    adapted = adapted.replace(trainable={"w": {"kernel": jnp.asarray(kernel)}})
    np.testing.assert_allclose(jlora.merge(adapted)["w"], wanted, atol=1e-12)
    x, g = jnp.asarray(rng.normal(size=(5, 12))), jnp.asarray(rng.normal(size=(5, 24)))
    both = lambda params: (x @ params["w"], g @ params["w"].T)
    for got, exact in zip(jlora.lift(both, on_materialize="error")(adapted.bind()), both({"w": wanted}), strict=True):
        np.testing.assert_allclose(got, exact, atol=1e-12)


def test_refused_sizes():
    with pytest.raises(ValueError, match="does not divide both in = 8 and out = 12; try 4"):
        jlora.adapt({"w": jnp.zeros((8, 12))}, jlora.C3A(6), "w", key=jax.random.key(0))
