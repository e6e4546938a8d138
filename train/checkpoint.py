"""Checkpoints of a run: trainable parameters, optimizer state, random key, data position, step.

The frozen base is not copied. A fingerprint of it (paths, shapes, dtypes, checksums of a few leaves) is kept instead,
and a checkpoint is refused on another base. orbax writes in the background and renames a finished checkpoint into
place. Every leaf has a checksum of its own, since a flipped bit inside a stored array would otherwise go unnoticed.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import shutil
import zlib
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jaxtyping import PyTree
from orbax.checkpoint import checkpoint_managers

from jlora.train.config import RunError, UserError

_CHECKED_LEAVES = 4  # enough to tell two fine-tunes of one architecture apart; all of them would read the whole base


def checksum(leaf: Any) -> int:
    """CRC-32 of an array's bytes."""
    return zlib.crc32(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8))


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
        "checksums": {leaves[i][0]: checksum(leaves[i][1]) for i in chosen},
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
        self.skipped: list[str] = []
        self._read_only = read_only
        self._drop_bad_metrics()
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
            state = jax.tree.map(lambda leaf: np.array(leaf, copy=True), state)
            meta = {"identity": self.identity, "data": data, "checksums": _checksums(state)}
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

        A damaged checkpoint is passed over, and dropped unless read-only, so that its step can be saved again.
        """
        steps = self.steps() if step is None else [step]
        for candidate in reversed(steps):
            try:
                state, data = self._read(candidate, abstract_state)
            except UserError:
                raise
            except Exception as error:  # whatever a damaged file makes orbax, tensorstore or json raise
                self.skipped.append(f"checkpoint {candidate} cannot be read ({_first_line(error)})")
                if not self._read_only:
                    shutil.rmtree(self.directory / str(candidate), ignore_errors=True)
                    self._manager.reload()
                continue
            return Restored(candidate, state, data, self.skipped)
        if self.skipped:
            raise UserError("no checkpoint is left: " + "; ".join(self.skipped))
        return None

    def _read(self, step: int, abstract_state: PyTree) -> tuple[PyTree, Any]:
        meta = self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]
        for name, wanted in self.identity.items():
            if meta["identity"].get(name) != wanted:
                raise UserError(
                    f"checkpoint {step} in {self.directory} was made with another {name}: it can only be used with the "
                    f"one it was trained on (then {_short(meta['identity'].get(name))}, now {_short(wanted)})"
                )
        state = self._manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract_state)))[
            "state"
        ]
        if _checksums(state) != meta["checksums"]:
            raise ValueError("its checksum does not match")
        return state, meta["data"]

    def _failed(self, error: Exception) -> RunError:
        kept = [step for step in self.steps() if (self.directory / str(step)).is_dir()]
        rest = f"the checkpoint of step {kept[-1]} is kept" if kept else "there is no earlier checkpoint"
        return RunError(f"could not write a checkpoint to {self.directory}: {_first_line(error)}; {rest}")

    def _drop_bad_metrics(self) -> None:
        # orbax reads the metrics of all checkpoints when it opens a directory, and fails altogether on a damaged one.
        for path in sorted(self.directory.glob("*/metrics/metrics")):
            try:
                json.loads(path.read_text())
            except ValueError:
                step = path.parent.parent
                self.skipped.append(f"checkpoint {step.name} cannot be read (damaged metrics)")
                if not self._read_only:
                    shutil.rmtree(step)


def _checksums(state: PyTree) -> list[int]:
    return [checksum(leaf) for leaf in jax.tree.leaves(state)]


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
