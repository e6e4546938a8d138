"""Poly: its routing, against numbers that PEFT computed, and by itself."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from recorded import arrays, cases

import jlora
from jlora.io import load_peft, save_peft
from jlora.io.poly import PolyFormat

pytestmark = pytest.mark.usefixtures("x64")
W = np.random.default_rng(0).normal(size=(12, 8))
X = np.random.default_rng(1).normal(size=(5, 3, 12))
METHOD = jlora.Poly(2, 3, splits=2)
apply = jlora.lift(lambda params, x: x @ params["w"], on_materialize="error")


def adapted(method: jlora.Poly = METHOD) -> jlora.Adapted:
    it = jlora.adapt({"w": jnp.asarray(W)}, method, "w", key=jax.random.key(0))
    noise = lambda leaf: leaf + jax.random.normal(jax.random.key(leaf.size), leaf.shape, leaf.dtype)
    return it.replace(trainable=jax.tree.map(noise, it.trainable))


@pytest.mark.parametrize("case", cases("poly.npz"))
def test_recorded_routing(case, tmp_path) -> None:
    z = arrays("poly.npz", case)
    part = lambda prefix: {key.removeprefix(prefix): value for key, value in z.items() if key.startswith(prefix)}
    (tmp_path / "adapter_config.json").write_text(str(z["config_json"]))
    tensors = {key: np.ascontiguousarray(value) for key, value in part("adapter/").items()}
    safetensors.numpy.save_file(tensors, tmp_path / "adapter_model.safetensors", {"format": "pt"})
    base = jax.tree.map(jnp.asarray, part("base/"))
    it = load_peft(tmp_path, base, axes={"*.weight": jlora.Axes((1,), (0,))})

    def model(p, x):
        return jnp.tanh(x @ p["lin0.weight"].T + p["lin0.bias"]) @ p["lin1.weight"].T + p["lin1.bias"]

    def loss(trainable):
        y = jlora.lift(model, on_materialize="error")(it.bind(trainable, {"task_ids": z["task_ids"]}), z["x"])
        return 0.5 * jnp.sum(jnp.square(y)), y

    grads, y = jax.grad(loss, has_aux=True)(it.trainable)
    np.testing.assert_allclose(y, z["y"], atol=1e-10, rtol=0)
    for module in ("lin0", "lin1"):
        wanted = {suffix: z[f"grad/{module}.{suffix}"] for suffix in PolyFormat.suffixes}
        for name, value in PolyFormat().read(None, wanted).items():
            np.testing.assert_allclose(grads[f"{module}.weight"][name], value, atol=1e-10)

    save_peft(it, tmp_path / "again", dtype=np.float64)
    again = safetensors.numpy.load_file(tmp_path / "again" / "adapter_model.safetensors")
    assert again.keys() == tensors.keys()
    for key, value in tensors.items():
        np.testing.assert_array_equal(again[key], value)
    config, theirs = (
        json.loads((tmp_path / "again" / "adapter_config.json").read_text()),
        json.loads(str(z["config_json"])),
    )
    for field in ("r", "n_tasks", "n_skills", "n_splits"):
        assert config[field] == theirs[field]


def test_each_example_has_the_merged_weight_of_its_task() -> None:
    it, ids = adapted(), jnp.array([2, 0, 1, 1, 2])
    y = apply(it.bind(context={"task_ids": ids}), X)
    for task in range(3):
        one = adapted(jlora.Poly(2, 3, splits=2, task=task))
        merged = X @ jlora.merge(one)["w"]
        np.testing.assert_allclose(apply(it.bind(context={"task_ids": task}), X), merged, atol=1e-10)
        np.testing.assert_allclose(y[ids == task], merged[ids == task], atol=1e-10)


def test_a_number_that_is_no_task() -> None:
    np.testing.assert_allclose(apply(adapted().bind(context={"task_ids": jnp.full(5, 3)}), X), X @ W, atol=1e-10)


def test_a_key_draws_for_each_example() -> None:
    it = adapted()
    same = jnp.broadcast_to(X[:1], X.shape)
    y = apply(it.bind(context={"task_ids": jnp.zeros(5, int), "key": jax.random.key(0)}), same)
    assert np.abs(y[0] - y[1]).max() > 1e-3


def test_sizes_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="first axis"):
        apply(adapted().bind(context={"task_ids": jnp.zeros(3, int)}), X)
    with pytest.raises(ValueError, match="4 does"):
        adapted(jlora.Poly(2, splits=5))
