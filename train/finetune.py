"""`jlora finetune`: measure, train, measure again, and leave a directory that says it all."""

import dataclasses
import importlib.metadata
import math
import re
import shlex
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

import jlora
from jlora.io import save_peft
from jlora.train import data, distributed, loading, models, ranks, starts, tasks
from jlora.train import mesh as meshes
from jlora.train.checkpoint import Checkpoints
from jlora.train.config import (
    FinetuneConfig,
    RunError,
    RunOptions,
    UserError,
    resolve_rate,
    resolve_steps,
    to_dict,
    validate,
)
from jlora.train.loop import (
    Interrupted,
    Loop,
    StopRequested,
    StopSignals,
    TrainState,
    make_train_step,
)
from jlora.train.optimizers import learning_rate_schedule, make_optimizer
from jlora.train.report import Reporter, figures_line, one_line, plot_losses, run_readme
from jlora.train.run import RunDirectory, write_directory, write_file, write_json
from jlora.train.tasks import Measured, Task

_VERSIONS = ("jlora", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


@dataclasses.dataclass
class Job:
    """Everything a run needs, made from a resolved configuration."""

    config: FinetuneConfig
    task: Task
    model: Any
    adapted: jlora.Adapted
    train: Any
    held_out: Any
    identity: dict[str, Any]
    """Of the data, by which a resumed run knows them."""
    places: Any
    """Where on a mesh the arrays of the run's state go; None without one."""
    apply: Callable
    eval_step: Callable
    reporter: Reporter
    signals: StopSignals

    def evaluate(self, adapted: jlora.Adapted) -> Measured:
        """Held-out figures."""
        batch_size = self.config.eval.eval_batch_size
        return self.task.evaluate(self.eval_step, adapted, self.held_out, batch_size, self.signals.poll)

    def measure(self, adapted: jlora.Adapted, measured: Measured | None = None) -> Measured:
        """These and what takes longer, with the model's answers; `measured` is what `evaluate` gave already."""
        measured = self.evaluate(adapted) if measured is None else measured
        return self.task.complete(
            measured, self.apply, adapted.bind(), self.model, self.held_out, self.config.eval, self.signals.poll
        )


def finetune(config: FinetuneConfig, argv: list[str]) -> int:
    """Run the command; returns the exit code."""
    validate(config)
    distributed.connect(config.run.distributed, config.run.distributed_timeout)
    distributed.check_same("options", _shared_options(config))
    reporter = Reporter()
    if config.run.resume is not None:
        here = {name: getattr(config.run, name) for name in ("mesh", "distributed", "distributed_timeout")}
        unset = {name: getattr(RunOptions(), name) for name in (*here, "resume")}
        with distributed.together():
            run = RunDirectory.open(config.run.resume)
            if dataclasses.replace(config, run=dataclasses.replace(config.run, **unset)) != FinetuneConfig():
                raise UserError(
                    "--resume takes every option but --mesh and --distributed from the run's config.json: give no "
                    "other option with it"
                )
            saved, options = run.read_config(), loading.read_run_config(run)
        here["mesh"] = config.run.mesh or options.run.mesh
        job = prepare(dataclasses.replace(options, run=dataclasses.replace(options.run, **here)), reporter, run.start)
    else:
        path = config.run.out or Path(distributed.from_first(lambda: str(_default_directory(config))))
        config = dataclasses.replace(config, run=dataclasses.replace(config.run, out=path))
        distributed.from_first(lambda: RunDirectory.check_free(path, config.run.overwrite))
        job = prepare(config, reporter)
        if config.run.dry_run:
            from jlora.train.inform import run_plan  # which imports Job from here

            reporter.say(run_plan(job))
            reporter.say(f"\nnothing was written; without --dry-run the run would go to {path}")
            return 0
        saved = describe(job, shlex.join(["jlora", *argv]))
        run = RunDirectory.create(path, saved, config.run.overwrite)
        if config.method.init != "default":
            starts.save(job.adapted, run.start)
    with job.signals:
        try:
            return _run(job, run, saved)
        except (Interrupted, StopRequested) as stop:
            _plot(job, run)
            where = f"after step {stop.step}, which is saved" if isinstance(stop, Interrupted) else "between steps"
            reporter.say(f"{signal.Signals(job.signals.agreed).name}: stopped {where}. Continue with:")
            reporter.say(f"  jlora finetune --resume {shlex.quote(str(run.path))}")
            return 128 + job.signals.agreed
        except OSError as error:
            raise RunError(f"could not write to {run.path}: {error}; what was saved before is kept") from error


def prepare(config: FinetuneConfig, reporter: Reporter, start: Path | None = None) -> Job:
    """Load and check everything; nothing is written. `start` is the file where the adapters of a run started."""
    method = loading.build_method(config.method)  # a misspelt option should not wait for the model
    if start is None:
        starts.check_calibration(config.method, method)
    make_optimizer(config.optimizer, 0.0)
    task = tasks.make(config.data)
    mesh = meshes.make(config.run.mesh)
    if mesh is not None:
        meshes.check_rows(mesh, batch_size=config.train.batch_size)
    reporter.unit = task.unit
    with distributed.together(), loading.user_errors():
        task.check(config.model.model, models.family_of(config.model.model))
        options, train, held_out = task.read(config.data, config.model.model, config.train.seed)
    model = loading.load_run_model(dataclasses.replace(config, data=options), mesh)
    task.attach(model)
    task.mesh = mesh
    method = loading.resolve_targets(config.method, model, task.train_fully(model))
    config = dataclasses.replace(config, data=task.resolve(options, model), method=method)
    with loading.user_errors():
        train = task.encode(train, config.data, model)
        held_out = task.hold_out(held_out, config.data, model, config.eval)
    identity = {"training data": task.identity(train)}
    distributed.check_same("data", {"rows": {**identity, "held-out data": len(held_out.rows)}})
    adapted = loading.build_adapted(
        model, config.method, config.train.seed, start,
        lambda rules, usage: starts.calibrate(
            model, usage, rules, train, task, config.method, batch_size=config.train.batch_size,
            seed=config.train.seed, progress=lambda batches: reporter.track(batches, "calibrating"),
        ),
    )  # fmt: skip
    if config.model.offload:
        if config.data.task == "dpo" and not config.data.reference_free:
            raise UserError("--offload and --task dpo: its reference is the base, read as a whole; try --quantize nf4")
        with loading.user_errors():
            adapted = jlora.offload(adapted)
    config = resolve_steps(resolve_rate(config, task.learning_rate, task.rate_share), len(train))
    loading.abstract_arrays(config, adapted)  # an optimizer may refuse the parameters
    apply = jlora.lift(model.module.apply)
    step = task.make_eval_step(apply)
    distributed.check_same("options", _shared_options(config))  # those that data and model decided
    places = loading.places(config, adapted, mesh)
    return Job(config, task, model, adapted, train, held_out, identity, places, apply, step, reporter, StopSignals())


def describe(job: Job, command: str) -> dict[str, Any]:
    """The content of config.json."""
    method = loading.build_method(job.config.method)
    count = lambda tree: sum(leaf.size for _, leaf in jlora.paths.flatten(tree)[0])
    return {
        "command": command,
        "options": to_dict(job.config),
        "method": {"name": job.config.method.method, **dataclasses.asdict(method)},
        "rules": {pattern: repr(method) for pattern, method in loading.build_rules(job.config.method).items()},
        "summary": {
            "model_name": Path(job.model.name).name,
            "parameters": count(job.adapted.base),
            "trainable": count(job.adapted.trainable),
            "train_rows": len(job.train),
            "eval_rows": len(job.held_out.rows),
            "eval_prompts": len(job.held_out.prompts) if job.held_out.references else 0,
            **({"classes": len(job.config.data.labels)} if job.config.data.labels else {}),
        },
        "versions": {name: importlib.metadata.version(name) for name in _VERSIONS},
        "backend": jax.default_backend(),
    }


def _shared_options(config: FinetuneConfig) -> dict[str, dict[str, Any]]:
    """The options without the one that says which of several processes this is."""
    return to_dict(dataclasses.replace(config, run=dataclasses.replace(config.run, distributed="none")))


def _default_directory(config: FinetuneConfig) -> Path:
    parts = [Path(config.model.model).name, Path(config.data.data).name.split(".")[0], config.method.method]
    name = "-".join([*parts, time.strftime("%Y%m%d-%H%M%S")])
    return Path("runs") / re.sub(r"[^A-Za-z0-9._-]+", "_", name)


def _run(job: Job, run: RunDirectory, saved: dict[str, Any]) -> int:
    config, say = job.config, job.reporter.say
    summary = saved["summary"]
    say(
        f"{summary['model_name']}: {summary['trainable']:,} trainable parameters beside {summary['parameters']:,}; "
        f"{summary['train_rows']:,} rows to train on, {summary['eval_rows']:,} held out; writing to {run.path}"
    )
    if config.data.labels and job.task.name != "regression":
        say(f"{len(config.data.labels)} classes: {', '.join(config.data.labels)}")
    for rows, what in ((job.train, "training"), (job.held_out.rows, "held-out")):
        if rows.truncated or rows.dropped:
            say(
                f"of the {what} examples {rows.truncated:,} were cut at --max-length {config.data.max_length} and "
                f"{rows.dropped:,} left out, whose prompt fills it"
            )
    identity = loading.base_identity(job.adapted) | job.identity
    checkpoints = Checkpoints(run.checkpoints, keep=config.run.keep, identity=identity)
    try:
        with distributed.alive(run.path):
            state, stream = _restore_or_start(job, checkpoints, run)
            results = distributed.from_first(run.read_results)
            if "after" in results and state.step == config.train.steps:
                say(f"this run is finished: see {run.readme}")
                return 0
            if "before" not in results:
                results = _measure_before(job, run)
            loss = results["before"][job.task.loss_key]
            if not math.isfinite(float(loss)):
                raise RunError(f"the held-out loss is {loss} before any training: stopped")
            say(f"before: {figures_line(results['before'])}")
            began, first = time.monotonic(), state.step
            state, measured = _train(job, run, checkpoints, state, stream)
            results["train_seconds"] = None if first else round(time.monotonic() - began, 1)
            _finish(job, run, saved, results, state, measured)
    finally:
        checkpoints.close()
    return 0


def _restore_or_start(job: Job, checkpoints: Checkpoints, run: RunDirectory) -> tuple[TrainState, Any]:
    """The newest readable checkpoint, or step 0; and the stream of batches in the same place."""
    stream = data.batches(job.train, job.config.train.batch_size, job.config.train.seed)
    restored = checkpoints.restore(loading.abstract_arrays(job.config, job.adapted, job.places))
    if restored is None:
        state = loading.initial_state(job.config, job.adapted, job.places)
    else:
        for problem in restored.skipped:
            job.reporter.say(f"{problem}; falling back to the one before")
        stream.set_state(restored.data)
        state = TrainState.from_arrays(restored.step, restored.state)
    if run.metrics.exists():
        job.reporter.say(f"resuming after step {state.step}")
        run.rewind_metrics(state.step)
    return state, stream


def _measure_before(job: Job, run: RunDirectory) -> dict[str, Any]:
    # With a fresh adapter the model is still the base, and the functions compiled here serve again after training.
    first = job.evaluate(job.adapted)
    measured = job.measure(job.adapted, first)
    results = {"before": measured.figures, "texts_before": measured.answers}
    run.append_metrics({"step": 0, **first.figures})
    write_json(run.results, results)
    return results


def _train(job: Job, run: RunDirectory, checkpoints: Checkpoints, state: TrainState, stream: Any):
    """Take the remaining steps; returns the last state and what was measured of it."""
    config = job.config
    last: dict[str, Measured] = {}

    def evaluate(state: TrainState) -> dict[str, Any]:
        last["measured"] = job.evaluate(state.adapted(job.adapted))
        return last["measured"].figures

    steps = config.train.steps
    schedule = learning_rate_schedule(config.optimizer, steps)
    shardings = job.places and (job.places["trainable"], job.places["opt_state"])
    loop = Loop(
        fixed=job.adapted.replace(trainable={}),
        train_step=make_train_step(
            job.apply, loading.run_optimizer(config), job.task.loss, shardings, loading.run_ranks(config)
        ),
        task=job.task,
        evaluate=evaluate,
        schedule=schedule,
        batches=stream,
        accumulation=config.train.accumulation,
        steps=steps,
        log_every=config.run.log_every,
        eval_every=config.eval.eval_every,
        checkpoint_every=config.run.checkpoint_every,
        run=run,
        checkpoints=checkpoints,
        reporter=job.reporter,
        signals=job.signals,
    )
    state = loop.train(state)
    return state, last.get("measured")


def _finish(
    job: Job, run: RunDirectory, saved: dict, results: dict, state: TrainState, measured: Measured | None
) -> None:
    """Adapter, figures after, samples, plot and README."""
    say, config = job.reporter.say, job.config
    adapted = state.adapted(job.adapted)
    try:
        export_adapter(adapted, run.adapter, job.model.name, job.task, overwrite=True)
    except ValueError as error:  # not everything that can be trained has a place in PEFT's files
        say(f"not written in PEFT format: {error}")
    measured = job.measure(adapted, measured)
    before = results.pop("texts_before")
    results["after"] = measured.figures
    results["samples"] = job.task.samples(job.held_out, before, measured.answers, config.eval.samples)
    if measured.answers:
        run.write_records(*job.task.records(job.held_out, before, measured.answers))
    _plot(job, run)
    write_file(run.readme, run_readme(run, saved, results, job.task, config.data))
    write_json(run.results, results)
    say()
    say(f"before: {figures_line(results['before'])}")
    say(f"after:  {figures_line(results['after'])}")
    if config.train.rank_schedule != "none":
        say(ranks.describe(adapted))
    for sample in results["samples"]:
        say()
        say(f"prompt: {one_line(sample['prompt'])}")
        if "label" in sample:
            say(f"label:  {one_line(sample['label'])}")
        say(f"before: {one_line(sample['before'])}")
        say(f"after:  {one_line(sample['after'])}")
    say()
    if run.adapter.exists():
        say(f"adapter in PEFT format: {run.adapter}")
    else:
        say(f"the trained model: jlora merge --run {shlex.quote(str(run.path))} --out DIRECTORY")
    say(f"report: {run.readme}, plot: {run.plot}")


def _plot(job: Job, run: RunDirectory) -> None:
    if not distributed.first():
        return
    options = job.config
    title = f"{Path(job.model.name).name} on {Path(options.data.data).name}, {options.method.method}"
    plot_losses(run.read_metrics(), run.plot, title, job.task.loss_unit)


def export_adapter(
    adapted: jlora.Adapted, directory: Path, model_name: str, task: Task, overwrite: bool = False
) -> None:
    """Write an adapter in PEFT format, all of it or nothing."""
    name = models.packaged.hub_name(model_name)
    lazily = lambda leaf: leaf if leaf.is_fully_addressable else distributed.Gathered(leaf)
    adapted = adapted.replace(
        base=jax.tree.map(lazily, adapted.base), trainable=distributed.to_host(adapted.trainable),
        frozen=distributed.to_host(adapted.frozen),
    )  # fmt: skip
    with write_directory(directory, overwrite) as temporary:
        save_peft(adapted, temporary, base_model_name_or_path=name, task_type=task.peft_type)
