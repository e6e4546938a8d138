"""GLoRA on a layer with a bias: as a user says it, against the formula, and in files."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from jlora.io import load_peft, save_peft
from jlora.methods import Follow

pytestmark = pytest.mark.usefixtures("x64")


def random(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def base() -> dict:
    return {"k": {"kernel": random(0, 2, 5, 4), "bias": random(1, 2, 4)}}


AXES = {"k/kernel": jlora.Axes((1,), (2,), (0,))}
FORMS = [
    ("lora", "lora", "constant"),
    ("vector", "vector", "vector"),
    ("constant", "none", "vector"),
    ("none", "lora", "none"),
]


def adapted(method: jlora.GLoRA) -> jlora.Adapted:
    rules = {"k/kernel": method, "k/bias": Follow(group="k/kernel", method=method, n_stack=1)}
    made = jlora.adapt(base(), rules, axes=AXES, key=jax.random.key(0))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-15), jlora.merge(made), base())
    noise = jax.tree.map(lambda leaf: leaf + random(leaf.size, *leaf.shape), made.trainable)
    return made.replace(trainable=noise)


@pytest.mark.parametrize("forms", FORMS)
def test_formula(forms: tuple[str, str, str]) -> None:
    ab, c, de = forms
    made = adapted(jlora.GLoRA(2, ab=ab, c=c, de=de))
    t = jax.tree.map(np.asarray, made.trainable["k/kernel"])
    merged = jlora.merge(made)["k"]
    for i in range(2):
        w, bias = (np.asarray(base()["k"][name][i]) for name in ("kernel", "bias"))
        product = lambda name, i=i: t[f"{name}1"][i] @ t[f"{name}2"][i]
        one = lambda name, i=i, p=product: p(name) if f"{name}1" in t else t[name][i] if name in t else 0.0
        np.testing.assert_allclose(merged["kernel"][i], w * (1 + one("a")) + one("b"), atol=1e-12)
        shift = one("c") @ w if c != "none" else 0.0
        np.testing.assert_allclose(merged["bias"][i], bias * (1 + one("d")) + one("e") + shift, atol=1e-12)


@pytest.mark.parametrize("forms", FORMS)
def test_training_and_a_file(forms: tuple[str, str, str], tmp_path) -> None:
    ab, c, de = forms
    made, x = adapted(jlora.GLoRA(2, ab=ab, c=c, de=de)), random(7, 3, 2, 5)
    layer = lambda p, x: jnp.einsum("tli,lio->tlo", x, p["k"]["kernel"]) + p["k"]["bias"]
    lifted = jlora.lift(layer, on_materialize="error")
    value, grads = jax.value_and_grad(lambda t: jnp.sum(jnp.sin(lifted(made.bind(t), x))))(made.trainable)
    wanted = jax.value_and_grad(lambda t: jnp.sum(jnp.sin(layer(jlora.merge(made.replace(trainable=t)), x))))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-10), (value, grads), wanted(made.trainable))
    params = {"k": {str(i): {name: leaf[i] for name, leaf in base()["k"].items()} for i in range(2)}}
    save_peft(made, tmp_path, names=lambda path: "k.*", dtype=jnp.float64)
    again = jlora.merge(load_peft(tmp_path, params))
    for i in range(2):
        for name, leaf in jlora.merge(made)["k"].items():
            np.testing.assert_allclose(again["k"][str(i)][name], leaf[i], atol=1e-12)
