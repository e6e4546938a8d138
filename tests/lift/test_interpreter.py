"""What the interpreter does beyond products: forming weights loudly, reports, keys, caching, other people's loops."""

import dataclasses
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

import jlora
from jlora.methods.base import Method
from jlora.weight import Params

KEY = jax.random.key(0)
W = jax.random.normal(jax.random.key(1), (4, 4))
X = jax.random.normal(jax.random.key(2), (3, 4))
AXES = {"w": jlora.Axes((0,), (1,)), "layers": jlora.Axes((1,), (2,), (0,))}


def adapted_with_noise(params, method, **kwargs):
    axes = {name: axes for name, axes in AXES.items() if name in params}
    adapted = jlora.adapt(params, method, "**", key=KEY, axes=axes, **kwargs)
    keys = iter(jax.random.split(jax.random.key(7), 50))
    return adapted.replace(
        trainable=jax.tree.map(lambda x: x + jax.random.normal(next(keys), x.shape), adapted.trainable)
    )


@pytest.mark.parametrize(
    ("name", "fn"),
    [
        ("mul", lambda p, x: x @ (p["w"] * 2.0)),
        ("reduce_sum", lambda p, x: x @ jnp.tanh(x.T) * p["w"].sum()),
        ("output", lambda p, x: p["w"]),
        ("dot_general of two adapted weights", lambda p, x: x @ (p["w"] @ p["w"])),
        ("carry of a scan", lambda p, x: jax.lax.scan(lambda w, _: (w * 0.5, x @ w), p["w"], None, length=2)[1]),
        ("concatenate", lambda p, x: x @ jnp.concatenate([p["w"], p["w"]], axis=1)),
        ("scan along an axis that is not stacked", lambda p, x: jax.lax.scan(lambda c, w: (c, x @ w), 0.0, p["w"])[1]),
    ],
)
def test_what_has_no_low_rank_form_is_formed_once_and_said(name, fn):
    params = {"w": W}
    adapted = adapted_with_noise(params, jlora.LoRA(2))
    merged = jlora.merge(adapted)
    with pytest.warns(jlora.MaterializeWarning, match=f"'w'.*{name}") as caught:
        got = jlora.lift(fn)(adapted.bind(), X)
    assert len(caught) == 1
    np.testing.assert_allclose(got, fn(merged, X), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="on_materialize='error'"):
        jlora.lift(fn, on_materialize="error")(adapted.bind(), X)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        jlora.lift(fn, on_materialize="silent")(adapted.bind(), X)


def test_a_custom_derivative_of_a_weight_keeps_its_derivative():
    @jax.custom_vjp
    def clipped(x, w):
        return x @ w

    clipped.defvjp(lambda x, w: (x @ w, (x, w)), lambda r, g: (g @ r[1].T, jnp.clip(r[0].T @ g, -0.1, 0.1)))
    adapted = adapted_with_noise({"w": W}, jlora.LoRA(2))
    lifted = jlora.lift(lambda p, x: clipped(x, p["w"]), on_materialize="silent")
    got = jax.grad(lambda t: lifted(adapted.bind(t), X).sum())(adapted.trainable)
    want = jax.grad(lambda t: clipped(X, jlora.merge(adapted.replace(trainable=t))["w"]).sum())(adapted.trainable)
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=1e-5, atol=1e-6), got, want)


def test_an_unadapted_function_keeps_its_custom_derivatives_effects_and_results():
    seen = []

    def fn(p, x):
        jax.debug.callback(lambda v: seen.append(float(v)), x.sum())
        return {"y": jax.nn.relu(x @ p["w"]), "n": 3, "none": None}

    adapted = adapted_with_noise({"w": W}, jlora.LoRA(2))
    out = jlora.lift(fn)(adapted.bind(), X)
    jax.effects_barrier()
    assert seen == [pytest.approx(float(X.sum()))] and set(out) == {"y", "n", "none"} and out["none"] is None
    np.testing.assert_allclose(out["y"], fn(jlora.merge(adapted), X)["y"], rtol=1e-5, atol=1e-5)


def test_one_trace_for_each_shape_and_static_argument():
    traces = []

    def fn(p, x, *, power, name=None):
        traces.append((x.shape, power))
        return (x @ p["w"]) ** power

    lifted = jlora.lift(fn)
    adapted = adapted_with_noise({"w": W}, jlora.LoRA(2))
    for x in (X, X + 1, X[:2]):
        for power in (1, 2):
            np.testing.assert_allclose(
                lifted(adapted.bind(), x, power=power), (x @ jlora.merge(adapted)["w"]) ** power, rtol=1e-3, atol=1e-4
            )
    del traces[:]  # the checks above call fn itself through nothing, but be explicit
    lifted(adapted.bind(), X * 3, power=2)
    lifted(adapted.replace(trainable=jax.tree.map(jnp.zeros_like, adapted.trainable)).bind(), X, power=1)
    assert traces == []
    with pytest.raises(TypeError, match="neither an array nor hashable"):
        lifted(adapted.bind(), X, power=1, name=bytearray(b"x"))


def test_equal_layers_of_an_unrolled_model_share_what_is_between_the_products():
    """And only equal ones: a constant or an option that differs is a layer of its own."""

    def fn(params, x, constants):
        for constant in constants:
            x = jnp.tanh(x @ params["w"]) * constant
            x = jax.lax.cumsum(x / (1.0 + jnp.abs(x)), axis=0, reverse=constant < 0)
        return x

    adapted = adapted_with_noise({"w": W}, jlora.LoRA(2))
    merged = jlora.merge(adapted)
    for constants in ((2.0, 2.0, 3.0, 2.0, 3.0, -1.0, -1.0), (2.0,) * 8):
        lifted = jlora.lift(lambda params, x, constants=constants: fn(params, x, constants), on_materialize="error")
        np.testing.assert_allclose(lifted(adapted.bind(), X), fn(merged, X, constants), rtol=1e-5, atol=1e-5)
    jaxpr = jax.make_jaxpr(lambda params, x: lifted(params, x))(adapted.bind(), X)
    names = [eqn.primitive.name for eqn in jaxpr.jaxpr.eqns]
    assert names.count("cumsum") <= 2 and len(names) < 8 * 3


def test_forward_mode_with_the_plain_implementation():
    adapted = adapted_with_noise({"w": W}, jlora.DoRA(2))
    lifted = jlora.lift(lambda p, x: jnp.sin(x @ p["w"]), implementation="plain")
    fn = lambda t: lifted(adapted.bind(t), X).sum()
    ones = jax.tree.map(jnp.ones_like, adapted.trainable)
    _, slope = jax.jvp(fn, (adapted.trainable,), (ones,))
    want = sum(
        jnp.vdot(g, o) for g, o in zip(*map(jax.tree.leaves, (jax.grad(fn)(adapted.trainable), ones)), strict=True)
    )
    np.testing.assert_allclose(slope, want, rtol=1e-4)


def test_a_scan_over_layers_is_differentiated_once():
    """And the carries that no adapted weight reaches stay without a derivative."""
    counts = {"of the layers": 0, "of what stays": 0}

    def counting(name):
        @jax.custom_jvp
        def first(x, *others):
            return x

        def jvp(primals, tangents):
            counts[name] += 1
            return primals[0], tangents[0]

        first.defjvp(jvp, symbolic_zeros=True)  # traced anew where other operands have derivatives
        return first

    here, there = map(counting, counts)

    def fn(params, x, x0):
        def layer(carry, w):
            x, table, stopped = carry
            x = 0.1 * here(x @ w, x) + there(table) + there(stopped)
            return (x, table + 1.0, jax.lax.stop_gradient(x.mean()) + 1.0), None

        (x, *_), _ = jax.lax.scan(layer, (x, x0, x0), params["layers"])
        return x.sum()

    adapted = adapted_with_noise({"layers": jnp.stack([W, W, W]) / 4}, jlora.LoRA(2))
    lifted = lambda t: jlora.lift(fn, on_materialize="error")(adapted.bind(t), X, jnp.ones(()))
    grads = jax.grad(lifted)(adapted.trainable)
    assert counts == {"of the layers": 1, "of what stays": 0}
    want = jax.grad(lambda t: fn(jlora.merge(adapted.replace(trainable=t)), X, jnp.ones(())))(adapted.trainable)
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=1e-4, atol=1e-5), grads, want)


# Reports and context.


@dataclasses.dataclass(frozen=True)
class Reporting(Method):
    """y = x W, and the mean of x as a report; the context's values scale the output."""

    dropout: float = 0.5  # so that it is given keys

    def init(self, key, w, site, dtype):
        return Params(trainable={"bias": jnp.zeros(w.shape[1], dtype)})

    def forward(self, dot, x, w, p, ctx):
        gain = 1.0 if ctx.values is None else ctx.values["gain"]
        report = {"mean": x.mean()} | ({} if ctx.key is None else {"draw": jax.random.uniform(ctx.key)})
        return dot(x, w) * gain, report


def scanned(p, x):
    body = jax.checkpoint(lambda x, w: (jnp.tanh(x @ w), None))
    x, _ = jax.lax.scan(body, x, p["layers"])
    return x @ p["w"] + jnp.tanh(x) @ p["w"]


def test_aux_is_keyed_by_path_stacked_by_scan_and_listed_by_use():
    adapted = jlora.adapt({"layers": jnp.stack([W, 2 * W, 3 * W]), "w": W}, Reporting(), "**", axes=AXES, key=KEY)
    y, aux = jlora.lift(scanned, aux=True)(adapted.bind(context={"key": KEY, "gain": jnp.float32(2.0)}), X)
    np.testing.assert_allclose(y, jlora.lift(scanned)(adapted.bind(context={"gain": jnp.float32(2.0)}), X), rtol=1e-5)
    ((layers,), (first, second)) = aux["layers"], aux["w"]
    assert layers["mean"].shape == (3,)
    np.testing.assert_allclose(layers["mean"][0], X.mean(), rtol=1e-5)
    draws = np.array([*layers["draw"], first["draw"], second["draw"]])
    assert len(set(draws.tolist())) == 5, "each layer and each use draws its own numbers"
    _, again = jlora.lift(scanned, aux=True)(adapted.bind(context={"key": KEY, "gain": jnp.float32(2.0)}), X)
    np.testing.assert_array_equal(again["layers"][0]["draw"], layers["draw"])
    _, quiet = jlora.lift(scanned, aux=True)(adapted.bind(), X)
    assert "draw" not in quiet["w"][0]


def test_aux_in_a_while_loop_is_refused():
    adapted = jlora.adapt({"w": W}, Reporting(), "**", axes={"w": AXES["w"]}, key=KEY)
    fn = lambda p, x: jax.lax.fori_loop(0, x.shape[0], lambda i, x: jax.lax.while_loop(
        lambda c: c[1] < 2, lambda c: (jnp.tanh(c[0] @ p["w"]), c[1] + 1), (x, 0))[0], x)  # fmt: skip
    jlora.lift(fn)(adapted.bind(), X)
    with pytest.raises(ValueError, match="while loop"):
        jlora.lift(fn, aux=True)(adapted.bind(), X)


# shard_map and the layouts that only it and slices exercise.


@pytest.mark.parametrize("method", [jlora.LoRA(2), jlora.DoRA(2), jlora.VeRA(5)], ids=lambda m: m.name)
def test_shard_map_brings_the_factors_with_the_weights_sharding(method, devices):
    P = PartitionSpec
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    params = {"up": jax.random.normal(KEY, (4, 4, 2)), "down": jax.random.normal(jax.random.key(1), (4, 2, 6))}

    def fn(p, x):
        def local(x, up, down):
            h = jnp.tanh(jnp.einsum("bd,dhk->bhk", x, up))
            return jax.lax.psum(jnp.einsum("bhk,hkd->bd", h, down), "model")

        specs = P("data"), P(None, "model"), P("model")
        return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P("data"))(x, p["up"], p["down"])

    x = jnp.concatenate([X, X[:1]])
    adapted = jlora.adapt(params, method, "**", fn=fn, args=(x,), key=KEY)
    assert adapted.sites["up"].axes == jlora.Axes((0,), (1, 2))
    moved = jax.tree.map(lambda t: t + 0.3 * jax.random.normal(jax.random.key(3), t.shape), adapted.trainable)
    # DoRA's norm runs over the sharded inputs of `down`, which a device has not all of: that one is formed.
    lifted = jlora.lift(fn, on_materialize="silent" if isinstance(method, jlora.DoRA) else "error")
    loss = lambda fn, tree, t: jnp.sin(fn(tree(t), x)).sum()
    got = jax.jit(jax.value_and_grad(lambda t: loss(lifted, adapted.bind, t)))(moved)
    merge = lambda t: jlora.merge(adapted.replace(trainable=t))
    want = jax.jit(jax.value_and_grad(lambda t: loss(fn, merge, t)))(moved)
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=1e-3, atol=1e-4), got, want)


def test_row_sharded_products_in_explicit_mode(devices):
    P = PartitionSpec
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    put = lambda x, *spec: jax.device_put(x, jax.NamedSharding(mesh, P(*spec)))
    params = {"up": put(jax.random.normal(KEY, (4, 8)), None, "model"), "down": put(jnp.ones((8, 4)), "model", None)}

    def fn(p, x):
        h = jnp.tanh(x @ p["up"])
        return jnp.einsum("bh,hd->bd", h, p["down"], out_sharding=P("data", None))

    axes = dict.fromkeys(params, jlora.Axes((0,), (1,)))
    with jax.set_mesh(mesh):
        x = put(jnp.concatenate([X, X[:1]]), "data", None)
        adapted = jlora.adapt(params, jlora.LoRA(2), "**", axes=axes, key=KEY)
        moved = jax.tree.map(lambda t: t + 0.3, adapted.trainable)
        got = jax.jit(jlora.lift(fn, on_materialize="error"))(adapted.bind(moved), x)
        merged = jlora.merge(adapted.replace(trainable=moved))
        np.testing.assert_allclose(got, fn(merged, x), rtol=1e-4, atol=1e-4)
        assert got.sharding.spec == P("data", None)
        assert {name: leaf.sharding.spec for name, leaf in merged.items()} == {
            name: leaf.sharding.spec for name, leaf in params.items()
        }
        grads = jax.jit(jax.grad(lambda t: jlora.lift(fn)(adapted.bind(t), x).sum()))(moved)
        assert jax.tree.structure(grads) == jax.tree.structure(moved)
