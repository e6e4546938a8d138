"""`jlora methods`, `models`, `targets`, `compare` and `finetune --dry-run`: what they print is so."""

import contextlib
import io
import json
import pathlib
import re
import shutil

import jax
import matplotlib.image
import pytest
from safetensors.numpy import load_file

import jlora
from jlora.io.formats import FORMATS
from jlora.methods import METHODS
from jlora.train import inform, models
from jlora.train.cli import main

SHIPPED = pathlib.Path(__file__).parents[1] / "data" / "models"


def rows_of(printed: str) -> dict[str, list[str]]:
    """First cell -> the other cells of each row of a table."""
    lines = printed.splitlines()
    at = next(i for i, line in enumerate(lines) if re.fullmatch(r"-+( +-+)+", line))
    starts = [match.start() for match in re.finditer("-+", lines[at])]
    cut = lambda line: [line[a:b].strip() for a, b in zip(starts, [*starts[1:], None], strict=True)]
    body = lines[at + 1 :]
    body = body[: body.index("")] if "" in body else body
    return {cells[0]: cells[1:] for cells in map(cut, body)}


@pytest.fixture(scope="module")
def methods_table() -> dict[str, list[str]]:
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert main(["methods"]) == 0
    return rows_of(printed.getvalue())


def test_every_method_has_a_row(methods_table):
    assert list(methods_table) == list(METHODS)
    for name, (cls, form, _, merges, peft) in methods_table.items():
        assert cls == METHODS[name].__name__
        assert form.removesuffix(", shared") in ("pair", "weight", "activations", "leaf")
        assert merges in ("yes", "no", "depends on options")
        assert peft == "-" or peft.removesuffix(" (read)") in {*FORMATS, "XLORA"}
    assert methods_table["dora"][4] == "LORA" and methods_table["loha"][4] == "LOHA"
    assert methods_table["vera"][1] == "pair, shared" and methods_table["noble"][3] == "no"


@pytest.mark.parametrize("name", ["lora", "dora", "vera", "loha", "hra", "full"])
def test_counts_are_those_of_adapters(name, methods_table, stories):
    forward = lambda params, ids: stories.module.apply({"params": params}, ids)
    shapes = jax.eval_shape(lambda params: params, stories.params)
    method = METHODS[name]()
    adapted = jlora.adapt(shapes, method, fn=forward, args=stories.inputs, key=jax.random.key(0))
    assert methods_table[name][2] == f"{sum(leaf.size for leaf in jax.tree.leaves(adapted.trainable)):,}"


def test_methods_of_another_model_and_rank(capsys):
    assert main(["methods", "--model", str(SHIPPED / "gpt2"), "--rank", "2", "--targets", "**/c_attn/kernel"]) == 0
    printed = capsys.readouterr().out
    model = models.outline(SHIPPED / "gpt2")
    leaves = dict(jlora.paths.flatten(model.params)[0])
    path = next(path for path in leaves if path.endswith("c_attn/kernel"))
    layers, n_in, n_out = leaves[path].shape
    assert rows_of(printed)["lora"][2] == f"{layers * 2 * (n_in + n_out):,}"
    assert "tokens: wants --method-options indices=..." in printed


def test_methods_refuses(capsys):
    for options, message in ((["--rank", "0"], "--rank must be above 0"), (["--targets", "**/qq"], "matches no leaf")):
        assert main(["methods", *options]) == 2
        assert message in capsys.readouterr().err


def test_all_about_a_method(capsys):
    assert main(["methods", "dora", "lora"]) == 0
    printed = capsys.readouterr().out
    assert "jlora.DoRA(rank=8" in printed and "arxiv.org/abs/2402.09353" in printed
    assert "jlora.LoRA(rank=8, alpha=16.0" in printed and "When to use it" in printed
    assert main(["methods", "dorra"]) == 2
    assert "unknown method 'dorra': known are lora" in capsys.readouterr().err


def test_models_lists_families(capsys):
    assert main(["models"]) == 0
    printed = capsys.readouterr().out
    families, weights = printed.split("Weights that")
    assert list(rows_of(families)) == sorted(models.FAMILIES)
    assert list(rows_of(weights)) == [models.BUNDLED, *models.packaged.PACKAGES]


@pytest.mark.parametrize("name", ["gpt2", "mixtral", "phi3"])
def test_outline_is_what_is_loaded(name):
    loaded = jax.eval_shape(lambda params: params, models.load(SHIPPED / name).params)
    assert jax.tree.all(jax.tree.map(lambda a, b: a.shape == b.shape and a.dtype == b.dtype,
                                     models.outline(SHIPPED / name).params, loaded))  # fmt: skip


def test_targets_are_those_of_finetune(capsys, stories):
    assert main(["targets"]) == 0
    printed = capsys.readouterr().out
    rows = rows_of(printed)
    forward = lambda params, ids: stories.module.apply({"params": params}, ids)
    adapted = jlora.adapt(stories.params, jlora.LoRA(), fn=forward, args=stories.inputs, key=jax.random.key(0))
    assert set(rows) == {path for path, _ in jlora.paths.flatten(stories.params)[0]}
    for path, (shape, used, axes, flops, caught) in rows.items():
        assert caught == ("all-linear: LoRA" if path in adapted.sites else "-")
        if path in adapted.sites:
            assert (used, axes) == ("linear", "0|1|2")
            size = 1.0
            for n in shape.split("x"):
                size *= int(n)
            assert float(flops) == pytest.approx(2 * size / 1e6, rel=5e-3)
    assert rows["model/embed_tokens/embedding"][1] == "lookup, linear"
    assert f"caught {len(adapted.sites)} of {len(rows)} leaves" in printed


def test_targets_of_patterns(capsys):
    options = ["--targets", "**/q_proj/kernel", "**/k_proj/kernel", "--train-fully", "**/norm/scale", "--rank", "2"]
    assert main(["targets", "stories260k", *options]) == 0
    caught = {path: cells[-1] for path, cells in rows_of(capsys.readouterr().out).items() if cells[-1] != "-"}
    assert caught == {
        "model/layers/self_attn/q_proj/kernel": "**/q_proj/kernel: LoRA",
        "model/layers/self_attn/k_proj/kernel": "**/k_proj/kernel: LoRA",
        "model/norm/scale": "**/norm/scale: Full",
    }


def test_targets_shows_the_leaves_and_then_what_is_wrong(capsys):
    assert main(["targets", "stories260k", "--targets", "**/qq_proj/kernel"]) == 2
    printed = capsys.readouterr()
    assert "model/layers/self_attn/q_proj/kernel" in rows_of(printed.out)
    assert "matches no leaf" in printed.err and "q_proj" in printed.err


@pytest.mark.parametrize("command", ["methods --model", "targets"])
def test_unknown_models_are_refused(command, tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"model_type": "rnn"}')
    for name, message in (("nowhere", "nowhere"), (str(tmp_path), "model_type 'rnn' is not known")):
        assert main([*command.split(), name]) == 2
        assert message in capsys.readouterr().err


def test_dry_run_prints_the_plan_and_writes_nothing(tiny_options, compile_once, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([*tiny_options, "--out", "run", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "model/layers/self_attn/q_proj/kernel" in printed
    assert {"rank=2", "dropout=0.1"} <= set(re.search(r"LoRA\((.*)\)", printed)[1].split(", "))
    assert "steps      12 of 4 rows" in printed and "go to run" in printed
    memory = {
        what: float(n.replace(",", "")) * {"KiB": 2**10, "MiB": 2**20}[unit]
        for what, n, unit in re.findall(
            r"(base|adapters|optimizer state|one step, beyond these) ([\d.,]+) (.iB)", printed
        )
    }
    assert memory["base"] == pytest.approx(4 * 260_032, rel=0.05)
    trainable = int(re.search(r"trainable ([\d,]+) beside", printed)[1].replace(",", ""))
    assert memory["adapters"] == pytest.approx(4 * trainable, rel=0.05)
    assert memory["optimizer state"] == pytest.approx(8 * trainable, rel=0.05)  # AdamW: two moments
    assert memory["one step, beyond these"] > 0
    assert not list(tmp_path.iterdir())
    assert main(["finetune", "--rank", "1000", "--dry-run"]) == 2
    assert "min(in, out)" in capsys.readouterr().err


@pytest.fixture(scope="module")
def two_runs(tiny_options, compile_once, tmp_path_factory) -> list[pathlib.Path]:
    """A run, and what one of rank 4 would have left."""
    path = tmp_path_factory.mktemp("compare")
    low, high = path / "low", path / "high"
    assert main([*tiny_options, "--no-generate", "--out", str(low)]) == 0
    shutil.copytree(low, high)
    config = json.loads((low / "config.json").read_text())
    config["options"]["method"]["rank"] = 4
    config["options"]["run"]["out"] = str(high)
    config["summary"]["trainable"] *= 2
    (high / "config.json").write_text(json.dumps(config))
    results = json.loads((low / "results.json").read_text())
    results["after"]["eval_nll"] *= 0.9
    (high / "results.json").write_text(json.dumps(results))
    return [low, high]


def test_compare(two_runs, tmp_path, capsys):
    out = tmp_path / "new" / "both.png"
    capsys.readouterr()
    assert main(["compare", *map(str, two_runs), "--out", str(out)]) == 0
    rows = rows_of(capsys.readouterr().out)
    assert rows["--rank"] == ["2", "4"] and "--alpha" not in rows and "--out" not in rows
    for i, run in enumerate(two_runs):
        results = json.loads((run / "results.json").read_text())
        assert rows["held-out loss"][i].split(" -> ") == [f"{results[k]['eval_nll']:.4g}" for k in ("before", "after")]
        tensors = load_file(run / "adapter" / "adapter_model.safetensors").values()
        assert rows["trainable parameters"][i] == f"{(i + 1) * sum(tensor.size for tensor in tensors):,}"
        assert rows["steps"][i] == "12 of 12"
    assert matplotlib.image.imread(out).shape == (630, 1050, 4)
    before = out.read_bytes()
    assert main(["compare", *map(str, two_runs), "--out", str(out)]) == 2
    assert "exists already" in capsys.readouterr().err and out.read_bytes() == before
    assert main(["compare", *map(str, two_runs), "--out", str(out), "--overwrite"]) == 0


def test_compare_takes_unfinished_runs(two_runs, tmp_path, capsys):
    half = tmp_path / "half"
    half.mkdir()
    (half / "config.json").write_bytes((two_runs[0] / "config.json").read_bytes())
    records = (two_runs[0] / "metrics.jsonl").read_text().splitlines(keepends=True)
    (half / "metrics.jsonl").write_text("".join(r for r in records if json.loads(r)["step"] <= 6))
    capsys.readouterr()
    assert main(["compare", str(half), str(two_runs[1]), "--out", str(tmp_path / "x.png")]) == 0
    rows = rows_of(capsys.readouterr().out)
    assert rows["steps"] == ["6 of 12", "12 of 12"] and rows["held-out loss"][0] == "-"


def test_compare_refuses(two_runs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run = str(two_runs[0])
    for paths, message in (([run], "two runs"), ([run, run], "the same run twice"), ([run, "."], "not a run")):
        assert main(["compare", *paths]) == 2
        assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_names_tell_runs_apart():
    assert inform._names([pathlib.Path("a/x"), pathlib.Path("a/y")]) == ["x", "y"]
    assert inform._names([pathlib.Path("a/x"), pathlib.Path("b/x")]) == ["a/x", "b/x"]
