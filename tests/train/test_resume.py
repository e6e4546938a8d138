"""Stopping and going on: killed, interrupted, damaged, out of disk, not finite. The outcome is the same to the bit."""

import gc
import os
import pathlib
import random
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest

from jlora.train import report
from jlora.train.cli import main

pytestmark = pytest.mark.optimized


def adapter_bytes(run: pathlib.Path) -> bytes:
    return (run / "adapter" / "adapter_model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def uninterrupted(tiny_options, compile_once, tmp_path_factory) -> pathlib.Path:
    run = tmp_path_factory.mktemp("uninterrupted") / "run"
    assert main([*tiny_options, "--out", str(run)]) == 0
    return run


def at_step(monkeypatch, step: int, action) -> None:
    """Call `action` when training has taken `step`, the first time."""
    tick = report.Reporter.tick

    def patched(self, done):
        tick(self, done)
        if done == step:
            monkeypatch.setattr(report.Reporter, "tick", tick)
            action()

    monkeypatch.setattr(report.Reporter, "tick", patched)


def stop_at(monkeypatch, step: int, signum: int) -> None:
    at_step(monkeypatch, step, lambda: os.kill(os.getpid(), signum))


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_signal_saves_and_says_how_to_resume(tiny_options, uninterrupted, tmp_path, monkeypatch, capsys, signum):
    run = tmp_path / "run"
    stop_at(monkeypatch, 5, signum)
    assert main([*tiny_options, "--out", str(run)]) == 128 + signum
    printed = capsys.readouterr().out
    assert "after step 5" in printed and f"jlora finetune --resume {run}" in printed
    assert (run / "checkpoints" / "5").is_dir() and not (run / "adapter").exists()
    assert main(["finetune", "--resume", str(run)]) == 0
    assert "resuming after step 5" in capsys.readouterr().out
    assert adapter_bytes(run) == adapter_bytes(uninterrupted)
    assert (run / "completions.jsonl").read_text() == (uninterrupted / "completions.jsonl").read_text()
    assert main(["finetune", "--resume", str(run)]) == 0  # once more: nothing left to do
    assert "is finished" in capsys.readouterr().out


def test_killed_at_a_random_step_then_resumed_is_the_same(tiny_options, uninterrupted, compile_once, tmp_path):
    run = tmp_path / "run"
    step = random.randint(1, 11)
    command = [sys.executable, "-m", "jlora.train.cli", *tiny_options, "--out", str(run)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=compile_once)
    try:
        while process.poll() is None:
            if (run / "metrics.jsonl").exists() and f'"step": {step}, "loss"' in (run / "metrics.jsonl").read_text():
                break
            time.sleep(0.001)
    finally:
        process.kill()
        errors = process.communicate()[1]
    assert process.returncode == -signal.SIGKILL, errors
    assert not (run / "adapter").exists()
    assert main(["finetune", "--resume", str(run)]) == 0, f"killed after step {step}"
    assert adapter_bytes(run) == adapter_bytes(uninterrupted), f"killed after step {step}"


def test_truncated_newest_checkpoint_falls_back_and_says_so(tiny_options, uninterrupted, tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    stop_at(monkeypatch, 8, signal.SIGTERM)
    assert main([*tiny_options, "--out", str(run)]) == 143
    for path in (run / "checkpoints" / "8").rglob("*"):
        if path.is_file():
            os.truncate(path, path.stat().st_size // 2)
    capsys.readouterr()
    assert main(["finetune", "--resume", str(run)]) == 0
    printed = capsys.readouterr().out
    assert "checkpoint 8 cannot be read" in printed and "resuming after step 6" in printed
    assert adapter_bytes(run) == adapter_bytes(uninterrupted)


# orbax leaves the event loops of a write that failed to the garbage collector, which complains
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_out_of_disk_keeps_the_checkpoint_before(tiny_options, uninterrupted, tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill_up():
        while not (run / "checkpoints" / "3").exists():  # written in the background
            time.sleep(0.01)
        resource.setrlimit(resource.RLIMIT_FSIZE, (16 * 1024, before[1]))

    at_step(monkeypatch, 5, fill_up)
    try:
        assert main([*tiny_options, "--out", str(run)]) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    error = capsys.readouterr().err
    assert "File too large; the checkpoint of step 3 is kept" in error and len(error.splitlines()) == 1
    assert main(["finetune", "--resume", str(run)]) == 0
    assert adapter_bytes(run) == adapter_bytes(uninterrupted)
    gc.collect()


def test_loss_that_is_not_finite_stops_with_the_step(tiny_options, compile_once, tmp_path, capsys):
    run = tmp_path / "run"
    options = ["--learning-rate", "1e30", "--checkpoint-every", "1", "--warmup-steps", "0", "--out", str(run)]
    assert main([*tiny_options, *options]) == 1
    error = capsys.readouterr().err
    assert "at step 2" in error and "checkpoint of step 1 is kept" in error and len(error.splitlines()) == 1
    assert (run / "checkpoints" / "1").is_dir() and not (run / "adapter").exists()


def test_resume_refuses_other_data_and_other_options(tiny_options, uninterrupted, tmp_path, tiny_data, capsys):
    run = tmp_path / "run"
    shutil.copytree(uninterrupted, run)
    assert main(["finetune", "--resume", str(run), "--steps", "20"]) == 2
    assert "no other option" in capsys.readouterr().err
    content = tiny_data.read_text()
    try:
        tiny_data.write_text(content.replace("cat", "cow"))
        assert main(["finetune", "--resume", str(run)]) == 2
    finally:
        tiny_data.write_text(content)
    assert "another training data" in capsys.readouterr().err
