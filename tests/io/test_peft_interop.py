"""PEFT reads what jlora wrote, and computes the same logits. Wants torch, transformers and peft."""

import importlib.util
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from jlora.io import save_peft
from jlora.train import models

ORACLES = pathlib.Path(os.environ.get("JLORA_ORACLES", pathlib.Path(__file__).parents[3] / "shared" / "oracles"))
WANTED = ("torch", "transformers", "peft")
absent = [name for name in WANTED if importlib.util.find_spec(name) is None]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(absent), reason=f"not installed: {absent}"),
    pytest.mark.skipif(not ORACLES.is_dir(), reason=f"no directory {ORACLES}: set JLORA_ORACLES"),
    pytest.mark.filterwarnings("default"),  # theirs; the ones about the adapter are looked at below
]

QKV = "**/self_attn/{q,k,v}_proj/kernel"
RULES = {
    "lora": {"**/*_proj/kernel": jlora.LoRA(4, alpha=7)},
    "rslora": {QKV: jlora.LoRA(4, alpha=7, rslora=True, dropout=0.1)},
    "dora": {QKV: jlora.DoRA(3, alpha=6)},
    "vera": {QKV: jlora.VeRA(5)},
    "two scales": {QKV: jlora.LoRA(4, alpha=7, rslora=True), "**/mlp/*/kernel": jlora.LoRA(2, alpha=3)},
    "ranks of their own": {
        "**/q_proj/kernel": jlora.LoRA(3, ranks=(3, 1), alphas=(5, 2.5)),
        "**/v_proj/kernel": jlora.LoRA(2, ranks=(0, 2)),
    },
    "dora on one layer": {"**/v_proj/kernel": jlora.DoRA(2, ranks=(0, 2)), "**/q_proj/kernel": jlora.DoRA(2)},
    "whole leaves": {"**/q_proj/kernel": jlora.LoRA(2), "**/*norm/scale": jlora.Full(), "lm_head/*": jlora.Full()},
    "one of many norms": {"**/q_proj/kernel": jlora.LoRA(2), "**/input_layernorm/scale": jlora.Full()},
    "embedding": {"**/embedding": jlora.LoRA(2, lookup_only=True), "**/q_proj/kernel": jlora.LoRA(2)},
    "biases": {"**/q_proj/kernel": jlora.LoRA(2), "**/q_proj/bias": jlora.Full()},
    "all biases": {"**/q_proj/kernel": jlora.LoRA(2), "**/bias": jlora.Full()},
    "offsets": {QKV: jlora.LoRA(2, alpha=5), "**/q_proj/bias": jlora.Offset(scale=0.5)},
}


@pytest.mark.parametrize("base", ["base_llama", "base_qwen2"])
@pytest.mark.parametrize("rules", RULES)
def test_peft_computes_the_same(base, rules, tmp_path, recwarn):
    import peft
    import torch
    import transformers

    model = models.load(ORACLES / "peft_dirs" / base)
    if "bias" in str(RULES[rules]) and base == "base_llama":
        pytest.skip("a model without biases")
    if "lm_head" in str(RULES[rules]) and "lm_head" not in model.params:
        pytest.skip("a model with a tied head")
    adapted = jlora.adapt(model.params, RULES[rules], key=jax.random.key(0), axes=STACKED)
    keys = iter(jax.random.split(jax.random.key(1), 100))
    noise = lambda leaf: leaf + 0.3 * jax.random.normal(next(keys), leaf.shape, leaf.dtype)
    trainable = jax.tree.map(noise, adapted.trainable)
    adapted = adapted.replace(trainable={path: padded(adapted, path, leaf) for path, leaf in trainable.items()})
    save_peft(adapted, tmp_path, base_model_name_or_path=base, task_type="CAUSAL_LM")

    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, (2, 7))
    apply = jlora.lift(lambda params, ids: model.module.apply({"params": params}, ids), on_materialize="error")
    ours = np.asarray(apply(adapted.bind(), jnp.asarray(ids, jnp.int32)))
    unadapted = np.asarray(apply(model.params, jnp.asarray(ids, jnp.int32)))
    with torch.no_grad():
        hf = transformers.AutoModelForCausalLM.from_pretrained(
            ORACLES / "peft_dirs" / base, dtype=torch.float32, attn_implementation="eager"
        )
        recwarn.clear()
        theirs = peft.PeftModel.from_pretrained(hf, tmp_path).eval()(torch.from_numpy(ids)).logits.numpy()
    assert not [str(w.message) for w in recwarn if "adapter keys" in str(w.message) or "unexpected" in str(w.message)]
    np.testing.assert_allclose(ours, theirs, atol=1e-4 * max(1.0, np.abs(theirs).max()), rtol=0)
    assert np.abs(ours - unadapted).max() > 0.1


STACKED = {"model/layers/**/kernel": jlora.Axes((1,), (2,), (0,))}


def padded(adapted, path, leaf):
    """A leaf with what lies beyond the true ranks at zero, where training would have left it."""
    site = adapted.sites.get(path)
    if not getattr(getattr(site, "method", None), "ranks", None):
        return leaf
    if isinstance(leaf, dict):
        return leaf | {"factors": site.method.mask_ranks(leaf["factors"])}
    return site.method.mask_ranks(leaf)
