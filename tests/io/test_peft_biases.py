"""A file that is about biases alone: PEFT's BEFT."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from jlora.io import load_peft, save_peft


def random(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


PARAMS = {
    "layers": {"v": {"kernel": random(0, 3, 4, 4), "bias": random(1, 3, 4)}},
    "head": {"kernel": random(2, 4, 4), "bias": random(3, 4)},
}


def test_offsets_alone(tmp_path) -> None:
    adapted = jlora.adapt(PARAMS, {"**/v/bias": jlora.Offset(scale=0.5), "head/*": jlora.Full()}, key=jax.random.key(0))
    noise = jax.tree.map(lambda leaf: leaf + random(leaf.size, *leaf.shape), adapted.trainable)
    adapted = adapted.replace(trainable=noise)
    save_peft(adapted, tmp_path)
    again = load_peft(tmp_path, PARAMS)
    assert set(again.sites) == {"layers/v/bias", "head/kernel", "head/bias"}
    assert isinstance(again.sites["layers/v/bias"].method, jlora.Offset)
    jax.tree.map(np.testing.assert_array_equal, jlora.merge(again), jlora.merge(adapted))
    with pytest.raises(ValueError, match="no bias"):
        load_peft(tmp_path, PARAMS | {"layers": {"v": {"kernel": PARAMS["layers"]["v"]["kernel"]}}})


def test_an_offset_of_something_else(tmp_path) -> None:
    adapted = jlora.adapt(PARAMS, {"head/kernel": jlora.Offset()}, key=jax.random.key(0))
    with pytest.raises(ValueError, match="not to 'head.weight'"):
        save_peft(adapted, tmp_path)


@pytest.mark.parametrize("forms", [("lora", "constant"), ("vector", "none"), ("none", "vector")])
def test_what_is_for_a_bias_that_is_not_there(forms: tuple[str, str], tmp_path) -> None:
    """GLoRA's C, D and E: an error, unless they do nothing."""
    method = jlora.GLoRA(2, ab="vector", c=forms[0], de=forms[1])
    layer = {name: PARAMS["head"][name] for name in ("kernel", "bias")}
    rules = {"head/kernel": method, "head/bias": jlora.methods.Follow(group="head/kernel", method=method)}
    adapted = jlora.adapt({"head": layer}, rules, key=jax.random.key(0))
    moved = jax.tree.map(lambda leaf: leaf + 1.0, adapted.trainable)
    without = {"head": {"kernel": layer["kernel"]}}
    save_peft(adapted.replace(trainable=moved), tmp_path / "moved")
    with pytest.raises(ValueError, match=r"glora_[CDE].* for the bias of head, .* would be lost.* names="):
        load_peft(tmp_path / "moved", without)
    load_peft(tmp_path / "moved", {"head": layer})
    save_peft(adapted, tmp_path / "start")  # C, D and E are zero
    again = load_peft(tmp_path / "start", without)
    np.testing.assert_array_equal(jlora.merge(again)["head"]["kernel"], layer["kernel"])
