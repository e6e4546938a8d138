import dataclasses
import json
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from safetensors.numpy import load_file, save_file

import jlora
from jlora.train import models
from jlora.train.models import hf, layers, stories

DATA = pathlib.Path(__file__).parents[1] / "data" / "models"
GOLDEN = [
    ("Once upon a time, there was a little girl named Lily. She loved to play with her toys in the park.", 31, 1.29),
    ("One day, a boy named Tim found a big red ball. He was very happy and showed it to his mom.", 33, 2.10),
    ("ROMEO: But, soft! what light through yonder window breaks? It is the east, and Juliet is the sun.", 62, 38.56),
    ("The quarterly fiscal report indicates substantial macroeconomic uncertainty in derivatives.", 65, 137.97),
]


def padded(rows, width):
    return np.array([row + [0] * (width - len(row)) for row in rows], np.int32)


def test_bundled_model_has_its_known_perplexities(stories, stories_logits):
    rows = [[1, *stories.tokenizer.encode(text)] for text, _, _ in GOLDEN]
    ids = padded(rows, 66)
    logp = jax.nn.log_softmax(stories_logits(stories.params, ids))[:, :-1]
    scores = np.asarray(jnp.take_along_axis(logp, ids[:, 1:, None], axis=-1))[..., 0]
    for row, score, (_, tokens, perplexity) in zip(rows, scores, GOLDEN, strict=True):
        assert len(row) - 1 == tokens
        assert np.exp(-score[:tokens].mean()) == pytest.approx(perplexity, abs=0.005)


def test_bundled_model_has_260032_parameters_stacked_by_layer(stories):
    assert sum(leaf.size for leaf in jax.tree.leaves(stories.params)) == 260_032
    shapes = jax.tree.map(jnp.shape, stories.params["model"]["layers"]["self_attn"])
    assert shapes["q_proj"]["kernel"] == (5, 64, 64) and shapes["k_proj"]["kernel"] == (5, 64, 32)
    assert "lm_head" not in stories.params


def base_directories(oracles):
    """Those of the recorded base models whose family is built here."""
    found = [path.parent for path in sorted(oracles.glob("peft_dirs/base_*/config.json"))]
    return [d for d in found if json.loads((d / "config.json").read_text())["model_type"] in models.FAMILIES]


def test_logits_agree_with_recorded_ones(oracles, recorded_inputs, same_logits):
    directories = base_directories(oracles)
    assert directories
    for directory in directories:
        model = models.load(directory)
        recorded = np.load(directory / "io.npz")
        logits = model.module.apply({"params": model.params}, **recorded_inputs(recorded))
        same_logits(logits, recorded["logits"], recorded, err_msg=directory.name)


def test_written_model_equals_the_one_read(oracles, tmp_path):
    for source in base_directories(oracles):
        model = models.load(source)
        models.save_hf(model, model.params, tmp_path / source.name)
        want, got = (load_file(d / hf.WEIGHTS) for d in (source, tmp_path / source.name))
        assert want.keys() == got.keys()
        for name in want:
            np.testing.assert_array_equal(got[name], want[name], err_msg=name)


def test_bundled_model_survives_the_hugging_face_layout(stories, tmp_path):
    models.save_hf(stories, stories.params, tmp_path)
    again = models.load(tmp_path)
    assert again.config == stories.config
    jax.tree.map(np.testing.assert_array_equal, again.params, stories.params)
    assert again.tokenizer.encode("Once upon a time") == stories.tokenizer.encode("Once upon a time")
    assert again.tokenizer.eos_id == 1


@pytest.fixture
def directory(stories, tmp_path) -> pathlib.Path:
    models.save_hf(stories, stories.params, tmp_path / "model")
    return tmp_path / "model"


def test_shards_equal_the_single_file(stories, directory):
    (directory / hf.WEIGHTS).unlink()
    hf.save_params(stories.params, directory, shard_bytes=300_000)
    shards = sorted(directory.glob("model-*.safetensors"))
    assert len(shards) == 4 and all(shard.stat().st_size < 310_000 for shard in shards)
    jax.tree.map(np.testing.assert_array_equal, models.load(directory).params, stories.params)
    shards[1].unlink()
    with pytest.raises(FileNotFoundError, match=r"model-00002-of-00004.safetensors is missing, though .*index.json"):
        models.load(directory)


SPECS = {
    "**/q_proj/kernel": P(None, None, "model"),
    "**/{k,v}_proj/kernel": P(None, "model", "data"),
    "**/o_proj/kernel": P(None, ("data", "model"), None),
    re.compile("mlp/(up|gate)_proj"): P(None, None, "model"),
    "**/down_proj/kernel": P(None, "data"),
    "**/embedding": P("model", "data"),
}


def test_loading_onto_a_mesh(stories, directory, devices, monkeypatch):
    """Each leaf lies where its spec says; each number is read once, however many devices get it."""
    mesh = Mesh(np.array(devices).reshape(2, 4), ("data", "model"))
    monkeypatch.setattr(hf, "_PORTION_BYTES", 1000)
    read = []
    build = hf.build_params

    def counting(module, shapes, fetch, *rest, **options):
        def counted(name, block):
            read.append(fetch(name, block).size)
            return fetch(name, block)

        return build(module, shapes, counted, *rest, **options)

    monkeypatch.setattr(hf, "build_params", counting)
    for source in (directory, "stories260k"):
        read.clear()
        params = models.load(source, mesh=mesh, specs=SPECS).params
        assert sum(read) == sum(leaf.size for leaf in jax.tree.leaves(params)) == 260_032
        jax.tree.map(np.testing.assert_array_equal, params, stories.params)
        specs = {path: leaf.sharding.spec for path, leaf in flatten_dict(params, sep="/").items()}
        assert all(leaf.sharding.mesh == mesh for leaf in jax.tree.leaves(params))
        assert specs["model/layers/self_attn/v_proj/kernel"] == P(None, "model", "data")
        assert specs["model/layers/mlp/gate_proj/kernel"] == P(None, None, "model")
        assert specs["model/norm/scale"] == P()
    whole = models.load(directory, mesh=mesh).params
    assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(whole))


@pytest.mark.parametrize("spec", [P("data"), P(None, "model"), P("data", "model"), P(None, "data", None, "model")])
def test_experts_onto_a_mesh(spec, devices):
    """Layers, experts, inputs and outputs of a leaf that many tensors make up."""
    source = DATA / "mixtral"
    wanted = models.load(source).params
    mesh = Mesh(np.array(devices[:4]).reshape(2, 2), ("data", "model"))
    params = models.load(source, mesh=mesh, specs={"**/experts/*": spec}).params
    jax.tree.map(np.testing.assert_array_equal, params, wanted)
    found = {path: leaf.sharding.spec for path, leaf in flatten_dict(params, sep="/").items() if "/experts/" in path}
    assert len(found) == 2 and set(found.values()) == {spec}


def test_specs_that_do_not_fit(devices):
    mesh = Mesh(np.array(devices[:2]), ("model",))
    with pytest.raises(ValueError, match="model/layers/mlp/down_proj/kernel"):
        models.load("stories260k", mesh=mesh, specs={"**/down_proj/kernel": P("model")})


def test_specs_without_a_mesh():
    with pytest.raises(ValueError, match="pass mesh="):
        models.load("stories260k", specs=SPECS)


def test_bfloat16_files_and_parameters(stories, directory):
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), stories.params)
    models.save_hf(stories, half, directory)
    model = models.load(directory, dtype="bfloat16")
    jax.tree.map(np.testing.assert_array_equal, model.params, half)
    ids = np.array([[1, 403, 407, 261]], np.int32)
    logits = model.module.apply({"params": model.params}, ids)
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, stories.module.apply({"params": stories.params}, ids), atol=0.5)
    assert models.load(directory).params["model"]["norm"]["scale"].dtype == jnp.float32


@pytest.mark.optimized
def test_what_is_computed_again(stories):
    """The same gradients for less memory, and for more operations only where products are computed again."""
    ids = np.arange(1, 257, dtype=np.int32).reshape(2, 128)
    fn = lambda params, ids: stories.module.apply({"params": params}, ids)
    adapted = jlora.adapt(stories.params, jlora.LoRA(4), "**/*_proj/kernel", key=jax.random.key(0), fn=fn, args=(ids,))
    trainable = jax.tree.map(lambda x: x + 0.1, adapted.trainable)
    found = {}
    for remat in ("none", "products", "layers"):
        apply = jlora.lift(models.load("stories260k", remat=remat).module.apply)
        loss = lambda trainable, fixed: jax.nn.logsumexp(apply({"params": fixed.bind(trainable)}, ids)).sum()  # noqa: B023
        compiled = jax.jit(jax.grad(loss)).lower(trainable, adapted).compile()
        memory, cost = compiled.memory_analysis().temp_size_in_bytes, compiled.cost_analysis()["flops"]
        found[remat] = compiled(trainable, adapted), memory, cost
    grads, memory, flops = zip(*found.values(), strict=True)
    for got in grads[1:]:
        jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, atol=1e-5 * np.abs(w).max()), got, grads[0])
    assert memory[0] > 1.3 * memory[1] > 1.3 * memory[2]
    assert flops[0] < flops[1] < 1.15 * flops[0] < flops[2]
    with pytest.raises(ValueError, match="got remat='all'; want one of none, products, layers"):
        models.load("stories260k", remat="all").module.apply({"params": stories.params}, ids)


def test_segments_do_not_see_each_other(stories, stories_logits):
    a, b = np.arange(5, 12, dtype=np.int32)[None], np.arange(40, 49, dtype=np.int32)[None]
    packed = np.concatenate([a, b], axis=1)
    positions = np.concatenate([np.arange(7), np.arange(9)])[None]
    segments = np.array([[1] * 7 + [2] * 9])
    logits = stories_logits(stories.params, packed, positions, segments)
    np.testing.assert_allclose(logits[:, :7], stories_logits(stories.params, a), atol=2e-5)
    np.testing.assert_allclose(logits[:, 7:], stories_logits(stories.params, b), atol=2e-5)


def test_cached_logits_equal_those_of_the_whole_sequence(stories, stories_logits):
    ids = np.arange(3, 27, dtype=np.int32).reshape(2, 12)
    cache = models.Cache.empty(stories.config, 2, 16)
    parts = []
    for piece in (ids[:, :7], ids[:, 7:8], ids[:, 8:]):
        logits, cache = stories.module.apply({"params": stories.params}, piece, None, None, cache)
        parts.append(logits)
    np.testing.assert_allclose(np.concatenate(parts, axis=1), stories_logits(stories.params, ids), atol=2e-5)
    assert int(cache.index) == 12


# Configuration

MINIMAL = {
    "vocab_size": 8,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def test_configuration_defaults_and_both_spellings_of_rope():
    config = models.FAMILIES["llama"].config(MINIMAL)
    assert (config.head_dim, config.num_kv_heads, config.rope_theta) == (4, 4, 10000.0)
    assert not (config.tie_embeddings or config.qkv_bias or config.o_bias)
    assert models.FAMILIES["qwen2"].config(MINIMAL).qkv_bias
    old = {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 4.0}}
    new = {"rope_parameters": {"rope_theta": 5e5, "rope_type": "linear", "factor": 4.0}}
    parsed = [models.FAMILIES["llama"].config(MINIMAL | rope) for rope in (old, new)]
    assert parsed[0] == parsed[1] and parsed[0].rope_scaling == layers.RopeScaling("linear", 4.0)


def test_llama3_rope_keeps_fast_and_slows_slow_frequencies():
    scaling = layers.RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)
    config = dataclasses.replace(models.FAMILIES["llama"].config(MINIMAL), head_dim=128, rope_theta=5e5)
    plain = np.asarray(layers.rotary_frequencies(config))
    scaled = np.asarray(layers.rotary_frequencies(dataclasses.replace(config, rope_scaling=scaling)))
    wavelength = 2 * np.pi / plain
    smooth = (8192 / wavelength - 1) / 3
    between = (1 - smooth) * plain / 8 + smooth * plain
    want = np.where(wavelength < 8192 / 4, plain, np.where(wavelength > 8192, plain / 8, between))
    np.testing.assert_allclose(scaled, want, rtol=1e-5)
    assert len(np.unique(np.round(scaled / plain, 4))) > 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4}}, "rope type 'yarn' is not built"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 4}}, "no 'low_freq_factor' among its keys"),
        ({"num_key_value_heads": 3}, "4 attention heads cannot share 3"),
        ({"head_dim": 3}, "even head_dim, got 3"),
    ],
)
def test_configurations_that_are_not_built(change, message):
    with pytest.raises(ValueError, match=message):
        models.FAMILIES["llama"].config(MINIMAL | change)


# Directories that are not right


def edit_config(directory, **changes):
    path = directory / "config.json"
    content = {k: v for k, v in (json.loads(path.read_text()) | changes).items() if v is not None}
    path.write_text(json.dumps(content))


def edit_tensors(directory, edit):
    tensors = load_file(directory / hf.WEIGHTS)
    edit(tensors)
    save_file(tensors, directory / hf.WEIGHTS)


def test_unknown_name(tmp_path):
    with pytest.raises(FileNotFoundError, match="no model directory .*'stories260k', which is shipped"):
        models.load(tmp_path / "nowhere")


def test_missing_files(directory):
    (directory / hf.WEIGHTS).unlink()
    with pytest.raises(FileNotFoundError, match="neither model.safetensors nor .*it holds .*config.json"):
        models.load(directory)
    (directory / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="config.json is missing"):
        models.load(directory)


def test_tokenizer_is_asked_for_only_when_used(directory):
    (directory / "tokenizer.json").unlink()
    model = models.load(directory)
    with pytest.raises(FileNotFoundError, match="no tokenizer.json"):
        _ = model.tokenizer


@pytest.mark.parametrize("content", ["{", "[]", ""])
def test_malformed_configuration(directory, content):
    (directory / "config.json").write_text(content)
    with pytest.raises(ValueError, match="config.json"):
        models.load(directory)


def test_unknown_family_and_missing_key(directory):
    edit_config(directory, model_type="mamba")
    with pytest.raises(ValueError, match=r"model_type 'mamba' is not known; known are \['bert', .*'llama', "):
        models.load(directory)
    edit_config(directory, model_type="llama", vocab_size=None)
    with pytest.raises(ValueError, match="config.json: no 'vocab_size' among its keys"):
        models.load(directory)


@pytest.mark.parametrize("kept", [0, 4, 200, -2])
def test_truncated_weights(directory, kept):
    file = directory / hf.WEIGHTS
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(ValueError, match="model.safetensors is not a whole safetensors file"):
        models.load(directory)


def test_tensors_that_do_not_fit_are_listed(directory):
    def spoil(tensors):
        del tensors["model.norm.weight"]
        tensors["model.layers.2.mlp.up_proj.weight"] = np.zeros((170, 64), np.float32)
        tensors["model.layers.0.self_attn.q_proj.bias"] = np.zeros(64, np.float32)

    edit_tensors(directory, spoil)
    with pytest.raises(ValueError) as caught:
        models.load(directory)
    lines = str(caught.value).split("\n")
    assert "3 tensors do not fit" in lines[0]
    assert [line.split() for line in lines[2:]] == [
        ["model.layers.0.self_attn.q_proj.bias", "nothing", "(64,)"],
        ["model.layers.2.mlp.up_proj.weight", "(172,", "64)", "(170,", "64)"],
        ["model.norm.weight", "(64,)", "missing"],
    ]


def test_redundant_tensors_are_passed_over(stories, directory):
    def add(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)

    edit_tensors(directory, add)
    jax.tree.map(np.testing.assert_array_equal, models.load(directory).params, stories.params)


def test_quantized_weights_are_refused(directory):
    def quantize(tensors):
        tensors["model.norm.weight"] = np.ones(64, np.int8)

    edit_tensors(directory, quantize)
    with pytest.raises(ValueError, match="model.norm.weight is int8; quantized"):
        models.load(directory)


def test_bundled_file_of_another_length_is_refused(monkeypatch):
    data = stories.assets.read("stories260K.bin")
    monkeypatch.setattr(stories.assets, "read", lambda name: data + bytes(4))
    with pytest.raises(ValueError, match="holds 264129 numbers, its header describes 264128"):
        stories.read()


@pytest.mark.slow
def test_transformers_reads_what_we_write(stories, stories_logits, directory):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    peer = transformers.AutoModelForCausalLM.from_pretrained(directory)
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    text = GOLDEN[2][0]
    ids = [1, *stories.tokenizer.encode(text)]
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == ids[1:]
    with torch.no_grad():
        want = peer(torch.tensor([ids])).logits.numpy()
    np.testing.assert_allclose(stories_logits(stories.params, np.array([ids], np.int32)), want, atol=1e-4)
