"""The run directory: what lies where, and how it is written so that a crash never leaves half a file.

config.json     every option, with the values that "default" came to
metrics.jsonl   one JSON object per line: {"step", "loss", ...} while training, {"step", "eval_nll", ...} held out
results.json    figures and samples before and after
completions.jsonl   every held-out prompt with its completion before and after, and its references
predictions.jsonl   instead, for classification and regression: what was held out, its label, what was predicted
start.npz       where the adapters started, with `--init`
loss.png        training and held-out loss over steps
checkpoints/    the newest and the best training states (orbax)
adapter/        the adapter in PEFT format
README.md       what was run, what came out, how to load it

Where several processes share a run, the first one writes all this, and what the others write is dropped; the
checkpoints alone are written by all. The directory must be one that all of them see.
"""

import contextlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jlora.train import distributed
from jlora.train.config import UserError


def _temporary_name(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def write_file(path: Path, content: str | bytes) -> None:
    """Write through a temporary file and a rename: readers see the old file or the new one, never a part."""
    if not distributed.first():
        return
    temporary = _temporary_name(path)
    try:
        with open(temporary, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """`write_file` of a JSON value."""
    write_file(path, json.dumps(_plain(value), indent=2, ensure_ascii=False) + "\n")


@contextlib.contextmanager
def write_directory(path: Path, overwrite: bool = False) -> Iterator[Path]:
    """A temporary directory beside `path` that takes its place when the body ends well and vanishes otherwise."""
    if not distributed.first():  # it may gather what lies on all devices, and so must be run
        with tempfile.TemporaryDirectory() as unused:
            yield Path(unused)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
    temporary.chmod(0o777 & ~_umask())
    old = _temporary_name(path)
    try:
        yield temporary
        if path.exists():
            if not overwrite:
                raise UserError(f"{path} exists already")
            os.rename(path, old)
        os.rename(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def check_writable(path: Path, option: str = "--out") -> None:
    """Refuse a path where nothing can be written: a directory is made beside it, or above what is missing, and removed.

    Permissions alone do not tell: by them root may write to /proc, and to a disk that is read-only.
    """
    above = path.absolute().parent
    try:
        while not above.exists():
            above = above.parent
        tempfile.TemporaryDirectory(prefix=f".{path.name}.", suffix=".tmp", dir=above).cleanup()
    except OSError as error:
        raise UserError(
            f"{option} {path}: nothing can be written in {above} ({error.strerror}): choose another {option}"
        ) from error


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _plain(value: Any) -> Any:
    """JSON has no inf and no NaN: they become strings, which `float` reads back."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


class RunDirectory:
    """Paths of a run, and its configuration and metrics on disk."""

    def __init__(self, path: Path):
        self.path = path
        self.config = path / "config.json"
        self.metrics = path / "metrics.jsonl"
        self.results = path / "results.json"
        self.plot = path / "loss.png"
        self.start = path / "start.npz"
        self.checkpoints = path / "checkpoints"
        self.adapter = path / "adapter"
        self.readme = path / "README.md"

    @classmethod
    def open(cls, path: Path) -> "RunDirectory":
        """An existing run."""
        run = cls(path)
        if not path.is_dir():
            raise UserError(f"there is no directory {path}")
        if not run.config.is_file():
            raise UserError(f"{path} is not a run directory: it has no config.json")
        return run

    @classmethod
    def check_free(cls, path: Path, overwrite: bool) -> None:
        """Refuse a path that is taken, or cannot be written. Only an earlier run is ever overwritten, and only on
        request."""
        check_writable(path)
        if not path.exists() or (path.is_dir() and not any(path.iterdir())):
            return
        if not path.is_dir() or not cls(path).config.is_file():
            raise UserError(f"{path} exists and is not a run directory: choose another --out")
        if not overwrite:
            raise UserError(f"{path} holds a run already: choose another --out, or add --overwrite to replace it")

    @classmethod
    def create(cls, path: Path, config: dict[str, Any], overwrite: bool) -> "RunDirectory":
        """A new run directory with its configuration, all at once."""
        distributed.from_first(lambda: cls.check_free(path, overwrite))
        with distributed.together():  # so that it is written when the others look
            try:
                with write_directory(path, overwrite=True) as temporary:
                    write_json(temporary / "config.json", config)
            except OSError as error:
                raise UserError(f"--out {path} cannot be written: {error}: choose another --out") from error
        run = cls(path)
        with distributed.together():
            if not run.config.is_file():
                raise UserError(
                    f"{run.config} was written by process 0 and is not here: --out must be on storage that all see"
                )
        return run

    def read_config(self) -> dict[str, Any]:
        return self._read_json(self.config)

    def read_results(self) -> dict[str, Any]:
        return self._read_json(self.results) if self.results.exists() else {}

    @staticmethod
    def _read_json(path: Path) -> dict[str, Any]:
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, OSError) as error:
            raise UserError(f"{path} cannot be read: {error}") from error

    def append_metrics(self, record: dict[str, Any]) -> None:
        """One line, in one write."""
        if not distributed.first():
            return
        with open(self.metrics, "ab") as file:
            file.write((json.dumps(_plain(record)) + "\n").encode())

    def read_metrics(self) -> list[dict[str, Any]]:
        """All records; a last line cut off by a crash is left out."""
        if not self.metrics.exists():
            return []
        records = []
        for line in self.metrics.read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(ValueError):
                records.append(json.loads(line))
        return records

    def rewind_metrics(self, step: int) -> None:
        """Drop what was recorded after `step`: those steps are about to be taken again."""
        if self.metrics.exists():
            kept = [record for record in self.read_metrics() if record["step"] <= step]
            write_file(self.metrics, "".join(json.dumps(record) + "\n" for record in kept))

    def write_records(self, name: str, records: list[dict[str, Any]]) -> None:
        """The answers that figures were computed from, one a line."""
        write_file(self.path / name, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
