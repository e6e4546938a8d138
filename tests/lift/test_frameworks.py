"""One law for every way of writing a model: the unmodified function, lifted, equals itself on the merged parameters, in
value and in gradient, and nothing is materialized."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jlora

METHODS = {"lora": jlora.LoRA(2, alpha=4), "dora": jlora.DoRA(2, alpha=3), "vera": jlora.VeRA(3)}
IDS = jnp.arange(12).reshape(2, 6) % 7


def check(fn, params, *args):
    """The law, for every method. Returns the last adaptation."""
    found = jlora.usage(fn, params, *args)
    for name, method in METHODS.items():
        adapted = jlora.adapt(params, method, "**", key=jax.random.key(0), usage=found)
        for what, got, want in law(fn, params, args, adapted):
            np.testing.assert_allclose(got, want, atol=3e-5, err_msg=f"{name}: {what}")
    return adapted


def law(fn, params, args, adapted):
    """(what, got, want) of the output at the start, and of a loss and its gradients away from it."""
    lifted = jlora.lift(fn, on_materialize="error")
    keys = iter(jax.random.split(jax.random.key(1), 100))
    moved = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(next(keys), x.shape), adapted.trainable)

    def loss(trainable, adapted, args):
        return jnp.sin(lifted(adapted.bind(trainable), *args)).sum()

    def merged_loss(trainable, adapted, args):
        return jnp.sin(fn(jlora.merge(adapted.replace(trainable=trainable)), *args)).sum()

    @jax.jit
    def run(adapted, moved, args):
        start = lifted(adapted.bind(), *args), fn(adapted.base, *args)
        return start, *(jax.value_and_grad(f)(moved, adapted, args) for f in (loss, merged_loss))

    start, got, want = run(adapted, moved, args)
    yield "output at the start", *start
    assert abs(want[0] - jnp.sin(start[1]).sum()) > 1e-3, "the adapters change nothing: the test would prove nothing"
    for (path, g), w in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(want), strict=True):
        scale = max(1.0, float(jnp.abs(w).max()))
        yield jax.tree_util.keystr(path), g / scale, w / scale


class LinenBlock(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        h = nn.LayerNorm()(x)
        q = nn.DenseGeneral((2, 4), name="q")(h)
        k = nn.Einsum((8, 2, 4), "btd,dhk->bthk", name="k")(h)
        p = jax.nn.softmax(jnp.einsum("bthk,bshk->bhts", q, k))
        h = jnp.einsum("bhts,bshk->bthk", p, nn.DenseGeneral((2, 4), use_bias=False, name="v")(h))
        x = x + nn.DenseGeneral(8, axis=(-2, -1), name="o")(h)
        return x + nn.Dense(8, name="down")(nn.gelu(nn.Dense(16, name="up")(x))), None


class LinenModel(nn.Module):
    tied: bool
    remat: bool = True

    @nn.compact
    def __call__(self, ids):
        embed = nn.Embed(7, 8)
        block = nn.remat(LinenBlock, prevent_cse=False) if self.remat else LinenBlock
        x, _ = nn.scan(block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)(name="layers")(
            embed(ids), None
        )
        x = nn.Conv(8, (3,), padding="SAME")(x)
        return embed.attend(x) if self.tied else nn.Dense(7, name="lm_head")(x)


@pytest.mark.parametrize("tied", [True, False])
def test_linen(tied):
    model = LinenModel(tied)
    params = model.init(jax.random.key(0), IDS)["params"]
    adapted = check(lambda p, ids: model.apply({"params": p}, ids), params, IDS)
    assert adapted.sites["layers/q/kernel"].axes == jlora.Axes((1,), (2, 3), (0,))
    assert adapted.sites["layers/o/kernel"].axes == jlora.Axes((1, 2), (3,), (0,))
    assert adapted.sites["Embed_0/embedding"].axes.kind == "embedding"
    assert adapted.sites["Conv_0/kernel"].axes == jlora.Axes((0, 1), (2,), kind="conv")


def test_linen_all_linear_leaves_the_embedding_the_head_and_the_convolution_alone():
    model = LinenModel(tied=False)
    params = model.init(jax.random.key(0), IDS)["params"]
    adapted = jlora.adapt(
        params, jlora.LoRA(2), key=jax.random.key(0), fn=lambda p, ids: model.apply({"params": p}, ids), args=(IDS,)
    )
    assert set(adapted.sites) == {f"layers/{name}/kernel" for name in ("q", "k", "v", "o", "up", "down")}


class NnxModel(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(7, 8, rngs=rngs)
        self.up = nnx.Linear(8, 12, rngs=rngs)
        self.heads = nnx.LinearGeneral(12, (2, 3), rngs=rngs)
        self.conv = nnx.Conv(6, 8, (3,), rngs=rngs)

    def __call__(self, ids):
        x = nnx.relu(self.up(self.embed(ids)))
        x = self.heads(x)
        return self.embed.attend(self.conv(x.reshape(*x.shape[:-2], 6)))


def test_nnx():
    graphdef, state = nnx.split(NnxModel(nnx.Rngs(0)))
    adapted = check(lambda s, ids: nnx.merge(graphdef, s)(ids), state, IDS)
    assert set(adapted.sites) == {"embed/embedding", "up/kernel", "heads/kernel", "conv/kernel"}


def test_nnx_scanned_layers():
    class Block(nnx.Module):
        def __init__(self, rngs):
            self.linear = nnx.Linear(8, 8, rngs=rngs)

        def __call__(self, x):
            return x + nnx.gelu(self.linear(x))

    @nnx.vmap(in_axes=0, out_axes=0)
    def create(key):
        return Block(nnx.Rngs(key))

    graphdef, state = nnx.split(create(jax.random.split(jax.random.key(0), 3)))

    def fn(state, x):
        @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        def forward(block, x):
            return block(x)

        return forward(nnx.merge(graphdef, state), x)

    adapted = check(fn, state, jax.random.normal(jax.random.key(2), (5, 8)))
    assert adapted.sites["linear/kernel"].axes.stack == (0,)


def test_haiku():
    hk = pytest.importorskip("haiku")

    def forward(x):
        x = jax.nn.relu(hk.Linear(8)(x))
        return hk.Linear(3)(hk.Conv1D(6, 3)(x))

    model = hk.without_apply_rng(hk.transform(forward))
    x = jax.random.normal(jax.random.key(1), (2, 5, 4))
    params = model.init(jax.random.key(0), x)
    adapted = check(model.apply, params, x)
    assert len(adapted.sites) == 3


def test_equinox():
    eqx = pytest.importorskip("equinox")

    class Model(eqx.Module):
        embed: eqx.nn.Embedding
        mlp: eqx.nn.MLP
        head: eqx.nn.Linear

        def __call__(self, ids):
            return jax.vmap(self.head)(jax.vmap(self.mlp)(jax.vmap(self.embed)(ids)))

    k1, k2, k3 = jax.random.split(jax.random.key(0), 3)
    model = Model(eqx.nn.Embedding(7, 6, key=k1), eqx.nn.MLP(6, 5, 8, 2, key=k2), eqx.nn.Linear(5, 4, key=k3))
    params, static = eqx.partition(model, eqx.is_array)
    adapted = check(lambda p, ids: jax.vmap(eqx.combine(p, static))(ids), params, IDS)
    assert adapted.sites["head/weight"].axes == jlora.Axes((1,), (0,))  # [out, in], found by tracing
    assert adapted.sites["embed/weight"].axes.kind == "embedding"  # a row cut out, under two vmaps


@jax.custom_vjp
def attention(q, k, v):
    return jax.nn.softmax(q @ k.swapaxes(-1, -2)) @ v


def _attention_fwd(q, k, v):
    return attention(q, k, v), (q, k, v)


def _attention_bwd(residuals, g):
    return jax.vjp(lambda q, k, v: jax.nn.softmax(q @ k.swapaxes(-1, -2)) @ v, *residuals)[1](g)


attention.defvjp(_attention_fwd, _attention_bwd)


def test_plain_jax():
    names = ["q", "k", "v", "o", "experts", "loop", "first"]
    shapes = [(3, 6, 6), (3, 6, 6), (3, 6, 6), (3, 6, 6), (2, 6, 6), (3, 6, 6), (6, 4)]
    keys = jax.random.split(jax.random.key(0), len(names))
    params = {n: jax.random.normal(k, s) * 0.2 for n, k, s in zip(names, keys, shapes, strict=True)}
    params["table"] = jax.random.normal(jax.random.key(3), (7, 6)) * 0.5

    def fn(p, ids):
        x = p["table"][ids]

        @jax.jit
        def layer(x, w):
            q, k, v, o = w
            return x + jnp.tanh(attention(x @ q, x @ k, jnp.einsum("io,bti->bto", v, x)) @ o), None

        x, _ = jax.lax.scan(jax.checkpoint(layer), x, (p["q"], p["k"], p["v"], p["o"]))
        for i in range(3):
            x = x + jnp.tanh(x @ p["loop"][i])
        x = jax.lax.fori_loop(0, 3, lambda i, x: x + jnp.tanh(x @ p["loop"][i]), x)
        x = jax.lax.cond(x.sum() > 1e9, lambda x: x, lambda x: x @ jax.lax.dynamic_index_in_dim(p["q"], 1, 0, False), x)
        rows = x.reshape(-1, 6)
        x = x + jax.lax.ragged_dot(rows, p["experts"], jnp.array([5, 7])).reshape(x.shape)
        x = x + jnp.einsum("ebti,eio->bto", jnp.stack([x, -x]), p["experts"])
        gate, up = jnp.split(p["first"], 2, axis=1)
        return (x @ p["first"][:, 1:3]) * (x @ gate) + x @ up + (p["first"].T[:2] @ x[..., None])[..., 0]

    check(fn, params, IDS)


def test_a_function_written_for_vectors_under_vmap():
    params = {"w": jax.random.normal(jax.random.key(0), (4, 3))}
    check(
        lambda p, xs: jax.vmap(lambda x: jnp.tanh(x @ p["w"]))(xs), params, jax.random.normal(jax.random.key(1), (5, 4))
    )
