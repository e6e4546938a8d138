"""Many adapters on one linear, against the same linear without any; and a quantized linear, against a dense one.

    python benchmarks/kernels.py                              # some minutes on two cores
    python benchmarks/kernels.py --shape 4096x4096x16 --rounds 30 --forms decode
    python benchmarks/kernels.py --forms quantized "quantized training"

Three forms, in float32: "decode" is 64 rows with a slot each, "tiles" 1024 rows in tiles of 64 rows of one slot, and
"training" the same with the gradient of x, A and B, against that of x through a frozen layer. 64 slots are filled, and
the table names 1, 4, 16 or 64 of them (1024 rows in tiles of 64: 16 at most). "lora_linear" is one adapter for all
rows. All of one shape take turns, so that what disturbs the machine disturbs all of them.

"bytes" is what has to be read, of W and of the adapters that are named, over W: the ratio to expect of "decode" where
memory is all that takes time.

"quantized" is 64 rows times a weight in NF4 or Int8, and "quantized training" 1024 rows with the gradient of x. In XLA,
whose program forms the matrix, what it adds is the same for any number of rows.
"""

import argparse
import dataclasses
import math
import os
import platform
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table
from step import measure, versions

from jlora.kernels import Slots, lora_linear, multi_lora, quantized_dot
from jlora.quant import NF4, Int8
from jlora.weight import Axes

SLOTS = 64
ADAPTERS = (1, 4, 16, 64)
QUANTIZED = {"quantized": (64,), "quantized training": (16, 64)}
FORMS = {"decode": (64,), "tiles": (16, 64), "training": (16, 64), **QUANTIZED}  # the leading axes of x
FORMATS = {"NF4": (NF4, {}), "NF4, double=False": (NF4, {"double": False}), "Int8": (Int8, {})}


class Runner:
    """A compiled program with its arguments: `step()` calls it as often as makes 20 ms, and waits for it."""

    def __init__(self, f, *args, calls: int | None = None):
        self.compiled, self.args, self.calls = jax.jit(f).lower(*args).compile(), args, 1
        if calls is None:
            self.step()
            start = time.perf_counter()
            self.step()
            calls = math.ceil(0.02 / (time.perf_counter() - start))
        self.calls = calls

    def step(self) -> float:
        for _ in range(self.calls):
            jax.block_until_ready(self.compiled(*self.args))
        return 0.0


def with_gradient(f):
    """(y, gradients with respect to x and the factors) of f(x, factors, ...)."""

    def step(dy, x, factors, *rest):
        y, vjp = jax.vjp(lambda x, factors: f(x, factors, *rest), x, factors)
        return y, vjp(dy)

    return step


def runners(form: str, n_in: int, n_out: int, r: int, implementations: tuple[str, ...]) -> dict:
    """(name, number of adapters) -> Runner."""
    lead, rng = FORMS[form], np.random.default_rng(0)
    array = lambda *shape: jnp.asarray(rng.standard_normal(shape, np.float32))
    x, w, dy = array(*lead, n_in), array(n_in, n_out) / math.sqrt(n_in), array(*lead, n_out)
    a, b = array(SLOTS, r, n_in) / math.sqrt(n_in), array(SLOTS, r, n_out)
    slots = Slots(a=a, b=b, scale=jnp.ones(SLOTS), rank=jnp.full(SLOTS, r, jnp.int32))

    def of(f, factors, *rest, **kwargs):
        if form == "training":
            return Runner(with_gradient(f), dy, x, factors, *rest, **kwargs)
        return Runner(f, x, factors, *rest, **kwargs)

    base = of(lambda x, _, w: x @ w, (), w)
    out = {("base alone", 0): base}
    for implementation in implementations:
        one = lambda x, ab, w: lora_linear(x, w, *ab, 1.0, implementation=implementation)  # noqa: B023
        out[f"lora_linear, {implementation}", 1] = of(one, (a[0].T, b[0]), w, calls=base.calls)
        many = lambda x, ab, w, slots, table: multi_lora(
            x,
            w,
            dataclasses.replace(slots, a=ab[0], b=ab[1]),
            table,
            implementation=implementation,  # noqa: B023
        )
        for count in ADAPTERS:
            if count <= lead[0]:
                table = jnp.asarray(rng.permutation(np.arange(lead[0]) % count), jnp.int32)
                rest = (w, dataclasses.replace(slots, a=None, b=None), table)
                out[f"multi_lora, {implementation}", count] = of(many, (a, b), *rest, calls=base.calls)
    return out


def quantized_runners(form: str, n_in: int, n_out: int, implementations: tuple[str, ...]) -> tuple[dict, dict]:
    """(name, 0) -> Runner, and -> the bytes of the weight over those of the dense one."""
    lead, rng = FORMS[form], np.random.default_rng(0)
    array = lambda *shape: jnp.asarray(rng.standard_normal(shape, np.float32))
    x, w, dy = array(*lead, n_in), array(n_in, n_out) / math.sqrt(n_in), array(*lead, n_out)

    def of(f, w, **kwargs):
        if form == "quantized training":
            return Runner(with_gradient(lambda x, _, w: f(x, w)), dy, x, (), w, **kwargs)
        return Runner(f, x, w, **kwargs)

    base = of(lambda x, w: x @ w, w)
    out, share = {("base alone", 0): base}, {("base alone", 0): 1.0}
    for format, (to, options) in FORMATS.items():
        stored = jax.jit(lambda w: to.of(w, Axes((0,), (1,)), **options))(w)  # noqa: B023
        for implementation in implementations:
            name = f"{format}, {implementation}", 0
            f = lambda x, w: quantized_dot(x, w, implementation=implementation)  # noqa: B023
            out[name], share[name] = of(f, stored, calls=base.calls), stored.nbytes / w.nbytes
    return out, share


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    size = lambda text: tuple(map(int, text.split("x")))
    parser.add_argument("--shape", type=size, action="append", help="in x out x r; may be repeated")
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS))
    parser.add_argument("--rounds", type=int, default=10, help="samples of each program")
    args = parser.parse_args()
    shapes = args.shape or [(1024, 1024, 16), (1024, 4096, 16), (4096, 4096, 16), (4096, 4096, 8)]

    on_tpu = jax.default_backend() == "tpu"
    implementations = ("custom_vjp", "pallas") if on_tpu else ("custom_vjp",)
    table = Table(title="Over the base alone, in CPU and wall seconds")
    for column in ("form", "in x out, r", "", "adapters"):
        table.add_column(column)
    for column in ("CPU min", "median", "wall min", "median", "bytes"):
        table.add_column(column, justify="right")
    for form in args.forms:
        sizes = dict.fromkeys((*shape[:2], 0) for shape in shapes) if form in QUANTIZED else shapes
        for n_in, n_out, r in sizes:
            if form in QUANTIZED:
                group, share = quantized_runners(form, n_in, n_out, implementations)
            else:
                group = runners(form, n_in, n_out, r, implementations)
                share = {key: 1 + key[1] * r * (n_in + n_out) / (n_in * n_out) for key in group}
            times = measure(group, args.rounds)
            base = times["base alone", 0]
            figures = lambda t: [f(t[clock]) for clock in ("cpu", "wall") for f in (min, statistics.median)]
            for (name, count), t in times.items():
                ratios = [f"{ours / theirs:.3f}" for ours, theirs in zip(figures(t), figures(base), strict=True)]
                if name == "base alone":
                    ratios = [f"{1e3 * v / group[name, count].calls:.2f} ms" for v in figures(t)]
                table.add_row(
                    form,
                    f"{n_in} x {n_out}" + f", {r}" * (r > 0),
                    name,
                    str(count),
                    *ratios,
                    f"{share[name, count]:.3f}",
                )
            table.add_section()
    if not on_tpu:
        for kernel in ("lora_linear, pallas", "multi_lora, pallas", "quantized_dot, pallas"):
            table.add_row("all", "", kernel, "", "TPU only", "", "", "", "")
    console = Console(width=140)
    console.print(
        f"{platform.machine()}, {os.cpu_count()} cores, {jax.devices()[0].platform}; {versions('jax', 'jaxlib')}",
        highlight=False,
    )
    console.print(table)


if __name__ == "__main__":
    main()
