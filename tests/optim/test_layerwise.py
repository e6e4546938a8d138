"""A step that holds one layer's gradient is the ordinary step, in less memory."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jlora
from jlora.optim.layerwise import Layerwise
from jlora.train.models.layers import Block, CausalLM, DecoderConfig, causal_mask

DIM, LAYERS, VOCAB = 8, 3, 11


def model_params(key: jax.Array, dim: int = DIM, layers: int = LAYERS) -> dict:
    keys = jax.random.split(key, 4)
    normal = lambda key, *shape: jax.random.normal(key, shape) / jnp.sqrt(shape[-2])
    layer = {"up": normal(keys[0], layers, dim, 2 * dim), "down": normal(keys[1], layers, 2 * dim, dim)}
    return {"model": {"layers": layer, "embed": normal(keys[2], VOCAB, dim)}, "head": normal(keys[3], dim, VOCAB)}


def embed(rest, ids):
    assert rest["model"]["layers"] is None
    return rest["model"]["embed"][ids]


def block(layer, x, ids, i):
    return x + jnp.tanh((1 + 0.1 * i) * x @ layer["up"]) @ layer["down"]


def head(rest, x, ids):
    """The next token; the embedding is used once more, as a tied one is."""
    logits = x @ rest["head"] + x @ rest["model"]["embed"].T
    return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], ids[:, 1:]).mean()


def loss(params, ids):
    rest = {"model": params["model"] | {"layers": None}, "head": params["head"]}
    layers = params["model"]["layers"]
    each = (layers, jnp.arange(len(layers["up"])))
    one = jax.checkpoint(lambda x, at: (block(at[0], x, ids, at[1]), None), prevent_cse=False)
    x, _ = jax.lax.scan(one, embed(rest, ids), each)
    return head(rest, x, ids)


def make(inner: optax.GradientTransformation, **options) -> Layerwise:
    functions = dict(embed=embed, block=block, head=head, layers="model/layers")
    return jlora.optim.layerwise(inner, **functions, **options)


def ordinary(tx, params, state, ids):
    value, grads = jax.value_and_grad(loss)(params, ids)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state, (value, optax.tree.norm(grads))


def close(a, b, atol: float) -> None:
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=atol, rtol=0), a, b)


WHOLE = {
    "adamw": (lambda: optax.adamw(optax.linear_schedule(0.1, 0.0, 9), weight_decay=0.1), {}),
    "clipped": (lambda: optax.adamw(0.1), {"clip_norm": 0.3}),
    "galore": (
        lambda: jlora.optim.galore(optax.adam(0.1, eps=1e-4), 3, solver="svd", period=2, where="**/{up,down}"),
        {"rest": optax.adam(0.1, eps=1e-4)},
    ),
}


@pytest.mark.parametrize("name", WHOLE)
def test_is_the_ordinary_step(name: str, x64: None) -> None:
    fn, options = WHOLE[name]
    clip = optax.clip_by_global_norm(options["clip_norm"]) if "clip_norm" in options else optax.identity()
    params = start = jax.tree.map(lambda x: x.astype(jnp.float64), model_params(jax.random.key(0)))
    ids = jax.random.randint(jax.random.key(1), (2, 6), 0, VOCAB)
    tx, whole = make(fn(), **options), optax.chain(clip, fn())
    state, wanted_state = tx.init(params), whole.init(params)
    step, wanted_step = jax.jit(tx.step), jax.jit(lambda *args: ordinary(whole, *args))
    wanted = params
    for _ in range(4):
        params, state, figures = step(params, state, ids)
        wanted, wanted_state, (value, norm) = wanted_step(wanted, wanted_state, ids)
        np.testing.assert_allclose(figures, (value, norm), rtol=1e-9)
    assert jax.tree.structure(params) == jax.tree.structure(start) and step._cache_size() == 1
    close(params, wanted, 1e-9)
    assert np.abs(params["model"]["layers"]["up"] - start["model"]["layers"]["up"]).max() > 0.01


def test_a_model_of_train(x64: None) -> None:
    """Its modules applied one by one; what all blocks share is computed before."""
    config = DecoderConfig(
        vocab_size=VOCAB, hidden_size=8, intermediate_size=12, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=4,
        max_positions=16, norm_eps=1e-5, rope_theta=1e4, rope_scaling=None, tie_embeddings=False, init_range=0.2,
        activation="silu", dtype="float64",
    )  # fmt: skip
    module, ids = CausalLM(config), jax.random.randint(jax.random.key(1), (2, 6), 0, VOCAB)
    params = nn.unbox(module.init(jax.random.key(0), ids))["params"]
    call = lambda rest, fn, *args: module.apply({"params": rest}, *args, method=fn)

    def shared(module, ids):
        mask, slots, _ = causal_mask(ids, None, None)
        return module.model._kind(False, slots[None], slots, mask)

    cross_entropy = optax.softmax_cross_entropy_with_integer_labels
    next_token = lambda logits: cross_entropy(logits[:, :-1], ids[:, 1:]).mean()
    tx = jlora.optim.layerwise(
        optax.adam(0.1),
        embed=lambda rest, batch: call(rest, lambda module, ids: module.model.embed_tokens(ids), batch["ids"]),
        block=lambda layer, x, batch, i: Block(config).apply(
            {"params": layer}, (x, None), (i, jnp.zeros((), jnp.int32)), [batch["kind"]]
        )[0][0],
        head=lambda rest, x, batch: next_token(call(rest, lambda m, x: m.model.norm(x) @ m.head()[0], x)),
        layers="model/layers",
    )
    batch = {"ids": ids, "kind": module.apply({"params": params}, ids, method=shared)}
    got, _, figures = jax.jit(tx.step)(params, tx.init(params), batch)
    whole = optax.adam(0.1)
    value, grads = jax.value_and_grad(lambda p: next_token(module.apply({"params": p}, ids)))(params)
    updates, _ = whole.update(grads, whole.init(params), params)
    np.testing.assert_allclose(figures.loss, value, rtol=1e-5)
    assert got["model"]["layers"]["mlp"]["up_proj"]["kernel"].shape[0] == 2
    close(got, optax.apply_updates(params, updates), 1e-4)


@pytest.mark.optimized
@pytest.mark.parametrize(
    "inner",
    [
        optax.adamw(0.1),
        jlora.optim.galore(optax.sgd(0.1, momentum=0.9), 4, solver="subspace", where="**/{up,down}"),
    ],
    ids=["adamw", "galore"],
)
def test_memory(inner: optax.GradientTransformation) -> None:
    """Of 16 layers whose gradients are most of what is temporary, the ordinary step has them all, this one one; and
    no stack of weights or moments is copied."""
    layers, dim = 16, 64
    params = jax.eval_shape(lambda: model_params(jax.random.key(0), dim, layers))
    ids = jax.ShapeDtypeStruct((2, 8), jnp.int32)
    tx = make(inner, rest=optax.sgd(0.1))

    def temporary(step, init) -> int:
        args = (params, jax.eval_shape(init, params), ids)
        return jax.jit(step, donate_argnums=(0, 1)).lower(*args).compile().memory_analysis().temp_size_in_bytes

    gradients = 4 * layers * 4 * dim * dim
    alone, together = temporary(tx.step, tx.init), temporary(lambda *args: ordinary(inner, *args), inner.init)
    assert together > gradients
    assert alone < 0.4 * gradients and alone < 0.3 * together


def test_bad_input() -> None:
    params = model_params(jax.random.key(0))
    with pytest.raises(ValueError, match=r"layers='layers' is no path of the parameters. Nearest: \['model/layers"):
        jlora.optim.layerwise(optax.sgd(0.1), embed=embed, block=block, head=head).init(params)
    with pytest.raises(ValueError, match="stacks"):
        jlora.optim.layerwise(optax.sgd(0.1), embed=embed, block=block, head=head, layers="model").init(params)
