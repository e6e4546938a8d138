"""Layers of one x (queries, keys and values; gate and up): frozen, adapted one by one, and adapted together.

    python benchmarks/lora_linears.py                        # timed here: half a minute on two cores
    python benchmarks/lora_linears.py --tpu v5p:2x2x1        # compiled for a TPU that need not be there; wants libtpu

Forward and backward of x [tokens, in] through all layers, with the gradients of the factors. Timed in float32 on the
layers of `benchmarks/step.py`, CPU seconds, the smallest of rounds in which all take turns. For a TPU in bfloat16 with
float32 factors, on those of an 8B Llama; seconds and bytes are the compiler's own estimates of the program it made.
"""

import argparse

import jax
import jax.numpy as jnp
from lora_linear import measure
from memory import device_of

from jlora.kernels import lora_linear, lora_linears

SCALE = 2.0
LAYERS = {
    "cpu": {"q, k, v": (512, (512, 512, 512)), "gate, up": (512, (1376, 1376))},
    "tpu": {"q, k, v": (4096, (4096, 1024, 1024)), "gate, up": (4096, (14336, 14336))},
}


def step(layers, dys, *operands):
    """The results and the gradients."""
    ys, pullback = jax.vjp(layers, *operands)
    return ys, pullback(dys)


def frozen(x, ws, pairs, dys):
    return step(lambda x: [x @ w for w in ws], dys, x)


def one_by_one(x, ws, pairs, dys):
    layer = lambda x, w, pair: lora_linear(x, w, *pair, SCALE)
    return step(lambda x, pairs: [layer(x, w, pair) for w, pair in zip(ws, pairs, strict=True)], dys, x, pairs)


def together(x, ws, pairs, dys):
    scales = [SCALE] * len(ws)
    return step(lambda x, pairs: list(lora_linears(x, ws, *zip(*pairs, strict=True), scales)), dys, x, pairs)


FORMS = {"frozen": frozen, "one by one": one_by_one, "together": together}


def shapes(tokens: int, n_in: int, outs: tuple[int, ...], rank: int, dtype: str, sharding=None) -> tuple:
    """x, the weights, the pairs of factors and the gradients of the results, as shapes."""
    leaf = lambda *shape, dtype=dtype: jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=sharding)
    factor = lambda *shape: leaf(*shape, dtype="float32")
    ws, dys = [leaf(n_in, out) for out in outs], [leaf(tokens, out) for out in outs]
    return leaf(tokens, n_in), ws, [(factor(n_in, rank), factor(rank, out)) for out in outs], dys


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, help="(default: 1024, for a TPU 8192)")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--tpu", metavar="TOPOLOGY", help="compile for it instead of timing")
    args = parser.parse_args()

    print("| layers | | seconds | / frozen | GB accessed | temporary MB |\n|---|---|---|---|---|---|")
    sharding = jax.sharding.SingleDeviceSharding(device_of("tpu", args.tpu)) if args.tpu else None
    tokens, dtype = args.tokens or (8192 if args.tpu else 1024), "bfloat16" if args.tpu else "float32"
    for name, (n_in, outs) in LAYERS["tpu" if args.tpu else "cpu"].items():
        operands = shapes(tokens, n_in, outs, args.rank, dtype, sharding)
        compiled = {form: jax.jit(f).lower(*operands).compile() for form, f in FORMS.items()}
        costs = {form: program.cost_analysis() for form, program in compiled.items()}
        if args.tpu:
            seconds = {form: cost["optimal_seconds"] for form, cost in costs.items()}
        else:
            leaves, treedef = jax.tree.flatten(operands)
            keys = jax.random.split(jax.random.key(0), len(leaves))
            arrays = [jax.random.normal(k, leaf.shape) / leaf.shape[0] for k, leaf in zip(keys, leaves, strict=True)]
            times = measure(list(compiled.values()), jax.tree.unflatten(treedef, arrays), args.rounds)
            seconds = {form: cpu for form, (cpu, _) in zip(compiled, times, strict=True)}
        for form, program in compiled.items():
            memory = program.memory_analysis().temp_size_in_bytes / 1e6
            ratio = seconds[form] / seconds["frozen"]
            accessed = costs[form]["bytes accessed"] / 1e9
            print(f"| {name} | {form} | {seconds[form]:.5f} | {ratio:.3f} | {accessed:.3f} | {memory:.1f} |")


if __name__ == "__main__":
    main()
