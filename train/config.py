"""The options of every command as typed dataclasses: the command line, `config.json` and the code read the same fields.

`None` means "decided by the model, the data or the method". What was decided is put in its place before anything is
written, so that a run's `config.json` shows every value that was used.
"""

import ast
import dataclasses
import math
import types
import typing
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro


class UserError(Exception):
    """Something the user can put right: shown on stderr without a traceback, exit code 2."""


class RunError(Exception):
    """A run that had to stop (disk full, loss not finite): shown on stderr without a traceback, exit code 1."""


def _optional(metavar: str):
    """An option that may stay undecided: `--rank INT` in the help, its docstring says what then happens."""
    return tyro.conf.arg(metavar=metavar, help_behavior_hint="")


def _list(metavar: str):
    """An argument of any number of values: `[RUN ...]` in the help."""
    return tyro.conf.arg(metavar=f"[{metavar} ...]", help_behavior_hint="")


OptionalInt = Annotated[int | None, _optional("INT")]
OptionalFloat = Annotated[float | None, _optional("FLOAT")]
OptionalStr = Annotated[str | None, _optional("STR")]
OptionalPath = Annotated[Path | None, _optional("PATH")]
Globs = Annotated[tuple[str, ...], tyro.conf.arg(metavar="GLOB ...", help_behavior_hint="")]
NamedValues = Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME=VALUE ...", help_behavior_hint="")]


Metrics = Annotated[
    tuple[Literal["bleu", "rouge", "exact-match"], ...],
    tyro.conf.arg(metavar="{bleu,rouge,exact-match} ...", help_behavior_hint="(default: bleu)"),
]


@dataclasses.dataclass(frozen=True)
class ModelOptions:
    """the frozen base"""

    model: str = "stories260k"
    """`stories260k` (shipped), a directory in Hugging Face layout (config.json, *.safetensors, tokenizer.json), a .gguf
    file, or a name that `jlora models` lists."""
    bf16: bool = False
    """Hold the base and the activations in bfloat16; adapters and optimizer state stay float32."""
    remat: Literal["none", "products", "layers"] = "none"
    """What the backward pass computes again to hold less: all but the products with weights, which costs little, or all
    of each layer, which costs about a third more time."""
    quantize: Literal["none", "nf4", "int8"] = "none"
    """Hold the base's linear layers in about 4 (QLoRA) or 8 bits a weight; what is trained stays as it is."""
    offload: bool = False
    """Hold the adapted weights in the host's memory, from where those of a layer come to the device when they are used:
    less memory, more time."""


@dataclasses.dataclass(frozen=True)
class DataOptions:
    """what to train on and what to hold out"""

    task: Literal["causal-lm", "dpo", "classification", "regression", "masked-lm", "image-classification"] = "causal-lm"
    """What to learn: text, or which of two texts is preferred (dpo), by decoders; classes or numbers of texts and pairs
    of them, or masked tokens, by BERT and RoBERTa; classes of images by ViT and ResNet."""
    data: str = "e2e"
    """`e2e` or `shakespeare` (shipped), or a .txt, .jsonl, .csv or .tsv file, which may be gzipped (.gz); for images a
    directory with a folder for each class, or an .npz file with `images` and `labels`."""
    eval_data: OptionalStr = None
    """A file to hold out (default: the shipped split, or `--eval-fraction` of `--data`)."""
    eval_fraction: float = 0.1
    """Share of a file that is held out when there is no `--eval-data`."""
    text_column: str = "text"
    """Column with plain text; every token is trained on."""
    prompt_column: str = "prompt"
    """Column with the prompt; its tokens are read but not trained on."""
    completion_column: str = "completion"
    """Column with the completion of the prompt."""
    chosen_column: str = "chosen"
    """Column with the completion that dpo is to prefer: a text, or messages that end with it."""
    rejected_column: str = "rejected"
    """Column with the other one."""
    label_column: str = "label"
    """Column with the class or the number of a text."""
    pair_column: OptionalStr = None
    """Column with a second text, to classify pairs (default: there is none)."""
    labels: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME ...", help_behavior_hint="")] = ()
    """Names of the classes in the order of their numbers (default: the labels of the training data, sorted)."""
    mask_fraction: float = 0.15
    """Share of the tokens that masked-lm has to tell."""
    dpo_beta: float = 0.1
    """Rewards of dpo are this times how much likelier a text has become; higher values stay nearer to the base."""
    label_smoothing: float = 0.0
    """Share of the preferences that dpo takes to be the wrong way round."""
    reference_free: bool = False
    """Compare likelihoods themselves in dpo, not with those of the base."""
    max_length: OptionalInt = None
    """Tokens per row; longer examples are cut (default: e2e 192, shakespeare 128, files 512 or the model's limit; 128
    for tasks of encoders)."""
    packing: bool = False
    """Put several short examples in one row; attention does not cross from one to the next."""
    loss_chunk: int = 0
    """Hold the logits of so many positions of each row at a time, and form them again in the backward pass: for large
    vocabularies much less memory (0: of all)."""
    chat_template: Literal["none", "auto"] = "none"
    """`auto`: prompts and completions go through the model's chat template, as turns of a user and of the model. The
    conversations of a .jsonl file with `messages` always do; of them the model's turns are trained on."""


@dataclasses.dataclass(frozen=True)
class MethodOptions:
    """which adapter goes where; an option left out takes the method's own default"""

    method: str = "lora"
    """`lora`, `dora`, `vera`, ... (a wrong name lists all), or `full`: train the weights themselves."""
    targets: Globs = ()
    """Globs over `/`-joined parameter paths, e.g. "**/q_proj/kernel" (default: all-linear, without the gates of
    experts; for `full`, every leaf)."""
    rank: OptionalInt = None
    """Rank of the update; a higher one can fit more and trains more parameters (default: lora, dora 8, vera 256)."""
    alpha: OptionalFloat = None
    """The update is scaled by alpha / rank (default: lora and dora 16)."""
    dropout: OptionalFloat = None
    """Probability of dropping an input of the adapter while training (default: 0)."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) instead, which keeps high ranks learning."""
    method_options: NamedValues = ()
    """Further options of the method, for example `d_initial=0.1` of vera."""
    init: str = "default"
    """Where lora and dora start: `pissa`, `milora`, `olora`, `orthogonal`, or from data `eva`, `corda`, `lora_ga`;
    lora_xs: `lora_sb`; what shira trains: `magnitude_mask`, or from data `gradient_mask`, `snip_mask` (default: at
    random and zero)."""
    init_options: NamedValues = ()
    """Further options of `--init`, for example `iterations=4` of pissa."""
    calibration_batches: int = 32
    """Training batches that an `--init` from data looks at."""
    train_fully: Globs = ()
    """Leaves to train as they are beside the adapters, for example "**/norm/scale"."""


@dataclasses.dataclass(frozen=True)
class OptimizerOptions:
    """the optimizer, and its learning rate over time"""

    optimizer: Literal[
        "adamw", "adafactor", "lion", "sgd", "adagrad_norm",
        "lora_plus", "lora_pro", "lora_pro_full", "altlora", "altlora_plus", "allora_approx", "scaled_gd",
        "scaled_adam", "lora_rite", "lora_fa", "ffa", "galore", "fira", "apollo", "dct", "trion",
        "owlore", "lisa",
    ] = "adamw"  # fmt: skip
    """One of optax, one of jlora.optim for pairs of factors, or (`galore` and after) for large matrices, as
    `--method full` trains; `owlore` and `lisa` move some layers at a time."""
    optimizer_options: NamedValues = ()
    """Further options of the optimizer, for example `rank=64 period=100` of galore."""
    state_bits: Literal[32, 8] = 32
    """8 holds the moments of AdamW in 8 bits, also where another optimizer is around it."""
    learning_rate: OptionalFloat = None
    """Peak learning rate (default: 1e-2 for the shipped model, 2e-4 for others; a tenth of that for `full` and for
    dpo)."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Course of the learning rate after the warm-up."""
    warmup_steps: OptionalInt = None
    """Steps over which the rate rises from 0 (default: an eighth of the steps, at most 50)."""
    final_fraction: float = 0.05
    """Where cosine and linear end, as a share of the peak."""
    weight_decay: float = 0.0
    """Decoupled weight decay; plain of adafactor; none of sgd, adagrad_norm and scaled_gd."""
    beta1: float = 0.9
    """First-moment decay; momentum of sgd (0: none)."""
    beta2: float = 0.999
    """Second-moment decay."""
    clip_norm: float = 1.0
    """Largest global norm of the gradient; 0 turns clipping off."""


@dataclasses.dataclass(frozen=True)
class TrainOptions:
    """how long, in what portions, from which seed"""

    steps: OptionalInt = None
    """Optimizer steps (default: e2e 800, shakespeare 300, files 400)."""
    epochs: OptionalInt = None
    """Passes over the training data, instead of `--steps`."""
    batch_size: int = 8
    """Rows per forward and backward pass."""
    accumulation: int = 1
    """Passes per optimizer step; the loss is the token mean over all of them."""
    seed: int = 0
    """Seed of the adapters' initial values, of the order of the data and of dropout."""
    rank_schedule: Literal["none", "adalora", "increlora", "triadapt", "diffora", "squeeze"] = "none"
    """Ranks that change while training, as the matrices need them: of adalora adapters they fall to a budget
    (`adalora`), grow to one (`increlora`), or go to some matrices (`diffora`); of triadapt_lora they grow (`triadapt`),
    of lora they fall in stages (`squeeze`)."""
    rank_schedule_options: NamedValues = ()
    """Further options of `--rank-schedule`, for example `target_rank=4 every=10` of adalora."""


@dataclasses.dataclass(frozen=True)
class EvalOptions:
    """what is measured on the held-out data"""

    eval_every: int = 50
    """Steps between held-out losses; 0: only before and after."""
    eval_batch_size: int = 32
    """Rows per held-out forward pass, and prompts decoded at a time."""
    eval_limit: OptionalInt = None
    """Use only the first N held-out rows and prompts (default: all)."""
    generate: bool = True
    """Decode the held-out prompts before and after: `--metrics` when there are references, and the samples shown."""
    metrics: Metrics = ("bleu",)
    """What decoded texts are compared with their references by; exact-match: the answer after "####", as in GSM8K, or
    the whole text where the references have no such mark."""
    max_new_tokens: int = 128
    """Longest completion in tokens."""
    samples: int = 3
    """Held-out prompts shown with the text before and after."""


@dataclasses.dataclass(frozen=True)
class RunOptions:
    """where the results go, and how often the state is saved"""

    out: OptionalPath = None
    """Run directory (default: runs/<model>-<data>-<method>-<time>)."""
    mesh: OptionalStr = None
    """Devices to run on, all that there are: sizes of the axes data, fsdp, model, expert, e.g. `data=2,model=4`, or
    `none` for one device; with `--resume`, others than before (default: none, or with `--distributed` all devices as
    `data`; of a resumed run, its own)."""
    distributed: str = "none"
    """Run as one of several processes that share a run: `auto` on TPU pods, Slurm, Open MPI, or as the variables
    JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID say; or HOST:PORT,PROCESSES,INDEX, with the host of
    process 0. All processes are given the same command but for INDEX."""
    distributed_timeout: int = 100
    """Seconds after which a process that does not come, or gives no sign of life, is given up."""
    overwrite: bool = False
    """Replace an earlier run in `--out`; without it an existing directory is an error."""
    resume: OptionalPath = None
    """Continue the run in this directory, with its own configuration, from its newest checkpoint."""
    dry_run: bool = False
    """Check everything, print the plan (what is adapted, steps, memory) and stop; nothing is written."""
    checkpoint_every: int = 100
    """Steps between checkpoints; 0: only at the end and on interruption."""
    keep: int = 2
    """Newest checkpoints kept, beside the one with the lowest held-out loss."""
    log_every: int = 10
    """Steps per line of metrics.jsonl, and per printed line where there is no terminal."""


@dataclasses.dataclass(frozen=True)
class FinetuneConfig:
    """Fine-tune a model with a low-rank adapter, and show that it got better.

    Without options: stories260k (260,032 parameters, shipped) learns to say restaurant attributes in a sentence (E2E
    NLG, shipped) through LoRA of rank 8 on all linear layers; 800 steps, a few minutes on two CPU cores.
    """

    model: ModelOptions = ModelOptions()
    data: DataOptions = DataOptions()
    method: MethodOptions = MethodOptions()
    optimizer: OptimizerOptions = OptimizerOptions()
    train: TrainOptions = TrainOptions()
    eval: EvalOptions = EvalOptions()
    run: RunOptions = RunOptions()


@dataclasses.dataclass(frozen=True)
class SourceOptions:
    """the model: a run (its base and its adapter), or a base with or without an adapter"""

    run: OptionalPath = None
    """Run directory of `jlora finetune`; brings the base, the adapter and the data options."""
    model: OptionalStr = None
    """Base model as in `jlora finetune` (default: the run's, the adapter's own, else stories260k)."""
    adapter: OptionalPath = None
    """Adapter directory in PEFT format (default: the run's, if there is a run)."""
    bf16: bool = False
    """Hold the base and the activations in bfloat16."""


@dataclasses.dataclass(frozen=True)
class GenerateConfig:
    """Complete prompts with a model, adapted or not."""

    prompt: Annotated[tuple[str, ...], tyro.conf.arg(aliases=["-p"], metavar="TEXT ...", help_behavior_hint="")] = ()
    """Texts to complete (default: three held-out prompts of the run's data)."""
    max_new_tokens: int = 128
    """Longest completion in tokens."""
    temperature: float = 0.0
    """0 takes the likeliest token; a higher value draws more freely."""
    top_p: float = 1.0
    """Draw only from the likeliest tokens that together hold this share of the probability."""
    chat_template: Annotated[Literal["none", "auto"] | None, _optional("none|auto")] = None
    """`auto`: prompts are what a user says, in the model's chat template (default: the run's, else none)."""
    seed: int = 0
    """Seed of the drawing."""
    source: SourceOptions = SourceOptions()


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """Measure what `jlora finetune` measures on held-out data: loss, perplexity, BLEU, accuracy, ..."""

    data: OptionalStr = None
    """Data to evaluate on as a whole, `e2e` or `shakespeare` (default: the run's held-out data, else e2e)."""
    task: Annotated[str | None, _optional("TASK")] = None
    """As in `jlora finetune` (default: the run's, else causal-lm)."""
    text_column: OptionalStr = None
    """Column with plain text (default: the run's, else `text`)."""
    prompt_column: OptionalStr = None
    """Column with the prompt (default: the run's, else `prompt`)."""
    completion_column: OptionalStr = None
    """Column with the completion of the prompt (default: the run's, else `completion`)."""
    label_column: OptionalStr = None
    """Column with the class or the number of a text (default: the run's, else `label`)."""
    pair_column: OptionalStr = None
    """Column with a second text (default: the run's)."""
    labels: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME ...", help_behavior_hint="")] = ()
    """Names of the classes in the order of their numbers (default: the run's, or the checkpoint's)."""
    max_length: OptionalInt = None
    """Tokens per row (default: as in `jlora finetune`)."""
    batch_size: int = 32
    """Rows per forward pass, and prompts decoded at a time."""
    limit: OptionalInt = None
    """Use only the first N rows and prompts (default: all)."""
    generate: bool = True
    """Decode the prompts for `--metrics`."""
    metrics: Metrics = ("bleu",)
    """As in `jlora finetune`."""
    chat_template: Annotated[Literal["none", "auto"] | None, _optional("none|auto")] = None
    """As in `jlora finetune` (default: the run's, else none)."""
    max_new_tokens: int = 128
    """Longest completion in tokens."""
    source: SourceOptions = SourceOptions()


@dataclasses.dataclass(frozen=True)
class MergeConfig:
    """Add an adapter into its base and write a plain model directory in Hugging Face layout.

    With `--model` alone, the base as it is.
    """

    out: Path
    """Directory to write; it must not exist."""
    source: SourceOptions = SourceOptions()


@dataclasses.dataclass(frozen=True)
class InspectConfig:
    """Show what is in a run directory or an adapter directory: results, paths, shapes, ranks, counts."""

    path: tyro.conf.Positional[Path]
    """Run directory, or adapter directory in PEFT format."""
    model: OptionalStr = None
    """Base model of the adapter (default: the one the run or the adapter names)."""
    spectra: bool = False
    """How large the change of every weight is, and of how many directions."""
    intruders: int = 0
    """Look for so many of the strongest directions after training among those before it, and count the ones that are
    new; 10 as a rule. Decomposes every adapted weight. Implies `--spectra`."""
    plot: OptionalPath = None
    """A PNG file to draw sizes, spectra and ranks of the changes to. Implies `--spectra`."""


@dataclasses.dataclass(frozen=True)
class ConvertConfig:
    """Write a checkpoint of a run as an adapter directory in PEFT format."""

    run: tyro.conf.Positional[Path]
    """Run directory of `jlora finetune`."""
    out: Path
    """Directory to write; it must not exist."""
    step: str = "latest"
    """Which checkpoint: `latest`, `best` (lowest held-out loss) or a step number."""
    to: Annotated[Literal["lora"] | None, _optional("lora")] = None
    """`lora`: as a plain LoRA, which engines serve that know no other method (default: the run's own method)."""
    rank: Annotated[int | float | None, _optional("INT|SHARE")] = None
    """Largest rank of `--to lora`, or the share of each matrix's change to keep, for example 0.95."""


@dataclasses.dataclass(frozen=True)
class MethodsConfig:
    """List the methods: what they are, what they train on a model, whether they merge, what PEFT calls them."""

    names: Annotated[tuple[str, ...], tyro.conf.Positional, _list("METHOD")] = ()
    """Methods to tell all about: paper, formula, cost, options (default: a table of all methods)."""
    model: str = "stories260k"
    """Model to count trainable parameters on; of a directory, config.json is enough."""
    rank: OptionalInt = None
    """Rank of the methods that have one (default: each method's own)."""
    targets: Globs = ()
    """Leaves to count on, as in `jlora finetune` (default: those of the model's family)."""


@dataclasses.dataclass(frozen=True)
class ModelsConfig:
    """List the families of models that can be read, and the weights that are here."""


@dataclasses.dataclass(frozen=True)
class TargetsConfig:
    """Show every leaf of a model: its shape, how the model uses it, and which pattern catches it."""

    model: tyro.conf.Positional[str] = "stories260k"
    """Model as in `jlora finetune`; of a directory, config.json is enough."""
    method: MethodOptions = MethodOptions()


@dataclasses.dataclass(frozen=True)
class CompareConfig:
    """Compare runs: a table of the options that differ and of what came out, and a figure of the losses."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, _list("RUN")]
    """Run directories of `jlora finetune`, finished or not."""
    out: Path = Path("compare.png")
    """The figure."""
    overwrite: bool = False
    """Replace the file `--out`."""


def validate(config: FinetuneConfig) -> None:
    """Refuse values that cannot work before anything is loaded; what needs the model is checked when it is there."""
    check_finite(config)
    check_metrics(config.eval.metrics)
    positive = {
        "--steps": config.train.steps, "--epochs": config.train.epochs, "--batch-size": config.train.batch_size,
        "--accumulation": config.train.accumulation, "--learning-rate": config.optimizer.learning_rate,
        "--max-length": config.data.max_length, "--eval-batch-size": config.eval.eval_batch_size,
        "--eval-limit": config.eval.eval_limit, "--max-new-tokens": config.eval.max_new_tokens,
        "--keep": config.run.keep, "--log-every": config.run.log_every,
        "--distributed-timeout": config.run.distributed_timeout,
        "--calibration-batches": config.method.calibration_batches,
    }  # fmt: skip
    for option, value in positive.items():
        if value is not None and value <= 0:
            raise UserError(f"{option} must be above 0, got {value}")
    not_negative = {
        "--warmup-steps": config.optimizer.warmup_steps, "--weight-decay": config.optimizer.weight_decay,
        "--clip-norm": config.optimizer.clip_norm, "--eval-every": config.eval.eval_every,
        "--checkpoint-every": config.run.checkpoint_every, "--samples": config.eval.samples,
        "--seed": config.train.seed, "--loss-chunk": config.data.loss_chunk,
    }  # fmt: skip
    for option, value in not_negative.items():
        if value is not None and value < 0:
            raise UserError(f"{option} must be 0 or above, got {value}")
    fractions = {"--final-fraction": config.optimizer.final_fraction, "--beta1": config.optimizer.beta1,
                 "--beta2": config.optimizer.beta2}  # fmt: skip
    for option, value in fractions.items():
        if not 0 <= value <= 1:
            raise UserError(f"{option} must lie between 0 and 1, got {value}")
    if not 0 < config.data.eval_fraction < 1:
        raise UserError(f"--eval-fraction must lie between 0 and 1, got {config.data.eval_fraction}")
    if not 0 < config.data.mask_fraction < 1:
        raise UserError(f"--mask-fraction must lie between 0 and 1, got {config.data.mask_fraction}")
    if config.data.dpo_beta <= 0:
        raise UserError(f"--dpo-beta must be above 0, got {config.data.dpo_beta}")
    if not 0 <= config.data.label_smoothing < 0.5:
        raise UserError(f"--label-smoothing must lie between 0 and 0.5, got {config.data.label_smoothing}")
    if config.train.steps is not None and config.train.epochs is not None:
        raise UserError("give --steps or --epochs, not both")


def check_finite(config: Any) -> None:
    """Refuse nan and inf, which no option has a use for, and which pass for numbers in every comparison."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            check_finite(value)
        elif isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"--{field.name.replace('_', '-')} must be a finite number, got {value}")


def check_metrics(metrics: Sequence[str]) -> None:
    """Refuse an empty list."""
    if not metrics:
        raise UserError("--metrics names none: name one or more, or leave decoding out with --no-generate")


def resolve_length(data: DataOptions, limit: int, usual: int | None = None) -> DataOptions:
    """Fill in `max_length`; `limit` is the longest sequence the model was made for, `usual` the task's own choice."""
    if data.max_length is None:
        length = min(usual or {"e2e": 192, "shakespeare": 128}.get(data.data, 512), limit)
    elif data.max_length > limit:
        raise UserError(f"--max-length {data.max_length} exceeds the {limit} positions of the model")
    else:
        length = data.max_length
    return dataclasses.replace(data, max_length=length)


_STEPS = {"e2e": 800, "shakespeare": 300}
_SHIPPED_RATE, _RATE = 1e-2, 2e-4  # small models take large steps


def resolve_rate(config: FinetuneConfig, usual: float | None = None, share: float = 1.0) -> FinetuneConfig:
    """Fill in the learning rate; `usual` is the task's own, `share` that of the model's which the task takes."""
    if config.optimizer.learning_rate is not None:
        return config
    rate = usual or share * (_SHIPPED_RATE if config.model.model == ModelOptions.model else _RATE)
    rate = rate / 10 if config.method.method == "full" else rate
    return dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, learning_rate=rate))


def resolve_steps(config: FinetuneConfig, rows: int) -> FinetuneConfig:
    """Fill in the number of steps and of warm-up steps, given the rows of encoded training data."""
    train, optimizer = config.train, config.optimizer
    rows_per_step = train.batch_size * train.accumulation
    if rows < rows_per_step:
        raise UserError(
            f"a step takes --batch-size {train.batch_size} x --accumulation {train.accumulation} rows, "
            f"the training data has {rows}: lower them"
        )
    if train.epochs is not None:
        steps = train.epochs * (rows // rows_per_step)
    else:
        steps = train.steps or _STEPS.get(config.data.data, 400)
    warmup = min(50, steps // 8) if optimizer.warmup_steps is None else optimizer.warmup_steps
    if warmup >= steps:
        raise UserError(f"--warmup-steps {warmup} leaves none of the {steps} steps: lower it")
    return dataclasses.replace(
        config,
        train=dataclasses.replace(train, steps=steps),
        optimizer=dataclasses.replace(optimizer, warmup_steps=warmup),
    )


def literal_options(flag: str, options: tuple[str, ...]) -> dict[str, Any]:
    """``NAME=VALUE`` pairs, the values as Python reads them; what it cannot read is a string."""
    values: dict[str, Any] = {}
    for option in options:
        name, equals, value = option.partition("=")
        if not equals:
            raise UserError(f"{flag} wants NAME=VALUE, got {option!r}")
        try:
            values[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            values[name] = value
    return values


def check_options(owner: str, given: Iterable[str], known: Sequence[str], flag: str = "") -> None:
    """Refuse names of options that their owner does not have."""
    for name in given:
        if name not in known:
            of = f" for {flag}" if flag else ""
            raise UserError(f"{owner} has no option {name!r}{of}: it has {', '.join(known) or 'none'}")


def to_dict(config: Any) -> Any:
    """A configuration as JSON values."""
    if dataclasses.is_dataclass(config):
        return {field.name: to_dict(getattr(config, field.name)) for field in dataclasses.fields(config)}
    return str(config) if isinstance(config, Path) else config


def from_dict(cls: type, values: dict[str, Any]) -> Any:
    """The inverse of `to_dict`; names it does not know are an error, missing ones take their default."""
    hints = typing.get_type_hints(cls)
    unknown = sorted(set(values) - set(hints))
    if unknown:
        raise UserError(f"unknown {cls.__name__} fields in the saved configuration: {', '.join(unknown)}")
    return cls(**{name: _from_json(hints[name], value) for name, value in values.items()})


def _from_json(hint: Any, value: Any) -> Any:
    if dataclasses.is_dataclass(hint):
        return from_dict(hint, value)
    if isinstance(value, list):
        return tuple(value)
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return Path(value) if Path in options and value is not None else value
