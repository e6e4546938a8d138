"""Masked language modelling: the tokens that were hidden, from those on both sides (Devlin et al. 2019)."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, Key

from jlora.train import data as files
from jlora.train import loading, metrics
from jlora.train.config import DataOptions, EvalOptions, UserError
from jlora.train.models import Family, LoadedModel
from jlora.train.tasks import base
from jlora.train.tasks.base import Batch, HeldOut, Measured, Rows
from jlora.train.tasks.text import trim_padding

_MASKS = ("[MASK]", "<mask>")


@functools.partial(jax.jit, static_argnames=("fraction", "mask_id", "vocab_size"))
def hide(
    key: Key[Array, ""],
    ids: Int[Array, "b t"],
    real: Float[Array, "b t"],
    fraction: float,
    mask_id: int,
    vocab_size: int,
) -> tuple[Int[Array, "b t"], Float[Array, "b t"]]:
    """Ids to read, and 1 where a token is to be told.

    Each token that is `real` (no special token, no padding) is chosen with probability `fraction`. Of the chosen, 80 %
    become the mask, 10 % any token, and 10 % stay: a token that is not masked must be worth a thought as well.
    """
    choose, how, other = jax.random.split(key, 3)
    chosen = (jax.random.uniform(choose, ids.shape) < fraction) & (real > 0)
    share = jax.random.uniform(how, ids.shape)
    random = jax.random.randint(other, ids.shape, 0, vocab_size, ids.dtype)
    read = jnp.where(share < 0.8, mask_id, jnp.where(share < 0.9, random, ids))
    return jnp.where(chosen, read, ids), chosen.astype(jnp.float32)


class MaskedLM(base.Task):
    """Cross-entropy over hidden tokens. Those of the training data are drawn anew in every step, from the step's key;
    those of the held-out data once, so that figures before and after are of the same."""

    name = "masked-lm"
    loss_key = "eval_nll"
    loss_unit = "nats per token"
    auto_class = "AutoModelForMaskedLM"

    def __init__(self, data: DataOptions):
        super().__init__(data)
        self.fraction = data.mask_fraction

    def read(self, data: DataOptions, model: str, seed: int):
        return data, *files.load_examples(loading.data_spec(data, seed))

    def check(self, name: str, family: Family) -> None:
        able = lambda family: base.reads_text(family) and not family.writes_text
        base.check_family(self, name, family, able, "fill in masks")

    def attach(self, model: LoadedModel) -> None:
        if model.config.head != "masked_lm":
            raise UserError(
                f"{model.name} has no head for masked tokens (its config.json says {model.source['architectures']}), "
                "and one that starts from nothing would have to learn the language: take a checkpoint that has it"
            )
        self.mask_id = _mask_id(model)
        self.vocab_size = model.config.vocab_size

    def encode(self, examples: Sequence[files.Example], data: DataOptions, model: LoadedModel) -> Rows:
        before, after = _specials(model)
        room = data.max_length - len(before) - len(after)
        if room < 1:
            raise ValueError(f"--max-length is {data.max_length}; the special tokens alone are {len(before + after)}")
        texts = [" ".join(filter(None, example)) for example in examples]
        pieces = [
            before + tokens[i : i + room] + after
            for tokens in model.tokenizer.encode_batch(texts)
            for i in range(0, len(tokens), room)
        ]
        if not pieces:
            raise ValueError(f"none of the {len(examples)} examples has a token")
        shape = (len(pieces), max(map(len, pieces)))
        ids, mask = np.full(shape, model.tokenizer.pad_id, np.int32), np.zeros(shape, np.float32)
        segment_ids = np.zeros(shape, np.int32)
        for n, piece in enumerate(pieces):
            ids[n, : len(piece)], segment_ids[n, : len(piece)] = piece, 1
            mask[n, len(before) : len(piece) - len(after)] = 1.0
        return Rows({"ids": ids, "segment_ids": segment_ids, "mask": mask})

    def hold_out(self, examples: Any, data: DataOptions, model: LoadedModel, options: EvalOptions) -> HeldOut:
        rows = self.encode(examples, data, model).take(slice(options.eval_limit))
        ids, real = rows.fields["ids"], rows.fields["mask"]
        read, hidden = jax.device_get(hide(jax.random.key(0), ids, real, self.fraction, self.mask_id, self.vocab_size))
        if not hidden.any():
            raise UserError(f"none of the {int(real.sum())} held-out tokens is hidden: raise --mask-fraction")
        fields = rows.fields | {"ids": read, "targets": ids, "mask": hidden}
        return HeldOut(Rows(fields), [])

    def loss(self, call: base.Call, batch: Batch, key: Any):
        read, hidden = hide(
            jax.random.fold_in(key, 1), batch["ids"], batch["mask"], self.fraction, self.mask_id, self.vocab_size
        )
        return _sums(call, batch | {"ids": read, "targets": batch["ids"], "mask": hidden})[:2]

    def make_eval_step(self, apply: Callable, bind: bool = True) -> Callable:
        return base.output_step(apply, bind, _sums)

    def evaluate(self, step, params, held_out, batch_size, poll=lambda: None) -> Measured:
        sums = [step(params, batch) for batch in base.batches(self, held_out.rows, batch_size, poll)]
        nll, count, hits = np.sum(jax.device_get(sums), axis=0, dtype=np.float64).tolist()
        figures = {"eval_nll": nll / count, "perplexity": metrics.perplexity(nll / count), "accuracy": hits / count}
        return Measured(figures)

    def trim(self, batch: Batch) -> Batch:
        return trim_padding(batch)

    def records(self, held_out, before, after):
        return "predictions.jsonl", []


def _sums(call: base.Call, batch: Batch):
    """Summed nll of the hidden tokens, how many there are, and how many of them are told right."""
    logits = call(batch["ids"], None, batch["segment_ids"]).astype(jnp.float32)
    nll = optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])
    right = jnp.argmax(logits, axis=-1) == batch["targets"]
    return jnp.sum(nll * batch["mask"]), jnp.sum(batch["mask"]), jnp.sum(right * batch["mask"])


def _mask_id(model: LoadedModel) -> int:
    found = [i for i in map(model.tokenizer.inner.token_to_id, _MASKS) if i is not None]
    if not found:
        raise UserError(f"the tokenizer of {model.name} has no mask token ({' or '.join(_MASKS)})")
    return found[0]


def _specials(model: LoadedModel) -> tuple[list[int], list[int]]:
    """What the tokenizer puts before and after a text."""
    inner = model.tokenizer.inner
    ids = inner.encode("", add_special_tokens=True).ids
    return ids[:1], ids[1:]
