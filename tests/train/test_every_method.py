"""Every method trains from the command line, on the shipped model and data."""

import importlib.util
import json
import math
import pathlib

import pytest

from jlora.methods import METHODS
from jlora.train.cli import main

FILE = pathlib.Path(__file__).parents[2] / "benchmarks" / "finetune_methods.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("jlora_finetune_methods", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_finetune(method, script, tmp_path, capsys):
    run, few = tmp_path / "run", "--steps 4 --batch-size 4 --max-length 96 --eval-limit 16 --no-generate".split()
    assert main([*script.command(method, *few), "--out", str(run)]) == 0, capsys.readouterr().err
    results = json.loads((run / "results.json").read_text())
    before, after = (results[when]["eval_nll"] for when in ("before", "after"))
    assert math.isfinite(after) and after != before
    capsys.readouterr()
    assert (
        main(["evaluate", "--run", str(tmp_path / "run"), "--max-length", "96", "--limit", "16", "--no-generate"]) == 0
    )
    assert f"held-out loss {after:.3f}" in capsys.readouterr().out


def test_options_are_of_methods(script):
    assert script.OPTIONS.keys() <= METHODS.keys()
