"""The command line from outside: what it writes, what it says, and that bad input leaves nothing behind."""

import json
import pathlib
import re
import shutil
import subprocess
import sys

import matplotlib.image
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jlora.train import models
from jlora.train.cli import main
from jlora.train.config import FinetuneConfig, OptimizerOptions, RunOptions, from_dict, to_dict
from jlora.train.optimizers import learning_rate_schedule

pytestmark = pytest.mark.optimized

COMMANDS = (
    "finetune", "generate", "evaluate", "merge", "inspect", "convert", "compare", "methods", "models", "targets",
)  # fmt: skip


@pytest.fixture(scope="module")
def run(tiny_options, compile_once, tmp_path_factory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("cli") / "run"
    assert main([*tiny_options, "--out", str(path)]) == 0
    return path


@pytest.fixture(scope="module")
def stories_directory(stories, tmp_path_factory) -> pathlib.Path:
    """The bundled model in Hugging Face layout."""
    path = tmp_path_factory.mktemp("stories")
    models.save_hf(stories, stories.params, path)
    return path


@pytest.mark.parametrize("command", [(), *((command,) for command in COMMANDS)])
def test_help_is_there(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*command, "--help"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert "usage: jlora" in printed
    for name in COMMANDS if not command else ():
        assert name in printed


def test_misspelt_option_is_an_error(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["finetune", "--rnak", "4"])
    assert stop.value.code == 2
    assert "--rank" in capsys.readouterr().err


def test_errors_point_to_the_help_of_their_command(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["finetune", "--steps", "abc"])
    assert stop.value.code == 2
    assert "jlora finetune --help" in capsys.readouterr().err


def test_help_wraps_descriptions_once(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    for command, wanted in {
        "finetune": r"\.gguf file, or",  # the docstring breaks after .gguf
        "methods": r"\[METHOD \.\.\.\] ",
        "compare": r"\[RUN \.\.\.\] ",
    }.items():
        with pytest.raises(SystemExit):
            main([command, "--help"])
        printed = capsys.readouterr().out
        assert re.search(wanted, printed) and "(default: )" not in printed


@pytest.mark.skipif(shutil.which("bash") is None, reason="wants bash")
def test_bash_completes(capsys, tmp_path):
    with pytest.raises(SystemExit):
        main(["--tyro-print-completion", "bash"])
    (tmp_path / "jlora").write_text(capsys.readouterr().out)
    for words, wanted in {
        "jlora me": {"merge", "methods"},
        "jlora finetune --opt": {"--optimizer", "--optimizer-options"},
        "jlora finetune --quantize ": {"none", "nf4", "int8"},
    }.items():
        *before, last = words.split(" ")
        script = f"""source {tmp_path / "jlora"}
            COMP_WORDS=({" ".join(before)} "{last}"); COMP_CWORD={len(before)}
            $(complete -p jlora | sed 's/.*-F //; s/ .*//'); printf '%s\\n' "${{COMPREPLY[@]}}" """
        done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
        assert set(done.stdout.split()) == wanted


def test_missing_extra_says_how_to_install_it(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tyro", None)
    assert main(["finetune"]) == 2
    assert "pip install 'jlora[train]'" in capsys.readouterr().err


def test_configuration_survives_json():
    config = FinetuneConfig(run=RunOptions(out=pathlib.Path("x")))
    assert from_dict(FinetuneConfig, json.loads(json.dumps(to_dict(config)))) == config


@pytest.mark.parametrize("name, end", [("constant", 1.0), ("linear", 0.1), ("cosine", 0.1)])
def test_schedule_rises_from_zero_and_ends_where_it_should(name, end):
    options = OptimizerOptions(schedule=name, learning_rate=2.0, warmup_steps=4, final_fraction=0.1)
    schedule = learning_rate_schedule(options, 20)
    np.testing.assert_allclose([schedule(i) for i in (0, 2, 4, 20)], [0.0, 1.0, 2.0, 2.0 * end], rtol=1e-6)


def test_run_directory_says_it_all(run):
    config = json.loads((run / "config.json").read_text())
    options = config["options"]
    assert options["optimizer"]["warmup_steps"] == 1 and options["train"]["steps"] == 12  # resolved, not None
    assert options["method"]["method"] == "lora" and config["method"]["alpha"] == 16.0
    assert config["method"]["rank"] == 2 and config["method"]["dropout"] == 0.1
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if "loss" in r] == list(range(1, 13))
    assert [r["step"] for r in records if "eval_nll" in r] == [0, 6, 12]
    results = json.loads((run / "results.json").read_text())
    assert results["after"]["eval_nll"] < results["before"]["eval_nll"]
    assert 0 <= results["after"]["bleu"] <= 100 and len(results["samples"]) == 2
    completions = [json.loads(line) for line in (run / "completions.jsonl").read_text().splitlines()]
    assert len(completions) == results["after"]["bleu_prompts"] == config["summary"]["eval_prompts"]
    assert matplotlib.image.imread(run / "loss.png").shape == (630, 1050, 4)
    readme = (run / "README.md").read_text()
    for part in ("held-out perplexity", "BLEU", "load_peft", "PeftModel", "loss.png", completions[0]["after"]):
        assert part in readme
    assert {path.name for path in run.iterdir()} == {
        "config.json", "metrics.jsonl", "results.json", "completions.jsonl", "loss.png", "README.md", "adapter",
        "checkpoints",
    }  # fmt: skip


def test_generate_evaluate_inspect_read_a_run(run, capsys):
    results = json.loads((run / "results.json").read_text())
    assert main(["generate", "--run", str(run), "--prompt", "cat 3 =", "dog 1 =", "--max-new-tokens", "8"]) == 0
    assert capsys.readouterr().out.count("output:") == 2
    assert main(["evaluate", "--run", str(run), "--batch-size", "8", "--max-new-tokens", "8"]) == 0
    printed = capsys.readouterr().out
    assert f"held-out loss {results['after']['eval_nll']:.3f}" in printed
    assert f"BLEU {results['after']['bleu']:.1f}" in printed
    assert main(["inspect", str(run)]) == 0
    printed = capsys.readouterr().out
    assert "model/layers/self_attn/q_proj/kernel" in printed and "12 of 12" in printed


def test_inspect_measures_and_draws(run, tmp_path, capsys):
    figure = tmp_path / "new" / "adapter.png"
    assert main(["inspect", str(run), "--intruders", "3", "--plot", str(figure)]) == 0
    printed = capsys.readouterr().out
    (row,) = (line for line in printed.splitlines() if line.startswith("model/layers/self_attn/q_proj/kernel[0] "))
    assert row.split()[-2:] == ["of", "3"] and "change/weight" in printed
    assert matplotlib.image.imread(figure).shape[1] == 1575
    assert main(["inspect", str(run), "--plot", str(figure)]) == 2
    assert "exists already" in capsys.readouterr().err


def test_base_alone_is_evaluated_too(run, tiny_data, capsys):
    assert main(["evaluate", "--data", str(tiny_data), "--max-length", "32", "--no-generate"]) == 0
    assert "perplexity" in capsys.readouterr().out


def test_merged_model_generates_what_the_adapter_does(run, tmp_path, capsys):
    merged = tmp_path / "merged"
    assert main(["merge", "--run", str(run), "--out", str(merged)]) == 0
    outputs = []
    for source in (["--run", str(run)], ["--model", str(merged)]):
        capsys.readouterr()
        assert main(["generate", *source, "--prompt", "bird 5 =", "--max-new-tokens", "12"]) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1]
    assert main(["merge", "--run", str(run), "--out", str(merged)]) == 2  # never overwritten
    assert "exists already" in capsys.readouterr().err


def test_convert_takes_newest_best_or_a_step(run, tmp_path, capsys):
    for step in ("latest", "best", "9"):
        assert main(["convert", str(run), "--out", str(tmp_path / step), "--step", step]) == 0
    newest = load_file(run / "adapter" / "adapter_model.safetensors")
    converted = load_file(tmp_path / "latest" / "adapter_model.safetensors")
    assert all((newest[name] == converted[name]).all() for name in newest)
    earlier = load_file(tmp_path / "9" / "adapter_model.safetensors")
    assert any((newest[name] != earlier[name]).any() for name in newest)
    capsys.readouterr()
    assert main(["convert", str(run), "--out", str(tmp_path / "x"), "--step", "7"]) == 2
    assert "no checkpoint '7'" in capsys.readouterr().err


def test_convert_to_plain_lora(tiny_options, compile_once, tmp_path, capsys):
    options = [*tiny_options, "--method", "dora", "--steps", "3", "--out", str(tmp_path / "run"), "--no-generate"]
    assert main(options) == 0
    capsys.readouterr()
    convert = ["convert", str(tmp_path / "run"), "--to", "lora", "--rank"]
    for rank, name in (("100", "all"), ("0.5", "half")):
        assert main([*convert, rank, "--out", str(tmp_path / name)]) == 0
        assert "DoRA" in capsys.readouterr().out
    losses = {}
    for adapter in ("run/adapter", "all", "half"):
        assert main(["evaluate", "--adapter", str(tmp_path / adapter), "--limit", "8", "--no-generate"]) == 0
        losses[adapter] = capsys.readouterr().out.partition("held-out loss ")[2].split()[0]
    assert losses["all"] == losses["run/adapter"] != losses["half"]
    config = json.loads((tmp_path / "half" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and not config["use_dora"]
    for wrong, message in ((["--to", "lora"], "go together"), (["--to", "lora", "--rank", "0"], "rank=0")):
        assert main(["convert", str(tmp_path / "run"), "--out", str(tmp_path / "x"), *wrong]) == 2
        assert message in capsys.readouterr().err


BAD_OPTIONS = {
    "rank zero": (["--rank", "0"], "rank"),
    "rank negative": (["--rank", "-3"], "rank"),
    "rank above the matrix": (["--rank", "33"], "min(in, out)"),
    "pattern without a match": (["--targets", "**/qq_proj/kernel"], "matches no leaf"),
    "unknown method": (["--method", "lorra"], "known are lora"),
    "option of another method": (["--method", "full", "--rank", "4"], "no option 'rank'"),
    "missing model": (["--model", "nowhere"], "nowhere"),
    "missing data": (["--data", "nowhere.txt"], "nowhere.txt"),
    "both steps and epochs": (["--steps", "3", "--epochs", "1"], "not both"),
    "no steps": (["--steps", "0"], "--steps"),
    "batch larger than the data": (["--batch-size", "100000"], "--batch-size"),
    "longer than the model": (["--max-length", "513"], "512"),
    "warm-up longer than the run": (["--steps", "5", "--warmup-steps", "5"], "--warmup-steps"),
    "not a run": (["--resume", "."], "config.json"),
    "no pairs for the optimizer": (["--method", "full", "--optimizer", "lora_pro"], "finds no pair of factors"),
    "nothing to project": (["--optimizer", "galore"], "--optimizer galore is for whole matrices: use --method full"),
    "too small to project": (["--method", "full", "--optimizer", "galore"], "such as --optimizer-options rank=16"),
    "option of another optimizer": (["--optimizer", "lion", "--optimizer-options", "rank=4"], "no option 'rank'"),
    "size that does not divide": (["--method", "oft"], "All leaves take --method-options block_size=4"),
    "rank that is too high": (["--method", "noble"], "All leaves take --rank 32"),
    "nowhere to write": (["--out", "/dev/null/x"], "--out /dev/null/x: nothing can be written in /dev/null"),
    "nowhere to write, tried": (["--out", "/dev/null/x/y", "--dry-run"], "nothing can be written in /dev/null"),
    "rate that is no number": (["--learning-rate", "nan", "--dry-run"], "--learning-rate must be a finite number"),
    "alpha without end": (["--alpha", "inf"], "--alpha must be a finite number, got inf"),
    "no metrics": (["--metrics"], "--metrics names none"),
    "calibration of nothing": (["--calibration-batches", "3"], "has no part in --init default"),
    "no run there": (["--resume", "nowhere", "--steps", "3"], "there is no directory nowhere"),
}
BAD_FILES = {
    "column missing": ("data.jsonl", b'{"txt": "a"}\n', "txt"),
    "csv column missing": ("data.csv", b"a,b\n1,2\n", "no column 'text'"),
    "empty": ("data.txt", b"", "empty"),
    "blank": ("data.jsonl", b'{"prompt": "a", "completion": ""}\n' * 3, "is blank in all 3 records"),
    "not utf-8": ("data.txt", b"caf\xe9", "UTF-8"),
    "unknown kind": ("data.parquet", b"PAR1", "parquet"),
}


def check_refused(argv: list[str], message: str, capsys, folder: pathlib.Path) -> None:
    """Exit code 2, a line or two on stderr, nothing written."""
    before = sorted(folder.rglob("*"))
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("jlora: ") and message in error
    assert len(error.splitlines()) <= 2 and "Traceback" not in error and "allow_unmatched" not in error
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize("options, message", BAD_OPTIONS.values(), ids=BAD_OPTIONS)
def test_bad_option_is_refused(options, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    check_refused(["finetune", *options], message, capsys, tmp_path)


BAD_COMMANDS = {
    "merge of nothing": (["merge", "--out", "m"], "nothing to merge: give a run with --run, or an adapter"),
    "merge to nowhere": (["merge", "--model", "stories260k", "--out", "/dev/null/x"], "nothing can be written"),
    "inspect nothing": (["inspect", "nowhere"], "there is no directory nowhere"),
    "inspect anything": (["inspect", "."], ". is neither a run nor an adapter"),
    "no adapter": (["generate", "--adapter", "."], ". is not an adapter directory: it has no adapter_config.json"),
    "temperature": (["generate", "--temperature", "nan"], "--temperature must be a finite number"),
    "no metrics": (["evaluate", "--metrics"], "--metrics names none"),
}


@pytest.mark.parametrize("argv, message", BAD_COMMANDS.values(), ids=BAD_COMMANDS)
def test_bad_command_is_refused(argv, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    check_refused(argv, message, capsys, tmp_path)


def test_a_base_alone_is_written_as_it_is(tmp_path, capsys):
    """As PEFT wants it beside an adapter."""
    assert main(["merge", "--model", "stories260k", "--out", str(tmp_path / "base")]) == 0
    assert "nothing was merged" in capsys.readouterr().out
    assert (tmp_path / "base" / "config.json").is_file()


@pytest.mark.parametrize("name, content, message", BAD_FILES.values(), ids=BAD_FILES)
def test_bad_data_is_refused(name, content, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_bytes(content)
    check_refused(["finetune", "--data", name], message, capsys, tmp_path)


def test_truncated_weights_are_refused(stories_directory, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(stories_directory, "model")
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    check_refused(["finetune", "--model", "model"], "model.safetensors", capsys, tmp_path)


def test_truncated_adapter_is_refused(run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(run / "adapter", "adapter")
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    check_refused(["merge", "--adapter", "adapter", "--out", "m"], "adapter_model.safetensors", capsys, tmp_path)


def test_adapter_of_another_model_is_refused(run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(run / "adapter", "adapter")
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    wider = {name: np.concatenate([value, value], axis=-1) for name, value in load_file(weights).items()}
    save_file(wider, weights, metadata={"format": "pt"})
    assert main(["merge", "--adapter", "adapter", "--out", "m"]) == 2
    error = capsys.readouterr().err
    assert "q_proj" in error and "Traceback" not in error
    assert not (tmp_path / "m").exists()


def test_a_base_on_the_host_trains_the_same(run, tiny_options, tmp_path, capsys):
    out = tmp_path / "far"
    assert main([*tiny_options, "--offload", "--remat", "layers", "--out", str(out)]) == 0
    near, far = (json.loads((path / "results.json").read_text())["after"]["eval_nll"] for path in (run, out))
    assert far == pytest.approx(near, rel=1e-5)
    refused = [*tiny_options, "--offload", "--targets", "**/embedding", "--out", str(tmp_path / "no")]
    check_refused(refused, "no adapted matrix to move", capsys, tmp_path / "no")


@pytest.mark.parametrize("method", ["dora", pytest.param("vera", marks=pytest.mark.slow), "full"])
def test_other_methods_train_and_come_back(method, tiny_options, compile_once, tmp_path, capsys):
    options = [*tiny_options, "--method", method, "--steps", "2", "--out", str(tmp_path / "run"), "--no-generate"]
    for name in ("--rank", "--dropout") if method == "full" else ():
        at = options.index(name)
        del options[at : at + 2]
    if method == "vera":
        options[options.index("--dropout") + 1] = "0.0"
    assert main(options) == 0
    after = json.loads((tmp_path / "run" / "results.json").read_text())["after"]
    capsys.readouterr()
    assert main(["evaluate", "--run", str(tmp_path / "run"), "--no-generate"]) == 0
    assert f"held-out loss {after['eval_nll']:.3f}" in capsys.readouterr().out
