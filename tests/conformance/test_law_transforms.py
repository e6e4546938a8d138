"""For every method: a lifted function can be jitted, mapped, differentiated, checkpointed and run in low precision like
the function itself."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from registry import (
    ROWS,
    Row,
    adapt_model,
    assert_close,
    effective,
    inputs,
    model,
    model_params,
    moved,
    over_every_other_row,
    over_forms,
    over_most_products,
    over_rows,
)

import jlora

lifted = jlora.lift(model, on_materialize="error")


@pytest.fixture(scope="module")
def case():
    """(adapted and moved, the plain model's tree that it equals), made once a row."""

    @functools.cache
    def case(name: str):
        row = next(row for row in ROWS if row.name == name)
        adapted = adapt_model(row)
        adapted = adapted.replace(trainable=moved(adapted.trainable))
        return adapted, effective(adapted)

    return case


@jax.jit
def merged_outputs(merged, x):
    return model(merged, x)


@jax.jit
def merged_gradients(adapted, trainable, x):
    loss = lambda trainable, x: jnp.sum(jnp.sin(model(effective(adapted.replace(trainable=trainable)), x)))
    return jax.grad(loss, (0, 1))(trainable, x)


@functools.partial(jax.jit, static_argnames="remat")
def lifted_gradients(adapted, trainable, x, remat=False):
    loss = lambda trainable, x: jnp.sum(jnp.sin(lifted(adapted.bind(trainable), x, remat=remat)))
    return jax.grad(loss, (0, 1))(trainable, x)


@over_every_other_row
def test_eager_and_jitted(row: Row, case) -> None:
    adapted, merged = case(row.name)
    wanted = merged_outputs(merged, inputs())
    assert_close(lifted(adapted.bind(), inputs()), wanted)
    assert_close(jax.jit(lifted)(adapted.bind(), inputs()), wanted)
    assert_close(jax.jit(lambda adapted, x: lifted(adapted.bind(), x))(adapted, inputs()), wanted)


@over_rows
def test_gradients_with_and_without_remat(row: Row, case) -> None:
    adapted, _ = case(row.name)
    wanted = merged_gradients(adapted, adapted.trainable, inputs())
    for remat in (False, True):
        assert_close(lifted_gradients(adapted, adapted.trainable, inputs(), remat=remat), wanted)


@over_forms
def test_vmap_over_inputs(row: Row, case) -> None:
    adapted, merged = case(row.name)
    x = jnp.stack([inputs(), 2 * inputs()])
    wanted = jnp.stack([merged_outputs(merged, x[0]), merged_outputs(merged, x[1])])
    assert_close(jax.vmap(lambda x: lifted(adapted.bind(), x))(x), wanted)
    assert_close(jax.vmap(lifted, in_axes=(None, 0))(adapted.bind(), x), wanted)


@over_forms
def test_vmap_over_an_ensemble(row: Row, case) -> None:
    adapted, merged = case(row.name)
    other = moved(adapted.trainable, seed=50)
    both = jax.tree.map(lambda *leaves: jnp.stack(leaves), adapted.trainable, other)
    got = jax.vmap(lambda trainable: lifted(adapted.bind(trainable), inputs()))(both)
    merged_other = effective(adapted.replace(trainable=other))
    assert_close(got, jnp.stack([merged_outputs(merged, inputs()), merged_outputs(merged_other, inputs())]))


@over_forms
def test_gradients_of_every_example(row: Row, case) -> None:
    adapted, _ = case(row.name)
    loss = lambda trainable, x: jnp.sum(jnp.sin(lifted(adapted.bind(trainable), x)))
    each = jax.jit(jax.vmap(jax.grad(loss), in_axes=(None, 0)))(adapted.trainable, inputs())
    parts = list(inputs()) if row.batchwise else [inputs()]
    gradients = [merged_gradients(adapted, adapted.trainable, part)[0] for part in parts]
    assert_close(jax.tree.map(lambda g: g.sum(0), each), jax.tree.map(lambda *g: sum(g), *gradients))


@over_most_products
def test_plain_implementation_has_forward_mode(row: Row, case) -> None:
    adapted, _ = case(row.name)
    plain = jlora.lift(model, on_materialize="error", implementation="plain")
    direction = moved(jax.tree.map(jnp.zeros_like, adapted.trainable))

    @jax.jit
    def derivatives(direction):
        loss = lambda t: jnp.sum(jnp.sin(plain(adapted.bind(t), inputs())))
        return jax.jvp(loss, (adapted.trainable,), (direction,))[1]

    gradient, _ = merged_gradients(adapted, adapted.trainable, inputs())
    products = jax.tree.map(lambda g, d: jnp.sum(g * d), gradient, direction)
    assert_close(derivatives(direction), sum(jax.tree.leaves(products)))


@over_every_other_row
def test_bfloat16_base(row: Row, case) -> None:
    exact_adapted, _ = case(row.name)
    low = model_params(jnp.bfloat16)
    adapted = adapt_model(row, low)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(adapted.trainable))  # wider than their base
    trainable = jax.tree.map(lambda t, now: t.astype(now.dtype), exact_adapted.trainable, adapted.trainable)
    y = lifted(adapted.bind(trainable), inputs(jnp.bfloat16))
    assert y.dtype == jnp.bfloat16
    # The reference: 64 bits throughout, on the same rounded numbers.
    widened = lambda leaf: leaf.astype(jnp.float64) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf
    wide = lambda tree: jax.tree.map(widened, tree)
    reference = adapted.replace(base=wide(low), trainable=wide(trainable), frozen=wide(adapted.frozen))
    wanted = lifted(reference.bind(), wide(inputs(jnp.bfloat16)))
    assert_close(y, wanted, 3e-2)
    # Gradients of the adapters keep the adapters' dtype and stay close.
    loss = lambda adapted, x: lambda t: jnp.sum(jnp.sin(lifted(adapted.bind(t), x).astype(jnp.float32)))
    grads = jax.jit(jax.grad(loss(adapted, inputs(jnp.bfloat16))))(trainable)
    assert jax.tree.map(lambda g: g.dtype, grads) == jax.tree.map(lambda t: t.dtype, trainable)
    error = jax.tree.map(
        lambda g, w: np.linalg.norm(np.asarray(g - w, np.float64)) / max(np.linalg.norm(w), 1.0),
        wide(grads),
        jax.jit(jax.grad(loss(reference, wide(inputs(jnp.bfloat16)))))(reference.trainable),
    )
    assert max(jax.tree.leaves(error)) < 5e-2


@over_forms
def test_model_that_casts_its_weights(row: Row, case) -> None:
    """A wide base and low-precision arithmetic, as in mixed-precision training."""
    adapted, merged = case(row.name)
    cast = lambda params, x: model(jax.tree.map(lambda w: w.astype(jnp.bfloat16), params), x)
    y = jlora.lift(cast, on_materialize="error")(adapted.bind(), inputs(jnp.bfloat16))
    assert y.dtype == jnp.bfloat16
    assert_close(y, merged_outputs(merged, inputs(jnp.bfloat16).astype(jnp.float64)), 3e-2)
