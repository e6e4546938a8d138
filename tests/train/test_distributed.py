"""`--distributed`: two real processes of four devices each, over gloo, are the one process of eight; they stop
together, are killed, and go on as they were, there or elsewhere; and what is refused."""

import contextlib
import itertools
import json
import os
import pathlib
import random
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from safetensors.numpy import load_file

from jlora.train import distributed, finetune
from jlora.train import mesh as meshes
from jlora.train.checkpoint import checksums
from jlora.train.cli import main
from jlora.train.config import UserError

# The default run, stories260k on E2E, in short.
SHORT = (
    "--steps 4 --batch-size 8 --max-length 64 --dropout 0.1 --eval-every 2 --eval-limit 8 --eval-batch-size 8 "
    "--checkpoint-every 2 --log-every 1 --warmup-steps 0 --no-generate"
).split()
LONGER = [*SHORT, "--steps", "12", "--checkpoint-every", "3", "--keep", "9"]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


class Processes:
    """`jlora finetune` as so many processes of four devices each; `own` are further options of each of them."""

    def __init__(self, options, environment, own=((), ()), count=2, timeout=60):
        address = f"localhost:{free_port()}"
        command = [sys.executable, "-m", "jlora.train.cli", "finetune", *options, "--distributed-timeout", str(timeout)]
        quickly = str(jax.config.read("jax_disable_most_optimizations"))  # compiled as in this process
        environment = environment | {
            "JAX_NUM_CPU_DEVICES": "4", "XLA_FLAGS": "", "JAX_DISABLE_MOST_OPTIMIZATIONS": quickly,
        }  # fmt: skip
        self.started = [
            subprocess.Popen(
                [*command, "--distributed", f"{address},{count},{i}", *extra],
                env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            )
            for i, extra in enumerate(own)
        ]  # fmt: skip

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self.started:
            process.kill()
            process.communicate()

    def end(self, seconds=300):
        """What they returned, what they printed, and what they complained of."""
        deadline = time.monotonic() + seconds
        printed = [process.communicate(timeout=max(1, deadline - time.monotonic())) for process in self.started]
        codes = [process.returncode for process in self.started]
        return codes, *zip(*printed, strict=True)


def wait_for_step(run: pathlib.Path, step: int, processes: Processes) -> None:
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and all(process.poll() is None for process in processes.started):
        with contextlib.suppress(FileNotFoundError):
            if f'"step": {step}, "loss"' in (run / "metrics.jsonl").read_text():
                return
        time.sleep(0.005)
    raise AssertionError(f"step {step} was not taken: {processes.end(1)}")


def succeed(options, environment, **more):
    with Processes(options, environment, **more) as processes:
        codes, printed, errors = processes.end()
    assert codes == [0, 0], errors
    assert "step" in printed[0] and "step" not in printed[1]  # the first one speaks
    return printed[0]


def adapter(run):
    return load_file(run / "adapter" / "adapter_model.safetensors")


def records(run, name):
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [record[name] for record in lines if name in record]


def assert_near(got, wanted, rtol=1e-4):
    """As far apart as sums in another order make them after a few steps of Adam."""
    np.testing.assert_allclose(records(got, "loss"), records(wanted, "loss"), rtol=rtol)
    last = [records(run, "eval_nll")[-1] for run in (got, wanted)]  # a stop leaves an evaluation out
    np.testing.assert_allclose(*last, rtol=rtol)
    for name, tensor in adapter(wanted).items():
        np.testing.assert_allclose(adapter(got)[name], tensor, atol=200 * rtol * np.abs(tensor).max(), err_msg=name)


def assert_same(got, wanted):
    for name, tensor in adapter(wanted).items():
        np.testing.assert_array_equal(adapter(got)[name], tensor, err_msg=name)


def test_two_processes_are_one_of_as_many_devices(compile_once, tmp_path, devices):
    one, two = tmp_path / "one", tmp_path / "two"
    command = [*SHORT, "--mesh", "data=4,model=2", "--targets", "**/q_proj/kernel", "**/down_proj/kernel"]
    printed = succeed([*command, "--out", str(two)], compile_once)
    assert "step 4/4" in printed and f"writing to {two}" in printed
    assert main(["finetune", *command, "--out", str(one)]) == 0
    assert_near(two, one, rtol=1e-5)
    files = lambda run: {path.name for path in run.iterdir()}
    assert files(one) == files(two)


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    ["", "--mesh data=2,fsdp=2,model=2 --method dora", "--mesh fsdp=8 --init pissa", "--mesh data=8 --quantize nf4"],
)
def test_other_meshes_and_methods(more, compile_once, tmp_path, devices):
    one, two = tmp_path / "one", tmp_path / "two"
    command = [*SHORT, "--generate", "--max-new-tokens", "8", *more.split()]
    succeed([*command, "--out", str(two)], compile_once)
    mesh = [] if "--mesh" in more else ["--mesh", "data=8"]
    assert main(["finetune", *command, *mesh, "--out", str(one)]) == 0
    assert_near(two, one)
    assert len((two / "completions.jsonl").read_text().splitlines()) == 8


@pytest.fixture(scope="module")
def uninterrupted(compile_once, tmp_path_factory):
    run = tmp_path_factory.mktemp("uninterrupted") / "run"
    succeed([*LONGER, "--out", str(run)], compile_once)
    return run


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_killed_at_a_random_step_and_started_again_it_is_the_same(killed, uninterrupted, compile_once, tmp_path):
    run, step = tmp_path / "run", random.randint(1, 11)
    with Processes([*LONGER, "--out", str(run)], compile_once, timeout=10) as processes:
        wait_for_step(run, step, processes)
        processes.started[killed].kill()
        codes, _, errors = processes.end(60)  # jax ends the other one
    assert codes[killed] == -signal.SIGKILL and codes[1 - killed] not in (0, None), errors
    assert not (run / "adapter").exists()
    printed = succeed(["--resume", str(run)], compile_once)
    assert "resuming after step" in printed, f"killed after step {step}"
    assert_same(run, uninterrupted)


@pytest.mark.slow
def test_a_signal_to_one_stops_all_at_one_step_and_others_go_on(uninterrupted, compile_once, tmp_path, capsys, devices):
    run = tmp_path / "run"
    with Processes([*LONGER, "--out", str(run)], compile_once) as processes:
        wait_for_step(run, 4, processes)
        processes.started[1].terminate()
        codes, printed, errors = processes.end()
    assert codes == [143, 143], errors
    assert "SIGTERM: stopped after step" in printed[0] and "step" not in printed[1]
    copies = [tmp_path / name for name in ("mesh", "eight", "alone")]
    for copy in copies:
        shutil.copytree(run, copy)
    succeed(["--resume", str(run)], compile_once)
    assert_same(run, uninterrupted)
    succeed(["--resume", str(copies[0]), "--mesh", "data=2,model=2,fsdp=2"], compile_once)
    assert main(["finetune", "--resume", str(copies[1]), "--mesh", "fsdp=4,model=2"]) == 0
    assert main(["finetune", "--resume", str(copies[2])]) == 0  # one device
    assert "resuming after step" in capsys.readouterr().out
    for copy in copies:
        assert_near(copy, uninterrupted)


@pytest.mark.slow
def test_a_damaged_part_of_one_process_is_passed_over_by_all(uninterrupted, compile_once, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(uninterrupted, run)
    shutil.rmtree(run / "adapter")
    results = json.loads((run / "results.json").read_text())
    (run / "results.json").write_text(json.dumps({"before": results["before"], "texts_before": []}))
    for path in (run / "checkpoints" / "12" / "state").rglob("*"):
        if path.is_file() and "ocdbt.process_1/d" in str(path):
            os.truncate(path, path.stat().st_size // 2)
    printed = succeed(["--resume", str(run)], compile_once)
    assert "checkpoint 12 cannot be read" in printed and "resuming after step 9" in printed
    assert_same(run, uninterrupted)


def test_options_that_differ_stop_all(compile_once, tmp_path):
    command = [*SHORT, "--out", str(tmp_path / "run")]
    with Processes(command, compile_once, own=((), ("--rank", "4"))) as processes:
        codes, _, errors = processes.end()
    assert codes == [2, 2]
    for error in errors:
        assert "process 1 has other options than process 0, which must be the same: rank is 4 there and None" in error
    assert not (tmp_path / "run").exists()


def test_a_process_alone_says_whom_it_waited_for(compile_once, tmp_path):
    command = [*SHORT, "--out", str(tmp_path / "run")]
    with Processes(command, compile_once, own=((),), timeout=1) as processes:
        codes, _, errors = processes.end()
    assert codes == [2] and "tried for 1 s (--distributed-timeout) to meet all processes at localhost:" in errors[0]


def test_sigterm_ends_a_process_that_does_not_train_yet():
    code = f"""
import os, signal, time
from jlora.train import distributed
distributed.connect("localhost:{free_port()},1,0", 60)
os.kill(os.getpid(), signal.SIGTERM)
time.sleep(20)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=100)
    assert done.returncode == -signal.SIGTERM, done.stderr


def test_auto_wants_a_cluster(compile_once, tmp_path):
    command = [sys.executable, "-m", "jlora.train.cli", "finetune", "--distributed", "auto"]
    cluster = ("SLURM_", "OMPI_", "JAX_COORD", "KUBERNETES_")
    environment = {name: value for name, value in compile_once.items() if not name.startswith(cluster)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100, cwd=tmp_path)
    assert done.returncode == 2 and "this is no TPU pod, and no task of Slurm or Open MPI" in done.stderr


@pytest.mark.parametrize("text", ["yes", "10.0.0.1:1234", "10.0.0.1,2,0", "10.0.0.1:1234,2,2", "10.0.0.1:1234,a,0"])
def test_a_place_that_is_none_is_refused(text, capsys):
    assert main(["finetune", "--distributed", text]) == 2
    assert "wanted none, auto, or HOST:PORT,PROCESSES,INDEX" in capsys.readouterr().err


def test_auto_reads_the_variables_of_jax(monkeypatch):
    values = {"JAX_COORDINATOR_ADDRESS": "10.0.0.1:1234", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    assert distributed._place("auto") == ("10.0.0.1:1234", 2, 1)


def test_commands_make_no_array_before_the_processes_meet():
    code = "from jlora.train import cli, commands, finetune, inform; from jax._src import xla_bridge; "
    code += "assert not xla_bridge.backends_are_initialized()"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=100)


def test_devices_of_several_processes_are_a_mesh_without_asking(monkeypatch, devices):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert dict(meshes.make(None).shape) == {"data": 8}
    with pytest.raises(UserError, match="--mesh none is for one device, and --distributed has 8"):
        meshes.make("none")


def test_checksums_do_not_depend_on_the_sharding(devices):
    mesh = meshes.make("data=4,model=2")
    rng = np.random.default_rng(0)
    arrays = [
        rng.normal(size=(8, 6)).astype(np.float32), rng.integers(0, 255, (4, 4), np.uint8), np.float16(2.5),
        rng.normal(size=(4, 2)).astype("complex64"), np.arange(8, dtype=np.int32) - 3, np.array([True, False] * 4),
    ]  # fmt: skip
    whole = checksums(arrays)
    spec = lambda x: P(*("data", "model")[: x.ndim])
    assert checksums([jax.device_put(x, NamedSharding(mesh, spec(x))) for x in arrays]) == whole
    for i, array in enumerate(arrays):
        for place, bit in itertools.product(range(min(array.nbytes, 4)), (0, 7)):
            raw = bytearray(array.tobytes())
            raw[place] ^= 1 << bit
            if array.dtype != bool:
                changed = [*arrays[:i], np.frombuffer(raw, array.dtype).reshape(array.shape), *arrays[i + 1 :]]
                assert [a == b for a, b in zip(checksums(changed), whole, strict=True)].count(False) == 1
    assert checksums([arrays[0][::-1]]) != checksums([arrays[0]])


def test_the_default_is_one_process():
    assert finetune.RunOptions().distributed == "none"
    assert distributed.first() and distributed.gather({"a": 1}) == [{"a": 1}] and distributed.largest(3) == 3
