"""Texts with a label: sequence classification and regression, of single texts and of pairs."""

import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import PyTree

from jlora.train import data as files
from jlora.train import metrics
from jlora.train.config import DataOptions, EvalOptions, UserError
from jlora.train.models import Family, LoadedModel
from jlora.train.tasks import base, labels
from jlora.train.tasks.base import Batch, HeldOut, Measured, Rows
from jlora.train.tokenizers import Tokenizer


class Record(NamedTuple):
    """A text or a pair of them, and the number that is to be predicted: that of a class, or one of its own."""

    text: str
    pair: str | None
    label: Any


class TextTask(base.Task):
    """What classification and regression have in common: their records, and their rows."""

    peft_type = "SEQ_CLS"
    auto_class = "AutoModelForSequenceClassification"
    label_dtype: ClassVar[type]

    def check(self, name: str, family: Family) -> None:
        able = lambda family: base.reads_text(family) and base.has_head(family)
        base.check_family(self, name, family, able, "tell texts apart by a head of its own")

    def known_labels(self, data: DataOptions, model: str) -> DataOptions:
        return labels.known(data, model)

    def train_fully(self, model: LoadedModel) -> tuple[str, ...]:
        return new_leaves(model)

    def encode(self, examples: Sequence[Record], data: DataOptions, model: LoadedModel) -> Rows:
        ids, segment_ids, types, truncated = encode_texts(
            model.tokenizer, [e.text for e in examples], [e.pair for e in examples], data.max_length
        )
        fields = {"ids": ids, "segment_ids": segment_ids, "token_type_ids": types}
        if getattr(model.config, "type_vocab_size", 1) < 2:
            del fields["token_type_ids"]
        fields |= {"labels": np.array([e.label for e in examples], self.label_dtype), "mask": np.ones(len(ids), "f4")}
        return Rows(fields, truncated, lengths=segment_ids.sum(axis=1))

    def hold_out(
        self, examples: Sequence[Record], data: DataOptions, model: LoadedModel, options: EvalOptions
    ) -> HeldOut:
        examples = examples[: options.eval_limit]
        rows = self.encode(examples, data, model)
        shown = [e.text if e.pair is None else f"{e.text} || {e.pair}" for e in examples]
        return HeldOut(rows, shown, [self.shown(number, data) for number in rows.fields["labels"]], data.labels)

    def shown(self, number: Any, data: DataOptions) -> str:
        """A label as it is shown."""
        raise NotImplementedError

    def trim(self, batch: Batch) -> Batch:
        return trim_padding(batch)

    def outputs(self, call: base.Call, batch: Batch) -> Any:
        """What the head gives [b, outputs]."""
        return call(batch["ids"], None, batch["segment_ids"], batch.get("token_type_ids"))

    def make_eval_step(self, apply: Callable, bind: bool = True) -> Callable:
        return base.output_step(apply, bind, self.outputs)

    def collect(self, step: Callable, params: PyTree, rows: Rows, batch_size: int, poll: Callable) -> np.ndarray:
        """Outputs [N, outputs] of all rows, computed in the order of their lengths: so the least is padding."""
        order = np.argsort(rows.lengths, kind="stable")
        ordered = base.collect(self, step, params, rows.take(order), batch_size, poll).astype(np.float64)
        outputs = np.empty_like(ordered)
        outputs[order] = ordered
        return outputs

    def read_records(self, data: DataOptions) -> tuple[list[Record], list[Record]]:
        """The records of both files, their labels as `read_label` gives them; of the second none if there is none."""
        return self._records(data, data.data), self._records(data, data.eval_data) if data.eval_data else []

    def split(self, train: list[Record], held_out: list[Record], data: DataOptions, seed: int):
        """Records to train on and held-out ones, where there is no file of these."""
        if data.eval_data is not None:
            return train, held_out
        chosen = labels.split(
            [(r.text, r.pair) for r in train], [self.kind(r) for r in train], data.eval_fraction, seed
        )
        return tuple([train[i] for i in part] for part in chosen)

    def kind(self, record: Record) -> Any:
        """What has the same share in both parts of a file that is split."""
        return None

    def read_label(self, value: Any, column: str, where: str) -> Any:
        """The label of a record."""
        raise NotImplementedError

    def _records(self, data: DataOptions, path: str) -> list[Record]:
        columns = [data.text_column, *([data.pair_column] if data.pair_column else []), data.label_column]
        records = []
        for number, row in files.read_table(pathlib.Path(path)):
            where = f"{path}, line {number}"
            missing = [column for column in columns if column not in row]
            if missing:
                raise ValueError(
                    f"{where}: no column {missing[0]!r}; found {list(row)}. Name yours with --text-column, "
                    "--pair-column and --label-column"
                )
            *texts, label = (row[column] for column in columns)
            for column, text in zip(columns, texts, strict=False):
                if not isinstance(text, str):
                    raise ValueError(f"{where}: column {column!r} is {text!r}, wanted text")
            pair = texts[1] if data.pair_column else None
            records.append(Record(texts[0], pair, self.read_label(label, data.label_column, where)))
        if not records:
            raise ValueError(f"{path} is empty: there is nothing to learn from")
        return records


class Classification(TextTask):
    """Cross-entropy over classes of texts; accuracy, F1 and Matthews' correlation."""

    name = "classification"
    label_dtype = np.int32

    def read(self, data: DataOptions, model: str, seed: int) -> tuple[DataOptions, list[Record], list[Record]]:
        parts = self.read_records(data)
        names, *numbers = labels.number_classes(
            *([record.label for record in part] for part in parts), data.labels, labels.checkpoint_names(model)
        )
        train, held_out = (
            [record._replace(label=int(n)) for record, n in zip(part, found, strict=True)]
            for part, found in zip(parts, numbers, strict=True)
        )
        return dataclasses.replace(data, labels=names), *self.split(train, held_out, data, seed)

    def kind(self, record: Record) -> int:
        return record.label

    def read_label(self, value: Any, column: str, where: str) -> labels.Label:
        return labels.read_label(value, column, where)

    def shown(self, number: Any, data: DataOptions) -> str:
        return data.labels[number]

    def loss(self, call: base.Call, batch: Batch, key: Any):
        return cross_entropy(self.outputs(call, batch), batch)

    def evaluate(self, step, params, held_out, batch_size, poll=lambda: None) -> Measured:
        return measure_classes(self.collect(step, params, held_out.rows, batch_size, poll), held_out)

    def details(self, held_out: HeldOut, measured: Measured) -> list[str]:
        return metrics.classification_table(held_out.labels, measured.answers).splitlines()

    def head(self, data: DataOptions) -> tuple[str, str]:
        return f", labels={list(data.labels)}", f", num_labels={len(data.labels)}"


class Regression(TextTask):
    """Squared error of a number; the correlations of Pearson and Spearman."""

    name = "regression"
    loss_unit = "squared error"
    label_dtype = np.float32

    def read(self, data: DataOptions, model: str, seed: int) -> tuple[DataOptions, list[Record], list[Record]]:
        names = data.labels or labels.checkpoint_names(model)
        if len(data.labels) > 1:
            raise UserError(f"--labels names classes, and --task regression predicts one number: got {data.labels}")
        train, held_out = self.split(*self.read_records(data), data, seed)
        if len(held_out) < 2:
            raise UserError("--task regression wants two held-out records or more, to correlate")
        # A new output bears the name of the column.
        names = names if len(names) == 1 else (data.label_column,)
        return dataclasses.replace(data, labels=tuple(names)), train, held_out

    def read_label(self, value: Any, column: str, where: str) -> float:
        return labels.read_number(value, column, where)

    def shown(self, number: Any, data: DataOptions) -> str:
        return f"{number:.3g}"

    def loss(self, call: base.Call, batch: Batch, key: Any):
        errors = jnp.square(self.outputs(call, batch)[:, 0].astype(jnp.float32) - batch["labels"])
        return jnp.sum(errors * batch["mask"]), jnp.sum(batch["mask"])

    def evaluate(self, step, params, held_out, batch_size, poll=lambda: None) -> Measured:
        found = self.collect(step, params, held_out.rows, batch_size, poll)[:, 0]
        figures = metrics.regression_scores(held_out.rows.fields["labels"], found)
        return Measured(figures, [f"{number:.3g}" for number in found])

    def head(self, data: DataOptions) -> tuple[str, str]:
        return f", labels={list(data.labels)}", ", num_labels=1"


def cross_entropy(logits: Any, batch: Batch):
    """Summed over the rows of a batch; and their number."""
    nll = optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), batch["labels"])
    return jnp.sum(nll * batch["mask"]), jnp.sum(batch["mask"])


def measure_classes(logits: np.ndarray, held_out: HeldOut) -> Measured:
    """Loss and scores of logits [N, classes], and the likeliest class of each row."""
    figures = metrics.classification_scores(held_out.rows.fields["labels"], logits)
    return Measured(figures, [held_out.names[i] for i in logits.argmax(axis=1)])


def new_leaves(model: LoadedModel) -> tuple[str, ...]:
    """Patterns of the head, and of what else was drawn because the checkpoint lacks it."""
    drawn = [path.rpartition("/")[0] + "/**" for path in model.drawn if not path.startswith("classifier/")]
    return ("classifier/**", *dict.fromkeys(drawn))


_WIDTHS = (16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)


def trim_padding(batch: Batch) -> Batch:
    """A batch without columns that are padding throughout, but for a few: there shall not be many shapes to compile."""
    segment_ids = batch["segment_ids"]
    used = np.flatnonzero(segment_ids.reshape(-1, segment_ids.shape[-1]).any(axis=0))
    width = int(used[-1]) + 1 if len(used) else 1
    width = next((w for w in _WIDTHS if w >= width), segment_ids.shape[-1])
    return {k: v[..., :width] if v.shape == segment_ids.shape else v for k, v in batch.items()}


def encode_texts(
    tokenizer: Tokenizer, texts: Sequence[str], pairs: Sequence[str | None], max_length: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """Ids, segments and types [N, T] of texts and pairs with their special tokens, and how many were cut.

    T is that of the longest, at most `max_length`; of a pair the longer text is cut.
    """
    inner = tokenizer.inner
    needed = inner.num_special_tokens_to_add(any(pair is not None for pair in pairs))
    if max_length <= needed:
        raise ValueError(f"--max-length is {max_length}; the special tokens of a text alone are {needed}")
    if not needed:
        raise ValueError("tokenizer.json adds no special tokens (post_processor), and the head reads the first of them")
    inner.enable_truncation(max_length)
    try:
        inputs = [text if pair is None else (text, pair) for text, pair in zip(texts, pairs, strict=True)]
        encodings = inner.encode_batch(inputs)
    finally:
        inner.no_truncation()
    width = max(len(e.ids) for e in encodings)
    ids = np.full((len(encodings), width), tokenizer.pad_id, np.int32)
    segment_ids, types = np.zeros((2, len(encodings), width), np.int32)
    for n, encoding in enumerate(encodings):
        length = len(encoding.ids)
        ids[n, :length], types[n, :length], segment_ids[n, :length] = encoding.ids, encoding.type_ids, 1
    return ids, segment_ids, types, sum(bool(e.overflowing) for e in encodings)
