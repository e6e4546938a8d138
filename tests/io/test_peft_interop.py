"""PEFT reads what jlora wrote, and computes the same logits: every method of every format. Wants torch, transformers
and peft."""

import importlib.util
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from recorded import DIRECTORY

import jlora
from jlora.io import save_peft
from jlora.io.formats import FORMATS
from jlora.methods import Follow, Site
from jlora.methods.alora import invocation_offsets
from jlora.train import models

WANTED = ("torch", "transformers", "peft")
absent = [name for name in WANTED if importlib.util.find_spec(name) is None]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(absent), reason=f"not installed: {absent}"),
    pytest.mark.skipif(not DIRECTORY.is_dir(), reason=f"no directory {DIRECTORY}: set JLORA_ORACLES"),
    pytest.mark.filterwarnings("default"),  # theirs; the ones about the adapter are looked at below
]

QKV = "**/self_attn/{q,k,v}_proj/kernel"
MATRICES = "**/{q,v,down}_proj/kernel"  # [32, 32], [32, 16] and [64, 32]
INVOCATION = (5, 9)
# What a method is tried with where its defaults do not fit these small weights, or say too little.
EXAMPLES = {
    "LoRA": [jlora.LoRA(3, alpha=7)],
    "DoRA": [jlora.DoRA(3, alpha=6)],
    "ALoRA": [jlora.ALoRA(3, alpha=7, invocation_tokens=INVOCATION)],
    "BDLoRA": [jlora.BDLoRA(4, alpha=7, blocked=side) for side in ("in", "out")],
    "KaSA": [jlora.KaSA(3, alpha=7)],
    "VeLoRA": [jlora.VeLoRA(3, alpha=7, groups=8, direction=direction) for direction in ("average", "fixed")],
    "MonteCLoRA": [jlora.MonteCLoRA(3, alpha=7, samples=4)],
    "GraLoRA": [jlora.GraLoRA(4, alpha=7), jlora.GraLoRA(4, alpha=7, blocks=4, hybrid_rank=2)],
    "LoHa": [jlora.LoHa(3, alpha=5)],
    "LoKr": [jlora.LoKr(2, alpha=5), jlora.LoKr(2, alpha=5, decompose_both=True, factor=4)],
    "HiRA": [jlora.HiRA(3)],
    "MiSS": [jlora.MiSS(5), jlora.MiSS(4, mini=8)],
    "Bat": [jlora.Bat(4)],
    "HRA": [jlora.HRA(4), jlora.HRA(4, orthogonal=True)],
    "OFT": [jlora.OFT(8, adjust=True), jlora.OFT(8, adjust=True, neumann=None), jlora.OFT(blocks=4, adjust=True)],
    "BOFT": [jlora.BOFT(4, levels=2), jlora.BOFT(blocks=4)],
    "RoAd": [jlora.RoAd(variant, group_size=8) for variant in (1, 2, 4)],
    "DeLoRA": [jlora.DeLoRA(3, strength=2.0)],
    "AdaLoRA": [jlora.AdaLoRA(4, alpha=6)],
    "SHiRA": [jlora.SHiRA(2)],
    "TrainableTokens": [jlora.TrainableTokens((3, 0, 41))],
    "FourierFT": [jlora.FourierFT(50, scaling=40.0)],
    "WaveFT": [jlora.WaveFT(60, scaling=2.0), jlora.WaveFT(60, scaling=2.0, wavelet="db2")],
    "IA3": [jlora.IA3(), jlora.IA3("inputs")],
    "C3A": [jlora.C3A(8)],
    "VeRA": [jlora.VeRA(5)],
    "PVeRA": [jlora.PVeRA(5)],
    "TinyLoRA": [jlora.TinyLoRA(2, 7), jlora.TinyLoRA(2, 7, group="tiny")],
    "PSOFT": [jlora.PSOFT(6), jlora.PSOFT(6, orthogonal=False, gain_in=False)],
    "PEANuT": [jlora.PEANuT(4, depth=2), jlora.PEANuT(4, activation="tanh")],
    "SuperTuning": [jlora.SuperTuning(0.9), jlora.SuperTuning(0.9, rank=2)],
    "VBLoRA": [
        jlora.VBLoRA(2, num_vectors=9, vector_length=8),
        jlora.VBLoRA(2, num_vectors=9, vector_length=8, store_topk=True),
    ],
    "UniLoRA": [jlora.UniLoRA(2, length=30)],
    "RandLoRA": [jlora.RandLoRA(3, alpha=6)],
    "Lily": [jlora.Lily(4, scale=0.5)],
    "GLoRA": [jlora.GLoRA(3), jlora.GLoRA(ab="vector", c="vector", de="vector")],
    "OSF": [jlora.OSF(0.75)],
    "FRoD": [jlora.FRoD(0.1)],
    "DEFT": [jlora.DEFT(3)],
    "Poly": [jlora.Poly(2, 3, skills=2, splits=2, task=1)],
}
TARGETS = {"TrainableTokens": "**/embedding", "Offset": "**/{q,v}_proj/bias"}
# Every method that is written as a file, by itself.
EACH = {
    f"{fmt.peft_type} {method}": {TARGETS.get(cls.__name__, MATRICES): method}
    for fmt in FORMATS.values()
    for cls in fmt.methods
    for method in EXAMPLES.get(cls.__name__) or [cls()]
}
# What is trained beside adapters, and what differs from matrix to matrix.
TOGETHER = {
    "rslora": {QKV: jlora.LoRA(4, alpha=7, rslora=True, dropout=0.1)},
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
    "tokens": {"**/q_proj/kernel": jlora.LoRA(2), "**/embedding": jlora.TrainableTokens((3, 0, 41))},
}
RULES = EACH | TOGETHER
# What PEFT 0.21.2 does not do with a right file.
DEFECTS = {
    f"BOFT {EXAMPLES['BOFT'][0]}": "PEFT takes one level, with a warning, where its CUDA extension is not built",
}


@pytest.mark.parametrize("base", ["base_llama", "base_qwen2"])
@pytest.mark.parametrize("rules", RULES)
def test_peft_computes_the_same(base, rules, tmp_path, recwarn):
    import peft
    import torch
    import transformers

    if rules in DEFECTS:
        pytest.skip(DEFECTS[rules])
    model = models.load(DIRECTORY / "peft_dirs" / base)
    for word, wanted, why in (("bias'", "**/bias", "biases"), ("lm_head", "lm_head/*", "a head of its own")):
        if word in str([*RULES[rules]]) and not any(
            jlora.paths.matches(wanted, *leaf) for leaf in leaves(model.params)
        ):
            pytest.skip(f"a model without {why}")
    adapted = jlora.adapt(model.params, RULES[rules], key=jax.random.key(0), axes=STACKED)
    keys = iter(jax.random.split(jax.random.key(1), 100))
    noise = lambda leaf: leaf + 0.3 * jax.random.normal(next(keys), leaf.shape, leaf.dtype)
    trainable = jax.tree.map(noise, adapted.trainable)
    adapted = adapted.replace(trainable={path: padded(adapted, path, leaf) for path, leaf in trainable.items()})
    adapted = with_biases(adapted)
    save_peft(adapted, tmp_path, base_model_name_or_path=base, task_type="CAUSAL_LM")

    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, (2, 7))
    ids[0, 2:4] = INVOCATION
    context, options = {"alora_offsets": invocation_offsets(ids, INVOCATION)}, {}
    if "Poly" in rules:
        context["task_ids"] = jnp.array([2, 0])
        options["task_ids"] = torch.tensor([2, 0])
    apply = jlora.lift(lambda params, ids: model.module.apply({"params": params}, ids), on_materialize="error")
    ours = np.asarray(apply(adapted.bind(context=context), jnp.asarray(ids, jnp.int32)))
    unadapted = np.asarray(apply(model.params, jnp.asarray(ids, jnp.int32)))
    with torch.no_grad():
        hf = transformers.AutoModelForCausalLM.from_pretrained(
            DIRECTORY / "peft_dirs" / base, dtype=torch.float32, attn_implementation="eager"
        )
        recwarn.clear()
        theirs = peft.PeftModel.from_pretrained(hf, tmp_path).eval()(torch.from_numpy(ids), **options).logits.numpy()
    told = [str(w.message) for w in recwarn if "adapter keys" in str(w.message) or "unexpected" in str(w.message)]
    assert not [key for message in told for key in re.findall(r"'([^']+)'", message) if not NOT_SAVED.search(key)]
    np.testing.assert_allclose(ours, theirs, atol=1e-4 * max(1.0, np.abs(theirs).max()), rtol=0)
    assert np.abs(ours - unadapted).max() > 0.1


# What PEFT leaves out of its own files, and warns of when it reads them: what is shared by the modules of a model or
# follows a table that is, and buffers of zeros.
NOT_SAVED = re.compile(r"\.randlora_[AB]\.|\.lm_head\.trainable_tokens_delta\.|\.glora_[A-E]\.\w+\.zeros$")
STACKED = {"model/layers/**/kernel": jlora.Axes((1,), (2,), (0,))}


def leaves(params):
    return jlora.paths.flatten(params)[0]


def with_biases(adapted):
    """PEFT changes the bias of a module with its outputs where the format says so."""
    formats = {cls: fmt for fmt in FORMATS.values() for cls in fmt.methods}
    shapes = {path: leaf.shape for path, leaf in leaves(adapted.base)}
    trainable, sites = dict(adapted.trainable), adapted.sites
    for path, site in adapted.sites.items():
        bias = path.removesuffix("kernel") + "bias"
        if bias in shapes and bias not in sites and formats[type(site.method)].follows(site.method):
            sites[bias] = Site(Follow(group=path, method=site.method, n_stack=len(site.axes.stack)), None, shapes[bias])
            trainable[bias] = {}
    return adapted.replace(trainable=trainable, _sites=tuple(sites.items()))


def padded(adapted, path, leaf):
    """A leaf with what lies beyond the true ranks at zero, where training would have left it."""
    site = adapted.sites.get(path)
    if not isinstance(getattr(getattr(site, "method", None), "ranks", None), tuple):
        return leaf
    if isinstance(leaf, dict):
        return leaf | {"factors": site.method.mask_ranks(leaf["factors"])}
    return site.method.mask_ranks(leaf)
