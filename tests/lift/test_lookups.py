"""Rows of a table that are cut out one at a time, under vmap: a gather with a number for every axis."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora

TABLE = jax.random.normal(jax.random.key(0), (7, 2, 3))
IDS = jnp.array([[0, 3, 6], [6, 1, 9]])  # the last is clipped
WAYS = {
    "index": lambda p, ids: jax.vmap(jax.vmap(lambda i: jnp.sin(p["t"][jnp.minimum(i, 6)])))(ids),
    "cut": lambda p, ids: jax.vmap(lambda i: jax.lax.dynamic_index_in_dim(p["t"], i, 0, False))(ids[0]),
    "kept": lambda p, ids: jax.vmap(jax.vmap(lambda i: jax.lax.dynamic_slice_in_dim(p["t"], i, 1)))(ids),
    "other axis": lambda p, ids: jax.vmap(
        lambda i: jax.lax.dynamic_slice_in_dim(jnp.moveaxis(p["t"], 0, 1), i, 1, axis=1), out_axes=1
    )(ids[1]),
}


@pytest.mark.parametrize("method", [jlora.LoRA(2), jlora.DoRA(2)], ids=["lora", "dora"])
@pytest.mark.parametrize("fn", WAYS.values(), ids=WAYS)
def test_rows_cut_out_under_vmap(fn, method):
    params = {"t": TABLE}
    adapted = jlora.adapt(params, method, "**", fn=fn, args=(IDS,), key=jax.random.key(1))
    assert adapted.sites["t"].axes == jlora.Axes((0,), (1, 2), kind="embedding")
    keys = iter(jax.random.split(jax.random.key(2), 20))
    moved = jax.tree.map(lambda x: x + 0.3 * jax.random.normal(next(keys), x.shape), adapted.trainable)
    lifted = jlora.lift(fn, on_materialize="error")
    got = jax.value_and_grad(lambda t: jnp.sin(lifted(adapted.bind(t), IDS)).sum())(moved)
    merged = lambda t: fn(jlora.merge(adapted.replace(trainable=t)), IDS)
    want = jax.value_and_grad(lambda t: jnp.sin(merged(t)).sum())(moved)
    np.testing.assert_allclose(lifted(adapted.bind(moved), IDS), merged(moved), rtol=1e-5, atol=1e-5)
    assert np.abs(merged(moved) - fn(params, IDS)).max() > 0.1
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=1e-4, atol=1e-5), got, want)
