"""`--mesh`: the same run over eight devices, stopped, and continued there or elsewhere; and what it refuses."""

import json
import os
import shutil
import signal

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from safetensors.numpy import load_file

from jlora.train import mesh as meshes
from jlora.train import models, report
from jlora.train.cli import main
from jlora.train.config import UserError

OPTIONS = (
    "--steps 6 --batch-size 8 --max-length 32 --rank 2 --dropout 0.1 --eval-every 3 --eval-batch-size 8 --no-generate "
    "--checkpoint-every 3 --log-every 1 --warmup-steps 0"
).split()


def adapter(run):
    return load_file(run / "adapter" / "adapter_model.safetensors")


def losses(run):
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [record["loss"] for record in records if "loss" in record]


def assert_near(got, wanted):
    """As far apart as sums in another order make them after a few steps of Adam."""
    np.testing.assert_allclose(losses(got), losses(wanted), rtol=1e-4)
    for name, tensor in adapter(wanted).items():
        np.testing.assert_allclose(adapter(got)[name], tensor, atol=2e-2 * np.abs(tensor).max(), err_msg=name)


def test_a_run_over_devices_is_the_run_on_one(tiny_data, compile_once, tmp_path, monkeypatch, capsys, devices):
    command = ["finetune", "--data", str(tiny_data), *OPTIONS]
    alone, whole, stopped, moved = (tmp_path / name for name in ("alone", "whole", "stopped", "moved"))
    mesh = ["--mesh", "data=2,fsdp=2,model=2"]
    assert main([*command, "--out", str(alone)]) == 0
    assert main([*command, *mesh, "--out", str(whole)]) == 0
    assert_near(whole, alone)

    tick = report.Reporter.tick

    def stop(self, done):
        tick(self, done)
        if done == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(report.Reporter, "tick", stop)
    assert main([*command, *mesh, "--out", str(stopped)]) == 143
    monkeypatch.undo()
    shutil.copytree(stopped, moved)
    assert main(["finetune", "--resume", str(stopped)]) == 0
    for name, tensor in adapter(whole).items():
        np.testing.assert_array_equal(adapter(stopped)[name], tensor)
    assert main(["finetune", "--resume", str(moved), "--mesh", "none"]) == 0
    assert_near(moved, whole)
    assert "resuming after step 4" in capsys.readouterr().out


def test_weights_lie_as_the_axes_say(devices):
    mesh = meshes.make("fsdp=2,model=4")
    leaves = {
        "model/layers/self_attn/q_proj/kernel": (2, 16, 32),
        "model/layers/self_attn/o_proj/kernel": (2, 32, 16),
        "model/layers/mlp/experts/down_proj": (2, 4, 24, 16),
        "model/layers/mlp/gate/kernel": (2, 16, 4),
        "model/layers/input_layernorm/scale": (2, 16),
        "model/embed_tokens/embedding": (64, 16),
        "odd/embedding": (63, 16),
        "lm_head/kernel": (16, 64),
    }
    specs = meshes.specs(mesh, {path: jax.ShapeDtypeStruct(shape, np.float32) for path, shape in leaves.items()})
    assert list(specs.values()) == [
        P(None, "fsdp", "model"), P(None, "model", "fsdp"), P(None, None, "model", "fsdp"), P(), P(),
        P("model", "fsdp"), P(None, "fsdp"), P("fsdp", "model"),
    ]  # fmt: skip
    mesh = meshes.make("data=2,expert=4")
    assert meshes.specs(mesh, {"a/experts/b": jax.ShapeDtypeStruct((2, 4, 3, 3), np.float32)})["a/experts/b"] == P(
        None, "expert", None, None
    )


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ("--mesh data=4", "for 4 devices, and there are 8: the sizes must multiply to 8"),
        ("--mesh data=2,tensor=4", "'tensor=4' is no AXIS=DEVICES with an axis of its own among data, fsdp, model"),
        ("--mesh data=2,data=4", "'data=4' is no AXIS=DEVICES"),
        ("--mesh data=x", "'data=x' is no AXIS=DEVICES"),
        ("--mesh expert=8", "nothing of this model is divided by 'expert', for it has no experts"),
        ("--mesh data=8 --batch-size 12", "rows cannot be divided over the 8 devices of data: --batch-size 16 can"),
        ("--mesh model=8", r"axis 1 of 172 entries is not divisible by the 8 devices of 'model'"),
    ],
)  # fmt: skip
def test_what_it_refuses(options, says, tiny_data, tmp_path, capsys, devices):
    command = ["finetune", "--data", str(tiny_data), "--batch-size", "8", *options.split()]
    assert main([*command, "--out", str(tmp_path / "run")]) == 2
    assert says in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_without_several_devices_it_says_how_to_have_them(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    with pytest.raises(UserError, match="xla_force_host_platform_device_count"):
        meshes.make("data=8")
    assert meshes.make(None) is meshes.make("none") is None


def test_a_model_is_read_to_where_a_function_says(devices):
    mesh = meshes.make("fsdp=2,model=4")
    model = models.load("stories260k", mesh=mesh, specs=lambda leaves: meshes.specs(mesh, leaves))
    kernel = model.params["model"]["layers"]["mlp"]["down_proj"]["kernel"]
    assert kernel.sharding.spec == P(None, "model", "fsdp")
