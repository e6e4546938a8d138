import json
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora import Factors
from jlora.train.checkpoint import Checkpoints, fingerprint
from jlora.train.config import RunError, UserError
from jlora.train.run import RunDirectory, write_directory, write_file

IDENTITY = {"base model": {"layout": "x"}}


def state_at(step: int):
    key = jax.random.key(step)
    pair = Factors(jax.random.normal(key, (64, 8)), jnp.full((8, 16), float(step)), 2.0)
    return {"trainable": {"layer/kernel": pair}, "opt_state": (jnp.int32(step),), "key": jax.random.key_data(key)}


def open_at(path: pathlib.Path, **options):
    return Checkpoints(path, **({"keep": 2, "identity": IDENTITY} | options))


@pytest.fixture
def saved(tmp_path):
    """Steps 1 to 5 were saved; step 2 has the best held-out loss."""
    checkpoints = open_at(tmp_path)
    for step in range(1, 6):
        checkpoints.save(step, state_at(step), {"next": step}, {2: 0.5, 3: 2.0}.get(step))
    checkpoints.wait()
    checkpoints.close()
    return tmp_path


def restore(path, **options):
    checkpoints = open_at(path, **options)
    try:
        return checkpoints.restore(jax.eval_shape(lambda: state_at(0)))
    finally:
        checkpoints.close()


def test_newest_and_best_are_kept_and_come_back_exactly(saved):
    checkpoints = open_at(saved)
    assert checkpoints.steps() == [2, 4, 5]
    assert checkpoints.best_step() == 2
    checkpoints.close()
    restored = restore(saved)
    assert (restored.step, restored.data, restored.skipped) == (5, {"next": 5}, [])
    jax.tree.map(np.testing.assert_array_equal, restored.state, state_at(5))


def test_nothing_saved_is_none(tmp_path):
    assert restore(tmp_path) is None


@pytest.mark.parametrize("damage", ["truncate", "flip", "empty metadata", "empty metrics"])
def test_damaged_newest_falls_back_to_the_one_before(saved, damage):
    newest = saved / "5"
    if damage == "empty metrics":
        newest = saved / "2"  # of an older one: must not keep the others from being read
        (newest / "metrics" / "metrics").write_text("{")
    elif damage == "empty metadata":
        (newest / "meta" / "metadata").write_text("")
    else:
        largest = max((path for path in newest.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
        content = bytearray(largest.read_bytes())
        if damage == "truncate":
            del content[len(content) // 2 :]
        else:
            content[len(content) // 2] ^= 1
        largest.write_bytes(content)
    restored = restore(saved)
    assert restored.step == (5 if damage == "empty metrics" else 4)
    assert len(restored.skipped) == 1 and f"checkpoint {newest.name} cannot be read" in restored.skipped[0]
    jax.tree.map(np.testing.assert_array_equal, restored.state, state_at(restored.step))
    assert not newest.exists()  # its step will be saved again


def test_read_only_leaves_a_damaged_checkpoint_alone(saved):
    (saved / "5" / "meta" / "metadata").write_text("")
    assert restore(saved, read_only=True).step == 4
    assert (saved / "5").exists()


def test_files_of_other_hosts_that_are_missing_are_no_damage(saved):
    """As of a run by two processes whose directory was not shared: nothing is dropped, and it says what to bring."""
    meta = saved / "5" / "meta" / "metadata"
    meta.write_text(json.dumps(json.loads(meta.read_text()) | {"processes": 2}))
    largest = max(
        (path for path in (saved / "5" / "state").rglob("*") if path.is_file()), key=lambda path: path.stat().st_size
    )
    os.truncate(largest, 10)
    with pytest.raises(UserError, match="5 in .* was written by 2 processes, and it lacks what process 1 wrote"):
        restore(saved)
    assert largest.exists()


def test_all_damaged_is_an_error(saved):
    for step in (2, 4, 5):
        (saved / str(step) / "meta" / "metadata").write_text("")
    with pytest.raises(UserError, match="no checkpoint is left"):
        restore(saved)


def test_another_base_is_refused(saved):
    with pytest.raises(UserError, match="another base model"):
        restore(saved, identity={"base model": {"layout": "y"}})
    assert (saved / "5").exists()


def test_state_may_be_donated_while_it_is_written(tmp_path):
    bump = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    state = state_at(7)
    checkpoints = open_at(tmp_path)
    checkpoints.save(7, state, None, None)
    for _ in range(20):
        state = bump(state)
    checkpoints.wait()
    checkpoints.close()
    jax.tree.map(np.testing.assert_array_equal, restore(tmp_path).state, state_at(7))


def test_failed_write_keeps_the_checkpoint_before(saved, monkeypatch):
    checkpoints = open_at(saved)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints._manager, "save", full)
    with pytest.raises(RunError, match="No space left on device; the checkpoint of step 5 is kept"):
        checkpoints.save(6, state_at(6), None, None)
    checkpoints.close()
    assert restore(saved).step == 5


def test_fingerprint_sees_names_shapes_dtypes_and_values():
    base = {f"layer{i}": np.full((3, 2), i, np.float32) for i in range(8)}
    assert fingerprint(base) == fingerprint({name: leaf.copy() for name, leaf in base.items()})
    others = [
        {**base, "layer0": base["layer0"] + 1},
        {**base, "layer7": base["layer7"].astype(np.float16)},
        {**base, "layer3": base["layer3"].T},
        {("x" if name == "layer2" else name): leaf for name, leaf in base.items()},
    ]
    for other in others:
        assert fingerprint(other) != fingerprint(base)


def test_write_file_is_all_or_nothing(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_file(path, "old")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_file(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_write_directory_is_all_or_nothing(tmp_path):
    path = tmp_path / "directory"
    with write_directory(path) as temporary:
        (temporary / "a").write_text("old")
    with pytest.raises(RuntimeError), write_directory(path, overwrite=True) as temporary:
        (temporary / "a").write_text("new")
        raise RuntimeError
    assert (path / "a").read_text() == "old"
    with write_directory(path, overwrite=True) as temporary:
        (temporary / "b").write_text("new")
    assert [file.name for file in path.iterdir()] == ["b"]
    assert list(tmp_path.iterdir()) == [path]


def test_metrics_are_rewound_and_a_cut_off_line_is_left_out(tmp_path):
    run = RunDirectory.create(tmp_path / "run", {}, overwrite=False)
    for step in (1, 2, 3):
        run.append_metrics({"step": step, "loss": float("nan") if step == 2 else 1.0})
    with open(run.metrics, "a") as file:
        file.write('{"step": 4, "lo')
    assert [record["step"] for record in run.read_metrics()] == [1, 2, 3]
    run.rewind_metrics(2)
    assert [record["step"] for record in run.read_metrics()] == [1, 2]
    assert float(run.read_metrics()[1]["loss"]) != float(run.read_metrics()[1]["loss"])


def test_only_runs_are_overwritten_and_only_on_request(tmp_path):
    path = tmp_path / "run"
    run = RunDirectory.create(path, {"a": 1}, overwrite=False)
    with pytest.raises(UserError, match="--overwrite"):
        RunDirectory.create(path, {"a": 2}, overwrite=False)
    assert run.read_config() == {"a": 1}
    RunDirectory.create(path, {"a": 2}, overwrite=True)
    assert run.read_config() == {"a": 2}
    other = tmp_path / "home"
    other.mkdir()
    (other / "file").write_text("precious")
    with pytest.raises(UserError, match="not a run directory"):
        RunDirectory.create(other, {}, overwrite=True)
