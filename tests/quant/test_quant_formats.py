"""What is stored: against NF4 written in numpy from its description, and the promises of both formats."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from jlora.quant import NF4, Int8, nf4

CODE = nf4.CODE.entries
MATRIX, LAYERS = jlora.Axes((0,), (1,)), jlora.Axes((1,), (2,), stack=(0,))
TABLE = jlora.Axes((0,), (1,), kind="embedding")


def normal(*shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def nf4_in_numpy(w, axes, block=64, double=True):
    """The dequantized matrix [in, out], by loops and in float64."""
    published = """-1 -0.6961928009986877 -0.5250730514526367 -0.39491748809814453 -0.28444138169288635
    -0.18477343022823334 -0.09105003625154495 0 0.07958029955625534 0.16093020141124725 0.24611230194568634
    0.33791524171829224 0.44070982933044434 0.5626170039176941 0.7229568362236023 1"""
    code = np.array([float(entry) for entry in published.split()])
    torch = np.asarray(w, np.float64) if axes.kind == "embedding" else np.asarray(w, np.float64).T
    flat = torch.reshape(-1)
    parts = [flat[i : i + block] for i in range(0, len(flat), block)]
    magnitudes = np.array([np.abs(part).max() for part in parts])
    picks = [
        code[np.argmin(np.abs(part[:, None] / m - code), axis=1)] if m else part
        for part, m in zip(parts, magnitudes, strict=True)
    ]
    if double:
        dynamic = [0.0, 1.0]
        for e in range(7):
            for j in range(2**e):
                low = 0.1 + 0.9 * j / 2**e
                middle = (low + 0.45 / 2**e) * 10.0 ** (e - 6)
                dynamic += [middle, -middle]
        dynamic = np.array(sorted(dynamic))
        assert len(dynamic) == 256
        mean = magnitudes.mean()
        apart = magnitudes - mean
        groups = [apart[i : i + 256] for i in range(0, len(apart), 256)]
        norms = [np.abs(group).max() for group in groups]
        rounded = [
            dynamic[np.argmin(np.abs(group[:, None] / (n or 1.0) - dynamic), axis=1)] * n
            for group, n in zip(groups, norms, strict=True)
        ]
        magnitudes = np.concatenate(rounded) + mean
    back = np.concatenate([pick * m for pick, m in zip(picks, magnitudes, strict=True)]).reshape(torch.shape)
    return back if axes.kind == "embedding" else back.T


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize(
    ("shape", "axes", "block"),
    [
        ((128, 160), MATRIX, 64),  # blocks within rows
        ((256, 320), MATRIX, 64),  # more than one block of magnitudes
        ((50, 30), MATRIX, 64),  # blocks across rows, the last one short
        ((7, 9), MATRIX, 64),  # one block, an odd number of entries
        ((30, 128), TABLE, 64),
        ((31, 15), TABLE, 16),
    ],
)
def test_nf4_is_its_description(x64, shape, axes, block, double):
    w = normal(*shape, dtype=jnp.float64)
    stored = NF4.of(w, axes, block_size=block, double=double)
    want = nf4_in_numpy(w, axes, block, double)
    # Magnitudes are stored in float32, the tables are float32.
    np.testing.assert_allclose(stored.dequantize(), want, rtol=3e-7, atol=1e-9)
    # Float32 picks the same entries.
    single = NF4.of(w.astype(jnp.float32), axes, block_size=block, double=double)
    np.testing.assert_array_equal(single.codes, stored.codes)


def test_the_order_is_that_of_bitsandbytes():
    """The first entry of PyTorch's [out, in] in the high half of the first byte, then along `in`."""
    w = np.zeros((4, 2), np.float32)
    w[0, 0], w[1, 0], w[2, 0], w[0, 1] = 1.0, -1.0, CODE[3], CODE[12]
    codes = np.asarray(NF4.of(jnp.asarray(w), MATRIX, double=False).codes)
    assert codes.tolist() == [[15 << 4 | 0, 3 << 4 | 7, 12 << 4 | 7, 7 << 4 | 7]]


@pytest.mark.parametrize("axes", [MATRIX, TABLE])
def test_entries_of_the_table_come_back_exactly(axes):
    w = np.random.default_rng(0).choice(CODE, (64, 64)).astype(np.float32)
    w[0, :] = w[:, 0] = 1.0  # every block has magnitude 1
    np.testing.assert_array_equal(NF4.of(jnp.asarray(w), axes, double=False).dequantize(), w)
    # Equal magnitudes are their mean, exactly.
    np.testing.assert_array_equal(NF4.of(jnp.asarray(w), axes).dequantize(), w)


def test_what_lies_in_the_middle_goes_to_the_lower_entry():
    edges = (CODE[1:] + CODE[:-1]) / 2
    w = np.concatenate([edges, np.nextafter(edges, np.float32(2)), [1.0]]).astype(np.float32)[:, None]
    back = np.asarray(NF4.of(jnp.asarray(w), MATRIX, block_size=64, double=False).dequantize())[:, 0]
    np.testing.assert_array_equal(back, [*CODE[:-1], *CODE[1:], 1.0])


def test_rounding_is_bounded_by_half_the_widest_gap():
    w = normal(192, 64)
    error = np.abs(NF4.of(w, MATRIX, double=False).dequantize() - w).reshape(3, 64, 64)
    magnitudes = np.abs(np.asarray(w)).reshape(3, 64, 64).max(1, keepdims=True)
    assert (error <= magnitudes * (1 - 0.6961928) / 2 * (1 + 1e-6)).all()


def test_bits_a_weight():
    w = normal(2, 512, 1024)
    bits = lambda stored: 8 * stored.nbytes / stored.size
    assert bits(NF4.of(w, LAYERS)) <= 4.13
    assert bits(NF4.of(w, LAYERS, double=False)) == 4.5
    assert bits(Int8.of(w, LAYERS)) == 8 + 32 / 512
    assert len(nf4.DYNAMIC_CODE.entries) == 256


def test_int8_is_its_formula():
    w = normal(48, 20)
    scale = np.abs(w).max(0) / 127
    np.testing.assert_allclose(Int8.of(w, MATRIX).dequantize(), np.round(w / scale) * scale, rtol=1e-6)
    scale = np.abs(w).max(1, keepdims=True) / 127
    np.testing.assert_allclose(Int8.of(w, TABLE).dequantize(), np.round(w / scale) * scale, rtol=1e-6)


@pytest.mark.parametrize("to", [NF4, Int8])
def test_zeros_stay_zeros(to):
    w = normal(64, 8).at[:, :4].set(0.0)
    back = to.of(w, MATRIX).dequantize()
    assert not back[:, :4].any() and jnp.isfinite(back).all()
    assert not to.of(jnp.zeros((64, 8)), MATRIX).dequantize().any()


@pytest.mark.parametrize("to", [NF4, Int8])
@pytest.mark.parametrize(
    ("shape", "axes"),
    [
        ((3, 6, 4), LAYERS),
        ((6, 3, 4), jlora.Axes((0,), (2,), stack=(1,))),
        ((3, 6, 2, 4), jlora.Axes((1,), (2, 3), stack=(0,))),
        ((2, 6, 3, 4), jlora.Axes((3,), (1,), stack=(0, 2))),
        ((3, 5, 2), jlora.Axes((2, 0), (1,))),
    ],
)
def test_any_axes_and_the_weight_of_one_layer(to, shape, axes):
    w = normal(*shape).astype(jnp.bfloat16)
    stored = to.of(w, axes)
    assert (stored.shape, stored.dtype, stored.ndim, stored.size) == (shape, w.dtype, w.ndim, w.size)
    assert stored.axes == axes
    back = stored.dequantize()
    assert back.shape == shape and back.dtype == w.dtype
    np.testing.assert_array_equal(np.asarray(stored), np.asarray(back))
    tolerance = 0.17 if to is NF4 else 0.006  # of the largest entry
    np.testing.assert_allclose(*(np.asarray(x, np.float32) for x in (back, w)), atol=tolerance * float(abs(w).max()))
    for leaf in jax.tree.leaves(stored):
        assert leaf.shape[: len(axes.stack)] == tuple(shape[axis] for axis in axes.stack)
    if axes.stack:
        one = jax.tree.map(lambda leaf: leaf[1], stored)
        at = (slice(None),) * axes.stack[0] + (1,)
        assert one.shape == back[at].shape
        np.testing.assert_array_equal(one.dequantize(), back[at])


def test_a_format_is_a_frozen_pytree():
    stored = NF4.of(normal(64, 8), MATRIX)
    with pytest.raises(dataclasses.FrozenInstanceError):
        stored.codes = None
    twice = jax.jit(lambda s: s)(stored)
    assert jax.tree.structure(twice) == jax.tree.structure(stored)
    assert "float32[64, 8]" in repr(stored) and "uint8" in repr(stored)
    assert jax.grad(lambda w: NF4.of(w, MATRIX).dequantize().sum())(normal(64, 8)).any() == False  # noqa: E712


@pytest.mark.parametrize("size", [0, 7, 64.0])
def test_a_block_size_that_cannot_be(size):
    with pytest.raises(ValueError, match="a positive even number"):
        NF4.of(normal(64, 8), MATRIX, block_size=size)
