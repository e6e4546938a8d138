"""Every recipe: its command is the one it states, the command line takes its options, and a few steps of it run."""

import importlib
import importlib.util
import json
import pathlib
import pkgutil
import re

import pytest

from jlora.train import cli, recipes
from jlora.train.models import packaged

RECIPES = {
    name: importlib.import_module(f"jlora.train.recipes.{name}")
    for _, name, _ in pkgutil.iter_modules(recipes.__path__)
}
FEW = (
    "--steps 2 --batch-size 2 --accumulation 1 --max-length 48 --eval-every 0 --eval-limit 2 --max-new-tokens 4 "
    "--samples 1 --checkpoint-every 0"
).split()
# What the reader of a recipe looks for, by the task that it is of.
FIGURES = {
    "stories_e2e": {"perplexity", "bleu"},
    "stories_shakespeare": {"perplexity"},
    "smollm2_gsm8k": {"perplexity", "exact_match"},
    "smollm2_qlora": {"perplexity"},
    "minilm_sst2": {"accuracy"},
    "minilm_trec6": {"accuracy"},
    "minilm_cola": {"matthews"},
    "minilm_rte": {"accuracy"},
}


def option(recipe, flag: str) -> str | None:
    return recipe.OPTIONS[recipe.OPTIONS.index(flag) + 1] if flag in recipe.OPTIONS else None


def write_data(recipe, path: pathlib.Path) -> str:
    """A few rows with the columns that a recipe reads."""
    if option(recipe, "--task") == "classification":
        columns = [c for c in (option(recipe, "--text-column"), option(recipe, "--pair-column")) if c]
        rows = [{"label": i % 2} | {column: f"a {column} with {i} words" for column in columns} for i in range(8)]
    else:
        columns = option(recipe, "--prompt-column"), option(recipe, "--completion-column")
        texts = [(f"How much is 1 + {i}?", f"1 + {i} = {i + 1}\n#### {i + 1}") for i in range(8)]
        rows = [dict(zip(columns, pair, strict=True)) for pair in texts]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def run(name: str, directory: pathlib.Path) -> dict:
    recipe = RECIPES[name]
    paths = [write_data(recipe, directory / f"{o[1:-1]}.jsonl") for o in recipe.OPTIONS if o.startswith("{")]
    argv = [*paths, *FEW, "--out", str(directory / "run")]
    assert recipes.finetune(recipe.OPTIONS, recipe.__doc__, argv) == 0
    assert (directory / "run" / "adapter" / "adapter_config.json").is_file()
    return json.loads((directory / "run" / "results.json").read_text())


def test_there_is_a_figure_of_every_recipe():
    assert RECIPES.keys() == FIGURES.keys()


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_says_how_to_run_it(name, monkeypatch, capsys):
    recipe, taken = RECIPES[name], []
    monkeypatch.setattr(cli, "_run", lambda config, argv: taken.append(config) or 0)
    paths = [f"file{i}" for i, _ in enumerate(o for o in recipe.OPTIONS if o.startswith("{"))]
    assert recipes.finetune(recipe.OPTIONS, recipe.__doc__, [*paths, "--steps", "3"]) == 0
    assert taken[0].train.steps == 3 and [taken[0].data.data, taken[0].data.eval_data][: len(paths)] == paths
    command = f"python -m jlora.train.recipes.{name} "
    (line,) = (line for line in recipe.__doc__.splitlines() if line.strip().startswith(command))
    assert len(re.findall(r"\.(?:tsv|jsonl)\b", line)) == len(paths)
    assert recipes.finetune(recipe.OPTIONS, recipe.__doc__, ["--help"]) == 0
    assert command in capsys.readouterr().out
    if paths:
        assert recipes.finetune(recipe.OPTIONS, recipe.__doc__, paths[1:]) == 2 and len(taken) == 1


def test_shakespeare_takes_a_few_steps(tmp_path):
    assert FIGURES["stories_shakespeare"] <= run("stories_shakespeare", tmp_path)["after"].keys()


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_takes_a_few_steps(name, tmp_path):
    """With the weights that it names: .ci/run installs the packages that bring them."""
    package = packaged.PACKAGES.get(option(RECIPES[name], "--model"))
    if package and importlib.util.find_spec(package.module) is None:
        pytest.skip(f"wants the weights of {package.distribution}")
    results = run(name, tmp_path)
    assert FIGURES[name] <= results["after"].keys()
    if name.startswith("smollm2_gsm8k"):
        assert results["samples"][0]["prompt"].endswith("<|im_start|>assistant\n")
