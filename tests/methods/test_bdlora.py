"""BD-LoRA: its zeros, and which modules a file gives blocks to."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import jlora
from jlora.io import load_peft, save_peft
from jlora.methods import Method

pytestmark = pytest.mark.usefixtures("x64")
normal = lambda seed, *shape: np.random.default_rng(seed).normal(size=shape)
BASE = {"up": {"kernel": normal(0, 6, 12)}, "down": {"kernel": normal(1, 12, 6)}}


def adapted(**methods: Method) -> jlora.Adapted:
    base = jax.tree.map(jnp.asarray, BASE)
    it = jlora.adapt(base, {f"{name}/*": method for name, method in methods.items()}, key=jax.random.key(0))
    noise = lambda leaf: leaf + jax.random.normal(jax.random.key(leaf.size), leaf.shape, leaf.dtype)
    return it.replace(trainable=jax.tree.map(noise, it.trainable))


def test_blocks() -> None:
    """Against products block by block, in numpy."""
    it = adapted(up=jlora.BDLoRA(6, 3.0, blocks=3), down=jlora.BDLoRA(4, 3.0, blocks=2, blocked="in"))
    delta = {name: np.asarray(jlora.merge(it)[name]["kernel"] - BASE[name]["kernel"]) for name in BASE}
    up, down = (jax.tree.map(np.asarray, it.trainable[f"{name}/kernel"]) for name in ("up", "down"))
    for i in range(3):  # outputs 4 i to 4 i + 4 hear the ranks 2 i and 2 i + 1
        out = slice(4 * i, 4 * i + 4)
        np.testing.assert_allclose(delta["up"][:, out], 0.5 * up["a"][:, 2 * i : 2 * i + 2] @ up["b"][:, out])
    for i in range(2):
        into, ranks = slice(6 * i, 6 * i + 6), slice(2 * i, 2 * i + 2)
        np.testing.assert_allclose(delta["down"][into], 0.75 * down["a"][into] @ down["b"][ranks])


def test_file(tmp_path) -> None:
    it = adapted(up=jlora.BDLoRA(4, blocks=2), down=jlora.BDLoRA(4, blocks=2, blocked="in"))
    save_peft(it, tmp_path, dtype=np.float64)
    config = json.loads((tmp_path / "adapter_config.json").read_text())["use_bdlora"]
    wanted = {"target_modules_bd_a": ["down"], "target_modules_bd_b": ["up"], "nblocks": 2, "match_strict": True}
    assert config == wanted
    shapes = {k.split("model.")[-1]: v.shape for k, v in load_file(tmp_path / "adapter_model.safetensors").items()}
    assert shapes["down.lora_A.weight"] == (4, 6) and shapes["up.lora_B.weight"] == (12, 2)
    again = load_peft(tmp_path, jax.tree.map(jnp.asarray, BASE))
    assert {site.method for site in again.sites.values()} == {site.method for site in it.sites.values()}
    jax.tree.map(np.testing.assert_array_equal, again.trainable, it.trainable)


def test_lora_beside_it(tmp_path) -> None:
    it = adapted(up=jlora.BDLoRA(4, blocks=2), down=jlora.LoRA(4))
    save_peft(it, tmp_path, dtype=np.float64)
    assert not json.loads((tmp_path / "adapter_config.json").read_text())["use_bdlora"]["match_strict"]
    again = load_peft(tmp_path, jax.tree.map(jnp.asarray, BASE))
    jax.tree.map(np.testing.assert_array_equal, again.trainable, it.trainable)


def test_refusals(tmp_path) -> None:
    with pytest.raises(ValueError, match="for instance 4"):
        jlora.BDLoRA(5, blocks=2)
    with pytest.raises(ValueError, match="4 does|6 does"):
        adapted(up=jlora.BDLoRA(5, blocks=5))
    with pytest.raises(ValueError, match="one number of blocks"):
        save_peft(adapted(up=jlora.BDLoRA(4, blocks=2), down=jlora.BDLoRA(4, blocks=1)), tmp_path)
    with pytest.raises(ValueError, match="kasa_config, velora_config and monteclora_config hold for all"):
        save_peft(adapted(up=jlora.LoRA(4), down=jlora.KaSA(4)), tmp_path)
