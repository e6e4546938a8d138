"""`--init`: adapters that start at the weights or at data, their files, and going on with them."""

import json
import signal

import jax
import numpy as np
import pytest
import safetensors.numpy
from test_resume import adapter_bytes, stop_at

from jlora.train.cli import main

EVA = ["--init", "eva", "--init-options", "rho=2.0", "--calibration-batches", "3"]


@pytest.mark.slow
def test_eva_goes_on_to_the_same_bits(tiny_options, compile_once, tmp_path, monkeypatch, capsys):
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert main([*tiny_options, *EVA, "--out", str(whole)]) == 0
    assert "calibrating: 3 batches" in capsys.readouterr().out
    stop_at(monkeypatch, 5, signal.SIGINT)
    assert main([*tiny_options, *EVA, "--out", str(run)]) == 128 + signal.SIGINT
    capsys.readouterr()
    assert main(["finetune", "--resume", str(run)]) == 0
    assert "calibrating" not in capsys.readouterr().out  # the start is a file of the run
    assert adapter_bytes(run) == adapter_bytes(whole)
    config = json.loads((run / "adapter" / "adapter_config.json").read_text())
    options = json.loads((run / "config.json").read_text())["options"]
    assert config["rank_pattern"] and options["method"]["init"] == "eva"
    losses = [json.loads((path / "results.json").read_text()) for path in (run, whole)]
    assert losses[0]["after"] == losses[1]["after"] and losses[0]["after"]["eval_nll"] < losses[0]["before"]["eval_nll"]


def test_pissa_is_saved_for_the_original_weights(tiny_options, tmp_path):
    run, converted = tmp_path / "run", tmp_path / "converted"
    few = [*tiny_options, "--steps", "1", "--eval-every", "0", "--no-generate"]
    assert main([*few, "--init", "pissa", "--init-options", "iterations=4", "--out", str(run)]) == 0
    tensors = safetensors.numpy.load_file(run / "adapter" / "adapter_model.safetensors")
    assert {value.shape[0] for name, value in tensors.items() if "lora_A" in name} == {4}  # twice --rank 2
    assert main(["convert", str(run), "--out", str(converted)]) == 0
    again = safetensors.numpy.load_file(converted / "adapter_model.safetensors")
    jax.tree.map(np.testing.assert_array_equal, again, tensors)
    (run / "start.npz").write_bytes(b"not a file of arrays")
    assert main(["convert", str(run), "--out", str(tmp_path / "broken")]) == 2


@pytest.mark.slow
def test_masks_of_shira(tiny_options, compile_once, tmp_path):
    """The places are those that data chose, and what is saved holds them."""
    at = tiny_options.index("--dropout")
    options = tiny_options[:at] + tiny_options[at + 2 :]
    few = [*options, "--method", "shira", "--steps", "1", "--eval-every", "0", "--no-generate"]
    places = {}
    for name, options in {"random": [], "snip": ["--init", "snip_mask", "--calibration-batches", "2"]}.items():
        assert main([*few, *options, "--out", str(tmp_path / name)]) == 0
        tensors = safetensors.numpy.load_file(tmp_path / name / "adapter" / "adapter_model.safetensors")
        places[name] = {key: value for key, value in tensors.items() if "shira_indices" in key}
    assert places["snip"].keys() == places["random"].keys()
    assert not any(np.array_equal(places["snip"][key], places["random"][key]) for key in places["snip"])
    results = [json.loads((tmp_path / name / "results.json").read_text())["before"] for name in places]
    assert results[0] == results[1]


@pytest.mark.slow
def test_the_model_is_the_base_before_training(tiny_options, compile_once, tmp_path):
    before = []
    for options in ([], ["--init", "pissa"], ["--init", "olora"], ["--init", "corda", "--calibration-batches", "4"]):
        run = tmp_path / f"run{len(before)}"
        assert main([*tiny_options, *options, "--steps", "1", "--out", str(run)]) == 0
        before.append(json.loads((run / "results.json").read_text())["before"])
    assert all(other == before[0] for other in before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--init", "pisa"], "unknown --init 'pisa': known are default, pissa"),
        (["--init", "pissa", "--init-options", "steps=4"], "--init pissa has no option 'steps'"),
        (["--init", "pissa", "--init-options", "iterations=0"], "a positive number of subspace iterations"),
        (["--init-options", "iterations=4"], "--init-options is for --init"),
        (["--init", "lora_sb", "--method", "lora_xs"], "say its size"),
        (["--init", "pissa", "--method", "vera"], "vera has none"),
        (["--init", "snip_mask"], "give it to jlora.SHiRA"),
        (["--init", "eva", "--calibration-batches", "0"], "--calibration-batches must be above 0"),
    ],
)
def test_errors(tiny_options, tmp_path, capsys, options, message):
    assert main([*tiny_options, *options, "--out", str(tmp_path / "run")]) == 2
    assert message in " ".join(capsys.readouterr().err.split()) and not (tmp_path / "run").exists()
