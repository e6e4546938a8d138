"""On a quantized base every method is what it is on that base dequantized: output, gradients, merged weight, in every
way of using a weight. And nothing of the base's size is formed or kept on the way."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import registry
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from registry import assert_close, moved, normal
from uses import USES

import jlora
from jlora.methods import Site
from jlora.quant import NF4, Int8, dequantize, quantize

METHODS = {"lora": jlora.LoRA(2), "dora": jlora.DoRA(2), "vera": jlora.VeRA(5), "oft": jlora.OFT(2)}
FORMATS = {"nf4": (NF4, {"block_size": 4}), "int8": (Int8, {})}
KINDS = "linear transposed scan experts lookup_and_tied_head conv".split()
ALSO = (  # for LoRA: what the interpreter does to a weight that is not an array
    "heads_merged einsum_any_order scan_in_the_middle scan_of_remat loop fori_loop some_layers layers_of_experts "
    "every_expert_transposed ragged cond split_weight sliced_in parts_of_heads one_head conv_grouped"
).split()


def pairs() -> Iterator:
    for name, use in USES.items():
        for label, method in METHODS.items():
            if method.check(Site(method, use.axes, use.shape)):
                continue
            for kind in FORMATS:
                fast = name in KINDS or (label == "lora" and name in ALSO and kind == "nf4")
                yield pytest.param(
                    use, method, kind, id=f"{name}-{label}-{kind}", marks=[] if fast else pytest.mark.slow
                )


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("use", "method", "kind"), list(pairs()))
def test_quantized_is_dequantized(use, method, kind):
    to, options = FORMATS[kind]
    params = quantize({"w": normal(1, use.shape) / 2}, to, "w", axes={"w": use.axes}, **options)
    ids = jnp.asarray(np.random.default_rng(2).integers(0, use.shape[0], (2, 3)))
    args = [ids if shape is None else normal(3 + i, shape) for i, shape in enumerate(use.args)]
    adapted = jlora.adapt(params, method, "w", key=jax.random.key(0))
    wanted = jlora.adapt(dequantize(params), method, "w", axes={"w": use.axes}, key=jax.random.key(0))
    assert_close(adapted.trainable, wanted.trainable)

    sliced_otherwise = use.sliced is not None and use.sliced not in method.sliceable
    plain = lambda params, *args: use.fn(params["w"], *args)
    lifted = jlora.lift(plain, on_materialize="silent" if sliced_otherwise else "error")
    wrt = (0,) if None in use.args else (0, 1)

    @jax.jit
    def run(adapted, trainable, args):
        def loss(trainable, *args):
            y = lifted(adapted.bind(trainable), *args)
            return jnp.sum(jnp.sin(y)), y

        (_, y), grads = jax.value_and_grad(loss, wrt, has_aux=True)(trainable, *args)
        return y, grads

    trainable = moved(wanted.trainable)
    assert_close(run(adapted, trainable, args), run(wanted, trainable, args))
    assert_close(jax.jit(lifted)(params, *args), plain(dequantize(params), *args))  # a base that nothing adapts
    merged = [jlora.merge(tree.replace(trainable=trainable)) for tree in (adapted, wanted)]
    assert_close(*merged)


# A model of scanned layers, with a table that is also its head.

LAYERS, DIM, WIDTH, VOCAB = 4, 64, 128, 40
IDS = jnp.arange(12).reshape(2, 6) * 3 % VOCAB


def model(params, ids):
    def layer(x, w):
        gate, up = jnp.split(w["up"], 2, axis=1)
        return x + (jnp.tanh(x @ gate) * (x @ up)) @ w["down"], None

    x, _ = jax.lax.scan(layer, params["table"].astype(jnp.float32)[ids], params["layers"])
    return x @ params["table"].T


def loss(params, ids):
    return jnp.mean(jnp.square(model(params, ids)))


def make_params(dim=DIM, width=WIDTH):
    shapes = {"up": (LAYERS, dim, 2 * width), "down": (LAYERS, width, dim)}
    keys = jax.random.split(jax.random.key(0), 3)
    layers = {
        name: jax.random.normal(key, shape) / 16 for key, (name, shape) in zip(keys, shapes.items(), strict=False)
    }
    return {"table": jax.random.normal(keys[2], (VOCAB, dim)), "layers": layers}


def make_quantized(to=NF4, **kwargs):
    return quantize(make_params(**kwargs), to, "**", fn=model, args=(IDS,))


def make_adapted(params, method=None, targets="**"):
    adapted = jlora.adapt(params, method or jlora.LoRA(2), targets, fn=model, args=(IDS,), key=jax.random.key(1))
    keys = iter(jax.random.split(jax.random.key(2), 50))
    noise = lambda leaf: leaf + jax.random.normal(next(keys), leaf.shape) / 16
    return adapted.replace(trainable=jax.tree.map(noise, adapted.trainable))


def both(to=NF4, method=None):
    small = make_quantized(to)
    adapted = make_adapted(small, method)
    return adapted, adapted.replace(base=dequantize(small))


def assert_near(got, wanted, tolerance=1e-5):
    """Up to rounding of the largest entries."""
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * max(1.0, float(jnp.max(jnp.abs(b)))))


def test_usage_finds_the_axes_of_quantized_leaves():
    small, large = make_quantized(), make_params()
    assert jlora.usage(model, small, IDS) == jlora.usage(model, large, IDS)
    assert small["table"].axes.kind == "embedding" and small["layers"]["up"].axes.stack == (0,)


@pytest.mark.parametrize("to", [NF4, Int8])
def test_float32_and_half_precision(to):
    adapted, wanted = both(to)
    lifted = jlora.lift(model, on_materialize="error")
    assert_near(lifted(adapted.bind(), IDS), lifted(wanted.bind(), IDS))
    half = lambda params: jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    small = quantize(half(make_params()), to, "**", fn=model, args=(IDS,))
    adapted = make_adapted(small)
    wanted = adapted.replace(base=dequantize(small))
    assert small["table"].dtype == jnp.bfloat16
    assert_near(lifted(adapted.bind(), IDS), lifted(wanted.bind(), IDS))


@pytest.mark.parametrize("transform", ["vmap", "remat", "grad of vmap", "jvp", "per example"])
def test_transformations(transform):
    adapted, wanted = both()
    lifted = jlora.lift(loss, on_materialize="error", implementation="plain" if transform == "jvp" else None)

    def run(adapted):
        of = lambda trainable, ids: lifted(adapted.bind(trainable), ids)
        match transform:
            case "vmap":
                return jax.vmap(of, (None, 0))(adapted.trainable, IDS[:, None])
            case "remat":
                return jax.grad(jax.checkpoint(of))(adapted.trainable, IDS)
            case "grad of vmap":
                return jax.grad(lambda t: jax.vmap(of, (None, 0))(t, IDS[:, None]).sum())(adapted.trainable)
            case "jvp":
                return jax.jvp(lambda t: of(t, IDS), (adapted.trainable,), (adapted.trainable,))
            case "per example":
                return jax.vmap(jax.grad(of), (None, 0))(adapted.trainable, IDS[:, None])

    assert_near(jax.jit(run)(adapted), jax.jit(run)(wanted))


def test_many_adapters_beside_one_base():
    adapted, wanted = both()
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), adapted.trainable)
    run = lambda adapted: jax.vmap(lambda t: jlora.lift(loss)(adapted.bind(t), IDS))(stacked)
    np.testing.assert_allclose(run(adapted), run(wanted), rtol=1e-5)


def test_dropout_is_the_same_in_the_backward_pass():
    adapted, wanted = both(method=jlora.LoRA(2, dropout=0.5))
    run = jax.jit(
        lambda a: jax.value_and_grad(lambda t: jlora.lift(loss)(a.bind(t, {"key": jax.random.key(3)}), IDS))(
            a.trainable
        )
    )
    assert_near(run(adapted), run(wanted))


def test_lookups_only_beside_a_quantized_table():
    method = jlora.LoRA(2, lookup_only=True)
    small = make_quantized()
    adapted = jlora.adapt(small, method, "table", key=jax.random.key(1))
    adapted = adapted.replace(trainable=jax.tree.map(lambda leaf: leaf + 0.1, adapted.trainable))
    wanted = adapted.replace(base=dequantize(small))
    lifted = jlora.lift(model)
    assert_near(lifted(adapted.bind(), IDS), lifted(wanted.bind(), IDS))


@pytest.mark.parametrize("mode", ["clip", "fill", "promise_in_bounds"])
@pytest.mark.parametrize("to", [NF4, Int8])
def test_rows_out_of_bounds_are_the_models_business(mode, to):
    small = quantize({"w": make_params()["table"]}, to, "w", axes={"w": jlora.Axes((0,), (1,), kind="embedding")})
    ids = jnp.array([0, 5, VOCAB - 1] + ([VOCAB, 10**6] if mode != "promise_in_bounds" else []))
    take = lambda params, ids: params["w"].at[ids].get(mode=mode)
    np.testing.assert_array_equal(jlora.lift(take)(small, ids), take(dequantize(small), ids))
    forced = lambda params, ids: params["w"].at[ids].get(mode="fill", fill_value=0.0)
    np.testing.assert_array_equal(jlora.lift(forced)(small, ids), forced(dequantize(small), ids))


def test_a_chain_of_casts_rounds_as_often_as_the_model_does():
    small = quantize({"w": make_params()["table"]}, NF4, "w", axes={"w": jlora.Axes((0,), (1,))})
    fn = lambda params, x: x @ params["w"].astype(jnp.bfloat16).astype(jnp.float32)
    x = jnp.eye(VOCAB)
    np.testing.assert_array_equal(jlora.lift(fn)(small, x), fn(dequantize(small), x))


@pytest.mark.parametrize(
    "fn", [lambda p, x: x @ (2 * p["w"]), lambda p, x: p["w"], lambda p, x: x * jnp.linalg.norm(p["w"])]
)
def test_uses_that_are_no_product_are_said(fn):
    small = quantize({"w": make_params()["table"]}, NF4, "w", axes={"w": jlora.Axes((0,), (1,))})
    x = jnp.ones((3, VOCAB))
    with pytest.warns(jlora.MaterializeWarning, match=r"quantized weight 'w' \(40, 64\) was dequantized as a whole"):
        got = jlora.lift(fn)(small, x)
    np.testing.assert_allclose(got, fn(dequantize(small), x), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="on_materialize='error'"):
        jlora.lift(fn, on_materialize="error")(small, x)


def test_quantized_leaves_anywhere_in_the_arguments():
    small = make_quantized()["layers"]["up"]
    one = jax.tree.map(lambda leaf: leaf[1], small)
    fn = lambda x, rest, *, up: (x @ up[0], x @ rest[1])
    wanted = fn(jnp.ones((2, DIM)), [None, one.dequantize()], up=small.dequantize())
    got = jlora.lift(fn, on_materialize="error")(jnp.ones((2, DIM)), [None, one], up=small)
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)


# What it costs.


def arrays_of(jaxpr) -> Iterator:
    """The types of everything computed in a jaxpr and in those within it."""
    for eqn in jaxpr.eqns:
        for var in eqn.outvars:
            yield var.aval
        for param in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(param, "jaxpr", param)
            if hasattr(inner, "eqns"):
                yield from arrays_of(inner)


def largest_float(fn, *args) -> int:
    avals = arrays_of(jax.make_jaxpr(fn)(*args).jaxpr)
    return max(aval.size for aval in avals if jnp.issubdtype(getattr(aval, "dtype", jnp.int8), jnp.floating))


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("to", [NF4, pytest.param(Int8, marks=pytest.mark.slow)])
def test_no_matrix_outlives_its_product(to, method):
    """One layer's matrices at most are formed, and a scan keeps none of them for its backward pass."""
    adapted = make_adapted(make_quantized(to), method, "**" if not isinstance(method, jlora.OFT) else "layers/**")
    step = jax.value_and_grad(lambda t, a: jlora.lift(loss, on_materialize="error")(a.bind(t), IDS))
    one_layer = DIM * 2 * WIDTH
    assert largest_float(step, adapted.trainable, adapted) <= one_layer
    assert largest_float(step, adapted.trainable, adapted.replace(base=dequantize(adapted.base))) <= LAYERS * one_layer
    init = lambda key: jlora.adapt(adapted.base, jlora.DoRA(2), "layers/**", key=key)  # reads the weight
    assert largest_float(init, jax.random.key(0)) <= one_layer

    _, back = jax.vjp(lambda t: jlora.lift(loss)(adapted.bind(t), IDS), adapted.trainable)
    kept = [leaf for leaf in jax.tree.leaves(back) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    assert max(leaf.size for leaf in kept) < one_layer


@pytest.mark.optimized
@pytest.mark.parametrize("to", [NF4, pytest.param(Int8, marks=pytest.mark.slow)])
def test_compiled_memory(to):
    """Beside a base of 8 layers the program needs about what one layer takes, forward and backward."""
    small = make_quantized(to, dim=128, width=256)
    layer_bytes = 4 * (128 * 512 + 256 * 128)

    def memory(params):
        adapted = make_adapted(params)
        step = jax.value_and_grad(lambda t, a: jlora.lift(loss)(a.bind(t), IDS))
        analysis = jax.jit(step).lower(adapted.trainable, adapted.replace(trainable=None)).compile().memory_analysis()
        return analysis.temp_size_in_bytes

    assert memory(small) < 2.5 * layer_bytes  # the matrices, and what XLA turns around
    assert memory(small) - memory(dequantize(small)) < 1.5 * layer_bytes


def test_memory_of_an_adapted_model():
    params = make_params(dim=128, width=256)
    small = quantize(params, NF4, "layers/**", fn=model, args=(IDS,))["layers"]
    adapted = jlora.adapt(small, jlora.LoRA(2), key=jax.random.key(0))
    stored = sum(leaf.nbytes for leaf in jax.tree.leaves(adapted))
    adapters = sum(leaf.nbytes for leaf in jax.tree.leaves(adapted.trainable))
    assert stored <= 0.16 * (sum(leaf.nbytes for leaf in jax.tree.leaves(params["layers"])) + adapters)


@pytest.mark.optimized
def test_only_the_rows_looked_up_are_formed():
    small = quantize({"w": make_params()["table"]}, NF4, "w", axes={"w": jlora.Axes((0,), (1,), kind="embedding")})
    adapted = jlora.adapt(small, jlora.LoRA(2), "w", key=jax.random.key(0))
    fn = jax.jit(lambda a: jlora.lift(lambda p: p["w"][jnp.array([3, 1])])(a.bind()))
    flops = fn.lower(adapted).compile().cost_analysis()["flops"]
    assert flops < VOCAB * DIM


# Devices.


@pytest.mark.parametrize("axis", ["stack", "in", "out"])
def test_shard_map(devices, axis):
    """What is stored is sharded along the stack; in and out are cut where the matrix is formed."""
    mesh = Mesh(np.array(devices[:2]), ("m",))
    shape, spec = (4, 6, 8), {"stack": P("m"), "in": P(None, "m"), "out": P(None, None, "m")}[axis]

    def local(w, x):
        if axis == "in":
            x = jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index("m") * 3, 3, axis=1)
        y = jnp.einsum("bi,eio->ebo", x, w)
        return jax.lax.psum(y, "m") if axis == "in" else y

    fn = jax.shard_map(local, mesh=mesh, in_specs=(spec, P()), out_specs=P() if axis == "in" else spec)
    axes = {"w": jlora.Axes((1,), (2,), stack=(0,))}
    small = quantize({"w": normal(0, shape).astype(jnp.float32)}, NF4, "w", axes=axes, block_size=2)
    adapted = jlora.adapt(small, jlora.LoRA(2), "w", key=jax.random.key(0))
    adapted = adapted.replace(trainable=jax.tree.map(lambda leaf: leaf + 0.1, adapted.trainable))
    wanted = adapted.replace(base=dequantize(small))
    x = jnp.asarray(np.random.default_rng(1).normal(size=(5, 6)), jnp.float32)
    lifted = jlora.lift(lambda p, x: jnp.sum(jnp.sin(fn(p["w"], x))), on_materialize="error")
    run = jax.jit(lambda a: jax.value_and_grad(lambda t: lifted(a.bind(t), x))(a.trainable))
    assert_near(run(adapted), run(wanted))
    bare = jlora.lift(lambda p, x: fn(p["w"], x), on_materialize="error")
    np.testing.assert_allclose(bare(small, x), fn(wanted.base["w"], x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("side", ["in", "out"])
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("to", [NF4, pytest.param(Int8, marks=pytest.mark.slow)])
def test_on_a_mesh(devices, kind, side, to):
    mesh = Mesh(np.array(devices).reshape(2, 4), ("data", "model"), axis_types=(kind, kind))
    spec = {"in": P("model", None), "out": P(None, "model")}[side]
    specs = {"first": {"kernel": spec, "bias": P()}, "layers": {"kernel": P(None, *spec)}, "last": {"kernel": spec}}
    put = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))
    options = {"block_size": 8} if to is NF4 else {}
    run = jax.jit(jax.value_and_grad(lambda t, a, x: jnp.sum(jnp.sin(jlora.lift(registry.model)(a.bind(t), x)))))

    def whole(params, x):
        small = quantize(params, to, fn=registry.model, args=(x,), **options)
        adapted = jlora.adapt(small, jlora.LoRA(2), fn=registry.model, args=(x,), key=jax.random.key(0))
        return run(jax.tree.map(lambda leaf: leaf + 0.1, adapted.trainable), adapted, x)

    wanted = whole(registry.model_params(), registry.inputs())
    with jax.set_mesh(mesh):
        got = whole(jax.tree.map(put, registry.model_params(), specs), put(registry.inputs(), P("data", None)))
    assert_near(got, wanted)


@pytest.mark.parametrize("side", ["in", "out"])
def test_explicit_meshes_store_parts(devices, side):
    """A quarter of the codes on each device, the numbers of one device; and whole where a quarter is no number."""
    mesh = Mesh(np.array(devices).reshape(2, 4), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    spec = {"in": P(None, "model", None), "out": P(None, None, "model")}[side]
    w = np.random.default_rng(0).normal(size=(3, 16, 24)).astype("f")
    axes = {"*": jlora.Axes((1,), (2,), (0,))}
    store = lambda w, **options: quantize({"w": w}, NF4, "*", axes=axes, **options)["w"]
    wanted = store(jnp.asarray(w), block_size=8)
    with jax.set_mesh(mesh):
        placed = jax.device_put(w, NamedSharding(mesh, spec))
        got, across_rows = store(placed, block_size=8), store(placed, block_size=64)
        parts = [part.data.size for part in got.codes.addressable_shards]
        assert parts == [wanted.codes.size // 4] * 8
        np.testing.assert_array_equal(got.codes, wanted.codes)
        np.testing.assert_array_equal(got.dequantize(), wanted.dequantize())
        assert across_rows.codes.is_fully_replicated


def test_capture_beside_a_quantized_base():
    small = make_quantized()
    got = jlora.capture(loss, small, IDS, targets="layers/down")
    want = jlora.capture(loss, dequantize(small), IDS, targets="layers/down")
    assert_near(got, want)


def test_a_new_batch_does_not_trace_anew():
    adapted = make_adapted(make_quantized())
    traces = []

    def counted(params, ids):
        traces.append(1)
        return loss(params, ids)

    lifted = jlora.lift(counted)
    for ids in (IDS, IDS + 1):
        lifted(adapted.bind(), ids)
    lifted(adapted.replace(base=jax.tree.map(lambda leaf: leaf, adapted.base)).bind(), IDS)
    assert len(traces) == 1
