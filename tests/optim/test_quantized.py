"""States and bases in 8 and 4 bits, and bases that are renewed lazily."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jlora
from jlora.optim.quantized import CODES, Blocks, is_blocks

RANDOM = np.random.default_rng(0)


def test_tables() -> None:
    """bitsandbytes' dynamic map: 2^e middles of equal parts of [0.1, 1] in the decade 10^(e-6), and 0 and 1."""
    signed, unsigned, int8, int4 = (CODES[name].entries for name in ("signed", "unsigned", "int8", "int4"))
    for code in CODES.values():
        n = len(code.entries)
        assert np.all(np.diff(code.entries) > 0)
        np.testing.assert_allclose(code.values(jnp.arange(n, dtype=jnp.uint8)), code.entries, rtol=3e-7)
    assert len(signed) == len(unsigned) == len(int8) == 256 and len(int4) == 16
    np.testing.assert_allclose(signed[[0, 127, 128, 255]], [-0.9929688, 0, 5.5e-7, 1], rtol=1e-6)
    np.testing.assert_allclose(unsigned[:4], [0, 3.25e-7, 7.75e-7, 2.125e-6], rtol=1e-6)
    for e in range(7):
        inside = lambda code: np.sum((code > 10.0 ** (e - 7)) & (code < 10.0 ** (e - 6)))  # noqa: B023
        assert inside(signed) == 2**e and inside(unsigned) == 2 ** (e + 1)


@pytest.mark.parametrize("code", CODES)
def test_the_nearest_entry_over_the_whole_range(code: str) -> None:
    """Entries themselves; on both sides of every edge; and numbers of every size: the place that numpy finds."""
    entries = CODES[code].entries.astype(np.float64)
    edges = (entries[1:] + entries[:-1]) / 2
    sizes = 10.0 ** RANDOM.uniform(-9, 0, 20_000)
    x = np.concatenate([entries, edges * (1 - 1e-5), edges * (1 + 1e-5), sizes, *([-sizes] if entries[0] < 0 else ())])
    x = np.float32(x[np.abs(x) <= 1])
    wanted = np.searchsorted(edges, x)
    np.testing.assert_array_equal(CODES[code].nearest(jnp.asarray(x)), wanted)


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("shape, axis, block", [((3, 22), -1, 8), ((2, 9, 5), -2, 100), ((13,), -1, 3)])
def test_the_nearest_of_the_table(code: str, shape: tuple, axis: int, block: int) -> None:
    """Against all entries of the table in numpy, block by block; again, nothing changes."""
    x = RANDOM.normal(size=shape) * np.exp(RANDOM.normal(size=shape) * 3)
    x = np.float32(np.abs(x) if code == "unsigned" else x)
    stored = Blocks.encode(jnp.asarray(x), code, axis, block)
    got = np.moveaxis(np.asarray(stored.decode()), axis, -1)
    assert stored.shape == shape and stored.codes.dtype == jnp.uint8
    for row, out in zip(*(a.reshape(-1, a.shape[-1]) for a in (np.moveaxis(x, axis, -1), got)), strict=True):
        for start in range(0, len(row), block):
            part = row[start : start + block]
            scale = np.abs(part).max()
            distance = np.abs(part[:, None] / scale - CODES[code].entries[None])
            wanted = CODES[code].entries[np.argmin(distance, axis=1)] * scale
            if code == "unsigned":
                wanted = np.maximum(wanted, CODES[code].entries[1] * scale)
            np.testing.assert_allclose(out[start : start + block], wanted, rtol=1e-5)
    if code == "signed":
        return  # has 1 and not -1
    again = stored.like(stored.decode())
    np.testing.assert_allclose(again.decode(), stored.decode(), rtol=2e-6)


class Layer(NamedTuple):
    """Parameters with the name of a second moment."""

    v: jax.Array
    bias: jax.Array


def test_what_is_stored() -> None:
    """By the place in the state, not by the names of parameters; small leaves and counts stay; bytes by the formula."""
    params = {"one": Layer(jnp.ones((8, 512)), jnp.ones(512)), "two": jnp.ones((16, 300), jnp.bfloat16)}
    for wrap in (lambda tx: tx, lambda tx: optax.masked(tx, True), lambda tx: optax.chain(optax.identity(), tx)):
        state = jlora.optim.quantized_state(wrap(optax.adamw(1e-3))).init(params)
        adam = next(x for x in jax.tree.leaves(state, is_leaf=is_adam) if is_adam(x))
        assert adam.mu["one"].v.code == adam.mu["two"].code == "signed"
        assert adam.nu["one"].v.code == adam.nu["two"].code == "unsigned"
        assert adam.mu["one"].bias.dtype == jnp.float32 and adam.count.dtype == jnp.int32
    bytes_of = lambda tree: sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
    assert bytes_of(adam.mu["one"].v) == 8 * 512 + 4 * 8 * 2
    assert bytes_of(adam.nu["two"]) == 16 * 300 + 4 * 16 * 2
    factored = jlora.optim.quantized_state(optax.adafactor(1e-3), min_size=1).init({"w": jnp.ones((200, 300))})
    found = [leaf for leaf in jax.tree.leaves(factored, is_leaf=is_blocks) if is_blocks(leaf)]
    assert found and all(leaf.code == "unsigned" for leaf in found)


def is_adam(x) -> bool:
    return isinstance(x, optax.ScaleByAdamState)


def test_first_step_is_exact_and_the_rest_near() -> None:
    """What is rounded is what is remembered. A direction of tiny gradients, whose second moment would round to 0, is
    no larger than Adam's."""
    size = np.where(np.arange(256) % 16 == 0, 1e-6, 1.0)
    grads = [jnp.asarray(np.float32(RANDOM.normal(size=(4, 256)) * size)) for _ in range(30)]
    plain, eight = optax.scale_by_adam(), jlora.optim.quantized_state(optax.scale_by_adam(), min_size=1)
    states, update = [tx.init(grads[0]) for tx in (plain, eight)], [jax.jit(tx.update) for tx in (plain, eight)]
    for i, g in enumerate(grads):
        (a, sa), (b, sb) = (f(g, state) for f, state in zip(update, states, strict=True))
        states = [sa, sb]
        if i == 0:
            np.testing.assert_array_equal(a, b)
    a, b = np.asarray(a), np.asarray(b)
    large = size == 1
    assert np.linalg.norm((a - b)[:, large]) < 0.05 * np.linalg.norm(a[:, large])
    assert np.abs(b[:, ~large]).max() < np.abs(a).max()


def test_bytes_of_galore_in_8_bits() -> None:
    """k r numbers of the weight's dtype, or of one byte, and 2 K r bytes with their scales, of matrices k x K."""
    params = {"w": jax.ShapeDtypeStruct((4, 512, 1024), jnp.bfloat16)}
    r, small, large = 256, 512, 1024
    inner = jlora.optim.quantized_state(optax.adam(1e-3))

    def size(**options) -> int:
        state = jax.eval_shape(jlora.optim.galore(inner, r, **options).init, params)
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state) if leaf.ndim)

    scales = 4 / 256
    assert size() == 4 * (2 * small * r + 2 * large * r * (1 + scales))
    assert size(projector_bits=8) == 4 * (small * r + 2 * large * r) * (1 + scales)
    assert size(projector_bits=4) == 4 * (small * r * (1 / 2 + scales) + 2 * large * r * (1 + scales))
    assert size(projector_bits=8, side="larger") == 4 * (large * r + 2 * small * r) * (1 + scales)


@pytest.mark.parametrize("bits, error", [(8, 0.5 / 127), (4, 0.5 / 7)])
def test_quantized_projector(bits: int, error: float) -> None:
    """The basis is within half a level of the one that is not quantized, and stays until the next refresh."""
    g = jnp.asarray(np.float32(RANDOM.normal(size=(2, 12, 40))))
    exact = jlora.optim.galore(optax.sgd(1.0), 5, solver="eigh")
    rounded = jlora.optim.galore(optax.sgd(1.0), 5, solver="eigh", projector_bits=bits)
    wanted = exact.update(g, exact.init(g))[1].stored["in"]
    _, state = rounded.update(g, rounded.init(g))
    stored = state.stored["in"]
    got = stored.decode()
    off = np.abs(got - wanted).max(-1)
    assert np.all(off <= error * np.abs(wanted).max(-1) * 1.001) and off.max() > 0.1 * error * np.abs(wanted).max()
    _, state = rounded.update(2 * g[::-1], state)
    assert jnp.array_equal(state.stored["in"].codes, stored.codes)


def test_lazy_refreshes() -> None:
    """Of a stack, the first matrix has gradients with one leading direction, the second any. Five similarities are
    there at the sixth refresh; from then on the first one's period doubles each time."""
    lead = np.linalg.qr(RANDOM.normal(size=(30, 1)))[0]
    tx = jlora.optim.galore(optax.sgd(1.0), 2, solver="eigh", period=2, lazy=0.7)
    w = jnp.zeros((2, 30, 40))
    state, update, renewed = tx.init(w), jax.jit(tx.update), []
    for step in range(34):
        any_of_them = RANDOM.normal(size=(2, 30, 40))
        any_of_them[0] = 0.1 * any_of_them[0] + 20 * lead * RANDOM.normal(size=(1, 40))
        before = state.stored["basis"]["in"]
        _, state = update(jnp.asarray(np.float32(any_of_them)), state)
        changed = np.any(np.asarray(before != state.stored["basis"]["in"]), axis=(1, 2))
        renewed += [(step, i) for i in range(2) if changed[i]]
    assert [step for step, i in renewed if i == 0] == [0, 2, 4, 6, 8, 10, 12, 16, 32]
    assert [step for step, i in renewed if i == 1] == list(range(0, 34, 2))
    np.testing.assert_array_equal(state.stored["period"], [32, 2])


def test_bad_input() -> None:
    adam = optax.adam(0.1)
    for make in (
        lambda: jlora.optim.quantized_state(adam, block=0),
        lambda: jlora.optim.quantized_state(adam, min_size=0.5),
        lambda: jlora.optim.galore(adam, projector_bits=2),
        lambda: jlora.optim.galore(adam, lazy=40),
        lambda: jlora.optim.galore(adam, lazy=0.4, transport="reset"),
    ):
        with pytest.raises(ValueError, match="wanted"):
            make()
