"""`--distributed`: one run by several processes, as a rule one on each host, over the devices of all of them.

Every process runs the same program. It draws the same batches and makes the part of them that its devices hold, so that
the data of a run do not depend on how many processes take part; a checkpoint is written by all, each its own shards;
what else is written or said is so by the first process alone (`first`). Computations on arrays that lie on all devices
are collective: every process has to come to them, in the same order. Hence whatever a process finds out alone (a file
that is missing, a signal, which checkpoint can be read) is told to the others before anyone acts on it.
"""

import contextlib
import hashlib
import json
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from jlora.train.config import RunError, UserError

_VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


def connect(text: str, timeout: int) -> None:
    """Join the other processes of `--distributed`. Must come before jax makes its first array.

    The first process waits for the others, and they for it, for `timeout` seconds. A process that gives no sign of life
    for as long is given up, and with it the run: jax ends the processes that are left.
    """
    if text == "none" or jax.distributed.is_initialized():
        return
    address, processes, index = _place(text)
    where = "where the cluster says" if address is None else f"at {address}, as process {index} of {processes}"
    late = (
        f"--distributed {text}: tried for {timeout} s (--distributed-timeout) to meet all processes {where}. Start "
        "every one of them, with the address of process 0, which the others must be able to reach"
    )
    watch = threading.Timer(timeout, _leave, (late, 2))  # jax itself would end the process with a dump of its stack
    watch.daemon = True
    watch.start()
    try:
        jax.distributed.initialize(
            address, processes, index, initialization_timeout=timeout + 60, heartbeat_timeout_seconds=timeout,
            shutdown_timeout_seconds=timeout,
        )  # fmt: skip
    except ValueError as error:  # jax found no cluster
        raise UserError(
            f"--distributed {text}: this is no TPU pod, and no task of Slurm or Open MPI ({error}). Set "
            f"{', '.join(_VARIABLES)}, or give --distributed HOST:PORT,PROCESSES,INDEX"
        ) from error
    except RuntimeError as error:
        raise UserError(f"--distributed {text}: tried {where}: {_first_line(error)}") from error
    finally:
        watch.cancel()
    # jax now notes SIGTERM and goes on. It is to end a process that is not training yet; `StopSignals` does the rest.
    signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM))


@contextlib.contextmanager
def alive(resume: Path) -> Iterator[None]:
    """Around what a run computes. When another process dies, this fails here, and a line says so. The process ends at
    once: an orderly end, of jax and of a checkpoint that is being written, would wait for the dead one.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1:
            raise
        if os.environ.get("JLORA_DEBUG"):
            traceback.print_exc()
        _leave(
            f"process {jax.process_index()}: a computation of the {jax.process_count()} processes failed, as a rule "
            f"because one of them ended: see what it said ({_first_line(error)[:200]}). Start all of them again, with "
            f"--resume {resume}",
            1,
        )


def _leave(message: str, code: int) -> None:
    sys.stdout.flush()
    print(f"jlora: {message}", file=sys.stderr, flush=True)
    os._exit(code)


def _place(text: str) -> tuple[str | None, int | None, int | None]:
    """Address of the first process, number of processes, and which one this is; None where jax is to find out."""
    if text == "auto":
        given = [os.environ.get(name) for name in _VARIABLES]
        if None in given:
            return None, None, None
        text = ",".join(given)
    address, processes, index = found if len(found := text.split(",")) == 3 else ("", "", "")
    wanted = re.fullmatch(r".+:\d+", address) and processes.isdecimal() and index.isdecimal()
    if not wanted or not int(index) < int(processes):
        raise UserError(
            f"--distributed {text}: wanted none, auto, or HOST:PORT,PROCESSES,INDEX such as 10.0.0.1:1234,2,0 on the "
            "first of two hosts and 10.0.0.1:1234,2,1 on the second"
        )
    return address, int(processes), int(index)


def first() -> bool:
    """Whether this is the process that writes and speaks; of one process, it is."""
    return jax.process_index() == 0


def gather(value: Any) -> list[Any]:
    """The JSON values that the processes give, in their order, on all of them. They wait for each other here."""
    if jax.process_count() == 1:
        return [value]
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(len(text))).tolist()
    row = np.zeros(1 << max(10, (max(sizes) - 1).bit_length()), np.uint8)  # few lengths: each is compiled
    row[: len(text)] = text
    rows = multihost_utils.process_allgather(row)
    return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Around what any process may fail in alone, such as reading files: the others raise its error, too.

    Nothing collective may be inside, for who failed does not come to it.
    """
    mine = None
    try:
        yield
    except (UserError, RunError) as error:
        mine = error
    told = gather(None if mine is None else [isinstance(mine, UserError), str(mine)])
    if mine is not None:
        raise mine
    for process, error in enumerate(told):
        if error is not None:
            raise (UserError if error[0] else RunError)(f"process {process}: {error[1]}")


def from_first(function: Callable[[], Any]) -> Any:
    """What a function gives on the first process, as a JSON value, or its error, on all of them.

    For whatever looks at files that change: processes that look one after another may see different ones.
    """
    found = None
    with together():
        if first():
            found = function()
    return gather(found)[0]


def check_same(what: str, values: dict[str, dict[str, Any]]) -> None:
    """Refuse to run where the processes have different values, by group and name: they would compute different things,
    or wait for each other forever."""
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
    if len(set(gather(digest))) == 1:
        return
    told = gather(values)
    for process, theirs in enumerate(told):
        for group, ours in told[0].items():
            for name, value in ours.items():
                if theirs[group][name] != value:
                    raise UserError(
                        f"process {process} has other {what} than process 0, which must be the same: {name} is "
                        f"{theirs[group][name]!r} there and {value!r} here"
                    )


def to_host(tree: PyTree) -> PyTree:
    """The arrays of a tree as numpy's, whole on every process: leaf by leaf, each first gathered by the devices where
    no process has all of it."""

    def get(leaf: Any) -> np.ndarray:
        spread = isinstance(leaf, jax.Array) and not leaf.is_fully_addressable
        return multihost_utils.process_allgather(leaf, tiled=True) if spread else np.asarray(leaf)

    return jax.tree.map(get, tree)


class Gathered:
    """A leaf that `to_host` gathers when, and only if, numpy asks for its values."""

    def __init__(self, leaf: jax.Array):
        self.leaf, self.shape, self.dtype, self.ndim, self.size = leaf, leaf.shape, leaf.dtype, leaf.ndim, leaf.size

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(to_host(self.leaf), dtype)


def place(tree: PyTree, shardings: PyTree) -> PyTree:
    """Arrays to where the shardings say. Of one that every process has, each one's devices take their part."""

    def put(leaf: Any, sharding: NamedSharding) -> jax.Array:
        if sharding.is_fully_addressable or (isinstance(leaf, jax.Array) and not leaf.is_fully_addressable):
            return jax.device_put(leaf, sharding)
        whole = np.asarray(leaf)
        return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])

    return jax.tree.map(put, tree, shardings)


def largest(number: int) -> Any:
    """The largest of the numbers that the processes give. What is returned is like a number, and waited for when it is
    read: until then the devices go on."""
    if jax.process_count() == 1:
        return number
    everywhere = NamedSharding(Mesh(np.array(jax.devices()), "devices"), PartitionSpec("devices"))
    mine = np.full(jax.device_count(), number, np.int32)
    return _largest(jax.make_array_from_callback(mine.shape, everywhere, lambda index: mine[index]))


_largest = jax.jit(jnp.max)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
