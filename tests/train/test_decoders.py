"""Every family of decoders against transformers: tiny random models that `tests/data/models/record.py` recorded."""

import functools
import importlib.util
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
import tokenizers
from safetensors.numpy import load_file

import jlora
from jlora.io import save_peft
from jlora.train import loading, models
from jlora.train.cli import main
from jlora.train.config import MethodOptions, SourceOptions
from jlora.train.generate import generate
from jlora.train.models import hf, layers

DATA = pathlib.Path(__file__).parents[1] / "data" / "models"
CONFIGS = {path.parent.name: json.loads(path.read_text()) for path in sorted(DATA.glob("*/config.json"))}
NAMES = [name for name, source in CONFIGS.items() if models.FAMILIES[source["model_type"]].module is layers.CausalLM]
each = pytest.mark.parametrize("name", NAMES)


@functools.partial(jax.jit, static_argnums=0)
def logits(module, params, *inputs) -> jax.Array:
    return module.apply({"params": params}, *inputs)


@each
def test_logits_are_those_of_transformers(name):
    """With padding on either side, beyond the window, and with positions that were counted without the padding."""
    model, io = models.load(DATA / name), np.load(DATA / name / "io.npz")
    mask = io["attention_mask"]
    got = np.asarray(logits(model.module, model.params, io["input_ids"], io["position_ids"], mask))
    np.testing.assert_allclose(got[mask == 1], io["logits"][mask == 1], atol=1e-4, rtol=0)
    whole = logits(model.module, model.params, io["input_ids"])[0]
    np.testing.assert_allclose(whole, io["logits"][0], atol=1e-4, rtol=0)


@each
def test_greedy_generation_with_a_cache(name):
    """The tokens that transformers generates, and those that the model without a cache finds likeliest."""
    model, io = models.load(DATA / name), np.load(DATA / name / "io.npz")
    scaling = model.config.rope_scaling
    # Frequencies that depend on the length may not change on the way, where a cache keeps the older ones.
    new = 4 if scaling is not None and scaling.kind in ("dynamic", "longrope") else 10
    prompts = [io["prompt"].tolist(), io["prompt"][5:9].tolist()]
    config = model.config
    found = generate(model.module.apply, model.params, prompts, config=config, max_new_tokens=new, batch_size=2)
    assert found[0] == io["generated"][:new].tolist()
    rows = np.zeros((2, 24), np.int32)
    for row, prompt, tokens in zip(rows, prompts, found, strict=True):
        row[: len(prompt) + new] = prompt + tokens
    length = 12 + new
    likeliest = np.argmax(logits(model.module, model.params, rows[:, :length]), axis=-1)
    for row, prompt, tokens in zip(likeliest, prompts, found, strict=True):
        assert row[len(prompt) - 1 : len(prompt) + new - 1].tolist() == tokens


@each
def test_written_files_equal_those_read(name, tmp_path):
    model = models.load(DATA / name)
    models.save_hf(model, model.params, tmp_path)
    want, got = (load_file(directory / hf.WEIGHTS) for directory in (DATA / name, tmp_path))
    assert want.keys() == got.keys()
    for key in want:
        np.testing.assert_array_equal(got[key], want[key], err_msg=key)
    assert json.loads((tmp_path / "config.json").read_text()) == CONFIGS[name]
    (tmp_path / hf.WEIGHTS).unlink()
    hf.save_params(model.params, tmp_path, model.family.layout, shard_bytes=9000)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    jax.tree.map(np.testing.assert_array_equal, models.load(tmp_path).params, model.params)


def adapted_model(name: str) -> tuple[models.LoadedModel, jlora.Adapted]:
    """With LoRA where `jlora finetune` puts it, and factors that are not zero."""
    model = models.load(DATA / name)
    options = loading.resolve_targets(MethodOptions(rank=2, alpha=4), model)
    adapted = loading.build_adapted(model, options, seed=0)
    leaves, treedef = jax.tree.flatten(adapted.trainable)
    rng = np.random.default_rng(0)
    noisy = [x + 0.1 * rng.normal(size=x.shape).astype(x.dtype) for x in leaves]
    return model, adapted.replace(trainable=jax.tree.unflatten(treedef, noisy))


@each
def test_adapter_in_the_default_places(name, tmp_path):
    """No weight's update is formed, merged equals lifted, and the file holds PyTorch's names and gives it back."""
    model, adapted = adapted_model(name)
    ids = np.load(DATA / name / "io.npz")["input_ids"][:1]
    lifted = jlora.lift(lambda params, ids: model.module.apply({"params": params}, ids), on_materialize="error")
    got, merged = np.asarray(jax.jit(lifted)(adapted.bind(), ids)), jlora.merge(adapted)
    np.testing.assert_allclose(got, logits(model.module, merged, ids), atol=1e-4, rtol=0)
    assert np.abs(got - logits(model.module, model.params, ids)).max() > 0.1

    save_peft(adapted, tmp_path / "adapter", task_type="CAUSAL_LM")
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    modules = (key.removeprefix("base_model.model.").partition(".lora_")[0] for key in tensors)
    named = {module.removesuffix(".base_layer") for module in modules}
    stored = {key.removesuffix(".weight") for key in load_file(DATA / name / hf.WEIGHTS)}
    linear = {key for key in stored if key.endswith("_proj") and ".experts." not in key}
    experts = {f"model.layers.{i}.mlp.experts" for i in range(model.config.num_layers) if model.config.experts}
    assert named == linear | experts
    again = loading.load_source(SourceOptions(model=str(DATA / name), adapter=tmp_path / "adapter"))
    jax.tree.map(np.testing.assert_array_equal, again.adapted.trainable, adapted.trainable)

    models.save_hf(model, merged, tmp_path / "merged")
    jax.tree.map(np.testing.assert_array_equal, models.load(tmp_path / "merged").params, merged)


WANTED = ("torch", "transformers", "peft")


@pytest.mark.slow
@pytest.mark.skipif(not all(map(importlib.util.find_spec, WANTED)), reason=f"wants {WANTED}")
@pytest.mark.filterwarnings("default")
@each
def test_transformers_and_peft_read_what_we_write(name, tmp_path):
    import peft
    import torch
    import transformers

    model, adapted = adapted_model(name)
    ids = np.load(DATA / name / "io.npz")["input_ids"][:1]
    models.save_hf(model, jlora.merge(adapted), tmp_path / "merged")
    save_peft(adapted, tmp_path / "adapter", task_type="CAUSAL_LM")
    want = logits(model.module, jlora.merge(adapted), ids)
    read = lambda directory: transformers.AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager")
    merged, base = read(tmp_path / "merged"), read(DATA / name)
    with torch.no_grad():
        np.testing.assert_allclose(merged(torch.tensor(ids)).logits, want, atol=1e-4, rtol=0)
        wrapped = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
        np.testing.assert_allclose(wrapped(torch.tensor(ids)).logits, want, atol=1e-4, rtol=0)


# The command line


def with_tokenizer(name: str, directory: pathlib.Path) -> pathlib.Path:
    """A copy of a recorded model with a tokenizer of single characters."""
    shutil.copytree(DATA / name, directory)
    characters = "<s></s>abcdefghijklmnopqrstuvwxyzTO 0123456789.=?"
    vocab = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", *dict.fromkeys(characters[7:])])}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="?"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    inner.decoder = tokenizers.decoders.Fuse()
    inner.save(str(directory / "tokenizer.json"))
    return directory


def finetune_and_merge(name, tiny_data, tmp_path, *more):
    model = with_tokenizer(name, tmp_path / "model")
    options = "--steps 2 --batch-size 2 --max-length 32 --rank 2 --eval-batch-size 8 --max-new-tokens 4 --eval-limit 8"
    run = tmp_path / "run"
    assert (
        main(["finetune", "--model", str(model), "--data", str(tiny_data), *options.split(), *more, "--out", str(run)])
        == 0
    )
    assert (run / "adapter" / "adapter_model.safetensors").exists()
    assert main(["merge", "--run", str(run), "--out", str(tmp_path / "merged")]) == 0
    want, got = (load_file(directory / hf.WEIGHTS) for directory in (model, tmp_path / "merged"))
    assert {k: v.shape for k, v in want.items()} == {k: v.shape for k, v in got.items()}
    assert any((want[key] != got[key]).any() for key in want)


@pytest.mark.parametrize(("name", "more"), [("gemma2", []), ("mixtral", ["--bf16", "--remat", "layers"])])
def test_finetune_and_merge(name, more, tiny_data, tmp_path):
    finetune_and_merge(name, tiny_data, tmp_path, *more)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(NAMES) - {"gemma2", "mixtral", "llama_dynamic"}))
def test_finetune_and_merge_the_others(name, tiny_data, tmp_path):
    finetune_and_merge(name, tiny_data, tmp_path)


# Configuration


def config_of(name: str, **changes) -> models.DecoderConfig:
    return models.FAMILIES[CONFIGS[name]["model_type"]].config(CONFIGS[name] | changes)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("mistral", {"attention_bias": True}, "attention_bias=True: not known for model_type 'mistral'"),
        ("llama3", {"logits_scaling": 8.0}, "logits_scaling=8.0: not known .* delete it from config.json"),
        ("llama3", {"quantization_config": {"quant_method": "gptq"}}, "the checkpoint is quantized"),
        ("llama3", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5"),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
        ("gemma2", {"hidden_activation": "relu"}, "hidden_activation is 'relu'"),
        ("gemma2", {"layer_types": ["chunked_attention"] * 4}, r"layer_types has \['chunked_attention'\]"),
        ("gemma2", {"layer_types": ["full_attention"] * 3}, "given for 3 layers, and there are 4"),
        ("gemma3", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0"),
        ("gemma3", {"rope_parameters": {"sliding_attention": {"rope_type": "linear"}}}, "of the local layers"),
        ("mixtral", {"router_jitter_noise": 0.1}, "router_jitter_noise=0.1"),
        ("mixtral", {"num_experts_per_tok": 5}, "cannot go to 5 of 4 experts"),
        ("qwen2_moe", {"mlp_only_layers": [0]}, r"mlp_only_layers=\[0\] leave layers without experts"),
        ("qwen2_moe", {"use_sliding_window": True, "layer_types": None}, "use_sliding_window without layer_types"),
        ("phi3", {"sliding_window": 0}, "at least 1 token"),
        ("phi3_longrope", {"rope_parameters": {"rope_type": "longrope"}}, "no 'short_factor'"),
    ],
)
def test_what_is_not_built_is_refused(name, change, message):
    with pytest.raises(ValueError, match=message):
        config_of(name, **change)


def test_what_cannot_matter_is_passed_over():
    known = config_of("llama3")
    changes = {
        "_name_or_path": "x",
        "transformers.js_config": {"dtype": "q4"},
        "torch_dtype": "bfloat16",
        "mystery": None,
        "unk_token_id": 3,
        "use_cache": False,
    }
    assert config_of("llama3", **changes) == known


def test_older_spellings_of_gemma():
    """Files from before `layer_types` and `rope_parameters` name the period and the bases."""
    older = dict(layer_types=None, rope_parameters=None, rope_theta=1e6, rope_local_base_freq=1e3)
    older |= dict(sliding_window_pattern=3, rope_scaling={"rope_type": "linear", "factor": 4.0})
    assert config_of("gemma3", **older) == config_of("gemma3")
    assert config_of("gemma3").local_layers == (True, True, False, True)
    assert config_of("gemma2", layer_types=None) == config_of("gemma2")
    assert config_of("gemma2").local_layers == (True, False, True, False)


def test_window_of_all_layers_needs_no_choice():
    """A model whose layers are of one kind traces no selection between kinds."""
    for name, chooses in (("llama3", False), ("mistral", False), ("gemma3", True)):
        model = models.load(DATA / name)
        jaxpr = jax.make_jaxpr(lambda p, model=model: model.module.apply({"params": p}, np.ones((1, 4), int)))(
            model.params
        )
        scans = [str(eqn) for eqn in jaxpr.eqns if eqn.primitive.name == "scan"]
        assert len(scans) == 1 and ("select_n" in scans[0]) >= chooses


def test_experts_take_their_tokens():
    """The sorted ragged product against a loop over tokens and experts."""
    model = models.load(DATA / "qwen2_moe")
    weights = jax.tree.map(lambda leaf: leaf[0], model.params["model"]["layers"]["mlp"])
    x = np.random.default_rng(0).normal(size=(2, 5, 16)).astype(np.float32)
    got = layers.MixtureOfExperts(model.config).apply({"params": weights}, x)

    silu = lambda z: z / (1 + np.exp(-z))
    w = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), weights)
    shared = {name: w["shared_expert"][f"{name}_proj"]["kernel"] for name in ("gate", "up", "down")}
    want = np.zeros(x.shape)
    for at in np.ndindex(2, 5):
        token = x[at].astype(np.float64)
        p = np.exp(token @ w["gate"]["kernel"])
        p /= p.sum()
        for e in np.argsort(-p)[:2]:
            gate, up = np.split(token @ w["experts"]["gate_up_proj"][e], 2)
            want[at] += p[e] * (silu(gate) * up) @ w["experts"]["down_proj"][e]
        y = (silu(token @ shared["gate"]) * (token @ shared["up"])) @ shared["down"]
        want[at] += y / (1 + np.exp(-token @ w["shared_expert_gate"]["kernel"]))
    np.testing.assert_allclose(got, want, atol=1e-5)
