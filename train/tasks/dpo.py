r"""Preferences: which of two completions of a prompt is the better one.

Direct Preference Optimization: Your Language Model is Secretly a Reward Model. Rafailov et al., 2023.
https://arxiv.org/abs/2305.18290

    r(x, y) = beta (log p(y | x) - log p_base(y | x)),    h = r(x, chosen) - r(x, rejected),
    loss = -(1 - e) log sigmoid(h) - e log sigmoid(-h)

log p(y | x) is the sum over the tokens of y. The reference is the base: the same function with the adapters left away,
and the weights as they were with `--method full`; no second model is kept. It costs a forward pass more in every step.
e is `--label-smoothing` (conservative DPO, for preferences of which some are wrong); `--reference-free` leaves
log p_base out, for completions that the base has no say in.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jlora.train import chat, distributed, loading, metrics
from jlora.train import data as files
from jlora.train.config import DataOptions, EvalOptions, UserError
from jlora.train.models import LoadedModel
from jlora.train.tasks import base
from jlora.train.tasks.base import Batch, Measured, Rows
from jlora.train.tasks.causal_lm import CausalLM
from jlora.train.tasks.text import trim_padding


class Preference(NamedTuple):
    """Two completions of one prompt: `files.Example`s, or conversations that are the same up to their last answer."""

    chosen: Any
    rejected: Any

    @property
    def prompt(self) -> str:
        return self.chosen.prompt


def dpo_loss(margins: Float[Array, "*b"], smoothing: float = 0.0) -> Float[Array, "*b"]:
    """The loss of each pair, of h."""
    return -(1 - smoothing) * jax.nn.log_sigmoid(margins) - smoothing * jax.nn.log_sigmoid(-margins)


class DPO(CausalLM):
    """The loss of Direct Preference Optimization; rewards of chosen and rejected completions, and how often the chosen
    one is ahead: half, where the two are equal but for rounding, as they are before training."""

    name = "dpo"
    loss_key = "eval_loss"
    loss_unit = "nats per pair"
    rate_share = 0.1

    def __init__(self, data: DataOptions):
        super().__init__(data)
        self.beta, self.smoothing, self.reference_free = data.dpo_beta, data.label_smoothing, data.reference_free

    def read(self, data: DataOptions, model: str, seed: int):
        if data.data == DataOptions.data:
            raise UserError(
                f"--task dpo wants --data: a file with the columns {data.prompt_column!r}, {data.chosen_column!r} and "
                f"{data.rejected_column!r}"
            )
        train = read_preferences(data.data, data)
        if data.eval_data is not None:
            held_out = read_preferences(data.eval_data, data)
        else:
            train, held_out = files.split(train, loading.data_spec(data, seed))
        if any(isinstance(preference.chosen, chat.Conversation) for preference in (*train, *held_out)):
            data = dataclasses.replace(data, chat_template="auto")
        return data, train, held_out

    def encode(self, examples: Sequence[Preference], data: DataOptions, model: LoadedModel) -> Rows:
        sides = [_rendered(side, data, model) for side in zip(*examples, strict=True)]
        cuts = list(zip(*(files.cut(side, model.tokenizer, data.max_length) for side in sides), strict=True))
        kept = [pair for pair in cuts if not any(side.dropped for side in pair)]
        if not kept:
            raise ValueError(
                f"none of the {len(examples)} pairs leaves a token to learn within --max-length {data.max_length}: "
                "their prompts fill it"
            )
        sequences = [side.sequences[0] for pair in kept for side in pair]
        lengths = np.array([len(tokens) for tokens, _ in sequences])
        rows = files.fill([[i] for i in range(len(sequences))], sequences, lengths.max(), model.tokenizer.pad_id)
        fields = {name: values.reshape(len(kept), 2, -1) for name, values in rows.fields.items()}
        truncated = sum(any(side.truncated for side in pair) for pair in kept)
        return Rows(fields, truncated, len(cuts) - len(kept), lengths.reshape(-1, 2).max(axis=1))

    def hold_out(
        self, examples: Sequence[Preference], data: DataOptions, model: LoadedModel, options: EvalOptions
    ) -> loading.HeldOut:
        examples = examples[: options.eval_limit]
        rows = self.encode(examples, data, model)
        chosen = _rendered([example.chosen for example in examples], data, model)
        prompts = loading.decodable(chosen, model, options.max_new_tokens)
        return loading.HeldOut(rows, [prompt for prompt, _ in prompts], [ids for _, ids in prompts], None)

    def trim(self, batch: Batch) -> Batch:
        return trim_padding(batch)

    def rewards(self, call: base.Call, batch: Batch) -> tuple[Float[Array, "b 2"], Float[Array, " b"]]:
        """Of the chosen and of the rejected; and 1 for pairs, 0 for rows that fill a batch up."""
        ids, mask, *rest = (
            batch[name].reshape(-1, batch["ids"].shape[-1]) for name in ("ids", "mask", "positions", "segment_ids")
        )
        rewards = self.beta * metrics.sequence_log_probs(call(ids, *rest), ids, mask)
        if not self.reference_free:
            rewards -= self.beta * metrics.sequence_log_probs(call.reference(ids, *rest), ids, mask)
        return rewards.reshape(-1, 2), jnp.any(batch["mask"] > 0, axis=(-2, -1)).astype(jnp.float32)

    def loss(self, call: base.Call, batch: Batch, key: Any):
        rewards, pairs = self.rewards(call, batch)
        return jnp.sum(dpo_loss(rewards[:, 0] - rewards[:, 1], self.smoothing) * pairs), jnp.sum(pairs)

    def make_eval_step(self, apply: Callable, bind: bool = True) -> Callable:
        return base.output_step(apply, bind, self.rewards)

    def evaluate(self, step, params, held_out, batch_size, poll=lambda: None) -> Measured:
        rewards = [step(params, batch)[0] for batch in base.batches(self, held_out.rows, batch_size, poll)]
        rewards = np.concatenate(distributed.to_host(rewards)).astype(np.float64)[: len(held_out.rows)]
        chosen, rejected = rewards.T
        margins = chosen - rejected
        ahead = np.where(np.abs(margins) < 1e-4, 0.5, margins > 0)
        return Measured(
            {
                "eval_loss": float(np.mean(dpo_loss(jnp.asarray(margins), self.smoothing))),
                "reward_margin": float(margins.mean()),
                "reward_accuracy": float(ahead.mean()),
                "chosen_reward": float(chosen.mean()),
                "rejected_reward": float(rejected.mean()),
            }
        )

    def identity(self, rows: Rows) -> int:
        return base.Task.identity(self, rows)


def read_preferences(path: str, data: DataOptions) -> list[Preference]:
    """The records of a file. A completion is a text, or a list of messages that ends with it; the prompt is then a list
    of messages, a user's text, or left out where those lists hold it."""
    columns = data.chosen_column, data.rejected_column
    found = []
    for number, row in files.read_table(pathlib.Path(path)):
        where = f"{path}, line {number}"
        values = [row.get(column) for column in columns]
        prompt = row.get(data.prompt_column)
        chats = [isinstance(value, list) for value in values]
        wanted = columns if all(chats) else (data.prompt_column, *columns)
        missing = [column for column in wanted if column not in row]
        if missing:
            raise ValueError(
                f"{where}: no column {' and '.join(map(repr, missing))}, found {list(row)}. Name yours with "
                "--prompt-column, --chosen-column and --rejected-column"
            )
        if all(chats):
            sides = [_conversation(prompt, row[column], f"{where}, column {column!r}") for column in columns]
            if sides[0].prompt != sides[1].prompt:
                raise ValueError(f"{where}: the messages before the last answer differ; one prompt has two completions")
        else:
            for column in wanted:
                if not isinstance(row[column], str) or not row[column].strip():
                    what = "empty" if row[column] == "" else f"{row[column]!r}, wanted text"
                    raise ValueError(f"{where}: column {column!r} is {what}")
            sides = [files.Example(prompt, value) for value in values]
        if values[0] == values[1]:
            raise ValueError(f"{where}: {columns[0]!r} and {columns[1]!r} are the same, which prefers nothing")
        found.append(Preference(*sides))
    if not found:
        raise ValueError(f"{path} is empty: there is nothing to learn from")
    return found


def _conversation(prompt: Any, messages: list, where: str) -> chat.Conversation:
    before = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt or []
    found = chat.read_messages([*before, *messages], where)
    last = found.messages[-1]
    if last["role"] != "assistant" or not last["content"].strip():
        raise ValueError(f"{where}: the last message is {last}, wanted the model's answer")
    return found


def _rendered(examples: Sequence[Any], data: DataOptions, model: LoadedModel) -> list[Any]:
    """Of a conversation the last answer is what is compared."""
    texts = loading.render(examples, data, model)
    return [dataclasses.replace(e, spans=e.spans[-1:]) if isinstance(e, chat.Dialogue) else e for e in texts]
