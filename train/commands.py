"""`jlora generate`, `evaluate`, `merge`, `inspect` and `convert`: what to do with a model once it is there."""

import dataclasses
from pathlib import Path

import jax

import jlora
from jlora.train import data, loading, models
from jlora.train.config import (
    ConvertConfig,
    DataOptions,
    EvaluateConfig,
    GenerateConfig,
    InspectConfig,
    MergeConfig,
    SourceOptions,
    UserError,
    resolve_length,
)
from jlora.train.finetune import complete, export_adapter
from jlora.train.generate import generate as generate_tokens
from jlora.train.loop import held_out_nll, make_eval_step
from jlora.train.metrics import corpus_bleu, perplexity
from jlora.train.report import Reporter, figures_line, one_line
from jlora.train.run import RunDirectory, write_directory


def generate(config: GenerateConfig) -> int:
    """Print each prompt with its completion."""
    source = loading.load_source(config.source)
    loading.need_text_model(source.model)
    prompts = list(config.prompt)
    if not prompts:
        options = _run_data(source) or DataOptions()
        held_out = _held_out(source, options, config.max_new_tokens, limit=3)
        prompts = held_out.prompts[:3]
    with loading.user_errors():
        tokens = generate_tokens(
            source.apply, source.params, [loading.prompt_ids(prompt, source.model) for prompt in prompts],
            config=source.model.config, max_new_tokens=config.max_new_tokens, temperature=config.temperature,
            top_p=config.top_p, key=jax.random.key(config.seed), eos_id=source.model.tokenizer.eos_id,
        )  # fmt: skip
    reporter = Reporter()
    for i, (prompt, row) in enumerate(zip(prompts, tokens, strict=True)):
        if i:
            reporter.say()
        reporter.say(f"prompt: {prompt}")
        reporter.say(f"output: {source.model.tokenizer.decode(row).strip()}")
    return 0


def evaluate(config: EvaluateConfig) -> int:
    """Print held-out loss, perplexity and BLEU."""
    for option, value in {"--batch-size": config.batch_size, "--limit": config.limit}.items():
        if value is not None and value < 1:
            raise UserError(f"{option} must be above 0, got {value}")
    source = loading.load_source(config.source)
    loading.need_text_model(source.model)
    options = None if config.data else _run_data(source)
    if options is None:
        options = DataOptions(
            data=config.data or "e2e",
            text_column=config.text_column,
            prompt_column=config.prompt_column,
            completion_column=config.completion_column,
        )
        if options.data not in ("e2e", "shakespeare"):  # all of a file that is named
            options = dataclasses.replace(options, eval_data=options.data)
    if config.max_length is not None:
        options = dataclasses.replace(options, max_length=config.max_length)
    held_out = _held_out(source, options, config.max_new_tokens, config.limit)
    adapted = source.adapted
    step = make_eval_step(source.apply, bind=adapted is not None)
    nll = held_out_nll(step, source.model.params if adapted is None else adapted, held_out.rows, config.batch_size)
    figures = {"eval_nll": nll, "perplexity": perplexity(nll)}
    if config.generate and held_out.references:
        texts = complete(
            source.apply, source.params, source.model, held_out.prompt_ids, max_new_tokens=config.max_new_tokens,
            batch_size=config.batch_size,
        )  # fmt: skip
        figures["bleu"], signature = corpus_bleu(texts, held_out.references)
    reporter = Reporter()
    reporter.say(f"{source.name} on {options.eval_data or options.data}, {len(held_out.rows)} rows")
    reporter.say(figures_line(figures))
    if "bleu" in figures:
        reporter.say(f"BLEU over {len(texts)} prompts, sacrebleu {signature}; the first:")
        reporter.say(f"prompt: {one_line(held_out.prompts[0])}")
        reporter.say(f"output: {one_line(texts[0])}")
    return 0


def merge(config: MergeConfig) -> int:
    """Write base plus adapter as a plain model directory."""
    _check_free(config.out)
    source = loading.load_source(config.source)
    with loading.user_errors():
        params = source.model.params if source.adapted is None else jlora.merge(source.adapted)
    with write_directory(config.out) as temporary:
        models.save_hf(source.model, params, temporary)
    Reporter().say(f"{source.name} written to {config.out}")
    return 0


def inspect(config: InspectConfig) -> int:
    """Print what a run or an adapter holds."""
    reporter, path = Reporter(), config.path
    if not path.is_dir():
        raise UserError(f"there is no directory {path}")
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
    else:
        source = loading.load_source(SourceOptions(adapter=path, model=config.model))
    reporter.say(jlora.summary(source.adapted))
    return 0


def convert(config: ConvertConfig) -> int:
    """Write a checkpoint as an adapter directory in PEFT format."""
    if (config.to is None) != (config.rank is None):
        raise UserError("--to lora and --rank go together: --to lora --rank 16")
    _check_free(config.out)
    run = RunDirectory.open(config.run)
    saved = loading.read_run_config(run)
    model = loading.load_model(saved.model.model, saved.model.bf16, quantize=saved.model.quantize)
    adapted, step = loading.load_checkpoint(run, saved, model, config.step)
    reporter = Reporter()
    with loading.user_errors():
        if config.to is not None:
            adapted, report = jlora.to_lora(adapted, config.rank)
            reporter.say(str(report))
        export_adapter(adapted, config.out, model.name)
    reporter.say(f"step {step} of {config.run} written to {config.out}")
    return 0


def _check_free(path: Path) -> None:
    if path.exists():
        raise UserError(f"{path} exists already: choose another --out")


def _run_data(source: loading.Source) -> DataOptions | None:
    return source.config.data if source.config else None


def _held_out(source: loading.Source, options: DataOptions, max_new_tokens: int, limit: int | None) -> loading.HeldOut:
    options = resolve_length(options, source.model.config.max_positions)
    seed = source.config.train.seed if source.config else 0
    with loading.user_errors():
        _, examples = data.load_examples(loading.data_spec(options, seed))
    return loading.prepare_held_out(examples, options, source.model, max_new_tokens, limit)
