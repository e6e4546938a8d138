"""Fine-tuning the shipped model on E2E by LoRA's optimizers, each at the best learning rate of one grid, over seeds.

    python benchmarks/finetune_optimizers.py                       # six optimizers, seven rates, three seeds
    python benchmarks/finetune_optimizers.py --steps 10 --eval-limit 32 --seeds 1 --rates 1e-2    # does it run

LoRA of rank 8, alpha 8 on all linear layers; batches of 4 rows of 192 tokens, packed, the same in the same order for
all; ALLoRA is the method of that name under AdamW, LoRA-Pro its AdamW form. Rates are chosen by the loss on one half of
the held-out prompts with the first seed, and what is reported is that on the other, where nothing was chosen. A seed
draws the adapters and the order of the data. Prints a Markdown table; what is done is kept in --results, and not done
again.
"""

import argparse
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import optax
import study

import jlora
from jlora.train import data, loading, models
from jlora.train.config import DataOptions, EvalOptions
from jlora.train.loop import make_train_step
from jlora.train.tasks import make as make_task

LORA = jlora.LoRA(8, 8.0)
METHODS: dict[str, tuple[jlora.LoRA, Callable[[Any], optax.GradientTransformation]]] = {
    "AdamW": (LORA, lambda rate: optax.adamw(rate, weight_decay=0.0)),
    "LoRA+": (LORA, lambda rate: jlora.optim.lora_plus(optax.adamw(rate, weight_decay=0.0), 16.0)),
    "LoRA-Pro": (LORA, lambda rate: jlora.optim.lora_pro_full(optax.adamw(rate, weight_decay=0.0))),
    "AltLoRA": (LORA, lambda rate: jlora.optim.altlora(rate)),
    "ALLoRA": (jlora.ALLoRA(8), lambda rate: optax.adamw(rate, weight_decay=0.0)),
    "ScaledAdam": (LORA, lambda rate: jlora.optim.scaled_adam(rate)),
}
BATCH, EVERY = 4, 10


class Study:
    """The model, the data, and what is compiled."""

    def __init__(self, eval_limit: int):
        self.model = models.load("stories260k")
        options = DataOptions(max_length=192, packing=True)
        self.task = make_task(options)
        options, train, held_out = self.task.read(options, "stories260k", 0)
        self.rows = self.task.encode(train, options, self.model)
        prompts = sorted({example.prompt for example in held_out})
        halves = set(prompts[::2])
        parts = [[e for e in held_out if (e.prompt in halves) == first] for first in (True, False)]
        decoding = EvalOptions(eval_limit=eval_limit)
        self.held_out = [self.task.hold_out(part, options, self.model, decoding) for part in parts]
        self.apply = jlora.lift(self.model.module.apply)
        self.eval_step = self.task.make_eval_step(self.apply)
        self.usage = loading.usage_of(self.model)

    @functools.cache  # noqa: B019
    def step(self, method: str) -> tuple[Callable, optax.GradientTransformation]:
        tx = study.with_rate(METHODS[method][1])
        return make_train_step(self.apply, tx, self.task.loss), tx

    def loss(self, adapted: jlora.Adapted, part: int) -> float:
        return self.task.evaluate(self.eval_step, adapted, self.held_out[part], 32).figures["eval_nll"]

    def run(self, cell: study.Cell) -> study.Cell:
        step, tx = self.step(cell["method"])
        lora, key = METHODS[cell["method"]][0], jax.random.key(cell["seed"])
        adapted = jlora.adapt(self.model.params, lora, self.model.family.targets, key=key, usage=self.usage)
        batches = data.batches(self.rows, BATCH, cell["seed"])
        adapted, losses = study.train(step, tx, adapted, batches, cell["steps"], cell["rate"])
        # What is not finite any more is worse than anything that is.
        bad = len(losses) < cell["steps"]
        validation, test = (20.0, 20.0) if bad else (self.loss(adapted, 0), self.loss(adapted, 1))
        return {"validation": validation, "test": test, "curve": [] if bad else study.smoothed(losses, EVERY)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--rates", nargs="+", type=float, default=[1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--eval-limit", type=int, default=256, help="rows of each half that is held out")
    parser.add_argument("--results", type=Path, default=Path("runs/finetune_optimizers.jsonl"))
    parser.add_argument("--figure", type=Path, default=Path("runs/finetune_optimizers.png"))
    args = parser.parse_args()

    setting = {"steps": args.steps, "eval_limit": args.eval_limit}
    lazy = functools.cache(lambda: Study(args.eval_limit))  # of a study that is done, nothing is loaded
    best = study.tuned(args.methods, args.rates, args.seeds, setting, args.results, lambda cell: lazy().run(cell))
    curve = lambda cells: f"{sum(c['curve'][-1] for c in cells if c['curve']) / max(1, len(cells)):.4f}"
    print(study.table(best, args.rates, {"training, last steps": curve}))
    study.figure(best, lambda i: i * EVERY, "optimizer step", "training loss (nats per token)", args.figure)


if __name__ == "__main__":
    main()
