"""X-LoRA against its formula in float64 NumPy, in every place where a scaling has to reach its token and its matrix."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from jlora.methods import xlora

pytestmark = pytest.mark.usefixtures("x64")

RANDOM = np.random.default_rng(0)
LAYERS, VOCAB, D, BATCH, SEQ = 3, 11, 6, 2, 5
RANKS, SCALES = (2, 1), (1.5, 0.5)
IDS = RANDOM.integers(0, VOCAB, (BATCH, SEQ))
PARAMS = {
    "table": {"embedding": RANDOM.normal(size=(VOCAB, D))},
    "layers": {name: {"kernel": RANDOM.normal(size=(LAYERS, D, D)) / 3} for name in ("up", "down")},
}


def model(params, ids):
    """Lookups, a scan over layers, and a head tied to the table."""
    x = jnp.take(params["table"]["embedding"], ids, axis=0)

    def layer(x, p):
        return x + jnp.tanh(x @ p["up"]["kernel"]) @ p["down"]["kernel"], None

    x, _ = jax.lax.scan(layer, x, params["layers"])
    return x @ params["table"]["embedding"].T


run = jlora.lift(model, on_materialize="error")
trace = dict(fn=model, args=(IDS,))


def randomly(adapted, seed=0):
    random = np.random.default_rng(seed)
    return adapted.replace(
        trainable=jax.tree.map(lambda a: jnp.asarray(random.normal(size=a.shape)), adapted.trainable)
    )


@functools.cache
def adapted():
    return randomly(jlora.adapt(PARAMS, {"**": jlora.XLoRA(RANKS, SCALES)}, key=jax.random.key(0), **trace))


def scalings(seed=1):
    return np.random.default_rng(seed).uniform(size=(BATCH, SEQ, xlora.layers(adapted()), 2))


def by_hand(spread):
    """The formula for every product of the model."""
    pairs = adapted().trainable

    def product(path, x, w, index=None, transposed=False):
        y = x @ (w.T if transposed else w)
        for e, (name, f) in enumerate(pairs[path].items()):
            at = () if index is None else (index,)
            delta = SCALES[e] * np.asarray(f.a)[at] @ np.asarray(f.b)[at]
            gains = np.asarray(spread[path])[at]
            y = y + gains[..., int(name), None] * (x @ (delta.T if transposed else delta))
        return y

    table = np.asarray(PARAMS["table"]["embedding"])
    x = product("table/embedding", np.eye(VOCAB)[IDS], table)
    for i in range(LAYERS):
        up, down = (np.asarray(PARAMS["layers"][name]["kernel"][i]) for name in ("up", "down"))
        x = x + product("layers/down/kernel", np.tanh(product("layers/up/kernel", x, up, i)), down, i)
    return product("table/embedding", x, table, transposed=True)


def test_each_token_and_matrix_has_its_own() -> None:
    given = scalings()
    spread = xlora.spread(adapted(), given)
    assert {path: s.shape for path, s in spread.items()} == {
        "layers/down/kernel": (LAYERS, BATCH, SEQ, 2),
        "layers/up/kernel": (LAYERS, BATCH, SEQ, 2),
        "table/embedding": (BATCH, SEQ, 2),
    }
    wanted = by_hand(spread)
    bound = lambda spread: run(adapted().bind(context={"scalings": spread}), IDS)
    np.testing.assert_allclose(bound(spread), wanted, atol=1e-12)
    np.testing.assert_allclose(jax.jit(bound)(spread), wanted, atol=1e-12)
    each = jax.vmap(  # each example by itself, without a batch axis
        lambda ids, own: run(adapted().bind(context={"scalings": xlora.spread(adapted(), own)}), ids)
    )
    np.testing.assert_allclose(each(jnp.asarray(IDS), given), wanted, atol=1e-12)
    remat = jlora.lift(jax.checkpoint(model), on_materialize="error")
    np.testing.assert_allclose(remat(adapted().bind(context={"scalings": spread}), IDS), wanted, atol=1e-12)


def test_same_for_all_matrices_or_tokens() -> None:
    one = scalings()[:, :, 0]
    every = jnp.broadcast_to(one[:, :, None], scalings().shape)
    out = lambda given: run(adapted().bind(context={"scalings": given}), IDS)
    np.testing.assert_allclose(out(one), by_hand(xlora.spread(adapted(), every)), atol=1e-12)
    every = jnp.broadcast_to(jnp.array([0.3, 0.7]), scalings().shape)
    wanted = by_hand(xlora.spread(adapted(), every))
    for given in ((0.3, 0.7), jnp.array([0.3, 0.7])):
        np.testing.assert_allclose(out(given), wanted, atol=1e-12)
    np.testing.assert_allclose(
        run(jlora.rank.choose(adapted(), {"scalings": (0.3, 0.7)}).bind(), IDS), wanted, atol=1e-12
    )
    np.testing.assert_allclose(out(0.0), model(PARAMS, IDS), atol=1e-12)
    np.testing.assert_allclose(out(1.0), model(jlora.merge(adapted()), IDS), atol=1e-12)


def test_gradients_reach_classifier_and_adapters() -> None:
    classifier = xlora.Classifier(D, 2, xlora.layers(adapted()), depth=3, width=4, temperature=0.7)
    params = classifier.init(jax.random.key(0), jnp.float64)
    hidden = jnp.asarray(RANDOM.normal(size=(BATCH, SEQ, D)))

    def loss(params, trainable, hidden):
        context = {"scalings": xlora.spread(adapted(), classifier(params, hidden))}
        return jnp.sin(run(adapted().bind(trainable, context), IDS)).sum()

    of_params, of_pairs, of_hidden = jax.grad(loss, (0, 1, 2))(params, adapted().trainable, hidden)
    assert not of_hidden.any()  # the first pass is not differentiated
    for tree, gradient, at in ((params, of_params, 0), (adapted().trainable, of_pairs, 1)):
        step = jax.tree.map(lambda leaf: jnp.asarray(RANDOM.normal(size=leaf.shape)), tree)
        moved = [jax.tree.map(lambda leaf, d, h=h: leaf + h * d, tree, step) for h in (1e-6, -1e-6)]
        args = [[params, adapted().trainable, hidden] for _ in moved]
        for arg, tree in zip(args, moved, strict=True):
            arg[at] = tree
        slope = (loss(*args[0]) - loss(*args[1])) / 2e-6
        along = sum(jnp.vdot(g, d) for g, d in zip(jax.tree.leaves(gradient), jax.tree.leaves(step), strict=True))
        np.testing.assert_allclose(along, slope, rtol=1e-6)


def test_classifier() -> None:
    hidden = RANDOM.normal(size=(BATCH, SEQ, D))
    classifier = xlora.Classifier(D, 3, depth=2, width=4, temperature=2.0)
    params = classifier.init(jax.random.key(0), jnp.float64)
    assert classifier.sizes == (D, 4, 3) and [layer["kernel"].shape for layer in params] == [(D, 4), (4, 3)]
    h = np.maximum(hidden @ np.asarray(params[0]["kernel"]) + np.asarray(params[0]["bias"]), 0)
    logits = (h @ np.asarray(params[1]["kernel"]) + np.asarray(params[1]["bias"])) / 2.0
    wanted = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    np.testing.assert_allclose(classifier(params, hidden), wanted, rtol=1e-12)
    dropped = classifier(params, hidden, jax.random.key(1))
    assert np.abs(dropped - wanted).max() > 1e-3

    s = jnp.array([[0.2, 0.5, 0.3], [0.4, 0.2, 0.4]])
    select = lambda **options: np.asarray(xlora.Classifier(D, 3, **options).select(s))
    np.testing.assert_array_equal(select(), s)
    np.testing.assert_array_equal(select(top_k=1), [[0, 0.5, 0], [0.4, 0, 0]])
    np.testing.assert_allclose(select(top_k=2, weight=3.0), 3 * np.array([[0, 0.5, 0.3], [0.4, 0, 0.4]]))
    even = 1 / (1 + np.exp(0.2))
    np.testing.assert_allclose(select(top_k=2, softmax_top_k=True), [[0, 1 - even, even], [0.5, 0, 0.5]])
    for options in ({"top_k": 4}, {"depth": 0}, {"temperature": 0.0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            xlora.Classifier(D, 3, **options)


def test_combine() -> None:
    """Adapters of different ranks, on different leaves and layers, one with an alpha of its own for each layer."""
    varied = {"layers/up/kernel": jlora.LoRA(2, ranks=(2, 0, 1), alphas=(3.0, 1.0, 5.0)), "table/*": jlora.LoRA(1)}
    rules = ({"layers/*/kernel": jlora.LoRA(3, alpha=2.0)}, varied)
    each = [randomly(jlora.adapt(PARAMS, rule, key=jax.random.key(0), **trace), i) for i, rule in enumerate(rules)]
    masked = lambda path, f: each[1].sites[path].method.mask_ranks(f)
    each[1] = each[1].replace(trainable={path: masked(path, f) for path, f in each[1].trainable.items()})
    both = xlora.combine(*each)
    assert [site.method.rank for site in both.sites.values()] == [(3, 0), (3, 2), (0, 1)]
    for e, alone in enumerate(each):
        one_hot = jnp.zeros((BATCH, SEQ, xlora.layers(both), 2)).at[..., e].set(1.0)
        got = run(both.bind(context={"scalings": xlora.spread(both, one_hot)}), IDS)
        np.testing.assert_allclose(got, run(alone.bind(), IDS), atol=1e-12)
    other = jlora.adapt(jax.tree.map(np.copy, PARAMS), jlora.LoRA(2), key=jax.random.key(0), **trace)
    with pytest.raises(ValueError, match="over one base"):
        xlora.combine(each[0], other)
    with pytest.raises(ValueError, match="mixes plain LoRA"):
        xlora.combine(jlora.adapt(PARAMS, jlora.DoRA(2), key=jax.random.key(0), **trace))


def test_a_cache_stays_valid() -> None:
    """The scalings of a token are those of the token: a model that is given one at a time is given its own."""
    given = scalings()
    whole = run(adapted().bind(context={"scalings": xlora.spread(adapted(), given)}), IDS)
    for t in range(SEQ):
        own = xlora.spread(adapted(), given[:, t : t + 1])
        one = run(adapted().bind(context={"scalings": own}), IDS[:, t : t + 1])
        np.testing.assert_allclose(one, whole[:, t : t + 1], atol=1e-12)


def test_what_is_refused() -> None:
    bind = lambda given: adapted().bind(context={"scalings": given})
    spread = xlora.spread(adapted(), scalings())
    for given, message in (
        ({"layers/up/kernel": spread["layers/up/kernel"]}, "spread"),
        (spread | {"layers/up/kernel": spread["layers/up/kernel"][0]}, "spread"),
        (np.ones((BATCH + 1, SEQ, 2)), "is used in a lookup product"),
        (np.ones((BATCH, SEQ, 3)), "each of 2 adapters"),
        ((1.0, 2.0, 3.0), "each of 2 adapters"),
    ):
        with pytest.raises(ValueError, match=message):
            run(bind(given), IDS)
    with pytest.raises(ValueError, match=r"\[batch, seq, 7, adapters\]"):
        xlora.spread(adapted(), scalings()[:, :, :3])
    with pytest.raises(ValueError, match="no one weight"):
        jlora.rank.choose(adapted(), {"scalings": scalings()[:, :, 0]})
    with pytest.raises(ValueError, match="one of them above 0"):
        jlora.XLoRA((0, 0))
    with pytest.raises(ValueError, match="no one weight"):
        jlora.lift(lambda p: p["table"]["embedding"] * 2, on_materialize="silent")(bind(spread))
