"""Does low-rank pretraining keep up? A small byte-level Llama from scratch on the source of Python's standard library.

    python benchmarks/pretrain.py                                       # five methods, four rates, two seeds
    python benchmarks/pretrain.py --steps 5 --seeds 1 --rates 1e-3      # does it run

The corpus is what lies beside `os.py` of the Python that runs this, files in the order of their names; every tenth is
held out, half of those for the choice of the rate and half for what is reported. A step is a batch of random pieces of
the text; all methods see the same tokens. Adam trains everything; GaLore, Fira and DCT-AdamW everything, with the
state of the matrices of the layers projected to --rank; LoRA, the foil, has random weights there, frozen, a pair of
rank --rank beside each, and trains embedding, head and norms as they are. Rates are of one grid, chosen with the first
seed; losses are in nats per byte. Prints a Markdown table; what is done is kept in --results, and not done again.
"""

import argparse
import functools
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import study

import jlora
from jlora.train import metrics
from jlora.train.call import Call
from jlora.train.loop import make_train_step
from jlora.train.models.layers import CausalLM, DecoderConfig

LENGTH, BATCH, EVERY = 128, 16, 20
MATRICES = "**/layers/**/kernel"
CONFIG = DecoderConfig(
    vocab_size=256, hidden_size=128, intermediate_size=344, num_layers=4, num_heads=4, num_kv_heads=4, head_dim=32,
    max_positions=LENGTH,
)  # fmt: skip


def methods(rank: int, period: int) -> dict[str, tuple[dict, Callable[[Any], optax.GradientTransformation]]]:
    """What is trained how, and the optimizer of a rate."""
    everything = {"**": jlora.Full()}
    low_rank = {MATRICES: jlora.LoRA(rank, float(rank)), "**": jlora.Full()}
    adam = lambda rate: optax.adamw(rate, weight_decay=0.0)
    options = dict(rank=rank, where=MATRICES)
    return {
        "Adam": (everything, adam),
        "GaLore": (everything, lambda rate: jlora.optim.galore(adam(rate), period=period, **options)),
        "Fira": (everything, lambda rate: jlora.optim.fira(rate, period=period, **options)),
        "DCT-AdamW": (everything, lambda rate: jlora.optim.dct(adam(rate), **options)),
        "LoRA": (low_rank, adam),
    }


@functools.cache
def corpus() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Bytes to train on, to choose by, and to report on; files end in a zero byte."""
    root = Path(os.__file__).parent
    files = sorted(path for path in root.rglob("*.py") if "site-packages" not in path.parts)
    texts = [path.read_bytes() + b"\0" for path in files]
    parts = [b"".join(t for i, t in enumerate(texts) if i % 10)]
    parts += [b"".join(texts[start::20]) for start in (0, 10)]
    return tuple(np.frombuffer(part, np.uint8) for part in parts)


def rows(text: np.ndarray, starts: np.ndarray) -> dict[str, np.ndarray]:
    """Pieces of the text as a batch; of each every byte but the first is learnt."""
    ids = text[starts[:, None] + np.arange(LENGTH)].astype(np.int32)
    positions = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), ids.shape)
    return {"ids": ids, "mask": np.ones(ids.shape, "f4"), "positions": positions, "segment_ids": np.ones_like(ids)}


def batches(text: np.ndarray, seed: int) -> Iterator[dict[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    while True:
        yield rows(text, rng.integers(0, len(text) - LENGTH, BATCH))


class Study:
    """The model, and what is compiled."""

    def __init__(self, rank: int, period: int, eval_limit: int):
        self.module = CausalLM(CONFIG)
        self.apply = jlora.lift(self.module.apply)
        self.methods, self.eval_limit = methods(rank, period), eval_limit
        one = rows(corpus()[0], np.zeros(1, int))
        self.inputs = [one[name] for name in ("ids", "positions", "segment_ids")]
        forward = lambda params, *inputs: self.module.apply({"params": params}, *inputs)
        self.init = jax.jit(lambda key: self.module.init(key, *self.inputs)["params"])
        self.usage = jlora.usage(forward, jax.eval_shape(self.init, jax.random.key(0)), *self.inputs)
        self.eval_step = jax.jit(
            lambda adapted, batch: metrics.next_token_loss(Call(self.apply, adapted.bind()), batch)
        )

    @functools.cache  # noqa: B019
    def step(self, method: str) -> tuple[Callable, optax.GradientTransformation]:
        tx = study.with_rate(self.methods[method][1])
        return make_train_step(self.apply, tx), tx

    def loss(self, adapted: jlora.Adapted, part: int) -> float:
        """Of pieces in equal distances."""
        text = corpus()[part]
        count = min(self.eval_limit, len(text) // LENGTH) // BATCH * BATCH
        starts = np.linspace(0, len(text) - LENGTH, count).astype(int).reshape(-1, BATCH)
        sums = [self.eval_step(adapted, rows(text, some)) for some in starts]
        return float(sum(nll for nll, _ in sums) / sum(scored for _, scored in sums))

    def run(self, cell: study.Cell) -> study.Cell:
        step, tx = self.step(cell["method"])
        key = jax.random.key(cell["seed"])
        adapted = jlora.adapt(self.init(key), self.methods[cell["method"]][0], key=key, usage=self.usage)
        curve = []

        def look(adapted: jlora.Adapted, number: int) -> None:
            if number % max(1, cell["steps"] // EVERY) == 0:
                curve.append(self.loss(adapted, 1))

        stream = batches(corpus()[0], cell["seed"])
        adapted, losses = study.train(step, tx, adapted, stream, cell["steps"], cell["rate"], look)
        bad = len(losses) < cell["steps"]
        validation, test = (20.0, 20.0) if bad else (self.loss(adapted, 1), self.loss(adapted, 2))
        size = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))
        numbers = {"trained": size(adapted.trainable), "state": size(jax.eval_shape(tx.init, adapted.trainable))}
        return {"validation": validation, "test": test, "curve": [] if bad else curve, **numbers}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=list(methods(1, 1)), choices=methods(1, 1))
    parser.add_argument("--rates", nargs="+", type=float, default=[1e-3, 3e-3, 1e-2, 3e-2])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--period", type=int, default=100, help="steps between refreshes of GaLore and Fira")
    parser.add_argument("--eval-limit", type=int, default=256, help="held-out pieces")
    parser.add_argument("--results", type=Path, default=Path("runs/pretrain.jsonl"))
    parser.add_argument("--figure", type=Path, default=Path("runs/pretrain.png"))
    args = parser.parse_args()

    setting = {
        "steps": args.steps, "rank": args.rank, "period": args.period, "eval_limit": args.eval_limit,
        "corpus": zlib.crc32(corpus()[0]),
    }  # fmt: skip
    lazy = functools.cache(lambda: Study(args.rank, args.period, args.eval_limit))
    best = study.tuned(args.methods, args.rates, args.seeds, setting, args.results, lambda cell: lazy().run(cell))
    print(f"{args.steps * BATCH * LENGTH:,} bytes read, from a text of {len(corpus()[0]):,}\n")
    columns = {"trained": lambda cells: f"{cells[0]['trained']:,}", "state": lambda cells: f"{cells[0]['state']:,}"}
    print(study.table(best, args.rates, columns))
    tokens = lambda i: i * max(1, args.steps // EVERY) * BATCH * LENGTH
    study.figure(best, tokens, "bytes read", "held-out loss (nats per byte)", args.figure)


if __name__ == "__main__":
    main()
