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
from jaxtyping import PyTree

import jlora
from jlora.io import save_peft
from jlora.train import data, loading
from jlora.train.checkpoint import Checkpoints
from jlora.train.checkpoint import checksum as array_checksum
from jlora.train.config import (
    FinetuneConfig,
    RunError,
    UserError,
    resolve_length,
    resolve_rate,
    resolve_steps,
    to_dict,
    validate,
)
from jlora.train.generate import generate
from jlora.train.loop import (
    Interrupted,
    Loop,
    StopRequested,
    StopSignals,
    TrainState,
    held_out_nll,
    learning_rate_schedule,
    make_eval_step,
    make_optimizer,
    make_train_step,
)
from jlora.train.metrics import corpus_bleu, perplexity
from jlora.train.report import Reporter, figures_line, one_line, plot_losses, run_readme
from jlora.train.run import RunDirectory, write_directory, write_file, write_json

_VERSIONS = ("jlora", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


@dataclasses.dataclass
class Job:
    """Everything a run needs, made from a resolved configuration."""

    config: FinetuneConfig
    model: Any
    adapted: jlora.Adapted
    train: data.Encoded
    held_out: loading.HeldOut
    apply: Callable
    eval_step: Callable
    reporter: Reporter
    signals: StopSignals

    def measure(self, trainable: PyTree, nll: float | None = None) -> tuple[dict[str, Any], list[str]]:
        """Held-out figures, and the completions of the held-out prompts ([] without --generate)."""
        options, adapted = self.config.eval, self.adapted.replace(trainable=trainable)
        if nll is None:
            nll = self.held_out_nll(trainable)
        figures: dict[str, Any] = {"eval_nll": nll, "perplexity": perplexity(nll)}
        if not options.generate:
            return figures, []
        wanted = self.held_out.prompt_ids if self.held_out.references else self.held_out.prompt_ids[: options.samples]
        texts = complete(
            self.apply, adapted.bind(), self.model, wanted, max_new_tokens=options.max_new_tokens,
            batch_size=options.eval_batch_size, poll=self.signals.poll,
        )  # fmt: skip
        if self.held_out.references and texts:
            figures["bleu"], figures["bleu_signature"] = corpus_bleu(texts, self.held_out.references)
            figures["bleu_prompts"] = len(texts)
        return figures, texts

    def held_out_nll(self, trainable: PyTree) -> float:
        adapted = self.adapted.replace(trainable=trainable)
        batch_size = self.config.eval.eval_batch_size
        return held_out_nll(self.eval_step, adapted, self.held_out.rows, batch_size, self.signals.poll)


def complete(
    apply: Callable,
    params: PyTree,
    model: Any,
    prompts: list[list[int]],
    *,
    max_new_tokens: int,
    batch_size: int,
    poll: Callable = lambda: None,
) -> list[str]:
    """The likeliest texts to follow the prompts. Batches go by length; `poll` is called between them."""
    texts = [""] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for start in range(0, len(order), batch_size):
        poll()
        chosen = order[start : start + batch_size]
        tokens = generate(
            apply, params, [prompts[i] for i in chosen], config=model.config, max_new_tokens=max_new_tokens,
            eos_id=model.tokenizer.eos_id, batch_size=batch_size,
        )  # fmt: skip
        for i, row in zip(chosen, tokens, strict=True):
            texts[i] = model.tokenizer.decode(row).strip()
    return texts


def finetune(config: FinetuneConfig, argv: list[str]) -> int:
    """Run the command; returns the exit code."""
    reporter = Reporter()
    if config.run.resume is not None:
        if dataclasses.replace(config, run=dataclasses.replace(config.run, resume=None)) != FinetuneConfig():
            raise UserError("--resume takes every option from the run's config.json: give no other option with it")
        run = RunDirectory.open(config.run.resume)
        saved = run.read_config()
        job = prepare(loading.read_run_config(run), reporter)
    else:
        validate(config)
        path = config.run.out or _default_directory(config)
        config = dataclasses.replace(config, run=dataclasses.replace(config.run, out=path))
        RunDirectory.check_free(path, config.run.overwrite)
        job = prepare(config, reporter)
        saved = describe(job, shlex.join(["jlora", *argv]))
        run = RunDirectory.create(path, saved, config.run.overwrite)
    with job.signals:
        try:
            return _run(job, run, saved)
        except (Interrupted, StopRequested) as stop:
            _plot(job, run)
            where = f"after step {stop.step}, which is saved" if isinstance(stop, Interrupted) else "between steps"
            reporter.say(f"{signal.Signals(job.signals.received).name}: stopped {where}. Continue with:")
            reporter.say(f"  jlora finetune --resume {shlex.quote(str(run.path))}")
            return 128 + job.signals.received
        except OSError as error:
            raise RunError(f"could not write to {run.path}: {error}; what was saved before is kept") from error


def prepare(config: FinetuneConfig, reporter: Reporter) -> Job:
    """Load and check everything; nothing is written."""
    loading.build_method(config.method)  # a misspelt option should not wait for the model
    model = loading.load_model(config.model.model, config.model.bf16, config.model.remat, config.model.quantize)
    loading.need_text_model(model)
    config = dataclasses.replace(config, data=resolve_length(config.data, model.config.max_positions))
    config = dataclasses.replace(config, method=loading.resolve_targets(config.method, model))
    adapted = loading.build_adapted(model, config.method, config.train.seed)
    train, held_out = loading.load_data(
        config.data, model, seed=config.train.seed, max_new_tokens=config.eval.max_new_tokens,
        limit=config.eval.eval_limit,
    )  # fmt: skip
    config = resolve_steps(resolve_rate(config), len(train))
    apply = jlora.lift(model.module.apply)
    return Job(config, model, adapted, train, held_out, apply, make_eval_step(apply), reporter, StopSignals())


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
        },
        "versions": {name: importlib.metadata.version(name) for name in _VERSIONS},
        "backend": jax.default_backend(),
    }


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
    for rows, what in ((job.train, "training"), (job.held_out.rows, "held-out")):
        if rows.truncated or rows.dropped:
            say(
                f"of the {what} examples {rows.truncated:,} were cut at --max-length {config.data.max_length} and "
                f"{rows.dropped:,} left out, whose prompt fills it"
            )
    identity = loading.base_identity(job.adapted) | {"training data": array_checksum(job.train.ids)}
    checkpoints = Checkpoints(run.checkpoints, keep=config.run.keep, identity=identity)
    try:
        state, stream = _restore_or_start(job, checkpoints, run)
        results = run.read_results()
        if "after" in results and state.step == config.train.steps:
            say(f"this run is finished: see {run.readme}")
            return 0
        if "before" not in results:
            results = _measure_before(job, run)
        if not math.isfinite(float(results["before"]["eval_nll"])):
            raise RunError(f"the held-out loss is {results['before']['eval_nll']} before any training: stopped")
        say(f"before: {figures_line(results['before'])}")
        began, first = time.monotonic(), state.step
        state, nll = _train(job, run, checkpoints, state, stream)
        results["train_seconds"] = None if first else round(time.monotonic() - began, 1)
    finally:
        checkpoints.close()
    _finish(job, run, saved, results, state, nll)
    return 0


def _restore_or_start(job: Job, checkpoints: Checkpoints, run: RunDirectory) -> tuple[TrainState, Any]:
    """The newest readable checkpoint, or step 0; and the stream of batches in the same place."""
    stream = data.batches(job.train, job.config.train.batch_size, job.config.train.seed)
    restored = checkpoints.restore(loading.abstract_arrays(job.config, job.adapted))
    if restored is None:
        state = loading.initial_state(job.config, job.adapted)
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
    figures, texts = job.measure(job.adapted.trainable)
    results = {"before": figures, "texts_before": texts}
    run.append_metrics({"step": 0, "eval_nll": figures["eval_nll"], "perplexity": figures["perplexity"]})
    write_json(run.results, results)
    return results


def _train(job: Job, run: RunDirectory, checkpoints: Checkpoints, state: TrainState, stream: Any):
    """Take the remaining steps; returns the last state and its held-out loss."""
    config = job.config
    last: dict[str, float] = {}

    def evaluate(trainable: PyTree) -> float:
        last["nll"] = job.held_out_nll(trainable)
        return last["nll"]

    steps = config.train.steps
    loop = Loop(
        fixed=job.adapted.replace(trainable={}),
        train_step=make_train_step(job.apply, make_optimizer(config.optimizer, steps)),
        evaluate=evaluate,
        schedule=learning_rate_schedule(config.optimizer, steps),
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
    return state, last.get("nll")


def _finish(job: Job, run: RunDirectory, saved: dict, results: dict, state: TrainState, nll: float | None) -> None:
    """Adapter, figures after, samples, plot and README."""
    say, config = job.reporter.say, job.config
    adapted = job.adapted.replace(trainable=state.trainable)
    try:
        export_adapter(adapted, run.adapter, job.model.name, overwrite=True)
    except ValueError as error:  # not everything that can be trained has a place in PEFT's files
        say(f"not written in PEFT format: {error}")
    results["after"], texts = job.measure(state.trainable, nll)
    before = results.pop("texts_before")
    prompts, shown = job.held_out.prompts, range(min(config.eval.samples, len(texts)))
    results["samples"] = [{"prompt": prompts[i], "before": before[i], "after": texts[i]} for i in shown]
    if texts:
        run.write_completions(prompts, before, texts, job.held_out.references)
    _plot(job, run)
    write_file(run.readme, run_readme(run, saved, results))
    write_json(run.results, results)
    say()
    say(f"before: {figures_line(results['before'])}")
    say(f"after:  {figures_line(results['after'])}")
    for sample in results["samples"]:
        say()
        say(f"prompt: {one_line(sample['prompt'])}")
        say(f"before: {one_line(sample['before'])}")
        say(f"after:  {one_line(sample['after'])}")
    say()
    if run.adapter.exists():
        say(f"adapter in PEFT format: {run.adapter}")
    else:
        say(f"the trained model: jlora merge --run {shlex.quote(str(run.path))} --out DIRECTORY")
    say(f"report: {run.readme}, plot: {run.plot}")


def _plot(job: Job, run: RunDirectory) -> None:
    options = job.config
    title = f"{Path(job.model.name).name} on {Path(options.data.data).name}, {options.method.method}"
    plot_losses(run.read_metrics(), run.plot, title)


def export_adapter(adapted: jlora.Adapted, directory: Path, model_name: str, overwrite: bool = False) -> None:
    """Write an adapter in PEFT format, all of it or nothing."""
    with write_directory(directory, overwrite) as temporary:
        save_peft(adapted, temporary, base_model_name_or_path=model_name, task_type="CAUSAL_LM")
