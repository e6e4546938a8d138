"""Products of one activation with several weights, which lift computes together where the model's jaxpr shows them."""

import collections

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxprs import equations

import jlora

X = jax.random.normal(jax.random.key(0), (2, 5, 12))


def weights(*names, n_out=6, dtype="float32", stack=()):
    keys = jax.random.split(jax.random.key(1), len(names))
    normal = lambda key: jax.random.normal(key, (*stack, 12, n_out), dtype) / 4
    return {name: normal(key) for name, key in zip(names, keys, strict=True)}


def moved(adapted):
    """The adapter away from its start, where B is zero."""
    leaves, treedef = jax.tree.flatten(adapted.trainable)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    noise = [
        leaf + 0.1 * jax.random.normal(key, leaf.shape, leaf.dtype) for key, leaf in zip(keys, leaves, strict=True)
    ]
    return adapted.replace(trainable=jax.tree.unflatten(treedef, noise))


def adapt(params, model, method=None, **options):
    method = method or jlora.LoRA(2)
    return moved(jlora.adapt(params, method, key=jax.random.key(3), fn=model, args=(X,), **options))


def sets(fn, *args):
    """How many products each set has that was computed together, in the program of ``fn``."""
    found = equations(jax.make_jaxpr(fn)(*args).jaxpr)
    products = [eqn for eqn, _ in found if eqn.primitive.name == "custom_vjp_call" and eqn.params["call_jaxpr"].eqns]
    return sorted(len(eqn.outvars) for eqn in products)


def check(model, adapted, want, context=None, rtol=1e-5):
    """The sets are those wanted, and values and gradients those of the merged model."""
    lifted = jlora.lift(model, on_materialize="error")
    apply = lambda trainable: lifted(adapted.bind(trainable, context=context), X)
    assert sets(apply, adapted.trainable) == want
    if context is None:
        merged = lambda trainable: model(jlora.merge(adapted.replace(trainable=trainable)), X)
        loss = lambda fn: jax.value_and_grad(lambda trainable: jnp.sum(jnp.sin(fn(trainable))))(adapted.trainable)
        (got, got_grads), (value, grads) = loss(apply), loss(merged)
        np.testing.assert_allclose(got, value, rtol=rtol)
        jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=1e3 * rtol, atol=10 * rtol), got_grads, grads)


def attention(p, x):
    """Queries, keys and values are made of x one after the other, with other work between."""
    q = jnp.tanh(x @ p["q"])
    k = jnp.einsum("btd,dk->btk", x, p["k"]) * q
    return k + jax.nn.silu(x @ p["v"])


def test_queries_keys_and_values():
    check(attention, adapt(weights("q", "k", "v"), attention), [3])


@pytest.mark.parametrize(
    "method", [jlora.LoRA(2, rslora=True), jlora.DoRA(2), jlora.AdaLoRA(2), jlora.DeLoRA(2)], ids=lambda m: m.name
)
def test_methods_that_are_a_branch(method):
    """DoRA's gain is on the results, the triple of AdaLoRA a pair by then."""
    check(attention, adapt(weights("q", "k", "v"), attention, method), [3])


def test_methods_that_are_a_branch_for_other_shapes():
    """Many waves of a small matrix, and products of large ranks, are cheaper as a weight."""
    check(attention, adapt(weights("q", "k", "v"), attention, jlora.FourierFT(30)), [1, 1, 1])
    rules = {"q": jlora.LoHa(2), "*": jlora.LoRA(2)}
    check(attention, adapt(weights("q", "k", "v"), attention, rules), [1, 2])


def test_methods_side_by_side_and_a_weight_that_is_not_adapted():
    rules = {"q": jlora.LoRA(2), "v": jlora.DoRA(3)}
    check(attention, adapt(weights("q", "k", "v"), attention, rules), [2])


def test_leaves_that_share_parameters_run_one_by_one():
    check(attention, adapt(weights("q", "k", "v"), attention, jlora.VeRA(4)), [1, 1, 1])


def test_dropout_is_of_each_weight():
    adapted = adapt(weights("q", "k", "v"), attention, jlora.LoRA(2, dropout=0.5))
    check(attention, adapted, [1, 1, 1], context={"key": jax.random.key(0)})
    check(attention, adapted, [3])  # without a key nothing drops


def test_layouts_and_casts_on_the_way_to_a_product():
    """Weights that are cast, reshaped, transposed or cut out of one matrix after the first product was written."""

    def model(p, x):
        q, k = x @ p["q"], x @ p["kT"].T
        v = jnp.einsum("btd,dhk->bthk", x, p["v"].reshape(12, 2, 3)).reshape(q.shape)
        gate, up = jnp.split(p["gate_up"], 2, axis=1)
        return q * k + v + (x @ gate) * (x @ up)

    params = weights("q", "v") | {"kT": weights("k")["k"].T, "gate_up": weights("g", n_out=12)["g"]}
    adapted = adapt(params, model)
    assert sets(lambda t: jlora.lift(model)(adapted.bind(t), X), adapted.trainable) == [5]
    check(model, adapted, [5])

    cast = lambda p, x: attention(jax.tree.map(lambda w: w.astype(jnp.float32), p), x)
    check(cast, adapt(weights("q", "k", "v", dtype="bfloat16"), cast), [3], rtol=1e-2)


def test_activations_that_only_look_alike():
    """Another x, another arithmetic, a weight that depends on the data: products of their own."""

    def model(p, x):
        y = x @ p["a"] + (x + 1) @ p["b"]
        return y + jnp.dot(x, p["c"], precision="highest")

    check(model, adapt(weights("a", "b", "c"), model), [1, 1, 1])


def test_a_weight_that_two_activations_meet():
    model = lambda p, x: x @ p["a"] + jnp.tanh(x) @ p["a"]
    check(model, adapt(weights("a"), model), [1, 1])


def test_experts_that_all_meet_one_activation_run_as_they_did():
    model = lambda p, x: jnp.einsum("btd,edk->ebtk", x, p["a"]) + jnp.einsum("btd,edk->ebtk", x, p["b"])
    experts = {"*": jlora.Axes(inputs=(1,), outputs=(2,), stack=(0,))}
    check(model, adapt(weights("a", "b", stack=(3,)), model, axes=experts), [1, 1])


@pytest.mark.parametrize("remat", [False, True], ids=["scan", "scan and remat"])
def test_in_a_scan(remat):
    def model(p, x):
        block = jax.checkpoint(attention) if remat else attention
        return jax.lax.scan(lambda x, p: (x.at[..., :6].add(block(p, x)), None), x, p)[0]

    check(model, adapt(weights("q", "k", "v", stack=(4,)), model), [3])


def test_layers_of_an_unrolled_model_are_traced_twice_at_most():
    """Once as it comes, once as the function that all the others call."""
    traced = collections.Counter()

    class Counted(jlora.LoRA):
        def factors(self, w, p):
            traced["factors"] += 1
            return super().factors(w, p)

    def model(p, x):
        for name in "abcdefgh":
            x = x + jnp.tanh(x @ p[name + "0"] + x @ p[name + "1"])
        return x

    adapted = adapt(weights(*(name + digit for name in "abcdefgh" for digit in "01"), n_out=12), model, Counted(2))
    traced.clear()
    check(model, adapted, [2] * 8, rtol=1e-4)
    apply = jlora.lift(model)
    traced.clear()
    jax.make_jaxpr(lambda t: apply(adapted.bind(t), X))(adapted.trainable)
    assert traced["factors"] == 4


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        q, k, v = (nn.DenseGeneral((2, 3), name=name)(x) for name in "qkv")
        y = nn.DenseGeneral(12, axis=(-2, -1), name="o")(q * k + v)
        return nn.Dense(12, name="down")(nn.silu(nn.Dense(24, name="gate")(y)) * nn.Dense(24, name="up")(y))


def test_a_linen_module():
    module = Block()
    params = module.init(jax.random.key(0), X)["params"]
    model = lambda params, x: module.apply({"params": params}, x)
    check(model, adapt(params, model), [1, 1, 2, 3])


def test_a_quantized_base_is_formed_once_more_for_the_backward_pass_and_not_kept():
    wide = jax.tree.map(lambda w: jnp.tile(w, (11, 11))[:128, :64], weights("q", "k", "v"))
    x = jax.random.normal(jax.random.key(5), (2, 5, 128))
    stored = jlora.quant.quantize(wide, jlora.quant.Int8, fn=attention, args=(x,))
    adapted = moved(jlora.adapt(stored, jlora.LoRA(2), key=jax.random.key(3), fn=attention, args=(x,)))
    lifted = jlora.lift(attention, on_materialize="error")
    apply = lambda trainable: lifted(adapted.bind(trainable), x)
    assert 3 in sets(apply, adapted.trainable)
    kept = jax.tree.leaves(jax.vjp(apply, adapted.trainable)[1])
    assert not [leaf for leaf in kept if leaf.shape == (128, 64) and jnp.issubdtype(leaf.dtype, jnp.floating)]
    dense = adapted.replace(base=jlora.quant.dequantize(adapted.base))
    loss = lambda fn: jax.value_and_grad(lambda t: jnp.sum(jnp.sin(fn(t))))(adapted.trainable)
    want = loss(lambda trainable: lifted(dense.bind(trainable), x))
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=1e-4, atol=1e-4), loss(apply), want)


def test_what_usage_finds_is_what_it_was():
    assert {path: leaf.kinds for path, leaf in jlora.usage(attention, weights("q", "k", "v"), X).items()} == {
        "q": ("linear",), "k": ("linear",), "v": ("linear",)
    }  # fmt: skip


def test_statistics_are_those_of_each_weight():
    """What listens to a product has no branch, and sees each by itself."""
    params = weights("q", "k", "v")
    stats = jlora.capture(lambda p, x: jnp.sum(attention(p, x) ** 2), params, X)
    x = X.reshape(-1, 12)
    for path in "qkv":
        np.testing.assert_allclose(stats[path].xx, x.T @ x, rtol=1e-5, atol=1e-5)
    loss = lambda p, batch: jnp.sum(attention(p, batch) ** 2)
    starting = jlora.LoRA(2, start=jlora.init.EVA())
    calibration = jlora.calibrate(loss, params, [X, 2 * X], starting)
    for path in "qkv":
        np.testing.assert_allclose(calibration.leaves[path]["xx"], 5 * x.T @ x, rtol=1e-5, atol=1e-4)
