"""MiSS and Bat: what they are to LoRA and to each other, and what they refuse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from jlora.weight import Params

rng = np.random.default_rng(0)


def test_miss_is_lora_with_a_tiled_identity(x64):
    method, w = jlora.MiSS(4), jnp.asarray(rng.normal(size=(10, 6)))
    block = jnp.asarray(rng.normal(size=(4, 6)))
    a = np.tile(np.eye(4), (3, 1))[:10]
    got = method.weight(w, Params({"block": block}))
    np.testing.assert_allclose(got, w + a @ block, atol=1e-12)
    np.testing.assert_array_equal(method.factors(w, Params({"block": block})).a, a)


def test_bat_without_a_weight_is_miss(x64):
    block = jnp.asarray(rng.normal(size=(3, 2, 2)))
    zeros = jnp.zeros((8, 6))
    rows = block.transpose(1, 0, 2).reshape(2, 6)
    got = jlora.Bat(2).weight(zeros, Params({"block": block}))
    np.testing.assert_allclose(got, jlora.MiSS(2).weight(zeros, Params({"block": rows})), atol=1e-12)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (jlora.MiSS(9), "at most 8"),
        (jlora.MiSS(4, mini=5), "the nearest is 4"),
        (jlora.Bat(3), "does not divide both in = 8 and out = 12; the nearest is 2"),
    ],
)
def test_refused_sizes(method, message):
    with pytest.raises(ValueError, match=message):
        jlora.adapt({"w": jnp.zeros((8, 12))}, method, "w", key=jax.random.key(0))
