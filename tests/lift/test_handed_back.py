"""Weights that a transformation returns just as it was given them are not formed: flax.nnx returns whole modules."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jlora

X = jax.random.normal(jax.random.key(0), (5, 4))
PARAMS = {
    "w": jax.random.normal(jax.random.key(1), (4, 4)) * 0.5,
    "layers": jax.random.normal(jax.random.key(2), (3, 4, 4)) * 0.5,
}


def remat(p, x):
    w, x = jax.checkpoint(lambda w, x: (w, jnp.tanh(x @ w)))(p["w"], x)
    return x @ w @ p["layers"][0]


def carry_of_scan(p, x):
    step = lambda carry, w: ((carry[0], jnp.tanh(carry[1] @ carry[0] @ w)), w)
    (w, x), layers = jax.lax.scan(step, (p["w"], x), p["layers"])
    return x @ w @ layers[1]


def carry_of_while(p, x):
    step = lambda carry: (carry[0] + 1, carry[1], jnp.tanh(carry[2] @ carry[1]))
    _, w, x = jax.lax.while_loop(lambda carry: (carry[0] < 3) & ((X @ carry[1]).sum() < 1e9), step, (0, p["w"], x))
    return x @ w @ p["layers"][0]


@pytest.mark.parametrize("fn", [remat, carry_of_scan, carry_of_while], ids=lambda fn: fn.__name__)
@pytest.mark.parametrize("method", [jlora.LoRA(2), jlora.DoRA(2)], ids=["lora", "dora"])
def test_loops_and_remat(fn, method):
    adapted = jlora.adapt(PARAMS, method, "**", fn=fn, args=(X,), key=jax.random.key(3))
    assert {path: site.axes.stack for path, site in adapted.sites.items()} == {"w": (), "layers": (0,)}
    keys = iter(jax.random.split(jax.random.key(4), 20))
    moved = jax.tree.map(lambda x: x + 0.3 * jax.random.normal(next(keys), x.shape), adapted.trainable)
    lifted = jlora.lift(fn, on_materialize="error")
    got = lambda trainable: jnp.sin(lifted(adapted.bind(trainable), X)).sum()
    want = lambda trainable: jnp.sin(fn(jlora.merge(adapted.replace(trainable=trainable)), X)).sum()
    derive = jax.value_and_grad if fn is not carry_of_while else lambda fn: fn  # no reverse mode in while
    got, want = (jax.jit(derive(f))(moved) for f in (got, want))
    assert abs(jax.tree.leaves(want)[0] - jnp.sin(fn(PARAMS, X)).sum()) > 1e-3
    close = lambda g, w: np.testing.assert_allclose(g, w, rtol=0, atol=1e-5 * max(1, np.abs(w).max()))
    jax.tree.map(close, got, want)  # entries are sums, whose errors go with the largest


def test_a_carry_that_changes_and_a_constant_that_is_stacked_are_formed():
    swapped = lambda p, x: jax.lax.scan(lambda c, _: (c[::-1], x @ c[0]), (p["w"], p["layers"][0]), None, length=2)[1]
    stacked = lambda p, x: x @ jax.lax.scan(lambda c, _: (c, p["w"]), 0.0, None, length=2)[1] @ p["layers"][:2]
    axes = {"w": jlora.Axes((0,), (1,)), "layers": jlora.Axes((1,), (2,), (0,))}
    adapted = jlora.adapt(PARAMS, jlora.LoRA(2), "**", axes=axes, key=jax.random.key(3))
    adapted = adapted.replace(trainable=jax.tree.map(lambda x: x + 0.1, adapted.trainable))
    for fn, where in ((swapped, "carry of a scan"), (stacked, "scan")):
        with pytest.warns(jlora.MaterializeWarning, match=where):
            got = jlora.lift(fn)(adapted.bind(), X)
        np.testing.assert_allclose(got, fn(jlora.merge(adapted), X), rtol=1e-4, atol=1e-5)


def test_a_rematerialized_nnx_module():
    class Block(nnx.Module):
        def __init__(self, rngs):
            self.linear = nnx.Linear(4, 4, rngs=rngs)

        def forward(self, x):
            return nnx.tanh(self.linear(x))

        def __call__(self, x):
            return nnx.remat(Block.forward)(self, x)

    graphdef, params = nnx.split(nnx.List([Block(nnx.Rngs(i)) for i in range(2)]))

    def fn(params, x):
        for block in nnx.merge(graphdef, params):
            x = block(x)
        return x

    adapted = jlora.adapt(params, jlora.LoRA(2), fn=fn, args=(X,), key=jax.random.key(0))
    assert len(adapted.sites) == 2
    adapted = adapted.replace(trainable=jax.tree.map(lambda x: x + 0.1, adapted.trainable))
    lifted = jlora.lift(fn, on_materialize="error")
    np.testing.assert_allclose(lifted(adapted.bind(), X), fn(jlora.merge(adapted), X), rtol=1e-5, atol=1e-5)
