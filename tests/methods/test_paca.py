"""PaCA against full training of its rows, and what its backward pass keeps."""

import jax
import jax.numpy as jnp
import numpy as np

import jlora


def adapted(dtype=None):
    rng = np.random.default_rng(0)
    params = {"kernel": jnp.asarray(rng.normal(size=(20, 8)), dtype)}
    x = jnp.asarray(rng.normal(size=(5, 20)), dtype)
    return jlora.adapt(params, jlora.PaCA(3, alpha=6.0), "*", key=jax.random.key(0)), x


apply = jlora.lift(lambda params, x: x @ params["kernel"], on_materialize="error")


def test_gradient_is_the_rows_of_the_full_one(x64):
    paca, x = adapted()
    w, rows = paca.base["kernel"], paca.frozen["kernel"]["rows"]
    assert len(set(rows.tolist())) == 3 and sorted(rows.tolist()) == rows.tolist()
    np.testing.assert_allclose(2.0 * paca.trainable["kernel"]["p"], w[rows], rtol=1e-15)
    loss = lambda y: jnp.sum(jnp.sin(y))
    got = jax.grad(lambda trainable: loss(apply(paca.bind(trainable), x)))(paca.trainable)["kernel"]["p"]
    full = jax.grad(lambda w: loss(x @ w))(w)
    np.testing.assert_allclose(got, 2.0 * full[rows], rtol=1e-12)


def test_merge_sets_the_rows(x64):
    paca, x = adapted()
    p = paca.trainable["kernel"]["p"] + 0.5
    moved = paca.replace(trainable={"kernel": {"p": p}})
    wanted = np.array(paca.base["kernel"])
    wanted[np.asarray(paca.frozen["kernel"]["rows"])] = 2.0 * p
    merged = jlora.merge(moved)["kernel"]
    np.testing.assert_array_equal(merged, wanted)
    np.testing.assert_allclose(apply(moved.bind(), x), x @ merged, rtol=1e-12)


def test_keeps_three_columns_of_the_input():
    paca, x = adapted()
    _, backward = jax.vjp(lambda trainable, x: apply(paca.bind(trainable), x), paca.trainable, x)
    kept = [leaf.shape for leaf in jax.tree.leaves(backward)]
    assert (5, 3) in kept and (5, 20) not in kept
