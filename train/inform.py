"""`jlora methods`, `models`, `targets` and `compare`, and the plan of `jlora finetune --dry-run`: what there is, before
and after training."""

import contextlib
import dataclasses
import importlib.util
import inspect
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import jlora
from jlora import paths
from jlora.adapt import _describe_axes, plan
from jlora.io.formats import FORMATS
from jlora.methods import METHODS, Full, Method
from jlora.tables import table
from jlora.train import data, loading, models
from jlora.train.config import (
    CompareConfig,
    DataOptions,
    MethodsConfig,
    ModelsConfig,
    TargetsConfig,
    UserError,
    check_finite,
)
from jlora.train.finetune import Job
from jlora.train.loop import make_train_step
from jlora.train.optimizers import learning_rate_schedule, make_optimizer
from jlora.train.report import FIGURES, Reporter, held_out_loss
from jlora.train.run import RunDirectory, check_writable, write_file
from jlora.train.tasks import TASKS
from jlora.train.tasks import make as make_task

# What there is.


def form(cls: type[Method]) -> str:
    """What a method makes of a weight: a "pair" of factors beside it, another "weight", a branch on "activations"; or
    the whole "leaf" is trained."""
    if cls.whole_leaf:
        return "leaf"
    if cls.mergeable is False:
        return "activations"
    plain = cls.factors is not Method.factors and cls.output_gain is Method.output_gain
    return "pair" if plain else "weight"


def shares(cls: type[Method]) -> bool:
    """Whether its leaves have parameters in common, as it comes."""
    return any(field.name == "group" and field.default is not None for field in dataclasses.fields(cls))


def merges(cls: type[Method]) -> str:
    if isinstance(cls.mergeable, property):
        return "depends on options"
    return "yes" if cls.mergeable else "no"


_OTHERS = {"frod": "FROD (read)", "xlora": "XLORA"}  # read only; by load_xlora and save_xlora


def peft_types() -> dict[str, str]:
    """Name of a method -> the `peft_type` of its files."""
    written = {cls: format.peft_type for format in FORMATS.values() for cls in format.methods}
    return {name: written[cls] for name, cls in METHODS.items() if cls in written} | _OTHERS


def methods(config: MethodsConfig) -> int:
    """A table of all methods, or all about some."""
    reporter = Reporter()
    for name in config.names:
        if name not in METHODS:
            raise UserError(f"unknown method {name!r}: known are {', '.join(METHODS)}")
    if config.names:
        for i, name in enumerate(config.names):
            reporter.say("\n" * bool(i) + _about(name))
        return 0
    if config.rank is not None and config.rank < 1:
        raise UserError(f"--rank must be above 0, got {config.rank}")
    model = _outline(config.model)
    targets = config.targets or model.family.targets
    usage = loading.usage_of(model)
    with loading.user_errors():
        plan(model.params, {target: Full() for target in targets}, usage=usage)  # all of them match something
    kinds, rows, without = peft_types(), [("method", "class", "form", "trainable", "merges", "PEFT")], []
    for name, cls in METHODS.items():
        counted = _count(cls, config.rank, model.params, targets, usage)
        if isinstance(counted, str):
            without.append(f"  {name}: {counted}")
        shown = "-" if isinstance(counted, str) else f"{counted:,}"
        kind = form(cls) + ", shared" * shares(cls)
        rows.append((name, cls.__name__, kind, shown, merges(cls), kinds.get(name, "-")))
    reporter.say(table(rows, right=("trainable",)))
    reporter.say()
    total = sum(math.prod(leaf.shape) for _, leaf in paths.flatten(model.params)[0])
    options = "default options" if config.rank is None else f"rank {config.rank} where there is one, else defaults,"
    reporter.say(f"trainable: parameters with {options} on {model.name} ({total:,}), targets {' '.join(targets)}")
    if without:
        reporter.say("without a number:")
        for line in without:
            reporter.say(line)
    reporter.say("more about one: jlora methods NAME")
    return 0


def _count(
    cls: type[Method], rank: int | None, params: Any, targets: Sequence[str], usage: dict[str, Any]
) -> int | str:
    """Trainable parameters on these targets, or why there is no number."""
    fields = dataclasses.fields(cls)
    missing = [f.name for f in fields if f.default is f.default_factory is dataclasses.MISSING]
    if missing:
        return f"wants --method-options {' '.join(name + '=...' for name in missing)}"
    options = {"rank": rank} if rank is not None and any(f.name == "rank" for f in fields) else {}
    try:
        method = cls(**options)
        sites = plan(params, [(target, method) for target in targets], usage=usage)
    except ValueError as error:
        return _reason(str(error))
    shared = {path: site for path, site in sites.items() if site.method.group is not None}
    return sum(method.count(site) for site in sites.values()) + (method.count_shared(shared) if shared else 0)


def _reason(message: str) -> str:
    """An error of `adapt` without the rule at its end, which says the method again."""
    return message.partition(" (rule ")[0].partition(": rule ")[0]


def _about(name: str) -> str:
    """The docstrings of a method: paper, formula and cost, then its options."""
    cls = METHODS[name]
    own = inspect.cleandoc(cls.__dict__.get("__doc__") or "")
    kind = peft_types().get(name)
    facts = f"form: {form(cls)}{', shared' * shares(cls)}. Merges: {merges(cls)}. PEFT: {kind or 'no such files'}."
    options = ", ".join(
        option.name if option.default is option.empty else f"{option.name}={option.default!r}"
        for option in inspect.signature(cls).parameters.values()
    )
    return "\n\n".join(
        [f"{name}: jlora.{cls.__name__}({options})", facts, inspect.getdoc(inspect.getmodule(cls)) or "", own]
    )


def list_models(config: ModelsConfig) -> int:
    """The families that can be read, and the weights that need no download by hand."""
    reporter = Reporter()
    rows = [("model_type", "tasks", "default targets")]
    for name, family in sorted(models.FAMILIES.items()):
        rows.append((name, _tasks(family), " ".join(family.targets)))
    reporter.say("Families: the model_type of a directory's config.json (--model DIRECTORY)")
    reporter.say()
    reporter.say(table(rows))
    reporter.say()
    here = [("--model", "weights", ""), (models.BUNDLED, "TinyStories, 260,032 parameters", "shipped")]
    for name, package in models.packaged.PACKAGES.items():
        installed = importlib.util.find_spec(package.module) is not None
        here.append((name, package.hub, "installed" if installed else package.install))
    reporter.say("Weights that come with this package or another")
    reporter.say()
    reporter.say(table(here))
    return 0


def _tasks(family: models.Family) -> str:
    """What `jlora finetune --task` teaches models of a family."""
    able = []
    for name in TASKS:
        with contextlib.suppress(UserError):
            make_task(DataOptions(task=name)).check("", family)
            able.append(name)
    return ", ".join(able)


# A model before it is trained.


def _outline(name: str) -> models.LoadedModel:
    """A model with shapes in the places of its parameters. Of a directory, config.json is read and nothing else."""
    if not Path(name).is_dir():
        return loading.load_model(name)
    with loading.user_errors():
        return models.outline(name)


def targets(config: TargetsConfig) -> int:
    """Every leaf of a model: its shape, how the model uses it, and which pattern catches it."""
    options = config.method
    check_finite(options)
    loading.build_method(options)  # a misspelt option should not wait for the model
    model = _outline(config.model)
    options = loading.resolve_targets(options, model)
    usage, caught, refused = loading.usage_of(model), {}, None
    try:
        for pattern, method in loading.build_rules(options).items():
            sites = plan(model.params, [(pattern, method)], usage=usage, exclude=model.family.statistics)
            caught |= {path: f"{pattern}: {method.name}" for path in sites if path not in caught}
    except ValueError as error:
        refused = loading.as_options(str(error)) + loading.what_fits(options, model, usage, str(error))
    (inputs, *_) = model.inputs
    unit, n = ("token", math.prod(inputs.shape)) if jnp.issubdtype(inputs.dtype, jnp.integer) else ("example", 1)
    flops = f"MFLOP/{unit}"
    rows = [("path", "shape", "used as", "stack|in|out", flops, "caught by")]
    leaves, _ = paths.flatten(model.params)
    for path, leaf in leaves:
        use = usage.get(path)
        kinds = "" if use is None else ", ".join(dict.fromkeys((*use.kinds, *use.other)))
        axes = "" if use is None or use.axes is None else _describe_axes(use.axes).partition(" ")[0]
        cost = 0 if use is None else use.flops / n / 1e6
        cost = "" if use is None else f"{cost:,.0f}" if cost >= 100 else f"{cost:.3g}"
        rows.append((path, "x".join(map(str, leaf.shape)) or "scalar", kinds, axes, cost, caught.get(path, "-")))
    reporter = Reporter()
    reporter.say(table(rows, right=(flops,)))
    reporter.say()
    if refused is not None:
        raise UserError(refused)
    reporter.say(f"caught {len(caught)} of {len(leaves)} leaves; try others with --targets, --method, --train-fully")
    reporter.say("stack|in|out: the axes along which matrices lie side by side, and those of their inputs and outputs")
    return 0


def run_plan(job: Job) -> str:
    """What a run would do: what is adapted, how many steps, and what is held in memory. Compiles the training step."""
    config, adapted = job.config, job.adapted
    train, optimizer = config.train, config.optimizer
    arrays = loading.abstract_arrays(config, adapted)
    rows = train.batch_size * train.accumulation
    clip = f", gradients clipped at {optimizer.clip_norm:g}" if optimizer.clip_norm else ""
    sizes = {
        "base": _bytes(adapted.base),
        "adapters": _bytes((adapted.trainable, adapted.frozen)),
        "optimizer state": _bytes(arrays["opt_state"]),
        "one step, beyond these": _working_memory(job, arrays),
    }
    lines = [
        jlora.summary(adapted),
        "",
        f"model      {job.model.name}, {loading.build_method(config.method)}",
        f"data       {config.data.data}: {len(job.train):,} rows to train on, {len(job.held_out.rows):,} held out"
        + (f", {config.data.max_length} tokens a row" if config.data.max_length else ""),
        f"steps      {train.steps:,} of {rows} rows, {train.steps * rows / len(job.train):.2f} passes over the data",
        f"optimizer  {optimizer.optimizer}, learning rate {optimizer.learning_rate:g} after {optimizer.warmup_steps} "
        f"steps of warm-up, then {optimizer.schedule}{clip}",
        "memory     "
        + ", ".join(f"{what} {_amount(size)}" for what, size in sizes.items() if size is not None)
        + f" (by XLA for {jax.default_backend()}; the held-out pass and decoding not included)",
    ]
    return "\n".join(lines)


def _bytes(tree: Any) -> int:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _amount(size: int) -> str:
    unit, scale = next(((u, n) for u, n in (("GiB", 2**30), ("MiB", 2**20)) if size >= n), ("KiB", 2**10))
    return f"{size / scale:,.1f} {unit}"


def _working_memory(job: Job, arrays: dict[str, Any]) -> int | None:
    """Bytes that the compiled step needs beside its arguments; None where XLA does not say."""
    config = job.config
    schedule = learning_rate_schedule(config.optimizer, config.train.steps)
    step = make_train_step(
        job.apply, make_optimizer(config.optimizer, schedule), job.task.loss, rank_schedule=loading.run_ranks(config)
    )
    batch = job.task.trim(next(data.batches(job.train, config.train.batch_size, config.train.seed)))
    batch = {k: jax.ShapeDtypeStruct((config.train.accumulation, *v.shape), v.dtype) for k, v in batch.items()}
    state = (arrays["trainable"], arrays["opt_state"], job.adapted.replace(trainable={}), batch)
    compiled = step.lower(*state, jax.random.key(0), jax.ShapeDtypeStruct((), jnp.int32)).compile()
    analysis = compiled.memory_analysis()
    return None if analysis is None else analysis.temp_size_in_bytes


# Runs after they are trained.


def compare(config: CompareConfig) -> int:
    """One table and one figure of several runs."""
    if len(config.runs) < 2:
        raise UserError("compare wants two runs or more: jlora compare RUN RUN")
    if config.out.exists() and not config.overwrite:
        raise UserError(f"{config.out} exists already: choose another --out, or add --overwrite")
    check_writable(config.out)
    runs = [RunDirectory.open(path) for path in config.runs]
    names = _names([run.path for run in runs])
    saved = [run.read_config() for run in runs]
    options = [_flat(each["options"]) for each in saved]
    figures = [_figures(run, each) for run, each in zip(runs, saved, strict=True)]
    rows = [("", *names)]
    for label, columns in (("option", options), ("figure", figures)):
        keys = dict.fromkeys(key for column in columns for key in column)
        for key in keys:
            cells = [column.get(key, "-") for column in columns]
            if label == "figure" or len(set(cells)) > 1:
                rows.append((key, *cells))
    reporter = Reporter()
    reporter.say(table(rows, right=names))
    config.out.parent.mkdir(parents=True, exist_ok=True)
    plot([run.read_metrics() for run in runs], names, config.out)
    reporter.say()
    reporter.say(f"losses over steps: {config.out}")
    return 0


def _names(found: Sequence[Path]) -> list[str]:
    """The last parts of the paths, as many as tell them apart."""
    parts = [path.resolve().parts for path in found]
    for n in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-n:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    raise UserError(f"the same run twice: {', '.join(map(str, found))}")


_PRIVATE = ("run.out", "run.resume", "run.overwrite", "run.dry_run")  # of a run, and no part of what it computes


def _flat(options: dict[str, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for name, value in options.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        elif prefix + name not in _PRIVATE:
            flat["--" + name.replace("_", "-")] = " ".join(map(str, value)) if isinstance(value, list) else str(value)
    return flat


_LABELS = {name: figure.short for name, figure in FIGURES.items()} | {"bleu_prompts": None}


def _figures(run: RunDirectory, saved: dict[str, Any]) -> dict[str, str]:
    """What came out of a run, as far as it went."""
    results, records = run.read_results(), run.read_metrics()
    held_out = [record for record in records if held_out_loss(record) is not None]
    steps = max((record["step"] for record in records), default=0)
    rows = {
        "trainable parameters": f"{saved['summary']['trainable']:,}",
        "steps": f"{steps:,} of {saved['options']['train']['steps']:,}",
    }
    before, after = results.get("before", {}), results.get("after", {})
    for key in dict.fromkeys([*before, *after]):
        label = _LABELS.get(key, key.replace("_", " "))
        if label is not None and not isinstance(before.get(key, after.get(key)), str):
            shown = [f"{float(each[key]):.4g}" if key in each else "-" for each in (before, after)]
            rows[label] = " -> ".join(shown)
    if held_out:
        best = min(held_out, key=held_out_loss)
        rows["lowest held-out loss"] = f"{held_out_loss(best):.4g} at step {best['step']}"
    if results.get("train_seconds") is not None:
        rows["training, s"] = f"{results['train_seconds']:.0f}"
    return rows


def plot(records: Sequence[Sequence[dict[str, Any]]], names: Sequence[str], path: Path) -> None:
    """Held-out losses (thick, with marks) and training losses (thin) of runs over optimizer steps, as a PNG."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure  # without pyplot: no backend to choose, no global state

    figure = Figure(figsize=(7, 4.2), dpi=150, layout="constrained")
    axes, highest = figure.subplots(), []
    for i, (run, name) in enumerate(zip(records, names, strict=True)):
        color = colormaps["tab10"](i % 10)
        style = ("-", "--", ":", "-.")[i // 10 % 4]
        trained = [(r["step"], float(r["loss"])) for r in run if "loss" in r and math.isfinite(float(r["loss"]))]
        losses = [(record["step"], held_out_loss(record)) for record in run]
        held_out = [(step, loss) for step, loss in losses if loss is not None and math.isfinite(loss)]
        if trained:
            axes.plot(*zip(*trained, strict=True), color=color, linestyle=style, linewidth=0.9, alpha=0.45)
        marked = held_out or [(math.nan, math.nan)]
        label = f"{name}: {held_out[-1][1]:.3f}" if held_out else f"{name}: nothing held out yet"
        axes.plot(*zip(*marked, strict=True), color=color, linestyle=style, marker="o", markersize=4, label=label)
        highest += [loss for _, loss in trained + held_out]
    axes.set(xlabel="optimizer step", ylabel="loss", ylim=(0, 1.08 * max(highest, default=1.0)))
    axes.set_title("held-out loss (marks) and training loss (thin)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    write_file(path, buffer.getvalue())
