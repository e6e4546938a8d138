"""Memory of a LoRA step of an 8B Llama by option, from compiling it for shapes alone: nothing is allocated.

    pip install "libtpu==0.0.42.*"                    # the compiler for TPUs, of jax 0.10.2; it wants none
    python benchmarks/memory.py                       # Llama 3 8B, 1 x 4096 tokens, r=16 on all linears, AdamW
    python benchmarks/memory.py --rows 4 --length 2048 --layers 8 --platform cpu

"arguments" are the base, the adapters, the optimizer's state and the batch; "temporary" is what the compiled step needs
besides: activations kept for the backward pass, logits, and the compiler's own copies. Both are XLA's figures. Without
libtpu they are those of its CPU backend, which turns weights of bfloat16 into float32, all layers at once: there the
rows of bfloat16 and NF4 say little. "fits" is the smallest of 16, 24, 80 and 141 GB that holds the two. What the 95 GB
of a TPU v5p do not hold is the compiler's own estimate, ~, which where both can be had is up to a tenth too low.
"""

import argparse
import dataclasses
import functools
import importlib.util
import os
import re
import time

import jax
import jax.numpy as jnp
import optax
from jax.sharding import SingleDeviceSharding
from rich.console import Console
from rich.table import Table

import jlora
from jlora.train.loop import make_train_step
from jlora.train.metrics import next_token_loss
from jlora.train.models.layers import CausalLM, DecoderConfig

LLAMA_8B = DecoderConfig(
    vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_layers=32, num_heads=32, num_kv_heads=8,
    head_dim=128, max_positions=8192, rope_theta=500000.0, norm_eps=1e-5,
)  # fmt: skip
SIZES = (16, 24, 80, 141)


@dataclasses.dataclass(frozen=True)
class Options:
    """What `jlora finetune` calls --bf16, --remat, --loss-chunk, --quantize and --offload; and what is trained."""

    dtype: str = "bfloat16"
    remat: str = "layers"
    chunk: int = 256
    quantize: bool = False
    offload: bool = False
    method: jlora.methods.Method = jlora.LoRA(16)  # noqa: B008


ROWS = {
    "full fine-tuning, float32": Options("float32", "none", 0, method=jlora.Full()),
    "LoRA, float32": Options("float32", "none", 0),
    "LoRA, bfloat16": Options(remat="none", chunk=0),
    "+ remat products": Options(remat="products", chunk=0),
    "+ remat layers": Options(chunk=0),
    "+ remat layers, loss in chunks": Options(),
    "+ remat layers, loss in chunks, NF4": Options(quantize=True),
    "+ remat layers, loss in chunks, base on the host": Options(offload=True),
}


def device_of(platform: str, topology: str = "v5p:2x2x1") -> jax.Device:
    """A device to compile for: of this machine, or a TPU's description."""
    if platform == "cpu":
        return jax.devices("cpu")[0]
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    from jax.experimental import topologies

    return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[0]


def bytes_of_step(
    config: DecoderConfig, options: Options, rows: int, length: int, device: jax.Device
) -> tuple[float, float, bool]:
    """What the training step takes on one device: (arguments, temporary), and whether that is an estimate."""
    module = CausalLM(dataclasses.replace(config, dtype=options.dtype), remat=options.remat)
    ids = jax.ShapeDtypeStruct((1, rows, length), jnp.int32)
    part = jax.ShapeDtypeStruct(ids.shape[1:], ids.dtype)
    params = jax.eval_shape(module.init, jax.random.key(0), part)["params"]
    fn = lambda params, ids: module.apply({"params": params}, ids)
    usage = jlora.usage(fn, params, part)
    if options.quantize:
        quantize = lambda params: jlora.quant.quantize(params, jlora.quant.NF4, usage=usage)
        params = jax.eval_shape(quantize, params)
    targets = "**" if isinstance(options.method, jlora.Full) else "all-linear"
    adapted = jlora.adapt(params, options.method, targets, usage=usage, key=jax.random.key(0))
    tx = optax.adamw(1e-4)
    loss = lambda call, batch, key: next_token_loss(call, batch, chunk=options.chunk)
    step = make_train_step(jlora.lift(module.apply), tx, loss)
    batch = {"ids": ids, "positions": ids, "segment_ids": ids, "mask": jax.ShapeDtypeStruct(ids.shape, jnp.float32)}
    state = jax.eval_shape(tx.init, adapted.trainable)
    fixed, key = adapted.replace(trainable={}), jax.eval_shape(lambda: jax.random.key(0))
    arguments = adapted.trainable, state, fixed, batch, key, jax.ShapeDtypeStruct((), jnp.int32)
    there = SingleDeviceSharding(device)
    put = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=there)
    arguments = jax.tree.map(put, arguments)
    if options.offload:
        arguments = (*arguments[:2], jlora.offload(arguments[2]), *arguments[3:])
        step = jax.jit(functools.partial(_from_host, step, arguments[2].base), donate_argnums=(0, 1))
    lowered = step.lower(*arguments)
    try:
        memory = lowered.compile().memory_analysis()
    except jax.errors.JaxRuntimeError as error:
        # A TPU's compiler refuses early what its memory does not hold, and estimates how much it is with the arguments.
        found = re.search(r"HLO temporaries \(([\d.]+)G\)", str(error))
        if found is None:
            raise
        given = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(arguments))
        return given, float(found[1]) * 2**30 - given, True
    return memory.argument_size_in_bytes, memory.temp_size_in_bytes, False


def _from_host(step, base, trainable, state, fixed, *rest):
    """The step with what lies on the host typed so, which the types of arrays do and those of shapes do not."""
    far = lambda leaf, given: (
        jax.device_put(leaf, jax.memory.Space.Host) if given.sharding.memory_kind == "pinned_host" else leaf
    )
    return step(trainable, state, fixed.replace(base=jax.tree.map(far, fixed.base, base)), *rest)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--layers", type=int, default=LLAMA_8B.num_layers)
    parser.add_argument("--only", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW")
    there = "tpu" if importlib.util.find_spec("libtpu") else "cpu"
    parser.add_argument("--platform", choices=("tpu", "cpu"), default=there, help="tpu where libtpu is installed")
    args = parser.parse_args()
    device = device_of(args.platform)
    config = dataclasses.replace(LLAMA_8B, num_layers=args.layers)
    where = f"{args.layers} layers; GB, compiled for {device.device_kind}"
    table = Table(title=f"{args.rows} x {args.length} tokens, {where}")
    for column in ("step", "arguments", "temporary", "together", "fits", "seconds to compile"):
        table.add_column(column, justify="left" if column == "step" else "right")
    for name in args.only:
        start = time.perf_counter()
        *taken, estimated = bytes_of_step(config, ROWS[name], args.rows, args.length, device)
        arguments, temporary = (n / 1e9 for n in taken)
        fits = next((f"{size}" for size in SIZES if arguments + temporary <= size), "none")
        about = "~" if estimated else ""
        table.add_row(
            name, f"{arguments:.1f}", f"{about}{temporary:.1f}", f"{about}{arguments + temporary:.1f}", fits,
            f"{time.perf_counter() - start:.0f}",
        )  # fmt: skip
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
