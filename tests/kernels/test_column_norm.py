"""Norms of columns: every implementation agrees with the matrix itself, in float64."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jlora.factors import Factors
from jlora.kernels import column_norm, column_norm_tpu
from jlora.methods.dora import column_norms

ALL = ("plain", "pallas_interpret")


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Blocks small enough that the shapes below need several, and hang over the edge."""
    monkeypatch.setattr(column_norm_tpu, "_FEATURES", 16)


def operands(n_in=24, n_out=40, r=3, dtype="float32", seed=0):
    rng = np.random.default_rng(seed)
    array = lambda shape, dtype: jnp.asarray(rng.normal(size=shape), dtype)
    return array((n_in, n_out), dtype), array((n_in, r), "float32"), array((r, n_out), "float32"), jnp.float32(0.7)


def in_float64(w, a, b, scale):
    w, a, b, scale = (np.asarray(v, np.float64) for v in (w, a, b, scale))
    return np.linalg.norm(w + scale * a @ b, axis=0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("n_in, n_out, r", [(24, 40, 3), (32, 64, 8), (5, 7, 1), (17, 16, 20)])
@pytest.mark.parametrize("implementation", ALL)
def test_agrees_with_the_matrix_in_float64(implementation, n_in, n_out, r, dtype):
    args = operands(n_in, n_out, r, dtype)
    got = jax.jit(partial(column_norm, implementation=implementation))(*args)
    assert got.dtype == "float32"
    np.testing.assert_allclose(got, in_float64(*args), rtol=1e-5)


@pytest.mark.parametrize("implementation", ALL)
def test_agrees_with_dora(implementation):
    w, a, b, _ = operands()
    want = column_norms(w, Factors(a, b, 0.5))
    np.testing.assert_allclose(column_norm(w, a, b, 0.5, implementation=implementation), want, rtol=1e-5)


@pytest.mark.parametrize("implementation", ALL)
def test_a_column_of_zeros_may_be_divided_by(implementation):
    got = column_norm(*(jnp.zeros_like(v) for v in operands()), implementation=implementation)
    assert np.all((got > 0) & (got < 1e-18))


@pytest.mark.parametrize("implementation", ALL)
def test_nothing_to_add(implementation):
    w, a, b, s = operands()
    got = column_norm(w, a[:, :0], b[:0], s, implementation=implementation)
    np.testing.assert_allclose(got, np.linalg.norm(w, axis=0), rtol=1e-5)
    assert column_norm(w[:, :0], a, b[:, :0], s, implementation=implementation).shape == (0,)


@pytest.mark.parametrize("implementation", ALL)
def test_is_a_constant(implementation):
    grads = jax.grad(lambda *args: column_norm(*args, implementation=implementation).sum(), (0, 1, 2, 3))(*operands())
    assert all(np.all(g == 0) for g in grads)


@pytest.mark.parametrize("implementation", ALL)
def test_vmap_and_scan(implementation):
    layers = [operands(seed=seed) for seed in range(3)]
    stack = jax.tree.map(lambda *v: jnp.stack(v), *layers)
    f = partial(column_norm, implementation=implementation)
    want = np.stack([in_float64(*layer) for layer in layers])
    np.testing.assert_allclose(jax.jit(jax.vmap(f))(*stack), want, rtol=1e-5)
    scanned = jax.jit(lambda stack: jax.lax.scan(lambda _, args: (None, f(*args)), None, stack)[1])(stack)
    np.testing.assert_allclose(scanned, want, rtol=1e-5)


@pytest.mark.parametrize("implementation", ALL)
def test_shard_map(implementation, devices):
    args = operands()
    f = jax.shard_map(
        partial(column_norm, implementation=implementation),
        mesh=Mesh(devices, "m"),
        in_specs=(P(None, "m"), P(), P(None, "m"), P()),
        out_specs=P("m"),
        check_vma=implementation != "pallas_interpret",  # the interpreter does not know of varying axes
    )
    np.testing.assert_allclose(jax.jit(f)(*args), in_float64(*args), rtol=1e-5)


def test_the_kernel_on_a_simulated_tpu():
    """With its memories, copies and a detector of races between them; fresh memory is NaN."""
    args = operands()
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(uninitialized_memory="nan", detect_races=True)):
        got = jax.jit(partial(column_norm, implementation="pallas_interpret"))(*args)
        np.testing.assert_allclose(got, in_float64(*args), rtol=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_kernel_lowers_for_tpu(dtype, monkeypatch):
    """Mosaic accepts it, at the blocks it has in earnest. Needs no TPU."""
    monkeypatch.undo()
    w, a, b, _ = operands(520, 700, 4, dtype)
    f = jax.jit(partial(column_norm_tpu.squares, interpret=False))
    assert jax.export.export(f, platforms=["tpu"])(w, a, b).mlir_module().count("tpu_custom_call") == 1


@pytest.mark.parametrize("broken", [dict(w=(24, 41)), dict(w=(2, 24, 40)), dict(a=(24, 4)), dict(scale=(2,))])
def test_shapes_that_do_not_fit(broken):
    args = dict(zip(("w", "a", "b", "scale"), operands(), strict=True))
    (shape,) = broken.values()
    with pytest.raises(ValueError, match=re.escape(str(shape)) + r".*; want w \[in, out\]"):
        column_norm(**args | {name: jnp.zeros(shape) for name, shape in broken.items()})


def test_other_bad_input():
    w, a, b, s = operands()
    with pytest.raises(ValueError, match="int32.*floating point"):
        column_norm(w.astype(int), a, b, s)
    with pytest.raises(ValueError, match="'fast'; want None or one of plain"):
        column_norm(w, a, b, s, implementation="fast")
