"""Where adapters start (`jlora.init`): `--init`, the calibration that some starts want, and what a run keeps of it.

A start from data, or from a decomposition, is not made again from a seed when a run goes on: what it froze, and the
ranks it gave, are a file of the run.
"""

import dataclasses
import io
import itertools
import json
import zipfile
from pathlib import Path
from typing import Any

import jax
import numpy as np

import jlora
from jlora import init, paths
from jlora.adapt import build, plan
from jlora.calibrate import Calibration, planned
from jlora.lift import LeafUsage
from jlora.methods import LoRA, Method, Site
from jlora.train import data, distributed
from jlora.train.call import Call
from jlora.train.config import MethodOptions, UserError, check_options, literal_options
from jlora.train.run import write_file


def make_start(options: MethodOptions) -> Any:
    """What `--init` names, None for the method's own."""
    if options.init == "default":
        if options.init_options:
            raise UserError("--init-options is for --init, and there is none")
        return None
    if options.init not in init.STARTS:
        raise UserError(f"unknown --init {options.init!r}: known are default, {', '.join(init.STARTS)}")
    cls = init.STARTS[options.init]
    given = literal_options("--init-options", options.init_options)
    known = [field.name for field in dataclasses.fields(cls) if field.init]
    check_options(f"--init {options.init}", given, known)
    if options.init == "lora_sb" and "learning_rate" not in given:
        raise UserError(
            "--init lora_sb starts at the first update: say its size, --init-options learning_rate=1e-4 (the rate of "
            "the first step)"
        )
    try:
        return cls(**given)
    except (ValueError, TypeError) as error:
        raise UserError(str(error)) from error


def check_calibration(options: MethodOptions, method: Method) -> None:
    """Refuse a number of batches that nothing looks at."""
    if options.calibration_batches != MethodOptions.calibration_batches and not method.needs:
        able = ", ".join(name for name, start in init.STARTS.items() if start.needs)
        raise UserError(
            f"--calibration-batches is for an --init from data ({able}), and has no part in --init {options.init}"
        )


def calibrate(
    model: Any, usage: dict[str, LeafUsage], rules: dict[str, Method], rows: Any, task: Any, options: MethodOptions,
    *, batch_size: int, seed: int, progress: Any = None,
) -> Calibration | None:  # fmt: skip
    """The statistics that the rules start from, of the first batches that training will see; None if they want none."""
    if not any(method.needs for method in rules.values()):
        return None
    stream = itertools.islice(data.batches(rows, batch_size, seed, epochs=1), options.calibration_batches)
    batches = [{name: np.asarray(value) for name, value in task.trim(batch).items()} for batch in stream]

    key = jax.random.key(seed)  # of losses that draw: what is masked

    def loss(params: Any, batch: dict[str, Any]) -> jax.Array:
        total, count = task.loss(Call(model.module.apply, params), batch, key)
        return total / jax.numpy.maximum(count, 1.0)

    return jlora.calibrate(
        loss, model.params, batches, rules, usage=usage,
        token_weights=_token_weights if "segment_ids" in batches[0] else None, progress=progress,
    )  # fmt: skip


def _token_weights(batch: dict[str, Any]) -> Any:
    """1 for tokens that are no padding and, where tokens are scored, are scored."""
    real = batch["segment_ids"] != 0
    return real * (batch["mask"] if batch["mask"].shape == real.shape else 1.0)


_RANKS, _SITES = ("rank", "alpha", "ranks", "alphas"), ":sites"


def save(adapted: "jlora.Adapted", file: Path) -> None:
    """Everything the adapters start at, and their ranks; but not leaves that are trained whole."""
    ranks_of = lambda method: {name: getattr(method, name) for name in _RANKS} if isinstance(method, LoRA) else {}
    ranks = {path: ranks_of(site.method) for path, site in adapted.sites.items()}
    trainable = {path: own for path, own in adapted.trainable.items() if not _is_whole(adapted.sites, path)}
    arrays = paths.flatten({"trainable": trainable, "frozen": adapted.frozen})[0]
    stream = io.BytesIO()
    np.savez(stream, **{_SITES: np.asarray(json.dumps(ranks))}, **distributed.to_host(dict(arrays)))
    write_file(file, stream.getvalue())


def load(file: Path, model: Any, rules: dict[str, Method], usage: dict[str, LeafUsage], seed: int) -> "jlora.Adapted":
    """What `save` wrote, on the model's parameters."""
    try:
        with np.load(file) as stored:
            arrays = {name: stored[name] for name in stored.files}
        ranks = json.loads(str(arrays.pop(_SITES)))
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise UserError(f"{file} cannot be read, and it holds what the adapters started at: {error}") from error
    sites = plan(model.params, rules, usage=usage, exclude=model.family.statistics)
    sites = {path: _with_ranks(sites[path], own) for path, own in ranks.items()}
    key, shape = jax.random.key(seed), lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
    abstract = {path: shape(leaf) for path, leaf in paths.flatten(model.params)[0]}
    made = build(model.params, sites, key=key, arrays=abstract, stats=planned(sites))
    whole = build(model.params, {path: site for path, site in sites.items() if site.method.whole_leaf}, key=key)
    trainable = {path: own for path, own in made.trainable.items() if not _is_whole(sites, path)}
    wanted, treedef = paths.flatten({"trainable": trainable, "frozen": made.frozen})
    if {name: leaf.shape for name, leaf in wanted} != {name: array.shape for name, array in arrays.items()}:
        raise UserError(f"{file} is of other adapters than the options describe: remove the run and begin anew")
    filled = jax.tree.unflatten(treedef, [jax.numpy.asarray(arrays[name]) for name, _ in wanted])
    trainable = {path: filled["trainable"].get(path, whole.trainable.get(path)) for path in made.trainable}
    return made.replace(trainable=trainable, frozen=filled["frozen"])


def _is_whole(sites: dict[str, Site], path: str) -> bool:
    return path in sites and sites[path].method.whole_leaf


def _with_ranks(site: Site, ranks: dict[str, Any]) -> Site:
    if not ranks:
        return site
    lists = {name: tuple(value) if isinstance(value, list) else value for name, value in ranks.items()}
    return dataclasses.replace(site, method=dataclasses.replace(site.method, **lists))
