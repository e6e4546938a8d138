"""What a model is trained for. A task says how records become batches, what the loss is, and what is measured.

    read -> (the model is loaded) -> encode, hold_out -> loss in every step, evaluate between steps, complete at the end

The commands, the loop and the report ask the task; a new one is a class here and a row in `TASKS`.
"""

import abc
import dataclasses
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, PyTree

from jlora.train import data as streams
from jlora.train import distributed
from jlora.train import mesh as meshes
from jlora.train.call import Call
from jlora.train.config import DataOptions, EvalOptions, UserError, resolve_length
from jlora.train.models import FAMILIES, Family, LoadedModel, hf

Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Rows:
    """N examples as arrays [N, ...] by name. "mask" [N, ...] is 0 where nothing is scored, as in rows that fill up a
    batch. An array may be anything with a length that numpy indices select from."""

    fields: Mapping[str, Any]
    truncated: int = 0
    """Examples that were cut because they exceed the length."""
    dropped: int = 0
    """Examples left out because nothing of them could be learnt."""
    lengths: Any = None
    """Tokens [N] of each row, where they differ: batches are made of rows of similar length."""

    def __len__(self) -> int:
        return len(self.fields["mask"])

    def take(self, rows: Any) -> "Rows":
        """The chosen rows, in that order."""
        lengths = None if self.lengths is None else self.lengths[rows]
        fields = {name: field[rows] for name, field in self.fields.items()}
        return dataclasses.replace(self, fields=fields, lengths=lengths)


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """Rows to measure on. `prompts` is how each of them is shown, `labels` what is wanted of it (None: nothing is)."""

    rows: Rows
    prompts: list[str]
    labels: list[str] | None = None
    names: tuple[str, ...] = ()
    """Of the classes."""
    references: None = None


@dataclasses.dataclass(frozen=True)
class Measured:
    """Figures by their names in results.json, and the model's answer to each prompt, where there are any."""

    figures: dict[str, Any]
    answers: list[str] = dataclasses.field(default_factory=list)


_LABELLED = ("classification", "regression", "image-classification")
_OPTIONS: dict[str, tuple[str, ...]] = {
    "packing": ("causal-lm",),
    "loss_chunk": ("causal-lm",),
    "chat_template": ("causal-lm", "dpo"),
    "pair_column": ("classification", "regression"),
    "labels": _LABELLED,
    "label_column": _LABELLED,
    "mask_fraction": ("masked-lm",),
    "max_length": ("causal-lm", "classification", "regression", "masked-lm", "dpo"),
    "chosen_column": ("dpo",),
    "rejected_column": ("dpo",),
    "dpo_beta": ("dpo",),
    "label_smoothing": ("dpo",),
    "reference_free": ("dpo",),
}
"""Options that only some tasks read."""


class Task(abc.ABC):
    """Everything that depends on what is learnt."""

    name: ClassVar[str]
    loss_key: ClassVar[str] = "eval_loss"
    """Name of the held-out loss in metrics.jsonl and results.json."""
    loss_unit: ClassVar[str] = "nats per example"
    unit: ClassVar[str] = "tokens"
    """What speed is counted in."""
    learning_rate: ClassVar[float | None] = None
    """Peak learning rate where none is given; None: that of the model."""
    rate_share: ClassVar[float] = 1.0
    """What of the model's it takes."""
    max_length: ClassVar[int | None] = 128
    """Tokens of a row where none are given; None: as the data want it."""
    peft_type: ClassVar[str | None] = None
    """`task_type` in PEFT's files."""
    auto_class: ClassVar[str]
    """The automatic class of transformers that reads the base."""
    inputs: ClassVar[str] = "ids"
    """What the model is called with, by a name."""
    mesh: Mesh | None = None
    """The devices of a run, where there are several."""

    def __init__(self, data: DataOptions):
        defaults = DataOptions()
        for option, tasks in _OPTIONS.items():
            if getattr(data, option) != getattr(defaults, option) and self.name not in tasks:
                flag = "--" + option.replace("_", "-")
                raise UserError(f"{flag} is for --task {' or '.join(tasks)}, and has no part in {self.name}")

    @abc.abstractmethod
    def check(self, name: str, family: Family) -> None:
        """Refuse models that are not made for this."""

    def known_labels(self, data: DataOptions, model: str) -> DataOptions:
        """The options with the labels that an evaluation needs and that nobody may guess from its data."""
        return data

    @abc.abstractmethod
    def read(self, data: DataOptions, model: str, seed: int) -> tuple[DataOptions, Sequence[Any], Sequence[Any]]:
        """Records to train on and held-out ones, and the options with what they decide: the names of the classes."""

    def attach(self, model: LoadedModel) -> None:  # noqa: B027
        """Keep what later steps need of the model, which may turn out not to do."""

    def resolve(self, data: DataOptions, model: LoadedModel) -> DataOptions:
        """Fill in the length of rows."""
        return resolve_length(data, model.config.max_positions, self.max_length)

    def train_fully(self, model: LoadedModel) -> tuple[str, ...]:
        """Patterns of leaves to train as they are beside the adapters: a new head."""
        return ()

    @abc.abstractmethod
    def encode(self, examples: Sequence[Any], data: DataOptions, model: LoadedModel) -> Any:
        """Rows of records, for `jlora.train.data.batches`."""

    @abc.abstractmethod
    def hold_out(self, examples: Sequence[Any], data: DataOptions, model: LoadedModel, options: EvalOptions) -> Any:
        """Held-out records as rows, with what is shown of them."""

    @abc.abstractmethod
    def loss(self, call: Call, batch: Batch, key: Array) -> tuple[Float[Array, ""], Float[Array, ""]]:
        """Summed loss of a batch, and by how much it is to be divided."""

    @abc.abstractmethod
    def make_eval_step(self, apply: Callable, bind: bool = True) -> Callable:
        """A compiled function of (adapted, batch), or of (parameters, batch) without `bind`, for `evaluate`."""

    @abc.abstractmethod
    def evaluate(
        self, step: Callable, params: PyTree, held_out: Any, batch_size: int, poll: Callable = lambda: None
    ) -> Measured:
        """Held-out figures, `loss_key` among them. `poll` is called between batches."""

    def complete(
        self,
        measured: Measured,
        apply: Callable,
        params: PyTree,
        model: LoadedModel,
        held_out: Any,
        options: EvalOptions,
        poll: Callable = lambda: None,
    ) -> Measured:
        """Adds what is only measured before and after training."""
        return measured

    def trim(self, batch: Batch) -> Batch:
        """A batch, or a stack of them, without columns that are padding throughout."""
        return batch

    def place(self, batch: Batch, axis: int = 0) -> Mapping[str, Any]:
        """A batch, or a stack of them, whose rows are along `axis`, on the devices of a run."""
        return batch if self.mesh is None else meshes.place_batch(self.mesh, batch, axis)

    def size(self, batch: Batch) -> int:
        """How many `unit`s a batch holds."""
        return int(np.count_nonzero(batch["segment_ids"]))

    def identity(self, rows: Any) -> int:
        """A checksum, by which a resumed run knows its training data."""
        total = 0
        for _, field in sorted(rows.fields.items()):
            total = zlib.crc32(np.ascontiguousarray(field).reshape(-1).view(np.uint8), total)
        return total

    def samples(self, held_out: Any, before: list[str], after: list[str], count: int) -> list[dict[str, str]]:
        """The first answers, before and after training."""
        shown = range(min(count, len(after)))
        rows = [{"prompt": held_out.prompts[i], "before": before[i], "after": after[i]} for i in shown]
        for i, row in enumerate(rows):
            if getattr(held_out, "labels", None):
                row["label"] = held_out.labels[i]
        return rows

    def records(self, held_out: Any, before: list[str], after: list[str]) -> tuple[str, list[dict[str, Any]]]:
        """Every answer, for a file of the run: its name, and its lines."""
        rows = zip(held_out.prompts, held_out.labels, before, after, strict=True)
        names = ("prompt", "label", "before", "after")
        return "predictions.jsonl", [dict(zip(names, row, strict=True)) for row in rows]

    def details(self, held_out: Any, measured: Measured) -> list[str]:
        """Further lines for `jlora evaluate`."""
        return []

    def head(self, data: DataOptions) -> tuple[str, str]:
        """What the head takes as an argument in jlora's `models.load` and in transformers' `from_pretrained`."""
        return "", ""


def check_family(task: Task, name: str, family: Family, able: Callable[[Family], bool], what: str) -> None:
    """An error unless `able`; `what` says what other models do not do."""
    if not able(family):
        names = sorted(name for name, other in FAMILIES.items() if able(other))
        raise UserError(
            f"{name} is a {family.model_type} model, which does not {what}: --task {task.name} wants one of "
            f"{', '.join(names)}"
        )


def reads_text(family: Family) -> bool:
    return family.inputs is hf.token_ids


def has_head(family: Family) -> bool:
    """Whether the family has a classification head."""
    return family.layout.new_head is not None


def output_step(apply: Callable, bind: bool, compute: Callable[[Call, Batch], Any]) -> Callable:
    """Compiled (adapted or parameters, batch) -> compute(the model bound, batch)."""

    @jax.jit
    def step(adapted, batch):
        call = Call(apply, adapted.bind(), adapted.base) if bind else Call(apply, adapted)
        return compute(call, batch)

    return step


def batches(task: Task, rows: Rows, batch_size: int, poll: Callable):
    """All rows once, in order, the last batch filled up with rows whose mask is 0."""
    size = min(batch_size, len(rows))
    for batch in streams.batches(rows, size, seed=0, epochs=1, shuffle=False, drop_remainder=False):
        poll()
        yield task.place(task.trim(batch))


def collect(task: Task, step: Callable, params: PyTree, rows: Rows, batch_size: int, poll: Callable) -> np.ndarray:
    """Outputs [N, ...] of all rows, in order."""
    outputs = [distributed.to_host(step(params, batch)) for batch in batches(task, rows, batch_size, poll)]
    return np.concatenate(outputs)[: len(rows)]
