"""The LoRA linear: every implementation means the same, under every transformation, and none does more than it must."""

import math
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxprs import equations

from jlora.kernels import lora_linear, lora_linear_tpu
from jlora.kernels.dropout import dropout
from jlora.kernels.lora_linear import _with_gradient

WRITTEN = ("custom_vjp", "pallas_interpret")
ALL = ("plain", *WRITTEN)
NAMES = ("x", "w", "a", "b", "scale")


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Blocks small enough that the shapes below need several, and hang over the edge."""
    monkeypatch.setattr(lora_linear_tpu, "_TOKENS", 8)
    monkeypatch.setattr(lora_linear_tpu, "_FEATURES", 16)
    monkeypatch.setattr(lora_linear_tpu, "_WIDE", 32)


def operands(lead=(3, 5), n_in=24, n_out=40, r=3, dtype="float32", factors=None, seed=0):
    rng = np.random.default_rng(seed)
    x, w, a, b = (
        jnp.asarray(rng.normal(size=shape) / math.sqrt(shape[0] or 1), kind)
        for shape, kind in [
            ((*lead, n_in), dtype),
            ((n_in, n_out), dtype),
            ((n_in, r), factors or dtype),
            ((r, n_out), factors or dtype),
        ]
    )
    return x, w, a, b, jnp.asarray(0.5, factors or dtype)


def value_and_grads(f):
    """A scalar loss of f(x, w, a, b, scale), with the gradient of all five."""
    return jax.value_and_grad(lambda *args: jnp.sum(jnp.sin(f(*args).astype(jnp.float32))), argnums=(0, 1, 2, 3, 4))


def assert_close(got, want, tolerance=1e-5):
    """The error is relative to the largest element, as that of a sum is."""
    for path, g in jax.tree.leaves_with_path(got):
        w = np.asarray(dict(jax.tree.leaves_with_path(want))[path], np.float64)
        np.testing.assert_allclose(g, w, rtol=0, atol=tolerance * max(1.0, np.abs(w).max(initial=0)), err_msg=str(path))


def outputs_of(jaxpr, *primitives):
    return [v.aval.shape for e, _ in equations(jaxpr) if e.primitive.name in primitives for v in e.outvars]


# ---- One meaning ----

SHAPES = {
    "several blocks, none full": dict(lead=(3, 5), n_in=24, n_out=40, r=3),
    "exact blocks, rank one": dict(lead=(16,), n_in=32, n_out=64, r=1),
    "one short block": dict(lead=(2, 1), n_in=5, n_out=7, r=2),
    "a single token without leading axes": dict(lead=(), n_in=6, n_out=8, r=2),
}


@pytest.mark.parametrize("frozen_w", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("implementation", WRITTEN)
def test_agrees_with_plain(implementation, shape, frozen_w):
    args = operands(**SHAPES[shape])
    f = partial(lora_linear, frozen_w=frozen_w)
    want = jax.jit(value_and_grads(partial(f, implementation="plain")))(*args)
    assert_close(jax.jit(value_and_grads(partial(f, implementation=implementation)))(*args), want)


@pytest.mark.parametrize("implementation", ALL)
def test_the_formula_in_float64(implementation):
    """Against numpy, to the last digits: nothing on the way is computed in float32."""
    with jax.enable_x64(True):
        x, w, a, b, s = operands(dtype="float64")
        dy = operands(n_in=40, seed=1, dtype="float64")[0]
        f = partial(lora_linear, frozen_w=False, implementation=implementation)
        y, vjp = jax.vjp(jax.jit(f), x, w, a, b, s)
        dx, dw, da, db, ds = vjp(dy)
        x, w, a, b, s, dy = (np.asarray(v) for v in (x.reshape(15, 24), w, a, b, s, dy.reshape(15, 40)))
        want = {
            "y": x @ w + s * (x @ a) @ b,
            "dx": dy @ (w + s * a @ b).T,
            "dw": x.T @ dy,
            "da": s * x.T @ (dy @ b.T),
            "db": s * (x @ a).T @ dy,
            "ds": np.sum((x @ a) * (dy @ b.T)),
        }
        got = {"y": y.reshape(15, 40), "dx": dx.reshape(15, 24), "dw": dw, "da": da, "db": db, "ds": ds}
        assert {v.dtype for v in got.values()} == {np.dtype("float64")}
        assert_close(got, want, 1e-13)


@pytest.mark.parametrize("generator", ["threefry2x32", "rbg"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("implementation", ALL)
def test_dropout(implementation, shape, generator):
    """The formula with the mask of the key, which the kernels make in blocks or, with another generator, read."""
    x, w, a, b, s = operands(**SHAPES[shape])
    key = jax.random.key(5, impl=generator)
    formula = lambda x, w, a, b, s: x @ jax.lax.stop_gradient(w) + s * (dropout(x, 0.4, key) @ a) @ b
    f = partial(lora_linear, dropout=0.4, key=key, implementation=implementation)
    got = jax.jit(value_and_grads(f))(x, w, a, b, s)
    assert_close(got, jax.jit(value_and_grads(formula))(x, w, a, b, s))
    assert_close(f(x, w, a, b, s), jax.vmap(f, (0, None, None, None, None))(x[None], w, a, b, s)[0])
    assert_close(lora_linear(x, w, a, b, s, dropout=0.4), x @ w + s * (x @ a) @ b)


@pytest.mark.parametrize("implementation", WRITTEN)
def test_dropout_under_scan_and_remat(implementation):
    """Of layers that have keys of their own."""
    (w, a, b), x = stacked_operands()
    keys = jax.random.split(jax.random.key(0), len(w))

    def loss(implementation, remat, a, b, x):
        def layer(x, own):
            w, a, b, key = own
            return x + lora_linear(x, w, a, b, 0.5, dropout=0.3, key=key, implementation=implementation), None

        return jnp.sum(jnp.sin(jax.lax.scan(jax.checkpoint(layer) if remat else layer, x, (w, a, b, keys))[0]))

    grads = lambda *which: jax.jit(jax.value_and_grad(partial(loss, *which), (0, 1, 2)))(a, b, x)
    for remat in (False, True):
        assert_close(grads(implementation, remat), grads("plain", False))


def test_dropout_keeps_a_byte_an_entry():
    """For the backward pass, beside x, which is kept without it, too."""
    drops = partial(lora_linear, dropout=0.3, key=jax.random.key(0), implementation="custom_vjp")
    kept = jax.tree.leaves(jax.vjp(drops, *operands(lead=(64,)))[1])
    assert sorted(str(leaf.dtype) for leaf in kept if leaf.shape == (64, 24)) == ["bool", "float32"]


def test_dropout_is_a_rate():
    with pytest.raises(ValueError, match=r"got a dropout of 1.0; want a rate in \[0, 1\)"):
        lora_linear(*operands(), dropout=1.0, key=jax.random.key(0))


@pytest.mark.parametrize("implementation", ["plain", "custom_vjp"])
def test_a_python_scale_is_the_same_number(implementation):
    x, w, a, b, s = operands()
    want = lora_linear(x, w, a, b, s, implementation=implementation)
    for scale in (0.5, np.float64(0.5)):
        assert_close(lora_linear(x, w, a, b, scale, implementation=implementation), want)
    assert_close(lora_linear(x, w, a, b, 2, implementation=implementation), x @ w + 2 * (x @ a) @ b)


@pytest.mark.parametrize("implementation", ALL)
def test_bfloat16_activations_with_float32_factors(implementation):
    exact, args = operands(), operands(dtype="bfloat16", factors="float32")
    f = jax.jit(value_and_grads(partial(lora_linear, implementation=implementation, frozen_w=False)))
    value, grads = f(*args)
    assert [g.dtype for g in grads] == [v.dtype for v in args]
    want = jax.jit(value_and_grads(partial(lora_linear, frozen_w=False)))(*exact)
    assert_close(jax.tree.map(lambda v: v.astype("float32"), (value, grads)), want, 3e-2)


def test_the_gradient_of_a_float32_factor_is_not_rounded_to_bfloat16():
    x, w, a, b, s = operands(dtype="bfloat16", factors="float32")
    for grad in jax.grad(lambda a, b: lora_linear(x, w, a, b, s).sum(dtype="float32"), (0, 1))(a, b):
        assert np.any(grad != grad.astype("bfloat16").astype("float32"))


@pytest.mark.parametrize("wanted, implementation", [(t, i) for t in ("float32", "bfloat16") for i in ALL][:-1])
def test_preferred_element_type(implementation, wanted):
    x, w, a, b, s = operands(dtype="bfloat16", factors="float32")
    f = partial(lora_linear, implementation=implementation, preferred_element_type=wanted)
    assert f(x, w, a, b, s).dtype == wanted
    assert jax.grad(lambda x: f(x, w, a, b, s).astype("float32").sum())(x).dtype == "bfloat16"


@pytest.mark.parametrize("implementation", ALL)
def test_no_tokens(implementation):
    args = operands(lead=(2, 0))
    value, grads = value_and_grads(partial(lora_linear, implementation=implementation))(*args)
    assert value == 0 and [g.shape for g in grads] == [v.shape for v in args]
    assert all(np.all(g == 0) for g in grads)


@pytest.mark.parametrize("implementation", WRITTEN)
def test_a_transposed_weight(implementation):
    """A tied head passes table.T, and is given the gradient of the table."""
    x, w, a, b, s = operands()
    f = partial(lora_linear, implementation=implementation, frozen_w=False)
    grads = jax.jit(value_and_grads(lambda x, table, *rest: f(x, table.T, *rest)))(x, w.T, a, b, s)
    want = jax.jit(value_and_grads(partial(lora_linear, implementation="plain", frozen_w=False)))(x, w, a, b, s)
    assert_close(grads, (want[0], (want[1][0], want[1][1].T, *want[1][2:])))


# ---- Transformations ----


@pytest.mark.parametrize("implementation", ALL)
@pytest.mark.parametrize("mapped", ["all", "x", "factors"])
def test_vmap(implementation, mapped):
    axes = {"all": (0, 0, 0, 0, 0), "x": (0, None, None, None, None), "factors": (None, None, 0, 0, 0)}[mapped]
    layers = [operands(lead=(5,), seed=seed) for seed in range(3)]
    args = [layers[0][i] if axis is None else jnp.stack([layer[i] for layer in layers]) for i, axis in enumerate(axes)]
    f = value_and_grads(partial(lora_linear, implementation=implementation))
    got = jax.jit(jax.vmap(f, axes))(*args)
    reference = jax.jit(value_and_grads(partial(lora_linear, implementation="plain")))
    each = [reference(*(v if axis is None else v[i] for v, axis in zip(args, axes, strict=True))) for i in range(3)]
    assert_close(got, jax.tree.map(lambda *v: jnp.stack(v), *each))


def loss_of_layers(implementation, remat, frozen_w=True, policy=None):
    """A loss of three stacked layers: a function of their parameters (w, a, b) and of x."""

    def layer(x, params):
        return jnp.tanh(lora_linear(x, *params, 0.5, implementation=implementation, frozen_w=frozen_w)), None

    layer = jax.checkpoint(layer, policy=policy) if remat else layer
    return lambda params, x: jnp.sum(jax.lax.scan(layer, x, params)[0] ** 2)


def stack_of_layers(*args, **kwargs):
    """The same with the gradient with respect to all parameters."""
    return jax.value_and_grad(loss_of_layers(*args, **kwargs))


def stacked_operands(n=24, r=3, tokens=10):
    layers = [operands(lead=(tokens,), n_in=n, n_out=n, r=r, seed=seed) for seed in range(3)]
    return tuple(jnp.stack([layer[i] for layer in layers]) for i in (1, 2, 3)), layers[0][0]


@pytest.mark.parametrize("implementation", WRITTEN)
@pytest.mark.parametrize("remat", [False, True])
def test_scan_and_remat(implementation, remat):
    params, x = stacked_operands()
    got = jax.jit(stack_of_layers(implementation, remat))(params, x)
    assert_close(got, jax.jit(stack_of_layers("plain", remat))(params, x))


def test_plain_has_forward_mode_and_second_derivatives():
    x, w, a, b, s = operands(lead=(4,), n_in=5, n_out=6, r=2)
    f = lambda a, b, s: lora_linear(x, w, a, b, s, implementation="plain")
    value, tangent = jax.jvp(f, (a, b, s), (b.T[:5], a.T[:, :1] * b, s))
    assert_close(value, x @ w + s * (x @ a) @ b)
    assert_close(tangent, s * (x @ b.T[:5]) @ b + s * (x @ a) @ (a.T[:, :1] * b) + s * (x @ a) @ b)
    hessian = jax.hessian(lambda s: jnp.sum(jnp.sin(f(a, b, s))))(s)
    assert_close(hessian, -jnp.sum(jnp.sin(f(a, b, s)) * ((x @ a) @ b) ** 2))
    _, tangent = jax.jvp(lambda w: lora_linear(x, w, a, b, s, implementation="plain"), (w,), (w,))
    assert np.all(tangent == 0), "a frozen weight has no tangent"


# ---- Several devices ----

SPECS = {  # of x, w, a, b, scale
    "data and columns": (P("d"), P(None, "m"), P(), P(None, "m"), P()),
    "data and rows": (P("d", None, "m"), P("m"), P("m"), P(), P()),
    "data and sequence": (P("d", "m"), P(), P(), P(), P()),
}
Y_SPECS = {"data and columns": P("d", None, "m"), "data and sequence": P("d", "m")}


def mesh(kind):
    return jax.make_mesh((2, 4), ("d", "m"), axis_types=(kind, kind))


def sharded_case(specs):
    args = operands(lead=(4, 8), n_in=16, n_out=24, r=4)
    want = jax.jit(value_and_grads(partial(lora_linear, implementation="plain", frozen_w=False)))(*args)
    return args, SPECS[specs], want


@pytest.mark.parametrize("rate", [0.0, 0.3])
@pytest.mark.parametrize("specs", SPECS)
@pytest.mark.parametrize("implementation", WRITTEN)
def test_partitioned_by_the_compiler(implementation, specs, rate):
    """Masks are those of the whole array, whatever part of it a device has."""
    args, spec, _ = sharded_case(specs)
    options = dict(frozen_w=False, dropout=rate, key=jax.random.key(2))
    want = jax.jit(value_and_grads(partial(lora_linear, implementation="plain", **options)))(*args)
    args = [jax.device_put(v, NamedSharding(mesh(AxisType.Auto), s)) for v, s in zip(args, spec, strict=True)]
    assert_close(jax.jit(value_and_grads(partial(lora_linear, implementation=implementation, **options)))(*args), want)


@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize("spec", [P(None, None, "m"), P(None, "m")])
def test_kernels_in_a_scan_are_partitioned(spec, remat):
    """Each device multiplies its part of the weights: no operand of a kernel is gathered but the activations that the
    layers' shardings say."""
    (w, a, b), x = stacked_operands(n=32, tokens=8)
    want = jax.jit(stack_of_layers("plain", remat))((w, a, b), x)
    put = lambda v, s: jax.device_put(v, NamedSharding(mesh(AxisType.Auto), s))
    of_a, of_b = (P(None, spec[1]), P(None, None, spec[2] if len(spec) > 2 else None))
    params = put(w, spec), put(a, of_a), put(b, of_b)
    step = jax.jit(stack_of_layers("pallas_interpret", remat))
    assert_close(step(params, put(x, P("d"))), want)
    text = step.lower(params, put(x, P("d"))).compile().as_text()
    gathered = re.findall(r"f32\[([\d,]+)\]\S* all-gather\(", text)
    assert not {shape for shape in gathered if shape.endswith("32,32")}, gathered


@pytest.mark.optimized
@pytest.mark.parametrize("specs", Y_SPECS)
def test_partitioning_gathers_no_activations(specs):
    """Merging a sharded batch axis with a sharded sequence axis would."""
    args, spec, _ = sharded_case(specs)
    put = lambda v, s: jax.device_put(v, NamedSharding(mesh(AxisType.Auto), s))
    x, w, a, b, s = map(put, args, spec)
    dy = put(jnp.ones((4, 8, 24)), Y_SPECS[specs])
    step = lambda x, w, a, b, dy: jax.vjp(lambda x, a, b: lora_linear(x, w, a, b, 0.5), x, a, b)[1](dy)
    assert "all-gather" not in jax.jit(step).lower(x, w, a, b, dy).compile().as_text()


@pytest.mark.parametrize("specs", Y_SPECS)
@pytest.mark.parametrize("implementation", ["plain", "custom_vjp"])
def test_explicit_sharding(implementation, specs):
    args, spec, want = sharded_case(specs)
    with jax.set_mesh(mesh(AxisType.Explicit)):
        args = [jax.device_put(v, s) for v, s in zip(args, spec, strict=True)]
        got = jax.jit(value_and_grads(partial(lora_linear, implementation=implementation, frozen_w=False)))(*args)
        assert [jax.typeof(g).sharding.spec for g in got[1]] == [jax.typeof(v).sharding.spec for v in args]
    assert_close(got, want)


@pytest.mark.parametrize("implementation", ALL)
@pytest.mark.parametrize("specs", Y_SPECS)
def test_shard_map(implementation, specs):
    args, spec, want = sharded_case(specs)
    f = jax.shard_map(
        partial(lora_linear, implementation=implementation, frozen_w=False),
        mesh=mesh(AxisType.Auto),
        in_specs=spec,
        out_specs=Y_SPECS[specs],
        check_vma=implementation != "pallas_interpret",  # the interpreter does not know of varying axes
    )
    assert_close(jax.jit(value_and_grads(f))(*args), want)


# ---- What it costs ----


@pytest.mark.optimized
@pytest.mark.parametrize("implementation", ALL)
@pytest.mark.parametrize("remat", [False, True])
def test_a_frozen_weight_has_no_gradient_product(implementation, remat):
    """Even when the caller differentiates the weight: no product has its shape, traced or compiled."""
    params, x = stacked_operands()
    step = jax.jit(stack_of_layers(implementation, remat))
    assert (24, 24) not in outputs_of(jax.make_jaxpr(step)(params, x).jaxpr, "dot_general")
    if implementation != "pallas_interpret":  # its blocks are sliced and padded by many small programs
        assert not re.search(r"f32\[24,24\]\S* dot\(", step.lower(params, x).compile().as_text())
    assert np.all(step(params, x)[1][0] == 0)


def test_a_trained_weight_has_one():
    params, x = stacked_operands()
    step = jax.jit(stack_of_layers("custom_vjp", remat=False, frozen_w=False))
    assert outputs_of(jax.make_jaxpr(step)(params, x).jaxpr, "dot_general").count((24, 24)) == 1


@pytest.mark.parametrize("implementation", ALL)
def test_a_scan_keeps_no_second_copy_of_the_weights(implementation):
    (w, a, b), x = stacked_operands()
    loss = loss_of_layers(implementation, remat=False)
    jaxpr = jax.make_jaxpr(jax.grad(lambda ab, w, x: loss((w, *ab), x)))((a, b), w, x).jaxpr
    assert (3, 24, 24) not in outputs_of(jaxpr, "scan")


def residuals(f, *args):
    return [v.shape for v in jax.tree.leaves(jax.vjp(f, *args)[1]) if v.ndim]


@pytest.mark.parametrize("implementation", WRITTEN)
def test_what_is_kept_for_the_backward_pass(implementation):
    x, w, a, b, s = operands(lead=(11,))
    f = partial(lora_linear, implementation=implementation)
    assert set(residuals(f, x, w, a, b, s)) == {x.shape, w.shape, a.shape, b.shape, (11, 3)}
    assert x.shape not in residuals(lambda b: f(x, w, a, b, s), b), "with A frozen, x is not needed"
    assert x.shape not in residuals(lambda x: f(x, w, a, b, s), x)


@pytest.mark.parametrize("implementation", ALL)
def test_remat_can_keep_h(implementation):
    params, x = stacked_operands()
    policy = jax.checkpoint_policies.save_only_these_names("lora_h")
    jaxpr = jax.make_jaxpr(stack_of_layers(implementation, True, policy=policy))(params, x).jaxpr
    assert (3, 10, 3) in outputs_of(jaxpr, "scan")
    assert (3, 10, 3) not in outputs_of(jax.make_jaxpr(stack_of_layers(implementation, True))(params, x).jaxpr, "scan")


@pytest.mark.optimized
@pytest.mark.parametrize("lead", [(256,), (4, 64)])
@pytest.mark.parametrize("n_in, n_out", [(128, 344), (128, 128)])
def test_flops_and_memory(lead, n_in, n_out):
    """FLOPs within 2 % of the count in the module's docstring; memory within that of plain autodiff on matrices.

    With several leading axes, the two sums over them go through transposes of h and ds, which are r wide.
    """
    r, tokens = 8, 256
    x, w, a, b, _ = operands(lead=lead, n_in=n_in, n_out=n_out, r=r)

    def compiled(f):
        def step(x, w, a, b, target):
            y, vjp = jax.vjp(lambda x, a, b: f(x, w, a, b), x, a, b)
            return y, vjp(y - target)

        return jax.jit(step).lower(x, w, a, b, jnp.zeros((*lead, n_out))).compile()

    def on_matrices(x, w, a, b):
        return lora_linear(x.reshape(tokens, n_in), w, a, b, 2.0, implementation="plain").reshape(*lead, n_out)

    program, plain = compiled(lambda *args: lora_linear(*args, 2.0)), compiled(on_matrices)
    products = 4 * tokens * n_in * n_out + 6 * tokens * r * (n_in + n_out)
    assert program.cost_analysis()["flops"] <= 1.02 * products
    transposes = 0 if len(lead) == 1 else 2 * tokens * r * x.dtype.itemsize
    assert program.memory_analysis().temp_size_in_bytes <= plain.memory_analysis().temp_size_in_bytes + transposes


def test_one_trace_serves_all_values():
    traces = []

    @jax.jit
    def f(*args):
        traces.append(1)
        return value_and_grads(lora_linear)(*args)

    for seed in range(3):
        f(*operands(seed=seed)[:4], 0.1 * seed)
    assert len(traces) == 1


def test_the_kernels_on_a_simulated_tpu():
    """With its memories, copies and a detector of races between them; fresh memory is NaN."""
    args = operands()
    want = jax.jit(value_and_grads(partial(lora_linear, implementation="plain")))(*args)
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(uninitialized_memory="nan", detect_races=True)):
        got = jax.jit(value_and_grads(partial(lora_linear, implementation="pallas_interpret")))(*args)
        assert_close(got, want)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_kernels_lower_for_tpu(dtype, dropout, monkeypatch):
    """Mosaic accepts them, at the blocks they have in earnest. Needs no TPU."""
    monkeypatch.undo()
    pieces = lora_linear_tpu.PallasPieces(
        compute=jnp.dtype(dtype), accumulate=jnp.dtype("float32"), out=jnp.dtype(dtype), precision=None,
        dropout=dropout,
    )  # fmt: skip

    def step(x, w, a, b, s, dy):
        keep = pieces.keep(x, jax.random.key(0)) if dropout else None
        f = lambda x, a, b, s: _with_gradient(pieces, True, jax.typeof(x), x, w, a, b, s, keep)
        y, vjp = jax.vjp(f, x, a, b, s)
        return y, vjp(dy)

    args = operands(lead=(300,), n_in=520, n_out=700, r=4, dtype=dtype, factors="float32")
    exported = jax.export.export(jax.jit(step), platforms=["tpu"])(*args, jnp.zeros((300, 700), dtype))
    assert exported.mlir_module().count("tpu_custom_call") == 4


# ---- Bad input ----


@pytest.mark.parametrize(
    "broken",
    [
        dict(x=(3, 23)),
        dict(w=(40, 24)),
        dict(w=(2, 24, 40)),
        dict(a=(24, 4)),
        dict(b=(3, 41)),
        dict(x=()),
        dict(scale=(2,)),
    ],
)
def test_shapes_that_do_not_fit(broken):
    args = dict(zip(NAMES, operands(), strict=True)) | {k: jnp.zeros(v) for k, v in broken.items()}
    (shape,) = broken.values()
    with pytest.raises(ValueError, match=re.escape(str(shape)) + r".*; want x \[\.\.\., in\]"):
        lora_linear(**args)


def test_unknown_implementation():
    with pytest.raises(ValueError, match="'fast'; want None or one of plain, custom_vjp, pallas, pallas_interpret"):
        lora_linear(*operands(), implementation="fast")


@pytest.mark.skipif(jax.default_backend() == "tpu", reason="is right there")
def test_pallas_away_from_a_tpu():
    with pytest.raises(ValueError, match="written for TPU.*'pallas_interpret' to emulate"):
        lora_linear(*operands(), implementation="pallas")


def test_integers_alone_have_no_gradient():
    x, w, a, b, s = operands()
    with pytest.raises(ValueError, match="int32.*floating point"):
        lora_linear(x.astype(int), w.astype(int), a, b, s)
