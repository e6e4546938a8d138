"""Encoders of text and images, and GPT-2: what is theirs alone. Recorded by `tests/data/encoders/record.py`."""

import json
import pathlib
import shutil

import jax
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file, save_file

import jlora
from jlora.io import load_peft, save_peft
from jlora.train import models
from jlora.train.cli import main
from jlora.train.generate import generate
from jlora.train.models import hf

DATA = pathlib.Path(__file__).parents[1] / "data"
ENCODERS = sorted(path.parent for path in (DATA / "encoders").glob("*/config.json"))
each = pytest.mark.parametrize("directory", ENCODERS, ids=lambda path: path.name)


@each
def test_logits_are_those_of_transformers(directory, recorded_inputs, same_logits):
    model, io = models.load(directory), np.load(directory / "io.npz")
    found = jax.jit(model.module.apply)({"params": model.params}, **recorded_inputs(io))
    wanted = ("logits",) if "logits" in io else ("hidden", "pooled")
    for got, name in zip(found if isinstance(found, tuple) else (found,), wanted, strict=True):
        same_logits(got, io[name], io)


def test_positions_of_roberta_can_be_given(recorded_inputs, same_logits):
    directory = DATA / "encoders" / "roberta_masked_lm"
    model, io = models.load(directory), np.load(directory / "io.npz")
    mask = io["attention_mask"]
    positions = np.where(mask == 1, np.cumsum(mask, axis=1) - 1, 5)
    logits = model.module.apply({"params": model.params}, positions=positions, **recorded_inputs(io))
    same_logits(logits, io["logits"], io)
    assert model.config.max_positions == 16  # of 18 rows, one is for padding and one for nothing


@each
def test_written_model_equals_the_one_read(directory, tmp_path):
    model = models.load(directory)
    models.save_hf(model, model.params, tmp_path)
    want, got = (load_file(d / hf.WEIGHTS) for d in (directory, tmp_path))
    # How many batches a norm has seen is of no use to one whose statistics stay.
    want = {name: tensor for name, tensor in want.items() if not name.endswith("num_batches_tracked")}
    assert want.keys() == got.keys()
    jax.tree.map(np.testing.assert_array_equal, got, want)


@each
def test_rematerialized_layers_give_the_same(directory, recorded_inputs):
    io, (plain, remat) = np.load(directory / "io.npz"), (models.load(directory, remat=r) for r in ("none", "layers"))

    def loss(params, model):
        return sum(
            (x**2).mean() for x in jax.tree.leaves(model.module.apply({"params": params}, **recorded_inputs(io)))
        )

    want, got = (jax.grad(loss)(plain.params, model) for model in (plain, remat))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, want)


@each
def test_bfloat16(directory, recorded_inputs):
    model, io = models.load(directory, dtype="bfloat16"), np.load(directory / "io.npz")
    assert {leaf.dtype.name for leaf in jax.tree.leaves(model.params)} == {"bfloat16"}
    found = model.module.apply({"params": model.params}, **recorded_inputs(io))
    wanted = io["logits"] if "logits" in io else io["hidden"]
    got = np.asarray(found[0] if isinstance(found, tuple) else found, np.float32)
    real = io["attention_mask"] == 1 if wanted.ndim == 3 else ...
    assert np.abs(got - wanted)[real].mean() < 0.05 * np.abs(wanted)[real].mean()


# Spellings and heads


@pytest.fixture
def copy(tmp_path):
    """A copy of a recorded directory, its configuration and tensors changed."""

    def make(directory, rename=lambda name: name, add=(), **changes):
        target = tmp_path / "copy"
        shutil.copytree(directory, target, copy_function=shutil.copyfile)
        source = json.loads((directory / "config.json").read_text()) | changes
        (target / "config.json").write_text(json.dumps({k: v for k, v in source.items() if v is not None}))
        tensors = {rename(name): tensor for name, tensor in load_file(directory / hf.WEIGHTS).items()}
        save_file(
            tensors | {name: np.ones(shape, np.float32) for name, shape in dict(add).items()}, target / hf.WEIGHTS
        )
        return target

    return make


def test_spellings_of_old_files(copy):
    directory = DATA / "encoders" / "bert_masked_lm"
    old = lambda name: name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
    surplus = {
        "bert.pooler.dense.weight": (8, 8),
        "cls.seq_relationship.bias": (2,),
        "cls.predictions.decoder.weight": (40, 8),
        "bert.embeddings.position_ids": (1, 18),
    }
    changed = copy(directory, old, surplus, architectures=["BertForPreTraining"])
    jax.tree.map(np.testing.assert_array_equal, models.load(changed).params, models.load(directory).params)


def test_models_are_read_with_or_without_their_prefix(copy):
    directory = DATA / "encoders" / "bert_bare"
    prefixed = copy(directory, lambda name: "bert." + name, {"cls.predictions.bias": (40,)})
    jax.tree.map(np.testing.assert_array_equal, models.load(prefixed).params, models.load(directory).params)


def test_gpt2_files_without_prefix_and_with_masks(copy):
    directory = DATA / "models" / "gpt2"
    plain = copy(
        directory, lambda name: name.removeprefix("transformer."), {"h.0.attn.bias": (1, 1, 48, 48)},
        architectures=["GPT2LMHeadModel"],
    )  # fmt: skip
    jax.tree.map(np.testing.assert_array_equal, models.load(plain).params, models.load(directory).params)


def test_tensors_of_another_shape_are_listed_by_their_names_in_the_file(oracles, copy):
    base = oracles / "peft_dirs" / "base_vit"
    config = json.loads((base / "config.json").read_text())
    size, hidden = config["intermediate_size"], config["hidden_size"]
    shapes = rf"\({size + 2}, {hidden}\) +\({size}, {hidden}\)"
    with pytest.raises(ValueError, match=rf"vit.encoder.layer.1.intermediate.dense.weight +{shapes}"):
        models.load(copy(base, intermediate_size=size + 2))


# A head for other labels


@pytest.mark.parametrize("name", ["bert_masked_lm", "bert_bare", "roberta", "roberta_masked_lm"])
def test_new_classification_head_on_what_the_checkpoint_has(name, tmp_path, recorded_inputs):
    directory = DATA / "encoders" / name
    old, io = models.load(directory), np.load(directory / "io.npz")
    model = models.load(directory, labels=["no", "yes"], seed=3)
    logits = model.module.apply({"params": model.params}, **recorded_inputs(io))
    assert logits.shape == (3, 2) and model.config.num_labels == 2
    backbone = old.params if name == "bert_bare" else old.params[name.split("_")[0]]
    for path, leaf in flatten_dict(model.params[name.split("_")[0]]).items():
        if path in (kept := flatten_dict(backbone)):  # a masked language model has no pooler
            np.testing.assert_array_equal(leaf, kept[path], err_msg="/".join(path))
    again, other = (models.load(directory, labels=["no", "yes"], seed=seed) for seed in (3, 4))
    jax.tree.map(np.testing.assert_array_equal, again.params, model.params)
    head = lambda model: np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(model.params["classifier"])])
    assert np.abs(head(model) - head(other)).max() > 0.01

    models.save_hf(model, model.params, tmp_path)
    read = models.load(tmp_path, labels=["no", "yes"], seed=9)  # the head for these labels is there now
    jax.tree.map(np.testing.assert_array_equal, read.params, model.params)
    assert read.source["id2label"] == {"0": "no", "1": "yes"}
    swapped = models.load(tmp_path, labels=["yes", "no"], seed=9)
    assert np.abs(head(swapped) - head(model)).max() > 0.01


def test_new_head_of_an_image_classifier(oracles):
    base = oracles / "peft_dirs" / "base_vit"
    model = models.load(base, labels=["cat", "dog"])
    assert model.params["classifier"]["kernel"].shape == (model.source["hidden_size"], 2)
    jax.tree.map(np.testing.assert_array_equal, model.params["vit"], models.load(base).params["vit"])


def test_new_head_of_a_resnet():
    base = DATA / "encoders" / "resnet"
    model = models.load(base, labels=["cat", "dog"])
    assert model.params["classifier"]["1"]["kernel"].shape == (16, 2)
    jax.tree.map(np.testing.assert_array_equal, model.params["resnet"], models.load(base).params["resnet"])


def test_lifted_resnet_equals_the_merged_one(recorded_inputs):
    """Convolutions adapted, statistics held, by LoRA, DoRA and ConvLoRA in turn."""
    model, io = models.load(DATA / "encoders" / "resnet"), np.load(DATA / "encoders" / "resnet" / "io.npz")
    fn = lambda params, pixels: model.module.apply({"params": params}, pixels)
    (pixels,) = recorded_inputs(io).values()
    rules = {
        "**/layer_0/convolution/kernel": jlora.DoRA(2),
        "**/layer_1/convolution/kernel": jlora.ConvLoRA(2),
        "**/convolution/kernel": jlora.LoRA(2),
        "**/normalization/*": jlora.Full(),
    }
    adapted = jlora.adapt(
        model.params, rules, fn=fn, args=(pixels,), key=jax.random.key(0), exclude=model.family.statistics
    )
    assert not any("running" in path for path in adapted.sites)
    keys = iter(jax.random.split(jax.random.key(1), 200))
    moved = jax.tree.map(lambda x: x + 0.05 * jax.random.normal(next(keys), x.shape), adapted.trainable)
    lifted = jlora.lift(fn, on_materialize="error")
    loss = lambda moved: (lifted(adapted.bind(moved), pixels) ** 2).sum()
    merged = lambda moved: (fn(jlora.merge(adapted.replace(trainable=moved)), pixels) ** 2).sum()
    got, want = (jax.jit(jax.value_and_grad(f))(moved) for f in (loss, merged))
    assert abs(want[0] / (io["logits"] ** 2).sum() - 1) > 0.05
    for g, w in zip(*map(jax.tree.leaves, (got, want)), strict=True):
        np.testing.assert_allclose(g, w, atol=1e-4 * max(1.0, np.abs(w).max()), rtol=0)


@pytest.mark.parametrize(
    ("base", "labels", "message"),
    [
        ("gpt2", ["a", "b"], "model_type 'gpt2' has no classification head here; bert, resnet, roberta, vit have"),
        ("bert", ["a", "a"], r"each once, got \['a', 'a'\]"),
        ("bert", [], "wanted the names of the classes"),
    ],
)
def test_labels_that_make_no_head(base, labels, message, oracles):
    with pytest.raises(ValueError, match=message):
        models.load(oracles / "peft_dirs" / f"base_{base}", labels=labels)


# What is refused


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("bert_bare", {"hidden_act": "mish"}, "hidden_act is 'mish'; built are gelu, gelu_new"),
        ("bert_bare", {"position_embedding_type": "relative_key"}, "position_embedding_type is 'relative_key'; only"),
        ("bert_bare", {"is_decoder": True}, "is_decoder is True; only False is built"),
        ("bert_bare", {"num_attention_heads": 3}, "hidden_size 8 is not a multiple of 3"),
        ("bert_bare", {"architectures": ["BertForTokenClassification"]}, "built are BertModel, BertForMaskedLM, "),
        ("bert_bare", {"vocab_size": None}, "config.json: no 'vocab_size'"),
        ("bert_bare", {"embedding_size": 4}, "embedding_size=4: not known for model_type 'bert'"),
        ("bert_masked_lm", {"tie_word_embeddings": False}, "tie_word_embeddings is False; only True"),
        ("roberta", {"add_cross_attention": True}, "add_cross_attention is True; only False"),
        ("resnet", {"layer_type": "wide"}, "layer_type is 'wide'; built are basic, bottleneck"),
        ("resnet", {"depths": [1]}, "hidden_sizes \\(8, 16\\) and depths \\(1,\\): wanted one of each a stage"),
        ("resnet", {"hidden_sizes": [6, 16]}, "hidden_sizes \\(6, 16\\) of bottlenecks must be multiples of 4"),
        ("resnet", {"architectures": ["ResNetBackbone"]}, "built are ResNetForImageClassification, ResNetModel"),
        ("resnet", {"width_per_group": 4}, "width_per_group=4: not known for model_type 'resnet'"),
    ],
)
def test_configurations_that_are_not_built(name, change, message, copy):
    with pytest.raises(ValueError, match=message):
        models.load(copy(DATA / "encoders" / name, **change))


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("gpt2", {"activation_function": "mish"}, "activation_function is 'mish'"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention is True"),
        ("gpt2", {"n_head": 1009}, "n_embd {n_embd} is not a multiple of 1009"),
        ("gpt2", {"architectures": ["GPT2DoubleHeadsModel"]}, "'GPT2DoubleHeadsModel'; built is GPT2LMHeadModel"),
        (
            "vit",
            {"patch_size": 1009},
            r"images of \({image_size}, {image_size}\) do not divide into patches of \(1009, 1009\)",
        ),
        ("vit", {"layerscale_value": 0.1}, "layerscale_value=0.1: not known for model_type 'vit'"),
    ],
)
def test_recorded_bases_with_options_that_are_not_built(family, change, message, copy, oracles):
    base = oracles / "peft_dirs" / f"base_{family}"
    with pytest.raises(ValueError, match=message.format(**json.loads((base / "config.json").read_text()))):
        models.load(copy(base, **change))


def test_images_of_another_size_are_refused(oracles):
    model = models.load(oracles / "peft_dirs" / "base_vit")
    size = model.source["image_size"]
    with pytest.raises(ValueError, match=rf"wanted images of \({size}, {size}, 3\), got \(3, {size}, {size}\)"):
        model.module.apply({"params": model.params}, np.zeros((1, 3, size, size), np.float32))


# GPT-2 writes text


def test_gpt2_generates_as_without_a_cache(oracles):
    model = models.load(oracles / "peft_dirs" / "base_gpt2")
    apply = jax.jit(model.module.apply)
    positions, vocabulary = (model.source[name] for name in ("n_positions", "vocab_size"))
    prompts = [[token % vocabulary for token in prompt] for prompt in ([5, 9, 17], [8], [3, 60, 41, 22, 7])]

    def plainly(prompt):
        row = np.zeros((1, positions), np.int32)
        row[0, : len(prompt)] = prompt
        for at in range(len(prompt), len(prompt) + 12):
            row[0, at] = np.argmax(apply({"params": model.params}, row)[0, at - 1])
        return row[0, len(prompt) : len(prompt) + 12].tolist()

    got = generate(model.module.apply, model.params, prompts, config=model.config, max_new_tokens=12)
    assert got == [plainly(prompt) for prompt in prompts]
    assert len({tuple(text) for text in got}) == 3


# The command line


@pytest.mark.parametrize("command", ["finetune --data e2e", "generate -p a", "evaluate --data e2e"])
def test_commands_for_text_refuse_models_that_write_none(command, tmp_path, capsys):
    directory = DATA / "encoders" / "roberta"
    assert main([*command.split(), "--model", str(directory)]) == 2
    assert "is a roberta model, which does not continue a text: this command wants" in capsys.readouterr().err


def test_merged_encoder_is_the_adapted_one(oracles, tmp_path, recorded_inputs, same_logits):
    root = oracles / "peft_dirs"
    assert main(f"merge --model {root}/base_vit --adapter {root}/vit_lora --out {tmp_path}/merged".split()) == 0
    model, io = models.load(tmp_path / "merged"), np.load(root / "vit_lora" / "io.npz")
    same_logits(model.module.apply({"params": model.params}, **recorded_inputs(io)), io["logits_merged"], io)


@pytest.fixture(scope="module")
def classifier():
    """A tiny RoBERTa with a new head and LoRA, trained to tell texts by whether a token is in them; with its data."""
    model = models.load(DATA / "encoders" / "roberta_masked_lm", labels=["without", "with"])
    ids = np.random.default_rng(0).integers(3, 40, (64, 10)).astype(np.int32)
    classes = np.arange(64) % 2
    ids[ids == 7] = 8
    ids[np.arange(64), np.arange(64) % 9 + 1] = np.where(classes, 7, 8)
    rules = {"classifier/**": jlora.Full(), "**/{query,value}/kernel": jlora.LoRA(2, alpha=8)}
    fn = lambda params, *inputs: model.module.apply({"params": params}, *inputs)
    adapted = jlora.adapt(model.params, rules, fn=fn, args=(ids,), key=jax.random.key(1))
    apply, tx = jlora.lift(fn), optax.adam(3e-2)

    @jax.jit
    def step(trainable, state):
        def loss(trainable):
            logits = apply(adapted.bind(trainable), ids)
            return optax.softmax_cross_entropy_with_integer_labels(logits, classes).mean()

        value, grads = jax.value_and_grad(loss)(trainable)
        updates, state = tx.update(grads, state)
        return optax.apply_updates(trainable, updates), state, value

    trainable, state = adapted.trainable, tx.init(adapted.trainable)
    losses = []
    for _ in range(60):
        trainable, state, value = step(trainable, state)
        losses.append(float(value))
    return model, adapted.replace(trainable=trainable), ids, losses


def test_adapter_and_new_head_learn_and_are_one_peft_directory(classifier, tmp_path):
    model, adapted, ids, losses = classifier
    assert losses[0] > 0.5 and losses[-1] < 0.2
    save_peft(adapted, tmp_path, task_type="SEQ_CLS")
    assert json.loads((tmp_path / "adapter_config.json").read_text())["modules_to_save"] == ["classifier"]
    other = models.load(DATA / "encoders" / "roberta_masked_lm", labels=["without", "with"], seed=5)
    read = load_peft(tmp_path, other.params)  # brings the head with it
    apply = jlora.lift(model.module.apply)
    want, got = (apply({"params": params.bind()}, ids) for params in (adapted, read))
    np.testing.assert_allclose(got, want, atol=1e-6)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_peft_reads_the_trained_classifier(classifier, tmp_path):
    torch, transformers, peft = (pytest.importorskip(name) for name in ("torch", "transformers", "peft"))
    model, adapted, ids, _ = classifier
    models.save_hf(model, model.params, tmp_path / "base")
    save_peft(adapted, tmp_path / "adapter", task_type="SEQ_CLS")
    base = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    peer = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    with torch.no_grad():
        want = peer(torch.tensor(ids)).logits.numpy()
    np.testing.assert_allclose(jlora.lift(model.module.apply)({"params": adapted.bind()}, ids), want, atol=1e-4)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("base", ["bert", "vit", "roberta", "resnet", "resnet_basic"])
def test_transformers_reads_a_new_head(base, tmp_path, oracles, recorded_inputs, same_logits):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    recorded = DATA / "encoders" / base
    directory = recorded if recorded.is_dir() else oracles / "peft_dirs" / f"base_{base}"
    model, io = models.load(directory, labels=["no", "yes"]), np.load(directory / "io.npz")
    models.save_hf(model, model.params, tmp_path)
    of_images = base.startswith(("vit", "resnet"))
    auto = "AutoModelForImageClassification" if of_images else "AutoModelForSequenceClassification"
    peer = getattr(transformers, auto).from_pretrained(tmp_path, attn_implementation="eager").eval()
    assert peer.config.id2label == {0: "no", 1: "yes"}
    with torch.no_grad():
        want = peer(**{name: torch.tensor(io[name]) for name in io if "logits" not in name}).logits.numpy()
    same_logits(model.module.apply({"params": model.params}, **recorded_inputs(io)), want, io)
