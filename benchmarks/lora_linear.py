"""One LoRA linear, forward and backward, against the same layer frozen and without an adapter (the floor).

    python benchmarks/lora_linear.py

takes half a minute on two cores. Sizes are options: `--tokens 4x256 --shape 512x1376 --shape 512x512 --rank 16`.

The floor computes y = x W and dx = dy W^T; the others also everything that training A and B asks for. CPU and wall time
are ratios to the floor: runs are interleaved and the fastest of each is taken, so that other work on the machine
matters little. FLOPs are a ratio to 4 T in out + 6 T r (in + out) (the floor's own to 4 T in out), and memory is what
the compiled program holds beside its arguments and results. The last two are exact and the same on every machine of
one kind. "merged axes" reshapes [batch, time, in] to [batch time, in] first, as one may do by hand.
"""

import argparse
import math
import time

import jax

from jlora.kernels import lora_linear

SCALE = 2.0


def programs():
    """name -> f(x, w, a, b, dy) returning y and the gradients."""

    def adapted(implementation, merged):
        def step(x, w, a, b, dy):
            if merged:
                x, dy = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
            f = lambda x, a, b: lora_linear(x, w, a, b, SCALE, implementation=implementation)
            y, vjp = jax.vjp(f, x, a, b)
            return y, vjp(dy)

        return step

    return {
        "floor: frozen layer": lambda x, w, a, b, dy: (x @ w, dy @ w.T),
        "plain": adapted("plain", False),
        "plain, merged axes": adapted("plain", True),
        "custom_vjp": adapted("custom_vjp", False),
        "custom_vjp, merged axes": adapted("custom_vjp", True),
    }


def measure(compiled, args, rounds):
    """The least CPU and wall seconds of one call, for each program. A sample lasts long enough for a coarse clock."""

    def sample(f, calls):
        cpu, wall = time.process_time(), time.perf_counter()
        for _ in range(calls):
            jax.block_until_ready(f(*args))
        return (time.process_time() - cpu) / calls, (time.perf_counter() - wall) / calls

    for f in compiled:
        sample(f, 2)
    calls = [max(1, math.ceil(0.04 / sample(f, 2)[1])) for f in compiled]
    rows = [[sample(f, n) for f, n in zip(compiled, calls, strict=True)] for _ in range(rounds)]
    return [tuple(map(min, zip(*column, strict=True))) for column in zip(*rows, strict=True)]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    size = lambda text: tuple(map(int, text.split("x")))
    parser.add_argument("--tokens", type=size, default="4x256", help="leading axes of x")
    parser.add_argument("--shape", type=size, action="append", help="in x out; may be repeated (512x1376 and 512x512)")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=20, help="samples of each program")
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args()

    lead, rank, tokens = options.tokens, options.rank, math.prod(options.tokens)
    print(f"{'':26}{'CPU':>8}{'wall':>8}{'FLOPs':>9}{'memory':>12}   (T {tokens}, r {rank}, {options.dtype})")
    for n_in, n_out in options.shape or [(512, 1376), (512, 512)]:
        keys = jax.random.split(jax.random.key(0), 5)
        shapes = [(*lead, n_in), (n_in, n_out), (n_in, rank), (rank, n_out), (*lead, n_out)]
        args = [jax.random.normal(k, s, options.dtype) / s[0] for k, s in zip(keys, shapes, strict=True)]
        compiled = [jax.jit(f).lower(*args).compile() for f in programs().values()]
        times = measure(compiled, args, options.rounds)
        base = 4 * tokens * n_in * n_out
        formulas = [base] + [base + 6 * tokens * rank * (n_in + n_out)] * (len(compiled) - 1)
        print(f"{n_in} -> {n_out}: floor {1e3 * times[0][0]:.2f} CPU ms, {1e3 * times[0][1]:.2f} wall ms")
        for name, program, (cpu, wall), formula in zip(programs(), compiled, times, formulas, strict=True):
            flops = program.cost_analysis()["flops"] / formula
            memory = program.memory_analysis().temp_size_in_bytes / 2**20
            print(f"  {name:24}{cpu / times[0][0]:8.3f}{wall / times[0][1]:8.3f}{flops:9.4f}{memory:8.2f} MiB")


if __name__ == "__main__":
    main()
