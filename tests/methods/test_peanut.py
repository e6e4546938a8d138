"""PEANuT against its formula, row by row of the weight."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from jlora.methods.peanut import ACTIVATIONS

pytestmark = pytest.mark.usefixtures("x64")
RNG = np.random.default_rng(0)
W = RNG.normal(size=(6, 5))


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_is_the_formula(depth) -> None:
    it = jlora.adapt(
        {"w": jnp.asarray(W)}, jlora.PEANuT(2, depth=depth, activation="tanh", scale=0.7), "w", key=jax.random.key(0)
    )
    own = {name: RNG.normal(size=leaf.shape) for name, leaf in it.trainable["w"].items()}
    h = [np.tanh(W @ own["a"])]
    for j in range(depth):
        h.append(np.tanh(h[-1] @ own["encoders"][j]))
    g = h[depth]
    for j in reversed(range(depth)):
        g = np.tanh(g @ own["decoders"][depth - 1 - j]) + h[j]
    merged = jlora.merge(it.replace(trainable={"w": jax.tree.map(jnp.asarray, own)}))["w"]
    np.testing.assert_allclose(merged, W + 0.7 * g @ own["b"], atol=1e-12)


def test_activations() -> None:
    x = np.linspace(-3, 3, 13)
    erf, sigmoid = np.vectorize(math.erf), 1 / (1 + np.exp(-x))
    formulas = {
        "relu": np.maximum(x, 0),
        "tanh": np.tanh(x),
        "sigmoid": sigmoid,
        "silu": x * sigmoid,
        "gelu": x * (1 + erf(x / np.sqrt(2))) / 2,
        "gelu_tanh": x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))) / 2,
        "softplus": np.log1p(np.exp(x)),
        "sin": np.sin(x),
        "linear": x,
    }
    assert formulas.keys() == ACTIVATIONS.keys()
    for name, wanted in formulas.items():
        np.testing.assert_allclose(ACTIVATIONS[name](jnp.asarray(x)), wanted, atol=1e-12, err_msg=name)
