"""Lily: what is shared, and what a file of it can say."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from jlora.io import load_peft, save_peft

pytestmark = pytest.mark.usefixtures("x64")

RULES = {f"**/{name}/kernel": jlora.Lily(3, experts=4, stride=2, group=f"lily.{name}") for name in "qv"}


def random(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def params(layers: int = 5) -> dict:
    layer = lambda i: {"q": {"kernel": random(i, 6, 4)}, "v": {"kernel": random(20 + i, 6, 6)}}
    return {"layers": [layer(i) for i in range(layers)]}


def model(p: dict, x: jax.Array) -> jax.Array:
    for layer in p["layers"]:
        x = x + jnp.tanh(x @ layer["v"]["kernel"]) + jnp.tile(x @ layer["q"]["kernel"], 2)[..., :6]
    return x


def moved(rules: dict = RULES) -> jlora.Adapted:
    adapted = jlora.adapt(params(), rules, key=jax.random.key(0))
    noise = jax.tree.map(lambda leaf: leaf + random(leaf.size, *leaf.shape) / 4, adapted.trainable)
    return adapted.replace(trainable=noise)


def test_layers_share_and_mix() -> None:
    adapted, x = moved(), random(1, 2, 3, 6)
    assert adapted.trainable["lily.q"]["6x4"]["a"].shape == (3, 6, 3)
    assert adapted.trainable["lily.v"]["6x6"]["b"].shape == (4, 3, 6)
    assert [int(adapted.frozen[f"layers/{i}/q/kernel"]["a"]) for i in range(5)] == [0, 0, 1, 1, 2]
    y = np.asarray(x)
    for i, layer in enumerate(params()["layers"]):
        out = {}
        for name in "qv":
            w, shared = np.asarray(layer[name]["kernel"]), adapted.trainable[f"lily.{name}"]
            shared = jax.tree.map(np.asarray, shared[f"{w.shape[0]}x{w.shape[1]}"])
            h = y @ shared["a"][i // 2]
            odds = np.exp(h @ np.asarray(adapted.trainable[f"layers/{i}/{name}/kernel"]["router"]))
            mixture = (odds / odds.sum(-1, keepdims=True)).mean((0, 1))
            out[name] = y @ w + h @ np.tensordot(mixture, shared["b"], 1)
        y = y + np.tanh(out["v"]) + np.tile(out["q"], 2)[..., :6]
    np.testing.assert_allclose(jlora.lift(model, on_materialize="error")(adapted.bind(), x), y, atol=1e-9)


def test_a_file(tmp_path) -> None:
    adapted = moved()
    save_peft(adapted, tmp_path, dtype=jnp.float64)
    again = load_peft(tmp_path, params())
    assert again.sites == adapted.sites
    for old, new in ((adapted.trainable, again.trainable), (adapted.frozen, again.frozen)):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), old, new)


def test_what_a_file_cannot_say(tmp_path) -> None:
    one = {"**/{0,1,2}/q/kernel": jlora.Lily(3, group="first"), "**/q/kernel": jlora.Lily(3, group="second")}
    with pytest.raises(ValueError, match="shares among all modules called 'q'"):
        save_peft(moved(one), tmp_path)


def test_experts_of_a_ragged_product_are_refused() -> None:
    axes = {"w": jlora.Axes((1,), (2,), (0,))}
    adapted = jlora.adapt({"w": random(0, 2, 4, 4)}, jlora.Lily(2), "w", axes=axes, key=jax.random.key(0))
    apply = jlora.lift(lambda p, x: jax.lax.ragged_dot(x, p["w"], jnp.array([2, 3])))
    with pytest.raises(ValueError, match="LoRA for the experts"):
        apply(adapted.bind(), random(1, 5, 4))
