"""`--mesh data=2,fsdp=2,model=2`: a run over several devices, sharded by GSPMD through `jit`.

    axis      what it divides
    data      the rows of a batch
    fsdp      the rows of a batch, and the inputs of every matrix, which is gathered where it is used
    model     the outputs of most matrices, and the inputs of those that come after them (o_proj, down_proj, ...): then
              one sum over devices follows the two
    expert    the rows of a batch, and the experts of a mixture

Vectors and small matrices are whole on every device. A table of embeddings is divided by its rows over `model`, if
their number allows it, and its transpose is then the head that a column-parallel matrix would be. Adapters go where
their weights go (`jlora.shard`), and the optimizer's state with them.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jlora.train import distributed
from jlora.train.config import UserError

AXES = ("data", "fsdp", "model", "expert")
_ROWS = ("data", "fsdp", "expert")
# Matrices that take what a column-parallel one gives, in the names of Llama, GPT-2 and BERT.
_AFTER = re.compile(r"(o_proj|down_proj|c_proj|output/dense)(/kernel)?$")
# Small, and of sizes that few numbers divide: routers, heads for classes, tables of positions.
_WHOLE = re.compile(r"(^|/)(gate|shared_expert_gate|classifier|wpe|position_embeddings|token_type_embeddings)/")


def make(text: str | None) -> Mesh | None:
    """The mesh of `--mesh`; None for one device. Devices of several processes are one axis `data` without it."""
    if text in (None, "none"):
        if jax.process_count() == 1:
            return None
        if text == "none":
            raise UserError(
                f"--mesh none is for one device, and --distributed has {jax.device_count()}: leave it out, or say "
                f"how to use them, such as --mesh data={jax.device_count()}"
            )
        text = f"data={jax.device_count()}"
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, _, size = part.strip().partition("=")
        if name not in AXES or name in sizes or not size.isdecimal() or int(size) < 1:
            raise UserError(
                f"--mesh {text}: {part.strip()!r} is no AXIS=DEVICES with an axis of its own among {', '.join(AXES)}; "
                "--mesh data=2,model=4 is meant"
            )
        sizes[name] = int(size)
    wanted, there = math.prod(sizes.values()), jax.device_count()
    if wanted != there:
        raise UserError(
            f"--mesh {text} is for {wanted} devices, and there are {there}: the sizes must multiply to {there}; a run "
            "that goes on takes another --mesh beside --resume"
            + (" (XLA_FLAGS=--xla_force_host_platform_device_count=8 makes eight of one CPU)" if there == 1 else "")
        )
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def specs(mesh: Mesh, leaves: Mapping[str, Any]) -> dict[str, PartitionSpec]:
    """How the leaves of a model are sharded, by path: `models.load` reads them to there."""
    found = {path: _spec(mesh, path, leaf.shape) for path, leaf in leaves.items()}
    used = {name for spec in found.values() for name in jax.tree.leaves(tuple(spec))}
    for name, size in mesh.shape.items():
        if size > 1 and name != "data" and name not in used:
            raise UserError(
                f"--mesh {name}={size}: nothing of this model is divided by {name!r}"
                + (", for it has no experts" if name == "expert" else "")
                + f". Give these devices to another axis, such as data={size}"
            )
    return found


def _spec(mesh: Mesh, path: str, shape: tuple[int, ...]) -> PartitionSpec:
    axis = lambda name: name if mesh.shape.get(name, 1) > 1 else None
    fsdp, model, experts = axis("fsdp"), axis("model"), "/experts/" in path
    if _WHOLE.search(path):
        return PartitionSpec()
    if path.endswith("/embedding"):
        return PartitionSpec(model if shape[0] % mesh.shape.get("model", 1) == 0 else None, fsdp)
    if not (experts or path.endswith("/kernel")):
        return PartitionSpec()
    head = [None] * (len(shape) - 2)
    if experts:
        head[-1] = axis("expert")
    return PartitionSpec(*head, *((model, fsdp) if _AFTER.search(path) else (fsdp, model)))


def check_rows(mesh: Mesh, **sizes: int) -> None:
    """Every batch must be divisible by the devices that its rows are divided over."""
    parts = math.prod(mesh.shape.get(name, 1) for name in _ROWS)
    for option, size in sizes.items():
        if size % parts:
            raise UserError(
                f"--{option.replace('_', '-')} {size} rows cannot be divided over the {parts} devices of "
                f"{', '.join(name for name in _ROWS if mesh.shape.get(name, 1) > 1)}: "
                f"--{option.replace('_', '-')} {-(-size // parts) * parts} can, or a --mesh where they divide {size}"
            )


def place_batch(mesh: Mesh, batch: Mapping[str, np.ndarray], axis: int) -> dict[str, jax.Array]:
    """A batch, its rows along `axis`, over the devices; whole on each where there are not enough of them.

    Where several processes have devices, each of them has drawn the whole batch and makes its devices' part of it.
    """
    names = tuple(name for name in _ROWS if mesh.shape.get(name, 1) > 1)
    parts = math.prod(mesh.shape[name] for name in names)

    def put(rows: np.ndarray) -> jax.Array:
        spec = (*(None,) * axis, names) if names and rows.shape[axis] % parts == 0 else ()
        return distributed.place(rows, NamedSharding(mesh, PartitionSpec(*spec)))

    return {name: put(rows) for name, rows in batch.items()}
