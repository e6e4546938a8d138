"""IA3 on a layer with a bias: as a user says it, and what a file can say."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from jlora.io import load_peft, save_peft
from jlora.methods import Follow

pytestmark = pytest.mark.usefixtures("x64")

PARAMS = {"k": {"kernel": jnp.arange(12.0).reshape(3, 4), "bias": jnp.arange(4.0)}}
SCALE = np.array([2.0, 3.0, 5.0, 7.0])


def adapted(**rules) -> jlora.Adapted:
    made = jlora.adapt(PARAMS, {"k/kernel": jlora.IA3()} | rules, key=jax.random.key(0))
    return made.replace(trainable=made.trainable | {"k/kernel": {"scale": jnp.asarray(SCALE)}})


def test_a_bias_follows(tmp_path) -> None:
    made = adapted(**{"k/bias": Follow(group="k/kernel", method=jlora.IA3())})
    layer = jlora.lift(lambda p, x: x @ p["k"]["kernel"] + p["k"]["bias"], on_materialize="error")
    loss = lambda t: jnp.sum(layer(made.bind(t), jnp.ones((1, 3))))
    y = np.asarray(PARAMS["k"]["kernel"]).sum(0) + np.arange(4.0)
    value, grads = jax.value_and_grad(loss)(made.trainable)
    np.testing.assert_allclose(value, y @ SCALE)
    np.testing.assert_allclose(grads["k/kernel"]["scale"], y)
    np.testing.assert_allclose(jlora.merge(made)["k"]["bias"], np.arange(4.0) * SCALE)
    save_peft(made, tmp_path)
    again = load_peft(tmp_path, PARAMS)
    assert again.sites == made.sites
    np.testing.assert_allclose(again.trainable["k/kernel"]["scale"], SCALE)


def test_a_bias_that_does_not_follow_is_not_written(tmp_path) -> None:
    with pytest.raises(ValueError, match="Follow"):
        save_peft(adapted(), tmp_path)
