"""DeLoRA's bound: lambda holds the update, whatever its factors are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora

pytestmark = pytest.mark.usefixtures("x64")


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e6])
def test_strength_bounds_the_update(size: float) -> None:
    rng = np.random.default_rng(0)
    w = jnp.asarray(rng.normal(size=(6, 9)))
    adapted = jlora.adapt({"w": w}, jlora.DeLoRA(4, strength=0.7), "w", key=jax.random.key(0))
    own = {name: jnp.asarray(size * rng.normal(size=adapted.trainable["w"][name].shape)) for name in "ab"}
    adapted = adapted.replace(trainable={"w": adapted.trainable["w"] | own})
    delta = (jlora.merge(adapted)["w"] - w) / np.linalg.norm(w, axis=1)[:, None]
    assert 0.1 < np.linalg.norm(delta) <= 0.7 + 1e-12
