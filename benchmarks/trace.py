"""What lifting costs before a program runs: tracing, lowering and compiling, with and without it.

    python benchmarks/trace.py                              # tracing, 32 layers
    python benchmarks/trace.py --layers 8 --compile         # lowering and compiling, too
    python benchmarks/trace.py --rounds 20                  # on a noisy machine

"bare" is the model as it is; "lifted" the same function with LoRA on all its linears. "forward" traces the loss,
"step" its `value_and_grad`: with respect to the model's parameters when bare, to the adapters when lifted. "by hand"
is a model with the LoRA layer of benchmarks/step.py written into it: what the adapters' equations cost anyone.
JAX's caches are emptied before each measurement. Figures are the smallest CPU time of several.
"""

import argparse
import functools
import gc
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import llama
import step
from rich.console import Console
from rich.table import Table

import jlora
from jlora.train.models.layers import CausalLM, DecoderConfig

RANK = 4
IDS = jax.ShapeDtypeStruct((2, 16), jnp.int32)


class LinenBlock(nn.Module):
    """The block of `llama.forward` in linen, for a model whose layers are modules in a Python loop."""

    config: llama.Config

    @nn.compact
    def __call__(self, x):
        c = self.config
        dense = lambda features, name: nn.Dense(features, use_bias=False, name=name)
        h = nn.RMSNorm()(x)
        q, k, v = (dense(c.dim, name)(h).reshape(*x.shape[:2], c.heads, -1) for name in llama.LINEAR[:3])
        x = x + dense(c.dim, "o_proj")(jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(x.shape))
        h = nn.RMSNorm()(x)
        return x + dense(c.dim, "down_proj")(nn.silu(dense(c.ffn, "gate_proj")(h)) * dense(c.ffn, "up_proj")(h))


class LinenUnrolled(nn.Module):
    config: llama.Config

    @nn.compact
    def __call__(self, ids):
        x = nn.Embed(self.config.vocab, self.config.dim)(ids)
        for i in range(self.config.layers):
            x = LinenBlock(self.config, name=f"layers_{i}")(x)
        return nn.Dense(self.config.vocab, use_bias=False, name="lm_head")(nn.RMSNorm()(x))


def models(config: llama.Config) -> dict[str, tuple[Callable, Any, Callable | None]]:
    """name -> (forward(params, ids), its parameters as shapes, the same with LoRA written in or None)."""
    plain = functools.partial(llama.forward, heads=config.heads)
    by_hand = functools.partial(plain, linear=lambda x, wab: step.lora_by_hand(x, *wab, 2.0))
    params = jax.eval_shape(lambda: llama.init(config, jax.random.key(0)))
    scanned = DecoderConfig(
        config.vocab, config.dim, config.ffn, config.layers, config.heads, config.heads, config.dim // config.heads, 256
    )

    def linen(module):
        shapes = jax.eval_shape(module.init, jax.random.key(0), IDS)["params"]
        return lambda params, ids: module.apply({"params": params}, ids), shapes, None

    return {
        "plain, unrolled": (plain, params, by_hand),
        "plain, scanned": (plain, jax.eval_shape(llama.stack, params), by_hand),
        "linen, unrolled": linen(LinenUnrolled(config)),
        "linen, scanned (jlora.train)": linen(CausalLM(scanned)),
    }


def functions(forward: Callable, params: Any, by_hand: Callable | None) -> dict[str, tuple[Callable, tuple]]:
    """What is traced, and its arguments; the first is differentiated."""
    adapted = jlora.adapt(params, jlora.LoRA(RANK), key=jax.random.key(0), fn=forward, args=(IDS,))
    loss = lambda forward: lambda params, ids: jnp.square(forward(params, ids)).mean()

    def lifted(trainable, adapted, ids):  # lifted anew, so that nothing is remembered from the round before
        return jlora.lift(loss(forward), on_materialize="error")(adapted.bind(trainable), ids)

    out = {"bare": (loss(forward), (params, IDS)), "lifted": (lifted, (adapted.trainable, adapted, IDS))}
    if by_hand is not None:
        pairs = {path: (f.a, f.b) for path, f in adapted.trainable.items()}
        written_in = lambda pairs, params, ids: loss(by_hand)(step.with_pairs(params, pairs), ids)
        out["by hand"] = (written_in, (pairs, params, IDS))
    return out


def fresh(fns: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """The smallest CPU time of each function, taking turns, each time with empty caches."""
    best = dict.fromkeys(fns, float("inf"))
    for _ in range(rounds):
        for name, fn in fns.items():
            jax.clear_caches()
            gc.collect()
            gc.disable()
            start = time.process_time()
            fn()
            best[name] = min(best[name], time.process_time() - start)
            gc.enable()
    return best


def import_seconds(rounds: int) -> dict[str, float]:
    """CPU seconds of a process that imports, the smallest of several."""
    code = "import time, {}; print(time.process_time())"
    run = lambda names: float(subprocess.run([sys.executable, "-c", code.format(names)], capture_output=True).stdout)
    return {names: min(run(names) for _ in range(rounds)) for names in ("jax, optax", "jax, optax, jlora")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compile", action="store_true", help="also lower and compile the step")
    args = parser.parse_args()

    console = Console(width=120)
    config = llama.Config(dim=args.dim, ffn=2 * args.dim, layers=args.layers, heads=4, vocab=256)
    console.print(f"{step.versions('jax', 'jaxlib', 'flax')}; {config}", highlight=False)
    table = Table(title="CPU seconds, smallest of several")
    for column in ("model", "what", "bare", "lifted", "by hand", "lifted / bare", "lifted / by hand"):
        table.add_column(column, justify="left" if column in ("model", "what") else "right")

    def row(model: str, what: str, best: dict[str, float]) -> None:
        cells = [f"{best[name]:.3f}" if name in best else "-" for name in ("bare", "lifted", "by hand")]
        ratios = [f"{best['lifted'] / best[name]:.2f}" if name in best else "-" for name in ("bare", "by hand")]
        table.add_row(model, what, *cells, *ratios)

    for model, (forward, params, by_hand) in models(config).items():
        fns = functions(forward, params, by_hand)
        trace = lambda fn, operands: lambda: jax.make_jaxpr(fn)(*operands)
        row(model, "trace forward", fresh({name: trace(*f) for name, f in fns.items()}, args.rounds))
        steps = {name: (jax.value_and_grad(fn), operands) for name, (fn, operands) in fns.items()}
        row(model, "trace step", fresh({name: trace(*f) for name, f in steps.items()}, args.rounds))
        if args.compile:
            lower = lambda fn, operands: lambda: jax.jit(fn).lower(*operands)
            row(model, "trace + lower step", fresh({name: lower(*f) for name, f in steps.items()}, args.rounds))
            full = lambda fn, operands: lambda: jax.jit(fn).lower(*operands).compile()
            row(model, "all, compile too", fresh({name: full(*f) for name, f in steps.items()}, 1))
        table.add_section()
    console.print(table)
    seconds = import_seconds(args.rounds)
    for names, value in seconds.items():
        console.print(f"import {names}: {value:.3f} s", highlight=False)


if __name__ == "__main__":
    main()
