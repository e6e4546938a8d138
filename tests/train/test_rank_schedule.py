"""`--rank-schedule`: ranks change while a run trains, one compiled step serves, a run that stopped goes on alike."""

import json
import signal
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_loop import batch_of, model, setting
from test_resume import adapter_bytes, stop_at

import jlora
from jlora.train import ranks
from jlora.train.cli import main
from jlora.train.config import TrainOptions
from jlora.train.loop import make_train_step

MATRICES = 5 * 7  # of the shipped model
ADALORA = ["--method", "adalora", "--rank", "4", "--rank-schedule", "adalora"]


def test_every_one_is_on_offer():
    offered = typing.get_args(typing.get_type_hints(TrainOptions)["rank_schedule"])
    assert set(offered) == {"none", *ranks.SCHEDULES}


def test_ranks_fall_and_a_run_that_stopped_goes_on_alike(tiny_options, compile_once, tmp_path, monkeypatch, capsys):
    options = [*tiny_options, *ADALORA, "--rank-schedule-options", "target_rank=2", "warmup_steps=2"]
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert main([*options, "--out", str(whole)]) == 0
    assert f"ranks in use: {2 * MATRICES} of {4 * MATRICES}" in capsys.readouterr().out
    stop_at(monkeypatch, 5, signal.SIGINT)
    assert main([*options, "--out", str(run)]) == 128 + signal.SIGINT
    assert main(["finetune", "--resume", str(run)]) == 0
    assert adapter_bytes(run) == adapter_bytes(whole)
    pattern = json.loads((run / "adapter" / "adapter_config.json").read_text())["rank_pattern"]
    assert sum(map(sum, pattern.values())) == 2 * MATRICES and len(set(map(sum, pattern.values()))) > 1
    printed = []
    for source in (["--adapter", str(run / "adapter")], ["--run", str(run)]):
        capsys.readouterr()
        assert main(["evaluate", *source, "--data", options[2], "--max-length", "32", "--no-generate"]) == 0
        printed.append(capsys.readouterr().out.partition("held-out loss")[2])
    assert printed[0] == printed[1] != ""


METHODS = {
    "adalora": (jlora.AdaLoRA(4), ("target_rank=2",), 2),
    "increlora": (jlora.AdaLoRA(4), ("target_rank=3", "warmup_steps=1"), 3),
    "triadapt": (jlora.TriAdaptLoRA(4), ("target_rank=3",), 3),
    "diffora": (jlora.AdaLoRA(4), ("share=1.0",), 4),
    "squeeze": (jlora.LoRA(4), ("stages=[(3, 3), (6, 2)]",), 2),
}


@pytest.mark.parametrize("name", ranks.SCHEDULES)
def test_one_program_serves(name):
    """As many ranks as were asked for, one compilation, and the model that the masks say."""
    method, options, wanted = METHODS[name]
    adapted, trainable, optimizer, _ = setting(method)
    kind = ranks.SCHEDULES[name]
    options = TrainOptions(steps=12, rank_schedule=name, rank_schedule_options=options)
    schedule = ranks.make(options, kind.method)
    assert schedule.orthogonality == kind.orthogonality
    step = make_train_step(jlora.lift(model), optimizer, rank_schedule=schedule)
    trainable, state = schedule.begin(adapted.replace(trainable=trainable), optimizer.init)
    fixed, batch, losses = adapted.replace(trainable={}), batch_of(1, 4), []
    for number in range(1, 13):
        trainable, state, metrics = step(trainable, state, fixed, batch, jax.random.key(5), np.int32(number))
        losses.append(float(metrics["loss"]))
    assert step._cache_size() == 1 and losses[-1] < losses[0]
    now = ranks.present(adapted.replace(trainable=trainable), state)
    assert ranks.describe(now) == f"ranks in use: {wanted} of 4"
    got = model({"params": jlora.merge(jlora.repack(now))}, batch["ids"][0], None, None) if wanted < 4 else None
    want = model({"params": jlora.merge(now)}, batch["ids"][0], None, None)
    assert got is None or np.allclose(got, want, atol=1e-5)


def test_the_penalty_is_in_the_gradient_and_not_in_the_loss():
    adapted, trainable, optimizer, plain = setting(jlora.AdaLoRA(4))
    copied = lambda: jax.tree.map(jnp.copy, trainable)
    fixed, rest = adapted.replace(trainable={}), (batch_of(1, 4), jax.random.key(5), np.int32(1))
    want, _, metrics = plain(copied(), optimizer.init(trainable), fixed, *rest)
    moved = {}
    for weight in (0, 0.5):
        options = ("target_rank=2", f"orthogonality={weight}", "warmup_steps=8", "final_steps=2")
        schedule = ranks.make(TrainOptions(steps=12, rank_schedule="adalora", rank_schedule_options=options), "adalora")
        step = make_train_step(jlora.lift(model), optimizer, rank_schedule=schedule)
        _, state = schedule.begin(adapted.replace(trainable=copied()), optimizer.init)
        moved[weight], _, own = step(copied(), state, fixed, *rest)
        assert own["loss"] == metrics["loss"]
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=1e-6), moved[0], want)
    penalty = lambda trainable: jlora.rank.orthogonality(adapted.replace(trainable=trainable))
    by_hand = jax.tree.map(lambda w, g: w - 0.5 * 0.5 * g, want, jax.grad(penalty)(trainable))  # of SGD at rate 0.5
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=1e-5, atol=1e-6), moved[0.5], by_hand)


@pytest.mark.slow
def test_over_devices(tiny_options, compile_once, tmp_path, capsys):
    """The same ranks, and the same losses to rounding."""
    options = [
        *tiny_options,
        *ADALORA,
        "--rank-schedule-options",
        "target_rank=2",
        "--batch-size",
        "8",
        "--no-generate",
    ]
    after = []
    for mesh in ("none", "data=2,fsdp=2,model=2"):
        run = tmp_path / mesh
        assert main([*options, "--mesh", mesh, "--out", str(run)]) == 0
        assert f"ranks in use: {2 * MATRICES} of {4 * MATRICES}" in capsys.readouterr().out
        after.append(json.loads((run / "results.json").read_text())["after"]["eval_nll"])
    assert after[0] == pytest.approx(after[1], rel=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rank-schedule", "adalora"], "--rank-schedule adalora is of --method adalora, got lora"),
        ([*ADALORA, "--rank-schedule-options", "rank=2"], "--rank-schedule adalora has no option 'rank'"),
        ([*ADALORA, "--rank-schedule-options", "target_rank=9"], "is above what there is to begin with"),
        ([*ADALORA, "--rank-schedule-options", "orthogonality=-1"], "is a weight of 0 or above"),
        (["--rank-schedule-options", "target_rank=2"], "is for --rank-schedule, and there is none"),
        (["--rank-schedule", "squeeze"], "wants --rank-schedule-options 'stages=[(STEP, RANK), ...]'"),
    ],
)
def test_errors(tiny_options, tmp_path, capsys, options, message):
    assert main([*tiny_options, *options, "--out", str(tmp_path / "run")]) == 2
    assert message in " ".join(capsys.readouterr().err.split()) and not (tmp_path / "run").exists()
