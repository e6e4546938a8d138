"""What a gradient costs with each method, relative to LoRA.

    python benchmarks/methods.py                                  # every method: some minutes
    python benchmarks/methods.py --methods lora,dora,vera --rounds 20
    python benchmarks/methods.py --tokens 1024 --hidden 512
    python benchmarks/methods.py --peft --rounds 3                # PEFT's list, on the weights that PEFT adapts

One run, one model (a Llama of two layers, not scanned; hidden x 3 hidden in its MLPs), every entry of
`jlora.methods.METHODS` on its fourteen linear weights, float32. Measured is the `value_and_grad` of the loss by what is
trained, compiled:

* trained: parameters; "=" where the size of the method was chosen to come within a tenth of LoRA's of rank 8, "~" where
  that is as near as its sizes come, "d" where it is the default: the notes below the table say why.
* state: bytes of what the method trains and of what it keeps frozen beside the base.
* FLOPs and temporary memory: XLA's own counts of the compiled program, the same on every machine with the same XLA.
* CPU: seconds relative to LoRA's, the smallest and the median of rounds in which all methods take turns.
* PEFT: the same ratio as PEFT's own benchmark publishes it, on another model and a GPU, at settings of its own.

What a branch adds to a layer falls with the width of the model, and with the share of the weights that are adapted. So
`--peft` takes both from PEFT's benchmark, which adapts the queries and values of a Llama 3072 wide: the methods that it
lists, of the sizes that it gives them, on those two weights of one block.

A method that refuses the model is listed with what it says. "formed" after a name: some use of a weight was not
low-rank, and lift formed the effective weight.
"""

import argparse
import dataclasses
import functools
import os
import platform
import re
import statistics
import sys
import warnings
from typing import Any, NamedTuple

import jax
import llama
import step
from rich import box
from rich.console import Console
from rich.table import Table

import jlora
from jlora.methods import METHODS, Method, Site

RANK = 8
# Options by which a method's size can be chosen, the first that it has.
SIZES = ("rank", "block_size", "n", "terms", "reduction")
# Methods whose options are not chosen by count, and why.
OPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "vera": ({}, "rank hardly counts; the default costs what LoRA of rank 256 costs"),
    "pvera": ({}, "rank hardly counts, as for vera"),
    "randlora": ({}, "of full rank at any count; more rank is fewer parameters"),
    "vblora": ({}, "most of it are logits, of which few are stored"),
    "mos": ({"rank": RANK, "budget": RANK}, "the count is LoRA's of rank `budget`"),
    "vida": ({"rank": 1, "high_rank": RANK - 1}, "two branches, LoRA of the sum of their ranks"),
    "unilora": ({}, "the count is free, and the cost LoRA's of its rank"),
    "tinylora": ({}, "the count is free, and meant to be tiny"),
    "fourierft": ({}, "meant for few; the cost does not depend on the count"),
    "waveft": ({}, "meant for few; the cost does not depend on the count"),
    "tied_lora": ({}, "one pair for all layers: what LoRA of its rank costs"),
    "lora_xs": ({}, "r^2 a matrix, whatever its size"),
    "inttune": ({}, "r^2 a matrix, whatever its size"),
    "loldu": ({}, "r a matrix, whatever its size"),
    "ia3": ({}, "no size to choose"),
    "road": ({}, "no size to choose"),
    "tokens": ({"indices": tuple(range(RANK))}, "for tables; here it trains eight inputs of each weight"),
    "full": ({}, "no size to choose"),
    "offset": ({}, "no size to choose"),
}
# Further rows: name -> (method, options). What costs as the method itself does is left out.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "fourierft, factored": ("fourierft", {"n": 8}),
    "gralora, k=4": ("gralora", {"rank": RANK, "alpha": 16.0, "blocks": 4}),
    "ia3, inputs": ("ia3", {"on": "inputs"}),
    "lokr, both": ("lokr", {"rank": 16, "decompose_both": True}),
    "oft, exact": ("oft", {"neumann": None}),
    "road, 4": ("road", {"variant": 4}),
    "tied_lora, vectors": ("tied_lora", {"trained": "uv"}),
}
# Of https://github.com/huggingface/peft/tree/main/method_comparison: time of training over LoRA's.
PEFT = {
    "vera": 1.07, "dora": 1.26, "shira": 1.07, "loha": 1.48, "lokr": 1.37, "oft": 1.26, "boft": 7.35, "adalora": 1.24,
    "randlora": 1.51, "fourierft": 1.80, "vblora": 1.27, "c3a": 1.24, "gralora": 1.16, "hira": 1.37, "miss": 0.95,
    "ia3": 1.05, "road": 1.04,
}  # fmt: skip
# And the sizes that it gives the methods, where they are not the defaults here.
PEFT_SIZES: dict[str, dict[str, Any]] = dict.fromkeys(("lora", "dora", "loha", "lokr", "adalora"), {"rank": 32}) | {
    "oft": {"blocks": 32},
    "c3a": {"block_size": 64},
}


class Choice(NamedTuple):
    """A row: a method, and how its options came about ("=", "~", "d" or "")."""

    method: Method
    how: str


def count(method: Method, sites: dict[str, Site]) -> int | None:
    """Trained parameters on these leaves; None if the method refuses one."""
    sites = {path: dataclasses.replace(site, method=method) for path, site in sites.items()}
    if not method.whole_leaf and any(method.check(site) for site in sites.values()):
        return None
    return sum(method.count(site) for site in sites.values()) + method.count_shared(sites)


def choose(name: str, sites: dict[str, Site], wanted: int) -> Choice:
    """The method of a row, of a size that trains about `wanted` parameters where it has such a size."""
    if name in VARIANTS:
        base, options = VARIANTS[name]
        return Choice(METHODS[base](**options), "")
    cls = METHODS[name]
    if name in OPTIONS:
        method = cls(**OPTIONS[name][0])
        return Choice(method, "=" if abs((count(method, sites) or 0) - wanted) <= wanted / 10 else "d")
    size = next((s for s in SIZES if s in {field.name for field in dataclasses.fields(cls)}), None)
    found: dict[Method, int] = {}
    for value in (*range(1, 65), *range(72, 513, 8)) if size else ():
        try:
            method = cls(**{size: value})
            n = count(method, sites)
        except (ValueError, TypeError):
            continue
        if n is not None:
            found[method] = n
    best = min(found, key=lambda method: abs(found[method] - wanted), default=None)
    if best is None or not wanted / 2 <= found[best] <= wanted * 2:
        return Choice(cls(), "d")
    return Choice(best, "=" if abs(found[best] - wanted) <= wanted / 10 else "~")


class Gradient:
    """A method ready to run: `step()` takes a gradient and waits for it."""

    def __init__(self, forward: Any, params: Any, ids: Any, method: Method, targets: Any = "layers/*/*_proj"):
        adapted = jlora.adapt(params, method, targets, key=jax.random.key(1), fn=forward, args=(ids,))
        lifted = jlora.lift(forward, on_materialize="warn")
        loss = lambda trainable, frozen, ids: llama.cross_entropy(lifted(frozen.bind(trainable), ids), ids)
        self.args = adapted.trainable, adapted.replace(trainable=None), ids
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            self.compiled = jax.jit(jax.value_and_grad(loss)).lower(*self.args).compile()
        self.formed = any(issubclass(warning.category, jlora.MaterializeWarning) for warning in caught)
        self.trained = sum(leaf.size for leaf in jax.tree.leaves(adapted.trainable))
        self.state = sum(leaf.nbytes for leaf in jax.tree.leaves((adapted.trainable, adapted.frozen)))
        self.temporary = self.compiled.memory_analysis().temp_size_in_bytes
        self.flops = self.compiled.cost_analysis()["flops"]

    def step(self) -> float:
        value, grads = self.compiled(*self.args)
        jax.block_until_ready(grads)
        return float(value)


def table(choices: dict[str, Choice], runners: dict[str, Gradient], times: dict[str, dict[str, list[float]]]) -> Table:
    """A row for each method that runs. Ratios are the row's over LoRA's: above 1 is more than LoRA."""
    out = Table(box=box.MARKDOWN)
    for column in ("method", "trained", "", "state MB", "FLOPs", "temporary", "CPU min", "CPU median", "PEFT"):
        out.add_column(column, justify="left" if column == "method" else "right")
    lora, cpu = runners["lora"], times["lora"]["cpu"]
    for name, runner in runners.items():
        mine = times[name]["cpu"]
        published = PEFT.get(name)
        out.add_row(
            f"{choices[name].method}" + (", formed" if runner.formed else ""),
            f"{runner.trained:,}",
            choices[name].how,
            f"{runner.state / 1e6:.2f}",
            f"{runner.flops / lora.flops:.3f}",
            f"{runner.temporary / lora.temporary:.2f}",
            f"{min(mine) / min(cpu):.2f}",
            f"{statistics.median(mine) / statistics.median(cpu):.2f}",
            "" if published is None else f"{published:.2f}",
        )
    return out


def main() -> None:
    names = ("lora", *(name for name in METHODS if name != "lora"), *VARIANTS)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", default="", help=f"some of these, with commas: {', '.join(METHODS)}")
    parser.add_argument("--tokens", type=int, help="tokens of a batch, in sequences of --length: 512, or 128")
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--hidden", type=int, help="width of the model, a multiple of 64: 256, or 3072")
    parser.add_argument("--layers", type=int, help="2, or 1")
    parser.add_argument("--rounds", type=int, default=10, help="gradients of each method")
    parser.add_argument("--peft", action="store_true", help="what PEFT's benchmark lists, on queries and values only")
    args = parser.parse_args()
    defaults = dict(tokens=128, hidden=3072, layers=1) if args.peft else dict(tokens=512, hidden=256, layers=2)
    args = argparse.Namespace(**vars(args) | {k: v for k, v in defaults.items() if getattr(args, k) is None})
    if args.tokens % args.length:
        parser.error(f"--tokens {args.tokens} is not a multiple of --length {args.length}")
    chosen = [name.strip() for name in args.methods.split(",") if name.strip()]
    unknown = [name for name in chosen if name not in METHODS]
    if unknown:
        parser.error(f"unknown methods {', '.join(unknown)}: known are {', '.join(METHODS)}")
    if args.peft:
        names = ("lora", *PEFT)
    if chosen:  # LoRA is what the rest is compared with
        names = [n for n in names if n == "lora" or n in chosen or (n in VARIANTS and VARIANTS[n][0] in chosen)]

    console = Console(width=200)
    config = llama.Config(args.hidden, 3 * args.hidden, args.layers, heads=max(1, args.hidden // 64), vocab=512)
    params = llama.init(config, jax.random.key(0))
    ids = jax.random.randint(jax.random.key(2), (args.tokens // args.length, args.length), 0, config.vocab)
    forward = functools.partial(llama.forward, heads=config.heads)
    shapes = jax.eval_shape(lambda: params)
    targets = re.compile(r"layers/\d+/[qv]_proj") if args.peft else "layers/*/*_proj"
    planned = jlora.adapt(shapes, jlora.LoRA(RANK), targets, key=jax.random.key(0), fn=forward, args=(ids,))
    wanted = count(jlora.LoRA(RANK), planned.sites)
    console.print(
        f"{platform.machine()}, {os.cpu_count()} cores, {jax.devices()[0].platform}; {step.versions('jax', 'jaxlib')}; "
        f"hidden {config.dim}, {ids.shape[0]} x {ids.shape[1]} tokens, float32",
        highlight=False,
    )
    choices: dict[str, Choice] = {}
    runners: dict[str, Gradient] = {}
    refused: dict[str, str] = {}
    for name in names:
        if sys.stderr.isatty():
            print(f"compiling {name}", end="\033[K\r", file=sys.stderr)
        try:
            sizes = PEFT_SIZES.get(name, {})
            choices[name] = Choice(METHODS[name](**sizes), "") if args.peft else choose(name, planned.sites, wanted)
            runners[name] = Gradient(forward, params, ids, choices[name].method, targets)
        except Exception as error:  # the table goes on without it
            if name == "lora":
                raise
            reason = " ".join(str(error).split())
            refused[name] = reason if isinstance(error, ValueError) else f"{type(error).__name__}: {reason}"
    console.print(table(choices, runners, step.measure(runners, args.rounds)))
    for name in runners:
        if choices[name].how == "d":
            why = OPTIONS[name][1] if name in OPTIONS else "none of its sizes comes near LoRA's count"
            console.print(f"d {name}: {why}", highlight=False, soft_wrap=True)
    for name, reason in refused.items():
        console.print(f"refused {name}: {reason[:300]}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
