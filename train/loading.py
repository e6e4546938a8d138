"""From options to objects: model, adapter and data, checked and ready, before anything is written."""

import contextlib
import dataclasses
import functools
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

import jlora
from jlora.adapt import plan
from jlora.io import load_peft
from jlora.methods import METHODS, Full, Method
from jlora.train import chat, data, distributed, models, ranks, starts
from jlora.train import mesh as meshes
from jlora.train.checkpoint import Checkpoints, fingerprint
from jlora.train.config import (
    DataOptions,
    FinetuneConfig,
    MethodOptions,
    SourceOptions,
    UserError,
    check_options,
    from_dict,
    literal_options,
)
from jlora.train.loop import TrainState
from jlora.train.optimizers import learning_rate_schedule, make_optimizer, projection_hint
from jlora.train.run import RunDirectory


@contextlib.contextmanager
def user_errors(context: str = "", hint: Callable[[str], str] = lambda message: ""):
    """Around calls whose ValueError or OSError is about what the user gave: bad shapes, missing files, bad data.

    ``hint(message)`` is added, with a blank at its beginning.
    """
    try:
        yield
    except (ValueError, OSError) as error:
        raise UserError(f"{context}{as_options(str(error))}{hint(str(error))}") from error


# What the library advises who calls it -> what does it here.
_ADVICE = {
    " (allow_unmatched=True permits it.)": "",
    "adjust=True": "--method-options adjust=True",
    "Use Full() to train leaves of floats": "Use --train-fully to train leaves of floats",
}


def as_options(message: str) -> str:
    """A message of the library, in the words of the command line."""
    for theirs, ours in _ADVICE.items():
        message = message.replace(theirs, ours)
    return message


_FORMATS = {"nf4": jlora.quant.NF4, "int8": jlora.quant.Int8}


def load_model(
    name: str,
    bf16: bool = False,
    remat: models.Remat = "none",
    quantize: str = "none",
    labels: Sequence[str] = (),
    seed: int = 0,
    mesh: Mesh | None = None,
) -> models.LoadedModel:
    """The model, with a head for `labels` if there are any; `seed` is of one that has to be drawn."""
    with distributed.together(), user_errors():
        model = models.load(
            name, dtype="bfloat16" if bf16 else "float32", remat=remat, labels=labels or None, seed=seed,
            mesh=mesh, specs=mesh and functools.partial(meshes.specs, mesh),
        )  # fmt: skip
    with user_errors():
        if quantize == "none":
            return model
        params = jlora.quant.quantize(model.params, _FORMATS[quantize], usage=usage_of(model))
        return dataclasses.replace(model, params=params)


def load_run_model(config: FinetuneConfig, mesh: Mesh | None = None) -> models.LoadedModel:
    """The base of a run, as the run had it, on the devices of a mesh."""
    options = config.model
    return load_model(
        options.model, options.bf16, options.remat, options.quantize, config.data.labels, config.train.seed, mesh
    )


def need_text_model(name: str, family: models.Family) -> None:
    """Refuse models that do not continue a text."""
    if not family.writes_text:
        able = ", ".join(sorted(name for name, family in models.FAMILIES.items() if family.writes_text))
        raise UserError(
            f"{name} is a {family.model_type} model, which does not continue a text: this command wants one of {able}. "
            "`jlora finetune --task` has other things to learn, such as classification"
        )


def usage_of(model: models.LoadedModel) -> dict[str, "jlora.LeafUsage"]:
    """How the model uses its weights, as `jlora.adapt` wants to be told. It is traced for it."""
    forward = lambda params, *inputs: model.module.apply({"params": params}, *inputs)
    return jlora.usage(forward, model.params, *(jnp.zeros(x.shape, x.dtype) for x in model.inputs))


def build_method(options: MethodOptions) -> Method:
    """The method that the options describe; an option the method does not have is an error."""
    if options.method not in METHODS:
        raise UserError(f"unknown method {options.method!r}: known are {', '.join(METHODS)}")
    cls = METHODS[options.method]
    given: dict[str, Any] = {name: getattr(options, name) for name in ("rank", "alpha", "dropout")}
    given = {name: value for name, value in given.items() if value is not None}
    if options.rslora:
        given["rslora"] = True
    given |= literal_options("--method-options", options.method_options)
    start = starts.make_start(options)
    if start is not None:
        given["start"] = start
    known = [field.name for field in dataclasses.fields(cls)]
    if "start" in given and "start" not in known:
        raise UserError(f"--init {options.init} is for lora, dora and their like; {options.method} has none")
    check_options(f"method {options.method!r}", given, known)
    try:
        return cls(**given)
    except (ValueError, TypeError) as error:
        raise UserError(as_options(str(error))) from error


def resolve_targets(
    options: MethodOptions, model: models.LoadedModel, train_fully: Sequence[str] = ()
) -> MethodOptions:
    """Fill in `targets`: those of the model's family, or everything when all is to be trained; and add what the task
    trains as it is."""
    targets = options.targets or (("**",) if options.method == "full" else model.family.targets)
    added = [] if options.method == "full" else [p for p in train_fully if p not in options.train_fully]
    return dataclasses.replace(options, targets=targets, train_fully=(*options.train_fully, *added))


def build_rules(options: MethodOptions) -> dict[str, Method]:
    """Pattern -> method, as `jlora.adapt` takes them; `options` have been resolved."""
    method = build_method(options)
    targets = options.targets or ("**" if options.method == "full" else "all-linear",)
    return {pattern: Full() for pattern in options.train_fully} | {pattern: method for pattern in targets}


_SIZE = re.compile(r"\b(rank|block_size|group_size|vector_length) (\d+)\b")


def what_fits(options: MethodOptions, model: models.LoadedModel, usage: Any, message: str) -> str:
    """The largest size that all leaves take, among powers of two and what ``message`` says of one leaf, where it is a
    size of the method that a leaf refuses; else nothing."""
    found = _SIZE.search(message)
    if found is None:
        return ""
    name, wanted = found[1], int(found[2])
    sizes = {2**i for i in range(1, 16)} | {int(size) for size in re.findall(r"at most (\d+)", message)}
    for size in sorted((size for size in sizes if size < wanted), reverse=True):
        given = f"{name}={size}"
        if name == "rank":
            fitting = dataclasses.replace(options, rank=size)
        else:
            others = (option for option in options.method_options if option.partition("=")[0] != name)
            fitting = dataclasses.replace(options, method_options=(*others, given))
        with contextlib.suppress(ValueError, UserError):
            plan(model.params, build_rules(fitting), usage=usage, exclude=model.family.statistics)
            return f" All leaves take --{'rank ' + str(size) if name == 'rank' else 'method-options ' + given}."
    return ""


def build_adapted(
    model: models.LoadedModel,
    options: MethodOptions,
    seed: int,
    start: Path | None = None,
    calibrate: Callable | None = None,
) -> "jlora.Adapted":
    """The model's parameters with the chosen method on the chosen leaves, at their initial values: those in the file
    ``start``, where there is one; else from what ``calibrate(rules, usage)`` finds, where they are from data."""
    rules = build_rules(options)
    with user_errors():
        usage = usage_of(model)
    with user_errors(hint=lambda message: what_fits(options, model, usage, message)):
        if start is not None and start.exists():
            adapted = starts.load(start, model, rules, usage, seed)
        else:
            stats = None if calibrate is None else calibrate(rules, usage)
            adapted = jlora.adapt(
                model.params, rules, key=jax.random.key(seed), stats=stats, usage=usage, exclude=model.family.statistics
            )
    # Full() may hand out the base's own buffers, and training donates what it trains.
    return adapted.replace(trainable=jax.tree.map(jnp.copy, adapted.trainable))


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """Rows to measure the loss on, and prompts to decode."""

    rows: data.Encoded
    prompts: list[str]
    prompt_ids: list[list[int]]
    references: list[list[str]] | None
    """All completions of each prompt; None for plain text, where a prompt is the beginning of a row."""


_PROMPT_TOKENS = 24  # of plain text, to be continued in the samples


def data_spec(options: DataOptions, seed: int) -> data.DataSpec:
    return data.DataSpec(
        path=options.data,
        text_column=options.text_column,
        prompt_column=options.prompt_column,
        completion_column=options.completion_column,
        eval_path=options.eval_data,
        eval_fraction=options.eval_fraction,
        seed=seed,
    )


def prepare_held_out(
    examples: list[data.Example],
    options: DataOptions,
    model: models.LoadedModel,
    max_new_tokens: int,
    limit: int | None,
) -> HeldOut:
    """Encode held-out examples, and choose what to decode: each distinct prompt, or beginnings of plain text."""
    tokenizer = model.tokenizer
    with user_errors():
        examples = render(examples, options, model)
        rows = data.encode(examples, tokenizer, options.max_length, options.packing)
    rows = dataclasses.replace(rows, **{name: values[:limit] for name, values in rows.fields.items()})
    room = model.config.max_positions - max_new_tokens
    references = {prompt: texts for prompt, texts in data.references(examples) if prompt}
    if references:
        found = decodable(examples, model, max_new_tokens, limit)
        prompts = [prompt for prompt, _ in found]
        return HeldOut(rows, prompts, [ids for _, ids in found], [references[prompt] for prompt in prompts])
    ids = [row[: min(_PROMPT_TOKENS, room)].tolist() for row in rows.ids]
    return HeldOut(rows, [tokenizer.decode(row) for row in ids], ids, None)


def decodable(
    examples: Sequence[Any], model: models.LoadedModel, max_new_tokens: int, limit: int | None = None
) -> list[tuple[str, list[int]]]:
    """Each distinct prompt of rendered examples, and its ids, without those that leave too little room to answer."""
    prompts = dict.fromkeys(e.prompt for e in examples if e.prompt)
    dialogues = {e.prompt for e in examples if isinstance(e, chat.Dialogue)}
    encode = lambda p: model.tokenizer.encode(p) if p in dialogues else prompt_ids(p, model)
    found = [(prompt, encode(prompt)) for prompt in list(prompts)[:limit]]
    return [(prompt, ids) for prompt, ids in found if len(ids) <= model.config.max_positions - max_new_tokens]


def render(examples: Sequence[Any], options: DataOptions, model: models.LoadedModel) -> Sequence[Any]:
    """Conversations, and with --chat-template auto prompts and completions, as the text of the model's template."""
    return chat.rendered(examples, model.tokenizer, model.name, pairs=options.chat_template == "auto")


def asked(prompts: Sequence[str], options: DataOptions, model: models.LoadedModel) -> list[list[int]]:
    """Token ids of prompts that somebody types: as they are, or with --chat-template auto as what a user says."""
    if options.chat_template == "none":
        return [prompt_ids(prompt, model) for prompt in prompts]
    template = chat.ChatTemplate(model.tokenizer, model.name)
    return [model.tokenizer.encode(template.prompt(prompt)) for prompt in prompts]


def prompt_ids(text: str, model: models.LoadedModel) -> list[int]:
    """A prompt as it stands at the beginning of an encoded row."""
    bos = model.tokenizer.bos_id
    return ([] if bos is None else [bos]) + model.tokenizer.encode(text)


def initial_state(config: FinetuneConfig, adapted: "jlora.Adapted", places: PyTree = None) -> TrainState:
    """Step 0, on the devices that `places` names. The key is apart from the one that initialized the adapter."""
    key, init = jax.random.fold_in(jax.random.key(config.train.seed), 1), run_optimizer(config).init
    schedule = run_ranks(config)
    begin = lambda adapted: (adapted.trainable, init(adapted.trainable))
    if schedule is not None:
        begin = lambda adapted: schedule.begin(adapted, init)
    with user_errors(hint=lambda message: projection_hint(config.optimizer, config.method.method, message)):
        if places is None:
            return TrainState(0, *begin(adapted), key)
        adapted = adapted.replace(trainable=distributed.place(adapted.trainable, places["trainable"]))
        there = places["trainable"], places["opt_state"]
        trainable, opt_state = jax.jit(begin, out_shardings=there)(adapted)
        key = distributed.place(jax.random.key_data(key), places["key"])
        return TrainState.from_arrays(0, {"trainable": trainable, "opt_state": opt_state, "key": key})


def run_optimizer(config: FinetuneConfig) -> optax.GradientTransformation:
    return make_optimizer(config.optimizer, learning_rate_schedule(config.optimizer, config.train.steps))


def run_ranks(config: FinetuneConfig) -> ranks.Schedule | None:
    return ranks.make(config.train, config.method.method)


def places(config: FinetuneConfig, adapted: "jlora.Adapted", mesh: Mesh | None) -> PyTree:
    """Where on a mesh the arrays of a run's state go: trainable parameters as their weights, the optimizer's state as
    these, and the key, and what a schedule of ranks holds, whole. None without a mesh."""
    if mesh is None:
        return None
    trainable = jlora.shard.specs(adapted).trainable
    opt_state = jlora.shard.of_state(run_optimizer(config), adapted.trainable, trainable)
    whole, schedule = NamedSharding(mesh, PartitionSpec()), run_ranks(config)
    if schedule is not None:
        _, shapes = jax.eval_shape(lambda: schedule.begin(adapted, run_optimizer(config).init))
        opt_state = jax.tree.map(lambda _: whole, shapes)._replace(optimizer=opt_state)
    return {"trainable": trainable, "opt_state": opt_state, "key": whole}


def abstract_arrays(config: FinetuneConfig, adapted: "jlora.Adapted", places: PyTree = None) -> PyTree:
    """Shapes, dtypes and places of what a checkpoint of this run holds."""
    shapes = jax.eval_shape(lambda: initial_state(config, adapted).arrays())
    if places is None:
        return shapes
    put = lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)
    return jax.tree.map(put, shapes, places)


def base_identity(adapted: "jlora.Adapted") -> dict[str, Any]:
    return {"base model": fingerprint(adapted.base)}


def read_run_config(run: RunDirectory) -> FinetuneConfig:
    """The resolved configuration a run was started with."""
    return from_dict(FinetuneConfig, run.read_config()["options"])


@dataclasses.dataclass
class Source:
    """A model to use: parameters, plain or adapted, and the function to apply them."""

    model: models.LoadedModel
    adapted: "jlora.Adapted | None"
    apply: Callable
    name: str
    config: FinetuneConfig | None = None

    @property
    def params(self) -> PyTree:
        return self.model.params if self.adapted is None else self.adapted.bind()


def load_source(options: SourceOptions, labels: Sequence[str] = ()) -> Source:
    """The model that `--run`, `--model` and `--adapter` name; with a head for `labels` where no run knows better."""
    config = run = None
    adapter = options.adapter
    if options.run is not None:
        run = RunDirectory.open(options.run)
        config = read_run_config(run)
        if adapter is None and run.adapter.is_dir():
            adapter = run.adapter
    name = options.model or (config.model.model if config else base_name(options))
    model = load_model(
        name,
        options.bf16 or bool(config and config.model.bf16),
        quantize=config.model.quantize if config else "none",
        labels=config.data.labels if config else labels,
        seed=config.train.seed if config else 0,
    )
    if adapter is not None:
        with user_errors():
            adapted = load_peft(adapter, model.params, usage=usage_of(model))
        return Source(model, adapted, jlora.lift(model.module.apply), f"{model.name} with {adapter}", config)
    if run is not None:
        adapted, step = load_checkpoint(run, config, model)
        name = f"{model.name} with step {step} of {run.path}"
        return Source(model, adapted, jlora.lift(model.module.apply), name, config)
    return Source(model, None, model.module.apply, model.name)


def base_name(options: SourceOptions) -> str:
    """The model that options without a run name."""
    return options.model or (models.BUNDLED if options.adapter is None else _base_of_adapter(options.adapter))


def _base_of_adapter(adapter: Path) -> str:
    path = adapter / "adapter_config.json"
    if not adapter.is_dir():
        raise UserError(f"there is no directory {adapter}")
    if not path.is_file():
        raise UserError(f"{adapter} is not an adapter directory: it has no adapter_config.json")
    with user_errors(f"{adapter} is not an adapter directory: "):
        name = json.loads(path.read_text(encoding="utf-8")).get("base_model_name_or_path")
    if not name:
        raise UserError(f"{path} does not name its base model: add --model")
    return name


def load_checkpoint(
    run: RunDirectory, config: FinetuneConfig, model: models.LoadedModel, step: str = "latest"
) -> tuple["jlora.Adapted", int]:
    """The adapter of a run as of a checkpoint: "latest", "best" or a step number."""
    adapted = build_adapted(model, config.method, config.train.seed, run.start)
    if not run.checkpoints.is_dir():
        raise UserError(f"{run.path} has no checkpoints yet")
    checkpoints = Checkpoints(run.checkpoints, keep=config.run.keep, identity=base_identity(adapted), read_only=True)
    try:
        number = None if step == "latest" else checkpoints.best_step() if step == "best" else step
        if step != "latest" and str(number) not in map(str, checkpoints.steps()):
            steps = ", ".join(map(str, checkpoints.steps())) or "none"
            raise UserError(f"{run.path} has no checkpoint {step!r}: there are {steps}")
        restored = checkpoints.restore(abstract_arrays(config, adapted), None if number is None else int(number))
    finally:
        checkpoints.close()
    if restored is None:
        raise UserError(f"{run.path} has no checkpoints yet")
    return TrainState.from_arrays(restored.step, restored.state).adapted(adapted), restored.step
