"""Causal language modelling: every next token of a text, or those of the completion of a prompt."""

import dataclasses
import functools
import zlib
from collections.abc import Callable, Sequence
from typing import Any

from jaxtyping import PyTree

from jlora.train import chat, loading, metrics
from jlora.train import data as files
from jlora.train.config import DataOptions, EvalOptions, UserError
from jlora.train.generate import generate
from jlora.train.models import Family, LoadedModel
from jlora.train.report import one_line
from jlora.train.tasks import base
from jlora.train.tasks.base import Measured


class CausalLM(base.Task):
    """Cross-entropy of the next token, perplexity; where prompts have references, scores of what is decoded."""

    name = "causal-lm"
    loss_key = "eval_nll"
    loss_unit = "nats per token"
    max_length = None
    peft_type = "CAUSAL_LM"
    auto_class = "AutoModelForCausalLM"

    def __init__(self, data: DataOptions):
        super().__init__(data)
        self._nll = functools.partial(metrics.next_token_loss, chunk=data.loss_chunk)

    def check(self, name: str, family: Family) -> None:
        loading.need_text_model(name, family)

    def read(self, data: DataOptions, model: str, seed: int):
        train, held_out = files.load_examples(loading.data_spec(data, seed))
        if any(isinstance(example, chat.Conversation) for example in (*train, *held_out)):
            data = dataclasses.replace(data, chat_template="auto")
        return data, train, held_out

    def encode(self, examples: Sequence[files.Example], data: DataOptions, model: LoadedModel) -> files.Encoded:
        examples = loading.render(examples, data, model)
        return files.encode(examples, model.tokenizer, data.max_length, data.packing)

    def hold_out(
        self, examples: Sequence[files.Example], data: DataOptions, model: LoadedModel, options: EvalOptions
    ) -> loading.HeldOut:
        if options.generate:
            metrics.check_metrics(options.metrics)
        return loading.prepare_held_out(examples, data, model, options.max_new_tokens, options.eval_limit)

    def loss(self, call: base.Call, batch: base.Batch, key: Any):
        return self._nll(call, batch)

    def make_eval_step(self, apply: Callable, bind: bool = True) -> Callable:
        return base.output_step(apply, bind, self._nll)

    def evaluate(self, step, params, held_out, batch_size, poll=lambda: None) -> Measured:
        total = tokens = 0.0
        for batch in base.batches(self, held_out.rows, batch_size, poll):
            nll, scored = step(params, batch)
            total, tokens = total + float(nll), tokens + float(scored)
        if not tokens:
            raise UserError("the held-out data has no token to score")
        return Measured({"eval_nll": total / tokens, "perplexity": metrics.perplexity(total / tokens)})

    def complete(self, measured, apply, params, model, held_out, options, poll=lambda: None) -> Measured:
        """Decodes the held-out prompts: all that have references, otherwise those that are shown."""
        if not options.generate:
            return measured
        wanted = held_out.prompt_ids if held_out.references else held_out.prompt_ids[: options.samples]
        texts = complete(
            apply, params, model, wanted, max_new_tokens=options.max_new_tokens, batch_size=options.eval_batch_size,
            poll=poll,
        )  # fmt: skip
        figures = dict(measured.figures)
        if held_out.references and texts:
            figures |= metrics.text_scores(options.metrics, texts, held_out.references)
        return Measured(figures, texts)

    def identity(self, rows: files.Encoded) -> int:
        return zlib.crc32(rows.ids)

    def details(self, held_out: loading.HeldOut, measured: Measured) -> list[str]:
        if not (held_out.references and measured.answers):
            return []
        count, signature = len(measured.answers), measured.figures.get("bleu_signature")
        said = f"decoded {count} prompts" if signature is None else f"BLEU over {count} prompts, sacrebleu {signature}"
        return [
            f"{said}; the first:",
            f"prompt: {one_line(held_out.prompts[0])}",
            f"output: {one_line(measured.answers[0])}",
        ]

    def records(self, held_out: loading.HeldOut, before: list[str], after: list[str]):
        rows = []
        for i, (old, new) in enumerate(zip(before, after, strict=True)):
            row: dict[str, Any] = {"prompt": held_out.prompts[i], "before": old, "after": new}
            if held_out.references is not None:
                row["references"] = held_out.references[i]
            rows.append(row)
        return "completions.jsonl", rows


def complete(
    apply: Callable,
    params: PyTree,
    model: LoadedModel,
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
