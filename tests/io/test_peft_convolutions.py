"""Adapters of convolutions mean the same on a kernel in Flax's layout and on a weight in PyTorch's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import jlora
from jlora.io import load_peft, save_peft

METHODS = {
    "loha": jlora.LoHa(2, alpha=3.0),
    "loha_tucker": jlora.LoHa(2, alpha=3.0, effective_conv=True),
    "lokr": jlora.LoKr(1, alpha=3.0),
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
