"""Other people's models as they are: adapt, train a step, merge. The function is written as users of each library write
it, the model is tiny and random, and nothing of it is changed.

    pip install -e ".[test,others]" && python -m pytest -m slow tests/parity
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

import jlora

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]  # the libraries have warnings of their own
IDS = np.arange(12).reshape(2, 6) % 11
IMAGES = jax.random.normal(jax.random.key(0), (2, 8, 8, 3))
SERIES = jax.random.normal(jax.random.key(1), (2, 5, 3))


def check(fn, params, args, sites: int):
    """The law: lifted equals merged after a step, in value and in gradient; every leaf that some product uses is
    adapted, and no weight is formed."""
    adapted = jlora.adapt(params, jlora.LoRA(2), "**", fn=fn, args=args, key=jax.random.key(2))
    assert len(adapted.sites) == sites, sorted(adapted.sites)
    lifted, tx = jlora.lift(fn, on_materialize="error"), optax.adam(1e-2)

    def loss(trainable, adapted, args):
        return jnp.sin(lifted(adapted.bind(trainable), *args)).mean()

    def merged_loss(trainable, adapted, args):
        return jnp.sin(fn(jlora.merge(adapted.replace(trainable=trainable)), *args)).mean()

    @jax.jit
    def step(adapted, args):
        grads = jax.grad(loss)(adapted.trainable, adapted, args)
        updates, _ = tx.update(grads, tx.init(adapted.trainable), adapted.trainable)
        return adapted.replace(trainable=optax.apply_updates(adapted.trainable, updates))

    @jax.jit
    def compare(adapted, args):
        got, want, base = lifted(adapted.bind(), *args), fn(jlora.merge(adapted), *args), fn(adapted.base, *args)
        gradients = [jax.grad(f)(adapted.trainable, adapted, args) for f in (loss, merged_loss)]
        return got, want, base, *gradients

    before = compare(adapted, args)
    close(before[0], before[2])
    got, want, base, *gradients = compare(step(adapted, args), args)
    assert np.abs(got - base).max() > 1e-3, "the step changes nothing: the test would prove nothing"
    close(got, want)
    for path, gradient in jax.tree.leaves_with_path(gradients[0]):
        assert np.abs(gradient).max() > 0, f"{jax.tree_util.keystr(path)} has no gradient"
    jax.tree.map(close, *gradients)


def close(got, want):
    np.testing.assert_allclose(got, want, rtol=0, atol=3e-5 * max(np.abs(want).max(), 1e-2))


def away(params):
    """Parameters away from the zeros that some of them start at."""
    leaves, treedef = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(3), len(leaves))
    noise = [0.2 * jax.random.normal(key, leaf.shape, leaf.dtype) for key, leaf in zip(keys, leaves, strict=True)]
    return jax.tree.map(jnp.add, params, jax.tree.unflatten(treedef, noise))


# gemma, of Google DeepMind: linen, einsums over heads, query and key in one weight

GEMMAS = {
    "gemma2": dict(final_logit_softcap=30.0, attn_logits_soft_cap=50.0),
    "gemma3": dict(final_logit_softcap=None, use_qk_norm=True, transpose_gating_einsum=True),
}


@pytest.mark.parametrize("options", GEMMAS.values(), ids=GEMMAS)
def test_gemma(options):
    pytest.importorskip("gemma")
    from gemma import gm

    kinds = gm.nn.config.AttentionType
    config = gm.nn.config.TransformerConfig(
        num_embed=11, embed_dim=16, hidden_dim=24, num_heads=4, num_kv_heads=2, head_dim=8, sliding_window_size=4,
        attention_types=(kinds.LOCAL_SLIDING, kinds.GLOBAL), use_post_attn_norm=True, use_post_ffw_norm=True, **options,
    )  # fmt: skip
    model = gm.nn.Transformer(config=config, dtype=jnp.float32)
    params = away(model.init(jax.random.key(0), IDS)["params"])
    check(lambda params, ids: model.apply({"params": params}, ids).logits, params, (IDS,), sites=2 * 5 + 1)


# tunix, of Google: nnx, remat of whole modules, a python loop over experts

SMALL = dict(num_layers=2, embed_dim=16, hidden_dim=24, num_heads=4, num_kv_heads=2, head_dim=8)
LLAMA = dict(SMALL, vocab_size=11, rope_theta=10_000, norm_eps=1e-5)


def llama(**options):
    from tunix.models.llama3 import model

    options = {name: model.RematConfig[value] if name == "remat_config" else value for name, value in options.items()}
    return model.Llama3(model.ModelConfig(**LLAMA, **options), rngs=nnx.Rngs(0))


def qwen_of_experts():
    from tunix.models.qwen3 import model

    return model.Qwen3(model.ModelConfig(**LLAMA, num_experts=4, num_experts_per_tok=2), rngs=nnx.Rngs(0))


def gemma():
    from tunix.models.gemma3 import model

    config = model.ModelConfig(**SMALL, num_embed=11, sliding_window_size=4, param_dtype=jnp.float32)
    return model.Gemma3(config, rngs=nnx.Rngs(0))


TUNIX = {
    "llama": (lambda: llama(weight_tying=True), 2 * 7 + 1),
    "llama, blocks rematerialized": (lambda: llama(remat_config="BLOCK"), 2 * 7 + 2),
    "llama, layers rematerialized": (lambda: llama(remat_config="DECODER"), 2 * 7 + 2),
    "qwen, experts": (qwen_of_experts, 2 * 8 + 2),
    "gemma": (gemma, 2 * 6 + 1),
}


@pytest.mark.parametrize("make, sites", TUNIX.values(), ids=TUNIX)
def test_tunix(make, sites):
    pytest.importorskip("tunix")
    graphdef, params, rest = nnx.split(make(), nnx.Param, ...)
    positions = jnp.broadcast_to(jnp.arange(IDS.shape[1]), IDS.shape)
    mask = jnp.broadcast_to(jnp.tril(jnp.ones((6, 6), bool)), (2, 6, 6))

    def fn(params, ids):
        logits, _ = nnx.merge(graphdef, params, rest)(ids, positions, None, mask)
        return logits

    check(fn, away(params), (IDS,), sites)


# Flax: a linen module inside of an nnx one


def test_flax_bridge():
    class Model(nnx.Module):
        def __init__(self, rngs):
            mlp = linen.Sequential([linen.Dense(8), linen.gelu, linen.Dense(4)])
            self.mlp = nnx.bridge.lazy_init(nnx.bridge.ToNNX(mlp, rngs=rngs), SERIES)
            self.head = nnx.Linear(4, 2, rngs=rngs)

        def __call__(self, x):
            return self.head(self.mlp(x))

    graphdef, params, rest = nnx.split(Model(nnx.Rngs(0)), nnx.Param, ...)
    fn = lambda params, x: nnx.merge(graphdef, params, rest, copy=True)(x)  # the bridge counts in its generator
    check(fn, params, (SERIES,), sites=3)


# Equinox: modules of vectors under vmap


def test_equinox_transformer():
    eqx = pytest.importorskip("equinox")

    class Block(eqx.Module):
        norms: list
        attention: eqx.nn.MultiheadAttention
        mlp: eqx.nn.MLP

        def __init__(self, key):
            k1, k2 = jax.random.split(key)
            self.norms = [eqx.nn.LayerNorm(8), eqx.nn.LayerNorm(8)]
            self.attention = eqx.nn.MultiheadAttention(2, 8, key=k1)
            self.mlp = eqx.nn.MLP(8, 8, 16, 1, activation=jax.nn.gelu, key=k2)

        def __call__(self, x):
            h = jax.vmap(self.norms[0])(x)
            x = x + self.attention(h, h, h, mask=jnp.tril(jnp.ones((len(x), len(x)), bool)))
            return x + jax.vmap(self.mlp)(jax.vmap(self.norms[1])(x))

    class Model(eqx.Module):
        embed: eqx.nn.Embedding
        blocks: Block
        head: eqx.nn.Linear

        def __init__(self, key):
            k1, k2, k3 = jax.random.split(key, 3)
            self.embed = eqx.nn.Embedding(11, 8, key=k1)
            self.blocks = eqx.filter_vmap(Block)(jax.random.split(k2, 3))
            self.head = eqx.nn.Linear(8, 11, key=k3)

        def __call__(self, ids):
            arrays, static = eqx.partition(self.blocks, eqx.is_array)
            step = lambda x, block: (eqx.combine(block, static)(x), None)
            x, _ = jax.lax.scan(step, jax.vmap(self.embed)(ids), arrays)
            return jax.vmap(self.head)(x)

    params, static = eqx.partition(Model(jax.random.key(0)), eqx.is_array)
    check(lambda params, ids: jax.vmap(eqx.combine(params, static))(ids), params, (IDS,), sites=6 + 2)


def test_equinox_convolutions_and_a_cell():
    eqx = pytest.importorskip("equinox")

    class Model(eqx.Module):
        down: eqx.nn.Conv2d
        up: eqx.nn.ConvTranspose2d
        cell: eqx.nn.LSTMCell
        head: eqx.nn.Linear

        def __init__(self, key):
            k1, k2, k3, k4 = jax.random.split(key, 4)
            self.down = eqx.nn.Conv2d(3, 8, 3, stride=2, padding=1, key=k1)
            self.up = eqx.nn.ConvTranspose2d(8, 4, 4, stride=2, padding=1, key=k2)
            self.cell = eqx.nn.LSTMCell(8, 6, key=k3)
            self.head = eqx.nn.Linear(6, 2, key=k4)

        def __call__(self, image):
            x = self.up(jax.nn.relu(self.down(jnp.moveaxis(image, -1, 0)))).mean(0)
            step = lambda state, row: (self.cell(row, state), None)
            (h, _), _ = jax.lax.scan(step, (jnp.zeros(6), jnp.zeros(6)), x)
            return self.head(h)

    params, static = eqx.partition(Model(jax.random.key(0)), eqx.is_array)
    check(lambda params, x: jax.vmap(eqx.combine(params, static))(x), params, (IMAGES,), sites=5)


# Haiku: transformed functions, a stack of layers, cells


def test_haiku_transformer():
    hk = pytest.importorskip("haiku")

    def forward(ids):
        def block(x):
            norm = lambda: hk.LayerNorm(-1, True, True)
            h = norm()(x)
            mask = jnp.tril(jnp.ones((1, 1, *[ids.shape[1]] * 2)))
            x = x + hk.MultiHeadAttention(2, 4, model_size=8, w_init=hk.initializers.VarianceScaling())(h, h, h, mask)
            return x + hk.nets.MLP([16, 8])(norm()(x))

        x = hk.layer_stack(3)(block)(hk.Embed(11, 8)(ids))
        return hk.Linear(11)(x)

    model = hk.without_apply_rng(hk.transform(forward))
    check(model.apply, model.init(jax.random.key(0), IDS), (IDS,), sites=6 + 2)


def test_haiku_convolutions_and_a_cell():
    hk = pytest.importorskip("haiku")

    def forward(x):
        x = jax.nn.relu(hk.Conv2D(8, 3, stride=2)(x))
        x = jax.nn.relu(hk.Conv2DTranspose(4, 3, stride=2)(x))
        x = hk.SeparableDepthwiseConv2D(1, 3)(x)
        cell = hk.LSTM(6)
        x, _ = hk.dynamic_unroll(cell, x.mean(1), cell.initial_state(len(x)), time_major=False)
        return hk.Linear(2)(x)

    model = hk.without_apply_rng(hk.transform(forward))
    check(model.apply, model.init(jax.random.key(0), IMAGES), (IMAGES,), sites=6)


# Keras 3 on JAX: layers called through stateless_call


@pytest.fixture
def keras(monkeypatch):
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    keras = pytest.importorskip("keras")
    if keras.backend.backend() != "jax":
        pytest.skip(f"Keras runs on {keras.backend.backend()}: set KERAS_BACKEND=jax")
    keras.utils.set_random_seed(0)
    return keras


def stateless(model):
    """The model's function of ``{path: array}``, and the parameters. Its state, statistics among it, stays."""
    rest = [variable.value for variable in model.non_trainable_variables]

    def fn(params, x):
        trainable = [params[variable.path] for variable in model.trainable_variables]
        y, _ = model.stateless_call(trainable, rest, x, training=False)
        return y

    return fn, {variable.path: variable.value for variable in model.trainable_variables}


def test_keras_transformer(keras):
    layers = keras.layers
    ids = keras.Input((6,), dtype="int32")
    x = layers.Embedding(11, 8)(ids)
    h = layers.LayerNormalization()(x)
    x = x + layers.MultiHeadAttention(2, 4)(h, h, use_causal_mask=True)
    x = x + layers.GroupQueryAttention(4, 4, 2)(x, x)
    x = x + layers.Dense(8)(layers.Dense(16, activation="gelu")(layers.LayerNormalization()(x)))
    model = keras.Model(ids, layers.Dense(11)(x))
    fn, params = stateless(model)
    check(fn, params, (IDS,), sites=1 + 4 + 4 + 3)


def test_keras_convolutions(keras):
    layers = keras.layers
    images = keras.Input((8, 8, 3))
    x = layers.BatchNormalization()(layers.Conv2D(8, 3, padding="same", activation="relu")(images))
    x = layers.Conv2D(8, 3, strides=2, padding="same", groups=2)(x)
    x = layers.Concatenate()([layers.Conv2DTranspose(4, 3, strides=2, padding="same")(x), images])
    x = layers.DepthwiseConv2D(3)(layers.SeparableConv2D(6, 3)(x))
    model = keras.Model(images, layers.Dense(4)(layers.GlobalAveragePooling2D()(x)))
    fn, params = stateless(model)
    check(fn, params, (IMAGES,), sites=7)


def test_keras_cells(keras):
    layers = keras.layers
    series = keras.Input((5, 3))
    x = layers.Bidirectional(layers.LSTM(4, return_sequences=True))(series)
    model = keras.Model(series, layers.EinsumDense("bd,dhe->bhe", (2, 3), bias_axes="he")(layers.GRU(4)(x)))
    fn, params = stateless(model)
    check(fn, params, (SERIES,), sites=7)
