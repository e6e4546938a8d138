"""Bytes of optimizer state on the matrices of Llama 7B, per method, against Adam: from shapes alone, nothing allocated.

    python benchmarks/optim.py                      # rank 1024, bfloat16
    python benchmarks/optim.py --rank 128 --dtype float32

The embedding and the head take the inner optimizer's ordinary step, as in GaLore's code. A saving is of the state only.
"""

import argparse

import jax
import jax.numpy as jnp
import optax

import jlora

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
    return {
        "adam": adam,
        "galore": optim.galore(adam, rank, where=WHERE),
        "galore, larger side": optim.galore(adam, rank, where=WHERE, side="larger"),
        "galore, both sides": optim.galore(adam, rank, where=WHERE, side="both"),
        "fira": optim.fira(1e-3, rank, where=WHERE),
        "apollo": optim.apollo(1e-3, rank, where=WHERE),
        "apollo mini": optim.apollo(1e-3, 1, per="tensor", scale=128.0, where=WHERE),
        "dct": optim.dct(adam, rank, where=WHERE),
        "dct, error feedback": optim.dct(adam, rank, where=WHERE, error_feedback=True),
    }


def state_bytes(tx: optax.GradientTransformation, params: dict) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(jax.eval_shape(tx.init, params)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", type=int, default=1024)
    parser.add_argument("--dtype", default="bfloat16")
    args = parser.parse_args()
    params, base = llama_7b(args.dtype), None
    print("| optimizer | GB of state | saved |\n|---|---|---|")
    for name, tx in methods(args.rank).items():
        size = state_bytes(tx, params)
        base = base or size
        print(f"| {name} | {size / 1e9:.2f} | {1 - size / base:.1%} |")


if __name__ == "__main__":
    main()
