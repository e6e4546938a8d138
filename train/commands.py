"""`jlora generate`, `evaluate`, `merge`, `inspect` and `convert`: what to do with a model once it is there."""

import dataclasses
import io
from pathlib import Path
from typing import Any

import jax

import jlora
from jlora import diagnostics
from jlora.train import loading, models, tasks
from jlora.train.config import (
    ConvertConfig,
    DataOptions,
    EvalOptions,
    EvaluateConfig,
    GenerateConfig,
    InspectConfig,
    MergeConfig,
    SourceOptions,
    UserError,
    check_finite,
    check_metrics,
)
from jlora.train.finetune import export_adapter
from jlora.train.generate import generate as generate_tokens
from jlora.train.report import Reporter, figures_line
from jlora.train.run import RunDirectory, check_writable, write_directory, write_file


def generate(config: GenerateConfig) -> int:
    """Print each prompt with its completion."""
    check_finite(config)
    source = loading.load_source(config.source)
    loading.need_text_model(source.model.name, source.model.family)
    prompts = list(config.prompt)
    options = source.config.data if source.config else DataOptions()
    if config.chat_template is not None:
        options = dataclasses.replace(options, chat_template=config.chat_template)
    if prompts:
        with loading.user_errors():
            ids = loading.asked(prompts, options, source.model)
    else:
        decoding = EvalOptions(eval_limit=3, max_new_tokens=config.max_new_tokens)
        _, held_out = _held_out(source, tasks.make(options), options, decoding)
        prompts, ids = held_out.prompts[:3], held_out.prompt_ids[:3]
    with loading.user_errors():
        tokens = generate_tokens(
            source.apply, source.params, ids, config=source.model.config, max_new_tokens=config.max_new_tokens,
            temperature=config.temperature, top_p=config.top_p, key=jax.random.key(config.seed),
            eos_id=source.model.tokenizer.eos_id,
        )  # fmt: skip
    reporter = Reporter()
    for i, (prompt, row) in enumerate(zip(prompts, tokens, strict=True)):
        if i:
            reporter.say()
        reporter.say(f"prompt: {prompt}")
        reporter.say(f"output: {source.model.tokenizer.decode(row).strip()}")
    return 0


def evaluate(config: EvaluateConfig) -> int:
    """Print what the task measures."""
    for option, value in {"--batch-size": config.batch_size, "--limit": config.limit}.items():
        if value is not None and value < 1:
            raise UserError(f"{option} must be above 0, got {value}")
    check_metrics(config.metrics)
    options, name = _data_options(config)
    with loading.user_errors():
        task = tasks.make(options)
        task.check(name, models.family_of(name))
        options = task.known_labels(options, name)
    source = loading.load_source(config.source, options.labels)
    if source.model.drawn and source.adapted is None:
        raise UserError(
            f"{source.name} has no head for {', '.join(options.labels)}: give a run with --run, or an adapter"
        )
    task.attach(source.model)
    decoding = EvalOptions(
        eval_limit=config.limit, max_new_tokens=config.max_new_tokens, eval_batch_size=config.batch_size,
        generate=config.generate, metrics=config.metrics, samples=0,
    )  # fmt: skip
    options, held_out = _held_out(source, task, options, decoding)
    adapted = source.adapted
    step = task.make_eval_step(source.apply, bind=adapted is not None)
    measured = task.evaluate(step, source.model.params if adapted is None else adapted, held_out, config.batch_size)
    measured = task.complete(measured, source.apply, source.params, source.model, held_out, decoding)
    reporter = Reporter()
    reporter.say(f"{source.name} on {options.eval_data or options.data}, {len(held_out.rows)} rows")
    reporter.say(figures_line(measured.figures))
    for line in task.details(held_out, measured):
        reporter.say(line)
    return 0


def _data_options(config: EvaluateConfig) -> tuple[DataOptions, str]:
    """What to evaluate on, as `jlora finetune` would be told, and the model's name."""
    saved = None
    if config.source.run is not None:
        saved = loading.read_run_config(RunDirectory.open(config.source.run))
    options = saved.data if saved else DataOptions()
    if config.data:  # all of a file that is named
        held_out = None if config.data in ("e2e", "shakespeare") else config.data
        options = dataclasses.replace(options, data=config.data, eval_data=held_out, max_length=None)
    names = ("task", "text_column", "prompt_column", "completion_column", "label_column", "pair_column", "labels")
    given = {name: value for name in (*names, "chat_template", "max_length") if (value := getattr(config, name))}
    options = dataclasses.replace(options, **given)
    if options.task not in tasks.TASKS:
        raise UserError(f"unknown task {options.task!r}: known are {', '.join(tasks.TASKS)}")
    return options, config.source.model or (saved.model.model if saved else loading.base_name(config.source))


def merge(config: MergeConfig) -> int:
    """Write base plus adapter as a plain model directory."""
    given = config.source
    if given.run is None and given.adapter is None and given.model is None:
        raise UserError("nothing to merge: give a run with --run, or an adapter with --adapter")
    _check_free(config.out)
    source = loading.load_source(given)
    with loading.user_errors():
        params = source.model.params if source.adapted is None else jlora.merge(source.adapted)
        with write_directory(config.out) as temporary:
            models.save_hf(source.model, params, temporary)
    Reporter().say(f"{source.name} written to {config.out}")
    if source.adapted is None:
        Reporter().say("nothing was merged: it is the base alone, without --run or --adapter")
    return 0


def inspect(config: InspectConfig) -> int:
    """Print what a run or an adapter holds."""
    reporter, path = Reporter(), config.path
    if not path.is_dir():
        raise UserError(f"there is no directory {path}")
    if config.plot is not None and config.plot.exists():
        raise UserError(f"{config.plot} exists already: choose another --plot")
    if config.plot is not None:
        check_writable(config.plot, "--plot")
    if config.intruders < 0:
        raise UserError(f"--intruders must not be below 0, got {config.intruders}")
    run = RunDirectory(path)
    if run.config.is_file():
        saved = run.read_config()
        options, results, records = saved["options"], run.read_results(), run.read_metrics()
        steps = max((record["step"] for record in records), default=0)
        reporter.say(f"run:     {saved['command']}")
        reporter.say(f"model:   {options['model']['model']}, {saved['summary']['parameters']:,} parameters")
        reporter.say(f"data:    {options['data']['data']}, {saved['summary']['train_rows']:,} rows to train on")
        reporter.say(f"steps:   {steps} of {options['train']['steps']}")
        for label in ("before", "after"):
            if label in results:
                reporter.say(f"{label + ':':8} {figures_line(results[label])}")
        if not run.adapter.is_dir() and not any(run.checkpoints.glob("[0-9]*")):
            return 0
        reporter.say()
        source = loading.load_source(SourceOptions(run=path, model=config.model))
    elif not (path / "adapter_config.json").is_file():
        raise UserError(
            f"{path} is neither a run nor an adapter: it has no config.json of `jlora finetune` and no "
            "adapter_config.json of PEFT"
        )
    else:
        source = loading.load_source(SourceOptions(adapter=path, model=config.model))
    reporter.say(jlora.summary(source.adapted))
    if not (config.spectra or config.intruders or config.plot):
        return 0
    with loading.user_errors():
        report = diagnostics.report(source.adapted, intruders=config.intruders)
        reporter.say()
        reporter.say(str(report))
        if config.plot is not None:
            buffer = io.BytesIO()
            diagnostics.plot(report).savefig(buffer, format="png")
            config.plot.parent.mkdir(parents=True, exist_ok=True)
            write_file(config.plot, buffer.getvalue())
            reporter.say()
            reporter.say(f"drawn to {config.plot}")
    return 0


def convert(config: ConvertConfig) -> int:
    """Write a checkpoint as an adapter directory in PEFT format."""
    check_finite(config)
    if (config.to is None) != (config.rank is None):
        raise UserError("--to lora and --rank go together: --to lora --rank 16")
    _check_free(config.out)
    run = RunDirectory.open(config.run)
    saved = loading.read_run_config(run)
    model = loading.load_run_model(saved)
    adapted, step = loading.load_checkpoint(run, saved, model, config.step)
    reporter = Reporter()
    with loading.user_errors():
        if config.to is not None:
            adapted, report = jlora.to_lora(adapted, config.rank)
            reporter.say(str(report))
        export_adapter(adapted, config.out, model.name, tasks.make(saved.data))
    reporter.say(f"step {step} of {config.run} written to {config.out}")
    return 0


def _check_free(path: Path) -> None:
    if path.exists():
        raise UserError(f"{path} exists already: choose another --out")
    check_writable(path)


def _held_out(
    source: loading.Source, task: tasks.Task, options: DataOptions, decoding: EvalOptions
) -> tuple[DataOptions, Any]:
    """What is held out, and the options with what the data and the model decide."""
    seed = source.config.train.seed if source.config else 0
    with loading.user_errors():
        options, _, examples = task.read(options, source.model.name, seed)
        options = task.resolve(options, source.model)
        return options, task.hold_out(examples, options, source.model, decoding)
