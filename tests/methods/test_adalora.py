"""AdaLoRA's two ways to take a rank away: a zero in e, from which it can come back, and the mask, from which not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from jlora.io import load_peft, save_peft

pytestmark = pytest.mark.usefixtures("x64")


def pruned() -> jlora.Adapted:
    rng = np.random.default_rng(0)
    params = {"layers": {"q": {"kernel": jnp.asarray(rng.normal(size=(2, 6, 5)))}}}
    axes = {"layers/q/kernel": jlora.Axes((1,), (2,), stack=(0,))}
    adapted = jlora.adapt(params, jlora.AdaLoRA(4, alpha=3.0), "**", axes=axes, key=jax.random.key(0))
    trainable = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape)), adapted.trainable)
    trainable["layers/q/kernel"]["e"] = trainable["layers/q/kernel"]["e"].at[:, 1].set(0.0)
    mask = jnp.array([[1.0, 1.0, 0.0, 1.0], [0.0, 0.0, 0.0, 0.0]])
    return adapted.replace(trainable=trainable, frozen={"layers/q/kernel": {"mask": mask}})


def test_gradients_of_what_was_taken() -> None:
    adapted = pruned()
    model = jlora.lift(lambda p, x: sum(x @ w for w in p["layers"]["q"]["kernel"]), on_materialize="error")
    loss = lambda t: jnp.sum(jnp.sin(model(adapted.bind(t), jnp.ones((3, 6)))))
    grads = jax.grad(loss)(adapted.trainable)["layers/q/kernel"]
    kept = np.asarray(adapted.frozen["layers/q/kernel"]["mask"]) != 0
    np.testing.assert_array_equal(np.asarray(grads["e"]) != 0, kept)
    zero = np.asarray(adapted.trainable["layers/q/kernel"]["e"]) == 0
    np.testing.assert_array_equal(np.any(np.asarray(grads["b"]) != 0, axis=-1), kept & ~zero)


def test_ranks_that_are_left_are_what_is_saved(tmp_path) -> None:
    adapted = pruned()
    save_peft(adapted, tmp_path, dtype=np.float64)
    again = load_peft(tmp_path, adapted.base, axes={"**": jlora.Axes((1,), (2,), stack=(0,))})
    np.testing.assert_array_equal(again.frozen["layers/q/kernel"]["mask"], [[1, 1, 1, 0], [0, 0, 0, 0]])
    merged = [jlora.merge(a)["layers"]["q"]["kernel"] for a in (adapted, again)]
    np.testing.assert_allclose(*merged, atol=1e-12)
