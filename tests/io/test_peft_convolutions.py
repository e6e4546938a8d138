"""Adapters of convolutions mean the same on a kernel in Flax's layout and on a weight in PyTorch's."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jlora
from jlora.io import load_peft, save_peft

METHODS = {
    "loha": jlora.LoHa(2, alpha=3.0),
    "loha_tucker": jlora.LoHa(2, alpha=3.0, effective_conv=True),
    "lokr": jlora.LoKr(1, alpha=3.0),
    "lokr_tucker": jlora.LoKr(1, alpha=3.0, effective_conv=True),
    "lokr_tucker_both": jlora.LoKr(1, alpha=3.0, decompose_both=True, factor=2, effective_conv=True),
    "lokr_whole": jlora.LoKr(9, alpha=3.0, decompose_both=True),
    "hira": jlora.HiRA(2),
}


@pytest.mark.parametrize("method", METHODS)
def test_both_layouts(method, tmp_path):
    rng = np.random.default_rng(0)
    normal = lambda shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    flax = {"conv": {"kernel": normal((3, 2, 8, 12))}}
    torch = {"conv.weight": flax["conv"]["kernel"].transpose(3, 2, 0, 1)}
    axes = {"conv/kernel": jlora.Axes((0, 1, 2), (3,), kind="conv")}
    adapted = jlora.adapt(flax, METHODS[method], "**", axes=axes, key=jax.random.key(0))
    adapted = adapted.replace(trainable=jax.tree.map(lambda leaf: leaf + normal(leaf.shape), adapted.trainable))
    merged = np.asarray(jlora.merge(adapted)["conv"]["kernel"])
    assert np.abs(merged - flax["conv"]["kernel"]).max() > 0.1

    save_peft(adapted, tmp_path / "flax")
    read = load_peft(tmp_path / "flax", torch)
    np.testing.assert_allclose(jlora.merge(read)["conv.weight"], merged.transpose(3, 2, 0, 1), atol=1e-5)
    save_peft(read, tmp_path / "torch")
    again = load_peft(tmp_path / "torch", flax)
    jax.tree.map(np.testing.assert_array_equal, again.trainable, adapted.trainable)
    assert {type(site.method) for site in again.sites.values()} == {type(METHODS[method])}
    first, second = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("flax", "torch"))
    assert first.keys() == second.keys()


# PEFT 0.21.2 with torch 2.13.0: an adapter of a convolution [7, 3, 2, 1] and its get_delta_weight, a row an output.
CORE = {
    "lokr_t2": np.reshape([-4, -1, 2, 5, -3, 0, 3, -5], (2, 2, 2, 1)),
    "lokr_w1": np.full((1, 1), -4),
    "lokr_w2_a": np.reshape([-4, 3, -1, -5, 2, -2, 5, 1, -3, 4, 0, -4, 3, -1], (2, 7)),
    "lokr_w2_b": np.reshape([-4, 5, 3, 1, -1, -3], (2, 3)),
}
CHANGE = [
    [342, 246, -420, -270, -324, -522],
    [-54, -252, 72, 270, 0, 594],
    [-252, 174, 300, -180, 324, -468],
    [540, 270, -660, -300, -540, -540],
    [144, -228, -168, 240, -216, 576],
    [-54, 198, 60, -210, 108, -486],
    [-450, -300, 552, 330, 432, 630],
]


@pytest.mark.parametrize("layout", ["torch", "flax"])
def test_core_of_lokr(layout, tmp_path):
    tensors = {f"base_model.model.conv.{name}": array.astype("f") for name, array in CORE.items()}
    config = {"peft_type": "LOKR", "r": 2, "alpha": 3, "use_effective_conv2d": True, "target_modules": ["conv"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    change, name = np.reshape(CHANGE, (7, 3, 2, 1)), "conv.weight"
    if layout == "flax":
        change, name = change.transpose(2, 3, 1, 0), "conv.kernel"
    read = load_peft(tmp_path, {name: jnp.zeros(change.shape)})
    np.testing.assert_array_equal(jlora.merge(read)[name], change)
    save_peft(read, tmp_path / "again")
    again = load_file(tmp_path / "again" / "adapter_model.safetensors")
    assert again.keys() == tensors.keys()
    for key, tensor in tensors.items():
        np.testing.assert_array_equal(again[key], tensor, err_msg=key)
    assert json.loads((tmp_path / "again" / "adapter_config.json").read_text())["use_effective_conv2d"]


def test_whole_factors_along_one_axis_are_refused(tmp_path):
    """PEFT's product of [o1, i1] and [o2, i2, k] is another one: torch.kron takes the axes from the last one on."""
    params = {"conv": {"kernel": jnp.ones((3, 6, 8))}}
    axes = {"conv/kernel": jlora.Axes((0, 1), (2,), kind="conv")}
    adapted = jlora.adapt(params, jlora.LoKr(9), "conv/*", axes=axes, key=jax.random.key(0))
    with pytest.raises(ValueError, match="conv.*along one axis with a whole W_2.*smaller r"):
        save_peft(adapted, tmp_path / "written")
    tensors = {"lokr_w1": np.ones((2, 2), np.float32), "lokr_w2": np.ones((4, 3, 3), np.float32)}
    tensors = {f"base_model.model.conv.{key}": value for key, value in tensors.items()}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    config = {"peft_type": "LOKR", "r": 9, "alpha": 9, "target_modules": ["conv"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="conv.*along one axis with a whole W_2.*smaller r"):
        load_peft(tmp_path, params, axes=axes)


@pytest.mark.parametrize("method", [jlora.LoHa(2, effective_conv=True), jlora.LoKr(2, effective_conv=True)], ids=str)
def test_core_of_a_convolution_along_one_axis(method, tmp_path):
    """PEFT's has a second window axis, of one place."""
    params = {"conv": {"kernel": jnp.ones((3, 6, 10))}}
    axes = {"conv/kernel": jlora.Axes((0, 1), (2,), kind="conv")}
    adapted = jlora.adapt(params, method, "**", axes=axes, key=jax.random.key(0))
    save_peft(adapted, tmp_path)
    cores = {k: t.shape for k, t in load_file(tmp_path / "adapter_model.safetensors").items() if "_t" in k}
    assert cores and set(cores.values()) == {(2, 2, 3, 1)}
    again = load_peft(tmp_path, params, axes=axes)
    jax.tree.map(np.testing.assert_array_equal, again.trainable, adapted.trainable)


@pytest.mark.parametrize("dora", [False, True])
def test_grouped_convolutions_are_refused_by_name(dora, tmp_path):
    """Two groups: PEFT's lora_A takes all the inputs, and the outputs of lora_B half the rank each."""
    tensors = {"lora_A.weight": np.zeros((4, 6, 3, 3), "f"), "lora_B.weight": np.zeros((8, 2, 1, 1), "f")}
    tensors |= {"lora_magnitude_vector": np.ones((1, 8, 1, 1), "f")} if dora else {}
    config = {"peft_type": "LORA", "r": 4, "use_dora": dora, "target_modules": ["conv"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    save_file({f"base_model.model.conv.{k}": t for k, t in tensors.items()}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"conv: these are the shapes of a convolution of 2 groups.*target_modules"):
        load_peft(tmp_path, {"conv.weight": jnp.zeros((8, 3, 3, 3))})
