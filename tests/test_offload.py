"""The base in the host's memory: the same numbers, fetched where a product wants them and not kept."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jlora

X = jnp.asarray(np.random.default_rng(0).normal(size=(4, 9, 8)), jnp.float32)
IDS = jnp.array([[0, 3, 1], [2, 2, 5]])


def normal(seed: int, shape: tuple[int, ...]) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape) / shape[-2] ** 0.5


def scanned(params, x):
    def layer(x, own):
        return x + jnp.tanh(x @ own["up"]) @ own["down"], None

    return jax.lax.scan(layer, x, params["layers"])[0] @ params["head"].T


def convolved(params, x):
    return jax.lax.conv_general_dilated(x, params["kernel"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"))


def experts(params, x):
    return jax.lax.ragged_dot(x.reshape(-1, 8), params["experts"], jnp.array([10, 0, 26]))


def looked_up(params, ids):
    return params["table"][ids] @ params["w"]


MODELS = {
    "scanned": (
        scanned,
        {
            "layers": {"up": normal(0, (3, 8, 16)), "down": normal(1, (3, 16, 8))},
            "head": normal(2, (5, 8)),
            "norm": jnp.ones(8),
        },
        X,
    ),
    "convolved": (convolved, {"kernel": normal(0, (3, 8, 6))}, X),
    "experts": (experts, {"experts": normal(0, (3, 8, 6))}, X),
    "looked up": (looked_up, {"table": normal(0, (6, 8)), "w": normal(1, (8, 4))}, IDS),
}


def adapted_model(name: str, method: jlora.methods.Method = jlora.LoRA(2), quantize=None):  # noqa: B008
    fn, params, x = MODELS[name]
    if quantize is not None:
        params = jlora.quant.quantize(params, quantize, fn=fn, args=(x,))
    targets = "all-linear" if name == "scanned" else "**"
    adapted = jlora.adapt(params, method, targets, key=jax.random.key(3), fn=fn, args=(x,), allow_unmatched=True)
    moved = lambda leaf: leaf + 0.1 * jax.random.normal(jax.random.key(leaf.size), leaf.shape)
    return jlora.lift(fn, on_materialize="error"), adapted.replace(trainable=jax.tree.map(moved, adapted.trainable)), x


def value_and_grads(lifted, adapted, x):
    loss = lambda trainable, fixed, x: jnp.sum(jnp.sin(lifted(fixed.bind(trainable), x)))
    return jax.jit(jax.value_and_grad(loss))(adapted.trainable, adapted.replace(trainable={}), x)


def assert_same(got, want):
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=3e-6 * max(1.0, np.abs(b).max()))
    jax.tree.map(close, got, want)


def kinds(tree) -> dict[str, str]:
    leaves = jlora.paths.flatten(tree)[0]
    return {path: {part.sharding.memory_kind for part in jax.tree.leaves(leaf)} for path, leaf in leaves}


@pytest.mark.parametrize("method", [jlora.LoRA(2), jlora.DoRA(2), jlora.HiRA(2), jlora.OFT(4), jlora.Bottleneck()])
def test_values_and_gradients(method) -> None:
    lifted, adapted, x = adapted_model("scanned", method)
    far = jlora.offload(adapted)
    assert_same(value_and_grads(lifted, far, x), value_and_grads(lifted, adapted, x))
    assert_same(lifted(far.bind(), x), lifted(adapted.bind(), x))


@pytest.mark.parametrize("name", [name for name in MODELS if name != "scanned"])
def test_other_products(name: str) -> None:
    lifted, adapted, x = adapted_model(name)
    assert_same(value_and_grads(lifted, jlora.offload(adapted), x), value_and_grads(lifted, adapted, x))


@pytest.mark.parametrize("quantize", [jlora.quant.NF4, jlora.quant.Int8])
def test_quantized(quantize) -> None:
    lifted, adapted, x = adapted_model("scanned", quantize=quantize)
    far = jlora.offload(adapted)
    assert kinds(far.base)["layers/up"] == {"pinned_host"}
    assert_same(value_and_grads(lifted, far, x), value_and_grads(lifted, adapted, x))
    assert_same(jlora.merge(far)["layers"]["up"], jlora.merge(adapted)["layers"]["up"])


def test_what_moves() -> None:
    _, adapted, _ = adapted_model("scanned")
    far = jlora.offload(adapted)
    host, device = {"pinned_host"}, {"device"}
    assert kinds(far.base) == {"layers/up": host, "layers/down": host, "head": host, "norm": device}
    assert kinds(jlora.merge(far)) == kinds(far.base)
    assert_same(jlora.merge(far), jlora.merge(adapted))
    assert kinds(jlora.offload(adapted_model("looked up")[1]).base) == {"table": device, "w": host}
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), adapted)
    assert kinds(jlora.offload(abstract).base) == kinds(far.base)


@pytest.mark.parametrize("remat", [False, True])
def test_nothing_is_kept_on_the_device(remat: bool) -> None:
    """Of the stacked weights there is no copy for the backward pass: what the scans give is smaller."""
    lifted, adapted, x = adapted_model("scanned")
    far = jlora.offload(adapted)
    model = jax.checkpoint(lifted) if remat else lifted
    loss = lambda trainable, fixed, x: jnp.sum(jnp.sin(model(fixed.bind(trainable), x)))
    text = str(jax.make_jaxpr(jax.grad(loss))(far.trainable, far.replace(trainable={}), x))
    assert re.search(r"f32<host>\[3,8,16\]", text)
    assert not re.search(r"f32\[3,(8,16|16,8)\]", text)


def test_layers_that_are_no_scan_fetch_twice() -> None:
    """The compiler may not take the matrix of the forward pass for that of the backward pass, and so keep it."""
    fn = lambda params, x: jnp.tanh(x @ params["a"]) @ params["b"]
    params = {"a": normal(0, (8, 16)), "b": normal(1, (16, 8))}
    far = jlora.offload(jlora.adapt(params, jlora.LoRA(2), key=jax.random.key(0), fn=fn, args=(X,)))
    loss = lambda trainable, fixed: jnp.sum(jlora.lift(fn)(fixed.bind(trainable), X))
    text = str(jax.make_jaxpr(jax.grad(loss))(far.trainable, far.replace(trainable={})))
    assert "prevent_cse=True" in text and "prevent_cse=False" not in text


def test_on_a_mesh() -> None:
    lifted, adapted, x = adapted_model("scanned")
    wanted = value_and_grads(lifted, adapted, x)
    for kind in (AxisType.Auto, AxisType.Explicit):
        mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(kind, kind))
        axis = "model" if kind == AxisType.Auto else None  # explicitly, the model would have to say more
        specs = {"layers": {"up": P(None, None, axis), "down": P(None, axis, None)}, "head": P(), "norm": P()}
        put = lambda tree, spec: jax.device_put(tree, NamedSharding(mesh, spec))  # noqa: B023
        base = jax.tree.map(put, adapted.base, specs)
        placed = jlora.offload(adapted.replace(base=base, trainable=put(adapted.trainable, P())))
        assert placed.base["layers"]["up"].sharding.spec == P(None, None, axis)
        with jax.set_mesh(mesh):
            got = value_and_grads(lifted, placed, put(x, P("data")))
        assert_same(got, wanted)


def test_refusals() -> None:
    _, adapted, _ = adapted_model("scanned")
    with pytest.raises(ValueError, match="memory='disk': cpu has device, pinned_host, unpinned_host"):
        jlora.offload(adapted, memory="disk")
    with pytest.raises(ValueError, match="no adapted matrix to move, of 3 adapted leaves"):
        jlora.offload(adapted_model("scanned", jlora.Full())[1])
