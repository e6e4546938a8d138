"""One training step of LoRA, beside what it could cost at best and what the alternatives cost.

    python benchmarks/step.py                                    # 33.7 M parameters, 1024 tokens, r=16, float32
    python benchmarks/step.py --tokens 512 --rank 8 --rounds 20 --methods jlora floor hand
    python benchmarks/step.py --scan                             # layers stacked and scanned

Every contender takes the same step on the same weights and batch: forward, backward, AdamW. They take turns, a step
each a round, so that what disturbs the machine disturbs all of them. The figure to trust is the smallest CPU time.

| contender    | what it is                                                                                      |
|--------------|-------------------------------------------------------------------------------------------------|
| floor        | the model frozen: gradient to an offset on the embeddings, so through every layer, of no weight |
| jlora        | the model unmodified, adapted by `jlora.adapt` and lifted                                        |
| hand         | LoRA written into the model, with a gradient written by hand (2-D, flattened)                   |
| hand-autodiff| LoRA written into the model as 2-D products and differentiated by JAX                           |
| materialized | W + s A B formed each step                                                                      |
| full         | all weights trained                                                                             |
| peft         | PEFT on torch, the same Llama from transformers; left out where they are not installed          |

FLOPs and temporary memory are of the compiled program, exact and the same on every machine with the same XLA. (XLA
counts the body of a scan once: with --scan the FLOPs are those of the unrolled model.) The process has memory in pages
of 2 MB, as that of `jlora finetune` has (docs/how-to/cpu.md); GLIBC_TUNABLES=glibc.malloc.hugetlb=0 keeps it from that.
"""

import argparse
import contextlib
import functools
import importlib.metadata
import importlib.util
import os
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import llama
import optax
from rich.console import Console
from rich.table import Table

import jlora
from jlora.train.huge_pages import restart_with_huge_pages

LEARNING_RATE = 1e-4


class Contender(NamedTuple):
    """`loss(trainable, frozen, ids)`, and the trees to start from."""

    loss: Callable[[Any, Any, Any], Any]
    trainable: Any
    frozen: Any


# The hand-written layer: what one would put into a model that is to be trained by LoRA and nothing else.


def lora_autodiff(x, w, a, b, scale):
    x2 = x.reshape(-1, x.shape[-1])
    return (x2 @ w + (scale * (x2 @ a)) @ b).reshape(*x.shape[:-1], -1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def lora_by_hand(x, w, a, b, scale):
    return _lora_forward(x, w, a, b, scale)[0]


def _lora_forward(x, w, a, b, scale):
    x2 = x.reshape(-1, x.shape[-1])
    h = scale * (x2 @ a)
    return (x2 @ w + h @ b).reshape(*x.shape[:-1], -1), (x, w, a, b, h)


def _lora_backward(scale, residuals, dy):
    x, w, a, b, h = residuals
    x2, dy2 = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
    ds = scale * (dy2 @ b.T)
    da = jax.lax.optimization_barrier(ds.T @ x2).T  # several times faster on CPU than x2.T @ ds
    return (dy2 @ w.T + ds @ a.T).reshape(x.shape), None, da, h.T @ dy2


lora_by_hand.defvjp(_lora_forward, _lora_backward)


def with_pairs(params, pairs):
    """The parameters with (w, a, b) in the place of each w that has a pair (a, b) at its path."""
    name = lambda keys: jax.tree_util.keystr(keys, simple=True, separator="/")
    put = lambda keys, w: (w, *pairs[name(keys)]) if name(keys) in pairs else w
    return jax.tree_util.tree_map_with_path(put, params)


def contenders(forward: Callable, params: Any, ids: Any, rank: int) -> dict[str, Contender]:
    """All that run in JAX, on the same parameters."""
    loss = lambda params, ids, **kwargs: llama.cross_entropy(forward(params, ids, **kwargs), ids)
    adapted = jlora.adapt(params, jlora.LoRA(rank, alpha=2 * rank), key=jax.random.key(1), fn=forward, args=(ids,))
    lifted = jlora.lift(forward, on_materialize="error")
    pairs = {path: (f.a, f.b) for path, f in adapted.trainable.items()}
    scale = 2.0

    def written_in(linear):
        return Contender(lambda pairs, params, ids: loss(with_pairs(params, pairs), ids, linear=linear), pairs, params)

    return {
        "floor": Contender(
            lambda offset, params, ids: loss(params, ids, offset=offset), jnp.zeros(params["norm"].shape), params
        ),
        "jlora": Contender(
            lambda trainable, adapted, ids: llama.cross_entropy(lifted(adapted.bind(trainable), ids), ids),
            adapted.trainable,
            adapted.replace(trainable=None),
        ),
        "hand": written_in(lambda x, wab: lora_by_hand(x, *wab, scale)),
        "hand-autodiff": written_in(lambda x, wab: lora_autodiff(x, *wab, scale)),
        "materialized": written_in(lambda x, wab: x @ (wab[0] + scale * wab[1] @ wab[2])),
        "full": Contender(lambda params, _, ids: loss(params, ids), params, ()),
    }


def compile_step(contender: Contender, ids: Any) -> tuple[Any, Any]:
    """(compiled step, its state): `state, loss = step(state, frozen, ids)`. The state is donated."""
    tx = optax.adamw(LEARNING_RATE)

    def step(state, frozen, ids):
        trainable, opt_state = state
        loss, grads = jax.value_and_grad(contender.loss)(trainable, frozen, ids)
        updates, opt_state = tx.update(grads, opt_state, trainable)
        return (optax.apply_updates(trainable, updates), opt_state), loss

    state = jax.tree.map(jnp.copy, (contender.trainable, tx.init(contender.trainable)))
    return jax.jit(step, donate_argnums=0).lower(state, contender.frozen, ids).compile(), state


class Runner:
    """A contender ready to run: `step()` takes one and waits for it."""

    def __init__(self, contender: Contender, ids: Any):
        self.compiled, self.state = compile_step(contender, ids)
        self.frozen, self.ids = contender.frozen, ids
        self.temporary = self.compiled.memory_analysis().temp_size_in_bytes
        self.flops = self.compiled.cost_analysis()["flops"]

    def step(self) -> float:
        self.state, loss = self.compiled(self.state, self.frozen, self.ids)
        return float(loss)


def torch_model(config: llama.Config, params: Any) -> Any:
    """The same Llama from transformers, with the same weights."""
    import numpy as np
    import torch
    import transformers

    torch.set_num_threads(os.cpu_count())
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=config.vocab,
            hidden_size=config.dim,
            intermediate_size=config.ffn,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.heads,
            rms_norm_eps=1e-5,
            use_cache=False,
            attn_implementation="sdpa",
        )
    )
    state = {"model.embed_tokens.weight": params["embed"], "model.norm.weight": params["norm"]}
    state["lm_head.weight"] = params["lm_head"].T
    for i, layer in enumerate(params["layers"]):
        at = f"model.layers.{i}."
        state[at + "input_layernorm.weight"] = layer["attention_norm"]
        state[at + "post_attention_layernorm.weight"] = layer["mlp_norm"]
        for j, name in enumerate(llama.LINEAR):
            state[f"{at}{'self_attn' if j < 4 else 'mlp'}.{name}.weight"] = layer[name].T
    model.load_state_dict({name: torch.from_numpy(np.array(w)) for name, w in state.items()})
    return model


class Peft:
    """The same step by PEFT on torch, from the same weights."""

    flops = temporary = None

    def __init__(self, config: llama.Config, params: Any, ids: Any, rank: int):
        import numpy as np
        import peft
        import torch

        model = torch_model(config, params)
        self.model = peft.get_peft_model(
            model, peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(llama.LINEAR), lora_dropout=0.0)
        )
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=1e-4)  # optax's default decay
        self.ids = torch.from_numpy(np.array(ids)).long()

    def step(self) -> float:
        loss = self.model(input_ids=self.ids, labels=self.ids).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()


def measure(runners: dict[str, Any], rounds: int) -> dict[str, dict[str, list[float]]]:
    """CPU and wall seconds of every step, the contenders taking turns. Also their losses."""
    out = {name: {"cpu": [], "wall": [], "loss": [runner.step()]} for name, runner in runners.items()}
    for _ in range(rounds):
        for name, runner in runners.items():
            time.sleep(0.02)  # the threads of the step before (OpenMP's) still spin for a few milliseconds
            cpu, wall = time.process_time(), time.perf_counter()
            loss = runner.step()
            out[name]["cpu"].append(time.process_time() - cpu)
            out[name]["wall"].append(time.perf_counter() - wall)
            out[name]["loss"].append(loss)
    return out


def table(runners: dict[str, Any], flops: dict[str, float | None], times: dict[str, dict[str, list[float]]]) -> Table:
    """A row for each contender; ratios are jlora's smallest CPU time, FLOPs and memory over the row's."""
    out = Table(title="One training step")
    for column in ("", "CPU s min", "median", "wall s min", "median", "GFLOP", "temporary MB", "loss, first .. last"):
        out.add_column(column, justify="left" if not column else "right")
    for column in ("jlora / it: CPU", "FLOPs", "memory"):
        out.add_column(column, justify="right", style="bold")
    show = lambda value, form, by=1.0: "-" if value is None else format(value / by, form)
    ratio = lambda ours, theirs: "-" if ours is None or theirs is None else f"{ours / theirs:.3f}"
    ours, our_flops = runners.get("jlora"), flops.get("jlora")
    for name, runner in runners.items():
        cpu, wall, loss = (times[name][k] for k in ("cpu", "wall", "loss"))
        out.add_row(
            name,
            *(f"{f(v):.3f}" for v in (cpu, wall) for f in (min, statistics.median)),
            show(flops[name], ".1f", 1e9),
            show(runner.temporary, ".1f", 1e6),
            f"{loss[0]:.4f} .. {loss[-1]:.4f}",
            ratio(min(times["jlora"]["cpu"]) if ours else None, min(cpu)),
            ratio(our_flops, flops[name]),
            ratio(ours and ours.temporary, runner.temporary),
        )
    return out


def versions(*names: str) -> str:
    found = []
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found.append(f"{name} {importlib.metadata.version(name)}")
    return ", ".join(found)


def main() -> None:
    names = ("floor", "jlora", "hand", "hand-autodiff", "materialized", "full", "peft")
    default = llama.Config()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1024, help="tokens a step, in sequences of --length")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=10, help="steps of each contender")
    parser.add_argument("--dim", type=int, default=default.dim)
    parser.add_argument("--layers", type=int, default=default.layers)
    parser.add_argument("--ffn", type=int, default=default.ffn)
    parser.add_argument("--vocab", type=int, default=default.vocab)
    parser.add_argument("--scan", action="store_true", help="stack the layers and scan over them")
    parser.add_argument("--remat", action="store_true", help="checkpoint every block")
    parser.add_argument("--methods", nargs="+", choices=names, default=names)
    args = parser.parse_args()
    if args.tokens % args.length:
        parser.error(f"--tokens {args.tokens} is not a multiple of --length {args.length}")

    console = Console(width=150)
    config = llama.Config(args.dim, args.ffn, args.layers, default.heads, args.vocab)
    params = llama.init(config, jax.random.key(0))
    ids = jax.random.randint(jax.random.key(2), (args.tokens // args.length, args.length), 0, config.vocab)
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    console.print(
        f"{platform.machine()}, {os.cpu_count()} cores, {jax.devices()[0].platform}, "
        f"{os.environ.get('GLIBC_TUNABLES', 'ordinary pages')}; "
        f"{versions('jax', 'jaxlib', 'torch', 'peft', 'transformers')}\n"
        f"{count / 1e6:.1f} M parameters, {ids.shape[0]} x {ids.shape[1]} tokens, float32, r={args.rank} on "
        f"{len(llama.LINEAR) * config.layers} linears, layers {'scanned' if args.scan else 'unrolled'}"
        f"{', remat' if args.remat else ''}",
        highlight=False,
    )

    forward = functools.partial(llama.forward, heads=config.heads, remat=args.remat)
    unrolled = contenders(forward, params, ids, args.rank)
    chosen = contenders(forward, llama.stack(params), ids, args.rank) if args.scan else unrolled
    runners: dict[str, Any] = {}
    for name in names:
        if name not in args.methods:
            continue
        if name != "peft":
            runners[name] = Runner(chosen[name], ids)
        elif all(importlib.util.find_spec(package) for package in ("torch", "peft", "transformers")):
            runners[name] = Peft(config, params, ids, args.rank)
        else:
            console.print("peft: left out; it wants `pip install torch peft transformers`.")
    flops = {name: runner.flops for name, runner in runners.items()}
    if args.scan:
        for name in flops.keys() - {"peft"}:
            flops[name] = compile_step(unrolled[name], ids)[0].cost_analysis()["flops"]
    console.print(table(runners, flops, measure(runners, args.rounds)))


if __name__ == "__main__":
    restart_with_huge_pages()
    main()
