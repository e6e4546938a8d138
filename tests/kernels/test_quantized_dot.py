"""The product with a quantized weight: every implementation means what the matrix means, and none keeps a matrix."""

import functools
import math
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jlora.blockwise import Dynamic
from jlora.kernels import quantized_dot, quantized_dot_tpu
from jlora.kernels.quantized_dot import _with_gradient
from jlora.quant import NF4, Int8
from jlora.weight import Axes

WRITTEN = ("custom_vjp", "pallas_interpret")
ALL = ("plain", *WRITTEN)
FORMATS = {
    "NF4": (NF4, {}),
    "NF4, single": (NF4, {"double": False}),
    "NF4, blocks of 24": (NF4, {"block_size": 24}),  # which begin anywhere in the kernels' blocks
    "Int8": (Int8, {}),
}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Blocks small enough that the shapes below need several, and hang over the edge. Codes are whole registers."""
    monkeypatch.setattr(quantized_dot_tpu, "_TOKENS", 16)
    monkeypatch.setattr(quantized_dot_tpu, "_ROWS", 16)
    monkeypatch.setattr(quantized_dot_tpu, "_COLUMNS", 256)


@functools.cache
def operands(format="NF4", lead=(3, 5), n_in=384, n_out=40, dtype="float32", kind="linear", seed=0):
    """x, w and dy."""
    rng = np.random.default_rng(seed)
    to, options = FORMATS[format]
    array = lambda *shape: jnp.asarray(rng.normal(size=shape) / math.sqrt(shape[-1]), dtype)
    w = jax.jit(lambda w: to.of(w, Axes((0,), (1,), kind=kind), **options))(array(n_in, n_out))
    return array(*lead, n_in), w, array(*lead, n_out)


def both_products(x, w, dy, **kwargs):
    """(y, dx)"""
    y, vjp = jax.vjp(lambda x: quantized_dot(x, w, **kwargs), x)
    return y, *vjp(dy)


def in_float64(x, w, dy):
    """What they should be, of the matrix as it is formed."""
    x, m, dy = (np.asarray(v, np.float64) for v in (x, w.matrix(), dy))
    return x @ m, dy @ m.T


def assert_close(got, want, tolerance=1e-5):
    """The error is relative to the largest element, as that of a sum is."""
    for g, w in zip(got, want, strict=True):
        assert g.shape == w.shape
        g, w = np.asarray(g, np.float64), np.asarray(w, np.float64)
        np.testing.assert_allclose(g, w, rtol=0, atol=tolerance * np.abs(w).max(initial=1e-30))


# ---- One meaning ----

SHAPES = {
    "several blocks, none full": dict(lead=(3, 7), n_in=384, n_out=40),
    "exact blocks": dict(lead=(32,), n_in=768, n_out=32),
    "one short block": dict(lead=(2, 1), n_in=192, n_out=7),
    "a single token without leading axes": dict(lead=(), n_in=192, n_out=24),
}


SOME = ["several blocks, none full"]


@pytest.mark.parametrize("format, shape", [(f, s) for f in FORMATS for s in (SHAPES if f in ("NF4", "Int8") else SOME)])
@pytest.mark.parametrize("implementation", ALL)
def test_agrees_with_the_matrix_in_float64(implementation, format, shape):
    args = operands(format, **SHAPES[shape])
    assert_close(jax.jit(partial(both_products, implementation=implementation))(*args), in_float64(*args))


@pytest.mark.parametrize("format", ["NF4", "Int8"])
@pytest.mark.parametrize("implementation", ALL)
def test_bfloat16(implementation, format):
    args = operands(format, dtype="bfloat16")
    got = jax.jit(partial(both_products, implementation=implementation))(*args)
    assert {v.dtype for v in got} == {jnp.dtype("bfloat16")}
    assert_close(got, in_float64(*args), 1e-2)


@pytest.mark.parametrize("format", ["NF4", "Int8"])
@pytest.mark.parametrize("implementation", ALL)
def test_dtypes(implementation, format):
    """Of the result: that of x and w together, or the one asked for. Of the gradient: that of x."""
    x, w, dy = operands(format)
    x = x.astype("bfloat16")
    f = partial(quantized_dot, w=w, implementation=implementation)
    assert f(x).dtype == "float32" and f(x, preferred_element_type="bfloat16").dtype == "bfloat16"
    y, dx = both_products(x, w, dy, implementation=implementation)
    assert dx.dtype == "bfloat16"
    want = in_float64(x, w, dy)
    assert_close([y], want[:1])
    assert_close([dx], want[1:], 1e-2)


@pytest.mark.parametrize("kind", ["linear", "embedding"])
@pytest.mark.parametrize("format", ["NF4", "Int8"])
@pytest.mark.parametrize("implementation", WRITTEN)
def test_transposed(implementation, format, kind):
    """A head that is tied to an embedding, which is stored by the rows that are looked up, and any other weight."""
    x, w, dy = operands(format, kind=kind, n_in=192, n_out=384)
    y, dx = in_float64(x, w, dy)
    f = jax.jit(partial(both_products, implementation=implementation), static_argnames="transposed")
    assert_close(f(x, w, dy, transposed=False), (y, dx))
    assert_close(f(dy, w, x, transposed=True), (dx, y))


@pytest.mark.parametrize("implementation", ["plain", "custom_vjp"])
def test_blocks_that_go_on_from_row_to_row(implementation):
    args = operands(n_in=40, n_out=24)
    assert_close(both_products(*args, implementation=implementation), in_float64(*args))


@pytest.mark.parametrize("implementation", ALL)
def test_no_tokens(implementation):
    x, w, dy = operands(lead=(2, 0))
    y, dx = both_products(x, w, dy, implementation=implementation)
    assert y.shape == dy.shape and dx.shape == x.shape


def test_the_table_of_magnitudes_by_arithmetic():
    places = jnp.arange(256, dtype=jnp.uint8)
    np.testing.assert_allclose(quantized_dot_tpu._dynamic(places), Dynamic().entries, rtol=3e-7)


# ---- Transformations ----


@functools.cache
def layers(format="NF4", n=192, tokens=10):
    """Three stacked layers, and x."""
    to, options = FORMATS[format]
    rng = np.random.default_rng(1)
    stack = jnp.asarray(rng.normal(size=(3, n, n)) / math.sqrt(n), "float32")
    w = jax.jit(lambda w: to.of(w, Axes((1,), (2,), (0,)), **options))(stack)
    return w, jnp.asarray(rng.normal(size=(tokens, n)), "float32")


def loss_of_layers(implementation, remat):
    def layer(x, w):
        return jnp.tanh(quantized_dot(x, w, implementation=implementation)), None

    layer = jax.checkpoint(layer) if remat else layer
    return lambda x, w: jnp.sum(jax.lax.scan(layer, x, w)[0] ** 2)


@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize("format", ["NF4", "Int8"])
@pytest.mark.parametrize("implementation", WRITTEN)
def test_scan_and_remat(implementation, format, remat):
    w, x = layers(format)
    want = x
    for i in range(3):
        want = jnp.tanh(want @ jax.tree.map(lambda leaf: leaf[i], w).matrix())  # noqa: B023
    value, grad = jax.jit(jax.value_and_grad(loss_of_layers(implementation, remat)))(x, w)
    assert_close([value], [jnp.sum(want**2)])
    assert_close([grad], [jax.jit(jax.grad(loss_of_layers("plain", remat)))(x, w)])


@pytest.mark.parametrize("implementation", ALL)
@pytest.mark.parametrize("mapped", ["all", "x", "w"])
def test_vmap(implementation, mapped):
    w, x = layers()
    x = jnp.stack([x, 2 * x, 3 * x])
    axes = {"all": (0, 0, 0), "x": (0, None, 0), "w": (None, 0, 0)}[mapped]
    args = x if axes[0] == 0 else x[0], w if axes[1] == 0 else jax.tree.map(lambda leaf: leaf[0], w), x
    got = jax.jit(jax.vmap(partial(both_products, implementation=implementation), axes))(*args)
    take = lambda tree, axis, i: tree if axis is None else jax.tree.map(lambda leaf: leaf[i], tree)
    each = [in_float64(*(take(v, axis, i) for v, axis in zip(args, axes, strict=True))) for i in range(3)]
    assert_close(got, [np.stack(v) for v in zip(*each, strict=True)])


def test_plain_has_forward_mode():
    x, w, _ = operands()
    f = partial(quantized_dot, w=w, implementation="plain")
    assert_close(jax.jvp(f, (x,), (x,)), [f(x)] * 2)


@pytest.mark.parametrize("implementation", ALL)
def test_what_is_stored_has_no_gradient(implementation):
    x, w, _ = operands("NF4, single")
    f = lambda m: quantized_dot(x, NF4(**{**vars(w), "magnitudes": m}), implementation=implementation).sum()
    assert np.all(jax.grad(f)(w.magnitudes) == 0)


def test_one_trace_serves_all_values():
    traces = []

    @jax.jit
    def f(*args):
        traces.append(1)
        return both_products(*args)

    for seed in range(3):
        f(*operands(seed=seed))
    assert len(traces) == 1


# ---- Several devices ----


@pytest.mark.parametrize("implementation", ALL)
@pytest.mark.parametrize("format", ["NF4", "Int8"])
def test_shard_map_over_tokens(implementation, format, devices):
    args = operands(format, lead=(8, 3))
    f = jax.shard_map(
        partial(quantized_dot, implementation=implementation),
        mesh=Mesh(devices, "d"),
        in_specs=(P("d"), P()),
        out_specs=P("d"),
        check_vma=implementation != "pallas_interpret",  # the interpreter does not know of varying axes
    )

    def products(x, w, dy):
        y, vjp = jax.vjp(lambda x: f(x, w), x)
        return y, *vjp(dy)

    assert_close(jax.jit(products)(*args), in_float64(*args))


@pytest.mark.parametrize("implementation", ALL)
@pytest.mark.parametrize("format", ["NF4, single", "Int8"])
def test_shard_map_over_the_weight(implementation, format, devices):
    """Cut along its outputs, which are the rows of what is stored: each device has a part of y, and of the sum dx."""
    args = operands(format, n_in=192, n_out=64)
    f = jax.shard_map(
        partial(quantized_dot, implementation=implementation),
        mesh=Mesh(np.reshape(devices, (2, 4)), ("d", "m"), axis_types=(AxisType.Auto,) * 2),
        in_specs=(P(), P("m")),
        out_specs=P(None, None, "m"),
        check_vma=implementation != "pallas_interpret",
    )

    def products(x, w, dy):
        y, vjp = jax.vjp(lambda x: f(x, w), x)
        return y, *vjp(dy)

    assert_close(jax.jit(products)(*args), in_float64(*args))


@pytest.mark.parametrize("mode", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("format", ["NF4", "Int8"])
def test_partitioned_by_the_compiler(format, mode, devices):
    x, w, dy = operands(format, lead=(8, 3))
    mesh = Mesh(np.reshape(devices, (2, 4)), ("d", "m"), axis_types=(mode,) * 2)
    with jax.set_mesh(mesh):
        put = lambda v, *spec: jax.device_put(v, NamedSharding(mesh, P(*spec)))
        y, dx = jax.jit(both_products)(put(x, "d"), put(w), put(dy, "d"))
        assert dx.sharding.spec[:1] == ("d",) == y.sharding.spec[:1]
    assert_close((y, dx), in_float64(x, w, dy))


# ---- What it costs ----


@pytest.mark.parametrize("implementation", WRITTEN)
def test_what_is_kept_for_the_backward_pass(implementation):
    """What is stored, and neither x nor a matrix; over layers that are scanned, no second copy of it."""
    x, w, _ = operands()
    kept = jax.tree.leaves(jax.vjp(lambda x: quantized_dot(x, w, implementation=implementation), x)[1])
    assert {v.shape for v in kept} <= {v.shape for v in jax.tree.leaves(w)}
    stack, x = layers()
    jaxpr = str(jax.make_jaxpr(jax.grad(loss_of_layers(implementation, False)))(x, stack))
    assert "f32[3,192,192]" not in jaxpr and "f32[3,192,192]" in str(
        jax.make_jaxpr(jax.grad(loss_of_layers("plain", False)))(x, stack)
    )


@pytest.mark.parametrize("implementation", WRITTEN)
def test_the_passes_of_one_program_share_no_matrix(implementation):
    """The backward pass forms it behind a barrier. (XLA for CPU takes no notice, so memory does not show it here.)"""
    program = jax.jit(partial(both_products, implementation=implementation)).lower(*operands()).as_text()
    assert program.count("optimization_barrier") == 1


def test_the_kernels_on_a_simulated_tpu():
    """With its memories, copies and a detector of races between them; fresh memory is NaN."""
    args = operands(lead=(20,))
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(uninitialized_memory="nan", detect_races=True)):
        got = jax.jit(partial(both_products, implementation="pallas_interpret"))(*args)
        assert_close(got, in_float64(*args))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("format", ["NF4", "Int8"])
def test_the_kernels_lower_for_tpu(format, dtype, monkeypatch):
    """Mosaic accepts them, at the blocks they have in earnest. Needs no TPU."""
    monkeypatch.undo()
    pieces = quantized_dot_tpu.PallasPieces(
        compute=jnp.dtype(dtype), accumulate=jnp.dtype("float32"), out=jnp.dtype(dtype), precision=None
    )

    def step(x, w, dy):
        y, vjp = jax.vjp(lambda x: _with_gradient(pieces, 0, jax.typeof(x), x, w), x)
        return y, vjp(dy)

    args = operands(format, lead=(300,), n_in=576, n_out=700, dtype=dtype)
    exported = jax.export.export(jax.jit(step), platforms=["tpu"])(*args)
    assert exported.mlir_module().count("tpu_custom_call") == (3 if format == "NF4" else 2)


# ---- Bad input ----


def test_shapes_that_do_not_fit():
    x, w, dy = operands()
    with pytest.raises(
        ValueError, match=r"got x \(3, 5, 40\) and w \[384, 40\].*; want x \[\.\.\., 384\].*transposed=True"
    ):
        quantized_dot(dy, w)
    with pytest.raises(ValueError, match=r"got x \(3, 5, 384\).*want x \[\.\.\., 40\].*transposed=False"):
        quantized_dot(x, w, transposed=True)
    with pytest.raises(ValueError, match=r"got x \(\)"):
        quantized_dot(jnp.float32(1), w)


def test_what_is_no_quantized_matrix():
    x, w, _ = operands()
    with pytest.raises(TypeError, match="want NF4 or Int8.*jlora.quant.quantize"):
        quantized_dot(x, w.matrix())
    stack, x = layers()
    with pytest.raises(ValueError, match=re.escape("codes (3, 192, 96); want those of one matrix") + ".*scanned over"):
        quantized_dot(x, stack)


def test_a_part_of_a_weight_with_norms_over_all_of_it(devices):
    x, w, _ = operands(n_in=192, n_out=512)
    f = jax.shard_map(quantized_dot, mesh=Mesh(devices, "d"), in_specs=(P(), _cut(w)), out_specs=P(None, None, "d"))
    with pytest.raises(ValueError, match="one for every 256.*double=False"):
        f(x, w)


def _cut(w):
    return NF4(**{**vars(w), "codes": P("d"), "magnitudes": P("d"), "norms": P(), "mean": P()})


def test_unknown_implementation():
    with pytest.raises(ValueError, match="'fast'; want None or one of plain, custom_vjp, pallas, pallas_interpret"):
        quantized_dot(*operands()[:2], implementation="fast")


@pytest.mark.skipif(jax.default_backend() == "tpu", reason="is right there")
def test_pallas_away_from_a_tpu():
    with pytest.raises(ValueError, match="written for TPU.*'pallas_interpret' to emulate"):
        quantized_dot(*operands()[:2], implementation="pallas")


def test_blocks_that_the_kernels_do_not_take():
    x, w, _ = operands(n_in=40, n_out=24)
    with pytest.raises(ValueError, match="block_size=64 over rows of 40.*a block_size that divides 40"):
        quantized_dot(x, w, implementation="pallas_interpret")
