"""Dropout, for every method that has it: on exactly when the tree was bound with a key, a mask of its own for each
layer, use and step, unbiased, and the same in the forward pass, in gradients and under remat."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from registry import Row, adapt_model, assert_close, inputs, model, moved, normal, over_dropout_forms, over_own_dropout

import jlora
from jlora.methods import Method

lifted = jlora.lift(model, on_materialize="error")


def with_dropout(row: Row, rate: float = 0.5) -> Row:
    return dataclasses.replace(row, method=dataclasses.replace(row.method, dropout=rate))


def context(seed: int) -> dict:
    return {"key": jax.random.key(seed)}


@over_own_dropout
def test_on_exactly_with_a_key(row: Row) -> None:
    quiet, adapted = adapt_model(row), adapt_model(with_dropout(row))
    trainable = moved(adapted.trainable)
    run = jax.jit(lambda adapted, context: lifted(adapted.bind(trainable, context), inputs()))
    off = run(adapted, None)
    assert_close(off, run(quiet, None))
    assert_close(off, run(quiet, context(0)))  # a key, but no dropout
    assert_close(off, run(adapted, {}))
    first, again, second = run(adapted, context(0)), run(adapted, context(0)), run(adapted, context(1))
    assert_close(first, again, 0.0)
    assert np.abs(first - off).max() > 1e-3 and np.abs(first - second).max() > 1e-3
    if row.method.mergeable:
        assert_close(jlora.merge(adapted.replace(trainable=trainable)), jlora.merge(quiet.replace(trainable=trainable)))


@over_dropout_forms
def test_layers_and_uses_differ(row: Row) -> None:
    """The same weights and parameters in every layer, and the same input: only the masks can differ."""
    params = {"w": jnp.broadcast_to(normal(0, (6, 4)), (3, 6, 4))}
    adapted = jlora.adapt(
        params, with_dropout(row).method, "w", axes={"w": jlora.Axes((1,), (2,), (0,))}, key=jax.random.key(0)
    )
    same = lambda leaf: jnp.broadcast_to(leaf[:1], leaf.shape)
    each = lambda tree: {k: v if k == row.method.group else jax.tree.map(same, v) for k, v in tree.items()}
    adapted = adapted.replace(trainable=each(moved(adapted.trainable)), frozen=each(adapted.frozen))
    x = normal(1, (16, 6))

    def scanned(params, x):
        return jax.lax.scan(lambda x, w: (x, x @ w), x, params["w"])[1]

    def twice(params, x):
        w = params["w"]
        return jnp.stack([x @ w[0], x @ w[0], x @ w[1]])

    for fn in (scanned, twice):
        run = jlora.lift(fn, on_materialize="error")
        masked, plain = run(adapted.bind(context=context(0)), x), run(adapted.bind(), x)
        assert_close(plain[0], plain[1])
        changes = masked - plain
        for i, j in ((0, 1), (0, 2), (1, 2)):
            assert np.abs(changes[i] - changes[j]).max() > 1e-3


@over_dropout_forms
def test_mean_is_the_output_without(row: Row) -> None:
    params = {"layers": {"kernel": normal(0, (3, 6, 4))}}
    adapted = jlora.adapt(
        params,
        with_dropout(row, 0.3).method,
        "**",
        axes={"layers/kernel": jlora.Axes((1,), (2,), (0,))},
        key=jax.random.key(0),
    )
    adapted = adapted.replace(trainable=moved(adapted.trainable))
    run = jlora.lift(lambda params, x: jnp.einsum("bi,lio->blo", x, params["layers"]["kernel"]), on_materialize="error")
    x, n = normal(1, (2, 6)), 4096
    sample = lambda key: run(adapted.bind(context={"key": key}), x)
    samples = jax.jit(jax.vmap(sample))(jax.random.split(jax.random.key(7), n))
    deviation = samples.std(0) / n**0.5
    moves = deviation > 1e-12  # all but a layer of rank 0
    assert moves.any()
    error = (samples.mean(0) - run(adapted.bind(), x)) / jnp.where(moves, deviation, 1.0)
    assert np.abs(error).max() < 5.0


@over_dropout_forms
def test_gradient_is_of_the_same_mask(row: Row) -> None:
    adapted = adapt_model(with_dropout(row))
    trainable, x = moved(adapted.trainable), inputs()
    direction = moved(jax.tree.map(jnp.zeros_like, trainable), seed=30)

    @jax.jit
    def check(trainable, direction):
        loss = lambda t, remat: jnp.sum(jnp.sin(lifted(adapted.bind(t, context(3)), x, remat=remat)))
        along = lambda h: loss(jax.tree.map(lambda p, d: p + h * d, trainable, direction), False)
        h = 1e-5
        return [jax.grad(loss)(trainable, remat) for remat in (False, True)], (along(h) - along(-h)) / (2 * h)

    (grads, grads_of_remat), wanted = check(trainable, direction)
    assert_close(grads_of_remat, grads)
    if row.own_gradients:
        return
    if type(row.method).output_gain is Method.output_gain:  # DoRA's is detached: its gradient is not the derivative
        products = jax.tree.map(lambda g, d: jnp.sum(g * d), grads, direction)
        assert_close(sum(jax.tree.leaves(products)), wanted, 1e-7)
