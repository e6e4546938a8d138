"""What optimizers of projected gradients cost: bytes of state, time of an update, temporary memory of a step.

    python benchmarks/optim.py                      # state on the matrices of Llama 7B, rank 1024, bfloat16
    python benchmarks/optim.py --rank 128 --dtype float32
    python benchmarks/optim.py time --rank 128      # of an update, on a Llama of 33.7 M parameters, float32
    python benchmarks/optim.py memory --rank 128    # of a step by layers and of an ordinary one, same Llama

The embedding and the head take the inner optimizer's ordinary step, as in GaLore's code. State is from shapes alone,
nothing is allocated; a saving is of the state only. Times are CPU seconds, the smallest of rounds in which all take
turns; that of an update is amortised, (one with a refresh + (period - 1) without) / period, and that of a step adds the
gradient of 4 x 256 tokens. Temporary memory is of the compiled step, whose parameters and state are donated.
"""

import argparse
import functools
import time

import jax
import jax.numpy as jnp
import llama
import optax

import jlora
from jlora.train.huge_pages import restart_with_huge_pages

WHERE = "layers/**"


def llama_7b(dtype: str) -> dict:
    """The parameters, stacked over the layers."""
    n, d, hidden, vocab = 32, 4096, 11008, 32000
    leaf = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))
    layers = {name: leaf(n, d, d) for name in ("q", "k", "v", "o")}
    layers |= {"gate": leaf(n, d, hidden), "up": leaf(n, d, hidden), "down": leaf(n, hidden, d)}
    # Lists of vectors: a stack [layers, d] would look like one matrix.
    norms = {f"norm_{i}": leaf(d) for i in range(2 * n + 1)}
    return {"layers": layers, "norms": norms, "embedding": leaf(vocab, d), "head": leaf(d, vocab)}


def methods(rank: int) -> dict[str, optax.GradientTransformation]:
    adam, optim = optax.adam(1e-3), jlora.optim
    eight = optim.quantized_state(adam)
    return {
        "adam": adam,
        "adam, 8 bits": eight,
        "galore": optim.galore(adam, rank, where=WHERE),
        "galore, larger side": optim.galore(adam, rank, where=WHERE, side="larger"),
        "galore, both sides": optim.galore(adam, rank, where=WHERE, side="both"),
        "galore, 8 bits": optim.galore(eight, rank, where=WHERE),
        "galore, 8 bits, projector too": optim.galore(eight, rank, where=WHERE, projector_bits=8),
        "galore, 8 bits, projector too, larger side": optim.galore(
            eight, rank, where=WHERE, projector_bits=8, side="larger"
        ),
        "galore, 8 bits, projector of 4": optim.galore(eight, rank, where=WHERE, projector_bits=4),
        "fira": optim.fira(1e-3, rank, where=WHERE),
        "apollo": optim.apollo(1e-3, rank, where=WHERE),
        "apollo mini": optim.apollo(1e-3, 1, per="tensor", scale=128.0, where=WHERE),
        "dct": optim.dct(adam, rank, where=WHERE),
        "dct, error feedback": optim.dct(adam, rank, where=WHERE, error_feedback=True),
        "trion": optim.trion(1e-3, rank, where=WHERE),
        "lisa, 2 of 32 layers": optim.lisa(adam, 2),
        "owlore, 5 of 32 layers": optim.owlore(adam, rank, active=5, where=WHERE),
    }


def state_bytes(tx: optax.GradientTransformation, params: dict) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(jax.eval_shape(tx.init, params)))


def show_state(rank: int, dtype: str) -> None:
    params, base = llama_7b(dtype), None
    print("| optimizer | GB of state | saved |\n|---|---|---|")
    for name, tx in methods(rank).items():
        size = state_bytes(tx, params)
        base = base or size
        print(f"| {name} | {size / 1e9:.2f} | {1 - size / base:.1%} |")


def loss(params: dict, ids: jax.Array, remat: bool = False) -> jax.Array:
    logits = llama.forward(params, ids, heads=llama.Config().heads, remat=remat)
    return llama.cross_entropy(logits, ids)


def timed(rank: int) -> dict[str, tuple[optax.GradientTransformation, int]]:
    """The optimizers whose time is taken, and steps between their refreshes."""
    adam, optim = optax.adamw(1e-3), jlora.optim
    galore = lambda inner=adam, **options: (optim.galore(inner, rank, where=WHERE, **options), 200)
    return {
        "adamw": (adam, 1),
        "galore": galore(),
        "galore, subspace": galore(solver="subspace"),
        "galore, 8 bits": galore(optim.quantized_state(adam), solver="subspace"),
        "fira, subspace": (optim.fira(1e-3, rank, where=WHERE, solver="subspace"), 200),
        "dct, every step": (optim.dct(adam, rank, where=WHERE), 1),
        "dct, every 200": (optim.dct(adam, rank, where=WHERE, period=200), 200),
    }


def cpu_seconds(fn, *args) -> float:
    began = time.process_time()
    jax.block_until_ready(fn(*args))
    return time.process_time() - began


def show_time(rank: int, rounds: int) -> None:
    params = llama.stack(llama.init(llama.Config(), jax.random.key(0)))
    ids = jax.random.randint(jax.random.key(1), (4, 256), 0, llama.Config().vocab)
    gradient = jax.jit(jax.grad(loss))
    of_gradient = min(cpu_seconds(gradient, params, ids) for _ in range(rounds + 1))
    grads = gradient(params, ids)
    print(f"gradient {of_gradient:.2f} s\n")
    print("| optimizer | refresh s | otherwise s | update / adamw's | step / adamw's |\n|---|---|---|---|---|")
    base = None
    for name, (tx, period) in timed(rank).items():

        @jax.jit
        def update(grads, state, params, tx=tx):
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        first = jax.jit(tx.init)(params)
        second = update(grads, first, params)[1]
        fewest = lambda state, times, update=update: min(
            cpu_seconds(update, grads, state, params) for _ in range(times)
        )
        between = fewest(second, 10 * rounds)
        refresh = fewest(first, rounds) if period > 1 else between
        seconds = (refresh + (period - 1) * between) / period
        base = base or seconds
        ratios = f"{seconds / base:.2f} | {(of_gradient + seconds) / (of_gradient + base):.3f}"
        print(f"| {name} | {refresh:.3f} | {between:.3f} | {ratios} |", flush=True)


def show_memory(rank: int) -> None:
    config = llama.Config()
    params = jax.eval_shape(lambda: llama.stack(llama.init(config, jax.random.key(0))))
    ids = jax.ShapeDtypeStruct((1, 256), jnp.int32)
    functions = dict(
        embed=lambda rest, ids: rest["embed"][ids],
        block=lambda layer, x, ids, i: llama.block(x, layer, heads=config.heads),
        head=lambda rest, x, ids: llama.cross_entropy(llama.logits(rest, x), ids),
    )

    def temporary(step, init) -> float:
        args = (params, jax.eval_shape(init, params), ids)
        return jax.jit(step, donate_argnums=(0, 1)).lower(*args).compile().memory_analysis().temp_size_in_bytes / 1e6

    adam = optax.adamw(1e-3)
    projected = functools.partial(jlora.optim.galore, adam, rank, solver="subspace")
    print("| optimizer | ordinary step, MB | by layers, MB | ratio |\n|---|---|---|---|")
    for name, whole, inner in (
        ("adamw", adam, adam),
        ("galore", projected(where=WHERE), projected(where="**/*_proj")),
        (
            "galore, 8 bits",
            *(
                jlora.optim.galore(jlora.optim.quantized_state(adam), rank, solver="subspace", where=where)
                for where in (WHERE, "*_proj")
            ),
        ),
    ):

        def ordinary(params, state, ids, tx=whole):
            value, grads = jax.value_and_grad(functools.partial(loss, remat=True))(params, ids)
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state, value

        tx = jlora.optim.layerwise(inner, rest=adam, **functions)
        together, alone = temporary(ordinary, whole.init), temporary(tx.step, tx.init)
        print(f"| {name} | {together:.0f} | {alone:.0f} | {alone / together:.2f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", default="state", choices=("state", "time", "memory"))
    parser.add_argument("--rank", type=int, help="(default: 1024 for state, 128 for the others, whose model is small)")
    parser.add_argument("--dtype", default="bfloat16", help="of the weights, for state")
    parser.add_argument("--rounds", type=int, default=5, help="for time")
    args = parser.parse_args()
    args.rank = args.rank or (1024 if args.what == "state" else 128)
    if args.what == "state":
        show_state(args.rank, args.dtype)
    elif args.what == "time":
        show_time(args.rank, args.rounds)
    else:
        show_memory(args.rank)


if __name__ == "__main__":
    restart_with_huge_pages()
    main()
