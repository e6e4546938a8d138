"""KaSA against PEFT's numbers on PEFT's truncated base, and what it takes away."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import jlora
from jlora.io import load_peft, save_peft

pytestmark = pytest.mark.usefixtures("x64")
W = np.random.default_rng(0).normal(size=(7, 5))
apply = jlora.lift(lambda params, x: x @ params["w"], on_materialize="error")


def test_peft_on_its_truncated_base(oracles, tmp_path) -> None:
    """The general tests take the smallest components away anew; here the base is PEFT's, and nothing is."""
    with np.load(oracles / "lora_variants.npz") as z:
        z = {key.removeprefix("kasa/"): z[key] for key in z.files if key.startswith("kasa/")}
    part = lambda prefix: {key.removeprefix(prefix): value for key, value in z.items() if key.startswith(prefix)}
    (tmp_path / "adapter_config.json").write_text(str(z["config_json"]))
    tensors = {key: np.ascontiguousarray(value) for key, value in part("adapter/").items()}
    safetensors.numpy.save_file(tensors, tmp_path / "adapter_model.safetensors", {"format": "pt"})
    base = jax.tree.map(jnp.asarray, part("base/") | part("base_after_init/"))
    it = load_peft(tmp_path, base, axes={"*.weight": jlora.Axes((1,), (0,))})
    it = it.replace(frozen=jax.tree.map(jnp.zeros_like, it.frozen))

    def model(p, x):
        return jnp.tanh(x @ p["lin0.weight"].T + p["lin0.bias"]) @ p["lin1.weight"].T + p["lin1.bias"]

    def loss(trainable, x):
        y = jlora.lift(model, on_materialize="error")(it.bind(trainable), x)
        return 0.5 * jnp.sum(jnp.square(y)), y

    (own, grad_x), y = jax.grad(loss, (0, 1), has_aux=True)(it.trainable, z["x"])
    np.testing.assert_allclose(y, z["y"], atol=1e-10, rtol=0)
    np.testing.assert_allclose(grad_x, z["grad_x"], atol=1e-10, rtol=0)
    for name in ("lin0", "lin1"):
        g, wanted = own[f"{name}.weight"], part(f"grad/{name}.")
        np.testing.assert_allclose(g["factors"].a.T, wanted["lora_A.weight"], atol=1e-10, rtol=0)
        np.testing.assert_allclose(g["factors"].b.T, wanted["lora_B.weight"], atol=1e-10, rtol=0)
        np.testing.assert_allclose(g["sigma"], wanted["lora_diag"], atol=1e-10, rtol=0)
        np.testing.assert_allclose(jlora.merge(it)[f"{name}.weight"], z[f"merged/{name}.weight"], atol=1e-10, rtol=0)


@pytest.mark.parametrize("w", [W, W.T], ids=["tall", "wide"])
def test_it_starts_as_the_truncated_base(w) -> None:
    it = jlora.adapt({"w": jnp.asarray(w)}, jlora.KaSA(2), "w", key=jax.random.key(0))
    u, s, vh = np.linalg.svd(w, full_matrices=False)
    np.testing.assert_allclose(jlora.merge(it)["w"], u[:, :-2] * s[:-2] @ vh[:-2], atol=1e-12)
    np.testing.assert_array_equal(it.base["w"], w)


def test_dropout_is_the_new_pairs_alone() -> None:
    it = jlora.adapt({"w": jnp.asarray(W)}, jlora.KaSA(2, dropout=0.5), "w", key=jax.random.key(0))
    x = jnp.ones((3, 7))
    np.testing.assert_allclose(apply(it.bind(context={"key": jax.random.key(1)}), x), apply(it.bind(), x), atol=1e-12)


def test_refusals(tmp_path) -> None:
    with pytest.raises(ValueError, match="at most 4"):
        jlora.adapt({"w": jnp.asarray(W)}, jlora.KaSA(5), "w", key=jax.random.key(0))
    it = jlora.adapt({"m": {"kernel": jnp.asarray(W)}}, jlora.KaSA(2), "m/kernel", key=jax.random.key(0))
    with pytest.raises(ValueError, match="smallest singular components"):
        save_peft(it.replace(frozen=jax.tree.map(jnp.zeros_like, it.frozen)), tmp_path)
    save_peft(it, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["kasa_config"] == {"beta": 1e-4, "gamma": 1e-3}
