"""Checkpoints of a run: trainable parameters, optimizer state, random key, data position, step.

The frozen base is not copied. A fingerprint of it (paths, shapes, dtypes, checksums of a few leaves) is kept instead,
and a checkpoint is refused on another base. orbax writes in the background and renames a finished checkpoint into
place. Every leaf has a checksum of its own, since a flipped bit inside a stored array would otherwise go unnoticed.

Where several processes share a run, each writes and reads the shards of its own devices. Any number of processes, on
any mesh, can go on from what others wrote. The first one decides what depends on files: which steps there are, which
base they belong to, what is dropped.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import SingleDeviceSharding
from jaxtyping import PyTree
from orbax.checkpoint import checkpoint_managers

from jlora.storage import near
from jlora.train import distributed
from jlora.train.config import RunError, UserError

_CHECKED_LEAVES = 4  # enough to tell two fine-tunes of one architecture apart; all of them would read the whole base


def checksums(leaves: Sequence[Any]) -> list[int]:
    """A number of 32 bits for each array: the sum, modulo 2^32, of h(x_i ^ h(i)) over the bits x_i of its entries.

    h is the finalizer of MurmurHash3, one to one on 32 bits, so that an entry that changed alone always shows, and any
    other change but for one in 2^32. Such a sum has no order: each device adds up what it holds, and the result is the
    same on any mesh; no array is gathered for it.
    """
    return [int(number) for number in jax.jit(_checksums)(list(leaves))]


def _checksums(leaves: Sequence[jax.Array]) -> list[jax.Array]:
    def of(x: jax.Array) -> jax.Array:
        x = near(x)
        if jnp.iscomplexobj(x):
            x = jnp.stack([x.real, x.imag])
        if jnp.issubdtype(x.dtype, jnp.floating):
            x = jax.lax.bitcast_convert_type(x, {1: jnp.uint8, 2: jnp.uint16}.get(x.dtype.itemsize, jnp.uint32))
        place = jnp.zeros(x.shape, jnp.uint32)
        for axis in range(x.ndim):
            place = place * np.uint32(x.shape[axis] % 2**32) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
        return jnp.sum(_mixed(x.astype(jnp.uint32) ^ _mixed(place)), dtype=jnp.uint32)

    return [of(x) for x in leaves]


@jax.jit
def _copied(tree: PyTree) -> tuple[PyTree, list[jax.Array]]:
    return jax.tree.map(jnp.copy, tree), _checksums(jax.tree.leaves(tree))


def _mixed(x: jax.Array) -> jax.Array:
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def fingerprint(base: PyTree) -> dict[str, Any]:
    """What identifies a base without storing it: a hash of paths, shapes and dtypes, and checksums of some leaves."""
    leaves = [
        (jax.tree_util.keystr(path, simple=True, separator="/"), leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(base)
    ]
    layout = "\n".join(f"{path} {tuple(leaf.shape)} {leaf.dtype}" for path, leaf in leaves)
    chosen = sorted({round(i * (len(leaves) - 1) / (_CHECKED_LEAVES - 1)) for i in range(_CHECKED_LEAVES)})
    return {
        "layout": hashlib.sha256(layout.encode()).hexdigest(),
        "leaves": len(leaves),
        "checksums": dict(zip((leaves[i][0] for i in chosen), checksums([leaves[i][1] for i in chosen]), strict=True)),
    }


@dataclasses.dataclass
class Restored:
    """A checkpoint read back; `skipped` says which newer ones could not be read and why."""

    step: int
    state: PyTree
    data: Any
    skipped: list[str]


class Checkpoints:
    """The checkpoints of one run. Keeps the newest `keep`, and the one with the lowest held-out loss."""

    def __init__(self, directory: Path, *, keep: int, identity: dict[str, Any], read_only: bool = False):
        """`identity`, {"base model": fingerprint(...), ...}, is stored with each checkpoint and compared on restore."""
        self.directory = directory.absolute()
        self.identity = identity
        self._read_only = read_only
        self.skipped: list[str] = distributed.from_first(self._drop_bad_metrics)
        policy = checkpoint_managers.AnyPreservationPolicy(
            [
                checkpoint_managers.LatestN(keep),
                checkpoint_managers.BestN(
                    get_metric_fn=lambda m: m["eval_nll"], reverse=True, n=1, keep_checkpoints_without_metrics=False
                ),
            ]
        )
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policy,
                best_fn=lambda m: m["eval_nll"],
                best_mode="min",
                create=not read_only,
                read_only=read_only,
                cleanup_tmp_directories=not read_only,  # left behind by a run that was killed while it wrote
            ),
            item_names=("state", "meta"),
        )

    def steps(self) -> list[int]:
        return sorted(self._manager.all_steps())

    def best_step(self) -> int | None:
        return self._manager.best_step()

    def save(self, step: int, state: PyTree, data: Any, eval_nll: float | None) -> None:
        """Start writing a checkpoint. Returns when the state has been copied; an earlier failed write raises here."""
        try:
            # Copies, since the next training step donates these buffers while the writing goes on.
            state, numbers = _copied(state)
            meta = {
                "identity": self.identity, "data": data, "processes": jax.process_count(),
                "checksums": [int(number) for number in numbers],
            }  # fmt: skip
            self._manager.save(
                step,
                args=ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta)),
                metrics=None if eval_nll is None else {"eval_nll": eval_nll},
                force=True,
            )
        except Exception as error:
            raise self._failed(error) from error

    def wait(self) -> None:
        """Return when everything is on disk."""
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise self._failed(error) from error

    def close(self) -> None:
        """Let go of the directory. A write that failed was reported by `wait` or `save`, if anyone asked."""
        with contextlib.suppress(Exception):
            self._manager.close()

    def restore(self, abstract_state: PyTree, step: int | None = None) -> Restored | None:
        """The newest checkpoint that can be read, or that of `step`; None when there is none at all.

        A leaf goes where its sharding in `abstract_state` says, whatever it was saved from; without one, to the default
        device. A damaged checkpoint is passed over, and dropped unless read-only, so that its step can be saved again.
        """
        steps = distributed.from_first(self.steps) if step is None else [step]
        for candidate in reversed(steps):
            try:
                state, data = self._read(candidate, abstract_state)
            except RunError as error:
                self.skipped.append(f"checkpoint {candidate} cannot be read ({error})")
                if not self._read_only:
                    directory = self.directory / str(candidate)
                    distributed.from_first(lambda directory=directory: shutil.rmtree(directory, ignore_errors=True))
                    self._manager.reload()
                continue
            return Restored(candidate, state, data, self.skipped)
        if self.skipped:
            raise UserError("no checkpoint is left: " + "; ".join(self.skipped))
        return None

    def _read(self, step: int, abstract_state: PyTree) -> tuple[PyTree, Any]:
        """Raises a RunError, in every process, if any of them cannot read its part."""
        meta = distributed.from_first(lambda: self._read_meta(step))
        here = SingleDeviceSharding(jax.local_devices()[0])
        put = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding or here)
        # The handler itself: the manager waits for all processes at the end, which one that failed does not come to.
        directory = self.directory / str(step) / "state"
        with distributed.together(), self._unreadable(step, meta):
            state = ocp.StandardCheckpointHandler().restore(
                directory, args=ocp.args.StandardRestore(jax.tree.map(put, abstract_state))
            )
        if checksums(jax.tree.leaves(state)) != meta["checksums"]:
            raise RunError("its checksum does not match")
        return state, meta["data"]

    def _read_meta(self, step: int) -> dict[str, Any]:
        with self._unreadable(step):
            meta = ocp.JsonCheckpointHandler().restore(self.directory / str(step) / "meta")
            identity = meta["identity"]
        for name, wanted in self.identity.items():
            if identity.get(name) != wanted:
                raise UserError(
                    f"checkpoint {step} in {self.directory} was made with another {name}: it can only be used with the "
                    f"one it was trained on (then {_short(identity.get(name))}, now {_short(wanted)})"
                )
        return meta

    @contextlib.contextmanager
    def _unreadable(self, step: int, meta: dict[str, Any] | None = None) -> Iterator[None]:
        """Whatever a damaged file makes orbax, tensorstore or json raise, as a RunError.

        Files of whole processes that are not there are no damage, but storage that was not shared, or copied in part:
        then nothing is dropped.
        """
        try:
            yield
        except Exception as error:
            written = range(1 if meta is None else meta["processes"])
            parts = self.directory / str(step) / "state"
            missing = [i for i in written if not (parts / f"ocdbt.process_{i}").is_dir()]
            if len(written) > 1 and missing:
                raise UserError(
                    f"checkpoint {step} in {self.directory} was written by {len(written)} processes, and it lacks what "
                    f"process {', '.join(map(str, missing))} wrote. Bring ocdbt.process_{missing[0]} from that host: a "
                    "run directory must be on storage that all hosts see. To go on from an earlier checkpoint, delete "
                    "this one"
                ) from error
            raise RunError(_first_line(error)) from error

    def _failed(self, error: Exception) -> RunError:
        kept = [step for step in self.steps() if (self.directory / str(step)).is_dir()]
        rest = f"the checkpoint of step {kept[-1]} is kept" if kept else "there is no earlier checkpoint"
        return RunError(f"could not write a checkpoint to {self.directory}: {_first_line(error)}; {rest}")

    def _drop_bad_metrics(self) -> list[str]:
        # orbax reads the metrics of all checkpoints when it opens a directory, and fails altogether on a damaged one.
        dropped = []
        for path in sorted(self.directory.glob("*/metrics/metrics")):
            try:
                json.loads(path.read_text())
            except ValueError:
                step = path.parent.parent
                dropped.append(f"checkpoint {step.name} cannot be read (damaged metrics)")
                if not self._read_only:
                    shutil.rmtree(step)
        return dropped


def _first_line(error: Exception) -> str:
    while error.__cause__ is not None:  # orbax wraps what its writing thread met
        error = error.__cause__
    text = (str(error).strip().splitlines() or [type(error).__name__])[0]
    code = re.search(r"os_error_code='(\d+)'", text)  # tensorstore's way to say what the system said
    if code:
        text = os.strerror(int(code[1]))
    return text if len(text) <= 200 else text[:200] + "..."


def _short(value: Any) -> str:
    text = json.dumps(value, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]
