"""Seconds and memory of every start of LoRA (`jlora.init`), beside a training step, their passes, and PEFT's.

    python benchmarks/init.py                         # 33.7 M parameters, 8 batches of 1024 tokens, r=16, float32
    python benchmarks/init.py --dim 256 --ffn 688 --layers 4 --batches 4
    python benchmarks/init.py --svd 4096              # the decomposition of one matrix alone: in full and iterated

Every row is a process of its own, so that its peak memory (resident) is its own. "calibrate" is the pass over the
batches, "/ passes" that over the same batches' forward passes (of inputs) or forward and backward passes to the same
weights (of gradients), compiled alike; "start" is everything else until there is an adapter. All of them the second
time, with "compile" what the first took more. PEFT's rows are its own preparation and `get_peft_model`, and are left
out where it is not installed.
"""

import argparse
import dataclasses
import importlib.util
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import llama
import optax
import step
from rich.console import Console
from rich.table import Table

import jlora
from jlora import init

STARTS: dict[str, Any] = {
    "default": None,
    "orthogonal": init.Orthogonal(),
    "olora": init.OLoRA(),
    "pissa": init.PiSSA(),
    "pissa_niter_4": init.PiSSA(iterations=4),
    "pissa_niter_16": init.PiSSA(iterations=16),
    "milora": init.MiLoRA(),
    "eva": init.EVA(),
    "corda": init.CorDA(),
    "lora_ga": init.LoRAGA(),
    "lora_sb": init.LoRASB(1e-4),
}
PEFT = ("default", "orthogonal", "olora", "pissa", "pissa_niter_4", "pissa_niter_16", "eva", "corda", "lora_ga")


def setup(args: argparse.Namespace) -> tuple[llama.Config, Any, list[Any]]:
    config = llama.Config(args.dim, args.ffn, args.layers, vocab=args.vocab)
    params = llama.init(config, jax.random.key(0))
    draw = lambda i: jax.random.randint(jax.random.key(i), (args.tokens // args.length, args.length), 0, config.vocab)
    return config, params, [draw(i) for i in range(args.batches)]


def seconds(fn: Callable[[], Any]) -> tuple[float, Any]:
    began = time.perf_counter()
    out = jax.block_until_ready(fn())
    return time.perf_counter() - began, out


def twice(fn: Callable[[], Any]) -> tuple[float, float, Any]:
    """(the first time less the second, the second, the result)."""
    first, _ = seconds(fn)
    second, out = seconds(fn)
    return first - second, second, out


def of_jlora(name: str, args: argparse.Namespace) -> dict[str, float]:
    config, params, batches = setup(args)
    loss = lambda p, ids: llama.cross_entropy(llama.forward(p, ids, heads=config.heads), ids)
    targets = [f"**/{name}" for name in llama.LINEAR]
    start, rank = STARTS[name], args.rank
    method = jlora.LoRAXS(rank, start=start) if name == "lora_sb" else jlora.LoRA(rank, 2.0 * rank, start=start)
    out: dict[str, float] = {}
    stats, usage = None, jlora.usage(loss, params, batches[0])
    if method.needs:
        run = lambda: jlora.calibrate(loss, params, batches, method, targets, usage=usage)
        compiled, out["calibrate"], stats = twice(run)
        out["compile"] = compiled
        chosen = {i: {name: layer[name] for name in llama.LINEAR} for i, layer in enumerate(params["layers"])}

        def of_chosen(chosen, params, ids):
            layers = [layer | chosen[i] for i, layer in enumerate(params["layers"])]
            return loss(params | {"layers": layers}, ids)

        of_one = jax.jit(jax.grad(of_chosen) if "g" in method.needs else of_chosen)
        sums = jax.jit(lambda a, b: jax.tree.map(jnp.add, a, b), donate_argnums=0)

        def passes():
            total = of_one(chosen, params, batches[0])
            for ids in batches[1:]:
                total = sums(total, of_one(chosen, params, ids))
            return total

        out["passes"] = twice(passes)[1]
    make = lambda: jlora.adapt(params, method, targets, usage=usage, key=jax.random.key(0), stats=stats).trainable
    compiled, out["start"], _ = twice(make)
    out["compile"] = out.get("compile", 0.0) + compiled
    if name == "default":
        adapted = jlora.adapt(params, method, targets, usage=usage, key=jax.random.key(0))
        tx, lifted = optax.adamw(1e-4), jlora.lift(loss)

        @jax.jit
        def train(trainable, state, fixed, ids):
            grads = jax.grad(lambda t: lifted(fixed.bind(t), ids))(trainable)
            updates, state = tx.update(grads, state, trainable)
            return optax.apply_updates(trainable, updates), state

        fixed, state = adapted.replace(trainable={}), tx.init(adapted.trainable)
        steps = [twice(lambda: train(adapted.trainable, state, fixed, batches[0]))[1] for _ in range(5)]
        out["step"] = min(steps)
    return out


def of_peft(name: str, args: argparse.Namespace) -> dict[str, float]:
    import numpy as np
    import peft
    import torch
    from peft.tuners.lora import corda, eva, loraga

    config, params, batches = setup(args)
    model = step.torch_model(config, params)
    batches = [torch.from_numpy(np.array(ids)).long() for ids in batches]
    kinds = {"lora_ga": peft.LoraGAConfig, "eva": peft.EvaConfig, "corda": peft.tuners.lora.config.CordaConfig}
    own = {f"{name}_config": kinds[name]()} if name in kinds else {}
    if name == "eva":  # it goes over the batches until components stay, which those of random weights never do
        own["eva_config"].tau = -1.0
    kind = True if name == "default" else name
    options = dict(r=args.rank, lora_alpha=2 * args.rank, target_modules=list(llama.LINEAR), init_lora_weights=kind)
    settings = peft.LoraConfig(**options, **own)
    out: dict[str, float] = {}

    def forward() -> None:
        with torch.no_grad():
            for ids in batches:
                for row in ids:  # CorDA's hook takes one sequence at a time
                    model(input_ids=row[None])

    def backward() -> None:
        for ids in batches:
            model(input_ids=ids, labels=ids).loss.backward()

    began = time.perf_counter()
    if name == "corda":
        corda.preprocess_corda(model, settings, run_model=forward)
    if name == "lora_ga":
        loraga.preprocess_loraga(model, settings, backward)
    if own and name != "eva":
        out["calibrate"] = time.perf_counter() - began
        began = time.perf_counter()
    adapted = peft.get_peft_model(model, settings, low_cpu_mem_usage=name == "eva")
    if name == "eva":
        rows = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in batches]
        eva.initialize_lora_eva_weights(adapted, rows, show_progress_bar=False)
    out["start"] = time.perf_counter() - began
    return out


def child(args: argparse.Namespace) -> None:
    whose, name = args.one
    out = (of_jlora if whose == "jlora" else of_peft)(name, args)
    print(json.dumps(out | {"peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}))


def decompositions(n: int, rank: int) -> None:
    """One n x n matrix whose singular values fall like those of trained weights do: slowly."""
    key = jax.random.key(0)
    q1, q2 = (jnp.linalg.qr(jax.random.normal(k, (n, n)))[0] for k in jax.random.split(key))
    s = (1.0 + jnp.arange(n)) ** -0.5
    w = (q1 * s) @ q2.T
    best = float(jnp.linalg.norm(s[rank:]))
    out = Table(title=f"PiSSA of {n} x {n}, rank {rank}")
    for column in ("", "s", "full / it", "residual over the best"):
        out.add_column(column, justify="left" if not column else "right")
    full = None
    for start in (init.PiSSA(), *(init.PiSSA(iterations=k) for k in (2, 4, 16))):
        fn = jax.jit(lambda w, start=start: start.pair(key, w, rank, 1.0, None))
        a, b = jax.block_until_ready(fn(w)) if start.iterations else (None, None)
        taken, (a, b) = seconds(lambda fn=fn: fn(w))  # in full it takes long enough without a first time
        full = taken if full is None else full
        off = float(jnp.linalg.norm(w - a @ b)) / best
        out.add_row(str(start), f"{taken:.2f}", f"{full / taken:.1f}", f"{off:.5f}")
    Console().print(out)


def main() -> None:
    default = llama.Config()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1024, help="tokens a batch, in sequences of --length")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--batches", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)
    for field in ("dim", "ffn", "layers", "vocab"):
        parser.add_argument(f"--{field}", type=int, default=getattr(default, field))
    parser.add_argument("--starts", nargs="+", choices=STARTS, default=list(STARTS))
    parser.add_argument("--svd", type=int, metavar="N", help="time the decomposition of one N x N matrix and stop")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        return child(args)
    if args.svd:
        return decompositions(args.svd, args.rank)
    console = Console()
    config = dataclasses.replace(default, dim=args.dim, ffn=args.ffn, layers=args.layers, vocab=args.vocab)
    console.print(f"{config}, {args.batches} batches of {args.tokens} tokens, rank {args.rank}, {os.cpu_count()} CPUs")
    console.print(step.versions("jax", "jaxlib", "torch", "peft", "transformers"))
    has_peft = all(importlib.util.find_spec(package) for package in ("torch", "peft", "transformers"))
    rows = [("jlora", name) for name in args.starts]
    rows += [("peft", name) for name in args.starts if has_peft and name in PEFT]
    results = {}
    for row in rows:
        done = subprocess.run([sys.executable, *sys.argv, "--one", *row], capture_output=True, text=True)
        if done.returncode:
            console.print(f"{' '.join(row)}: {done.stderr.strip().splitlines()[-1]}")
            continue
        results[row] = json.loads(done.stdout.strip().splitlines()[-1])
        console.print(" ".join(row), {name: round(value, 3) for name, value in results[row].items()})
    one_step = results.get(("jlora", "default"), {}).get("step")
    out = Table(title="Starts of LoRA: wall seconds" + (f"; a training step takes {one_step:.3f}" if one_step else ""))
    columns = ("", "calibrate", "/ passes", "start", "all / step", "compile", "peak MB")
    for column in (*columns, "PEFT s", "PEFT / it", "PEFT MB"):
        out.add_column(column, justify="left" if not column else "right")
    show = lambda value, form=".2f": "-" if value is None else format(value, form)
    for name in args.starts:
        if ("jlora", name) not in results:
            continue
        own, its = results["jlora", name], results.get(("peft", name), {})
        total = own["start"] + own.get("calibrate", 0.0)
        theirs = its["start"] + its.get("calibrate", 0.0) if its else None
        out.add_row(
            name,
            show(own.get("calibrate")),
            show(own["calibrate"] / own["passes"] if "passes" in own else None),
            show(own["start"]),
            show(total / one_step if one_step else None, ".1f"),
            show(own["compile"]),
            show(own["peak"], ".0f"),
            show(theirs),
            show(theirs / total if theirs else None, ".1f"),
            show(its.get("peak"), ".0f"),
        )
    console.print(out)


if __name__ == "__main__":
    main()
