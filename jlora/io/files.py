"""The two files of an adapter directory: reading them with errors that name the file, writing them atomically."""

import contextlib
import json
import os
import pathlib
import tempfile
from collections.abc import Mapping
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_PICKLE = "adapter_model.bin"


def read_config(directory: pathlib.Path) -> dict[str, Any]:
    """The config of an adapter directory."""
    if not (directory / CONFIG).is_file():
        raise FileNotFoundError(f"{directory / CONFIG} is missing: {_nearby(directory)}")
    try:
        config = json.loads((directory / CONFIG).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{directory / CONFIG} is not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{directory / CONFIG} holds a {type(config).__name__}; a JSON object is wanted.")
    return config


def read_tensors(directory: pathlib.Path) -> dict[str, np.ndarray]:
    """The tensors of an adapter directory."""
    if not (directory / WEIGHTS).is_file():
        pickle = (directory / _PICKLE).is_file()
        found = f"{_PICKLE}, a pickle, which jlora does not open: load and save it once with PEFT" if pickle else "none"
        raise FileNotFoundError(f"{directory / WEIGHTS} is missing. Other weights in the directory: {found}.")
    try:
        return safetensors.numpy.load_file(directory / WEIGHTS)
    except (safetensors.SafetensorError, OSError) as error:
        raise ValueError(f"{directory / WEIGHTS} is not a whole safetensors file ({error}): fetch it again.") from error


def _nearby(directory: pathlib.Path) -> str:
    if not directory.is_dir():
        return "there is no such directory."
    named = sorted(entry.parent.name for entry in directory.glob(f"*/{CONFIG}"))
    if named:
        return f"PEFT keeps named adapters in directories of their own, here {named}; give one of them."
    return f"the directory holds {sorted(entry.name for entry in directory.iterdir())[:10]}."


def write(directory: pathlib.Path, config: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> None:
    """Write both files, each complete or not at all: an interrupted write leaves what was there before."""
    # safetensors writes a buffer as it lies in memory, so a transposed view has to be laid out anew.
    laid_out = {key: np.ascontiguousarray(tensor) for key, tensor in tensors.items()}
    contents = {
        WEIGHTS: safetensors.numpy.save(laid_out, metadata={"format": "pt"}),
        CONFIG: (json.dumps(config, indent=2, sort_keys=True) + "\n").encode(),
    }
    directory.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as cleanup:
        written = []
        for name, content in contents.items():
            handle, temporary = tempfile.mkstemp(prefix=f".{name}.", dir=directory)
            cleanup.callback(pathlib.Path(temporary).unlink, missing_ok=True)
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o666 & ~_umask())  # mkstemp's files are for their owner alone
            written.append((temporary, directory / name))
        for temporary, final in written:
            os.replace(temporary, final)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
