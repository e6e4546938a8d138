"""A model with stacked and plain weights, and a training step with an allocator, for the tests of this folder."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jlora

AXES = {"layers": jlora.Axes((1,), (2,), stack=(0,)), "first": jlora.Axes((0,), (1,)), "last": jlora.Axes((0,), (1,))}


def params():
    random = np.random.default_rng(0)
    shapes = {"first": (5, 6), "last": (6, 4), "layers": (3, 6, 6)}
    return {name: jnp.asarray(random.normal(size=shape) / 2) for name, shape in shapes.items()}


def model(params, x):
    x = jnp.tanh(x @ params["first"])
    x, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["layers"])
    return x @ params["last"]


lifted = jax.jit(lambda adapted, x: jlora.lift(model, on_materialize="error")(adapted.bind(), x))


def data():
    random = np.random.default_rng(1)
    return jnp.asarray(random.normal(size=(16, 5))), jnp.asarray(random.normal(size=(16, 4)))


@jax.jit
def effective(adapted):
    """The effective weights: what ``jlora.merge`` gives, in one small program."""
    out = {}
    for path, site in adapted.sites.items():
        one = site.method.weight
        for _ in site.canonical_shape[0]:
            one = jax.vmap(one)
        out[path] = one(adapted.base[path], adapted.params_of(path, site))
    return adapted.base | out


def loss_of(trainable, adapted):
    """Of the weights alone, so that it compiles quickly; not convex, and every weight has its part."""
    weights = effective(adapted.replace(trainable=trainable))
    return sum(jnp.sum(jnp.sin(w + i)) for i, w in enumerate(weights.values()))


def adapt(method):
    return jlora.adapt(params(), method, "**", axes=AXES, key=jax.random.key(0))


def moved(adapted):
    """With every trained number at random."""
    random = np.random.default_rng(2)
    return adapted.replace(
        trainable=jax.tree.map(lambda p: jnp.asarray(random.normal(size=p.shape)), adapted.trainable)
    )


def train(adapted, tx, opt_state, allocator=None, state=None, steps=(0,)):
    """(adapters, optimizer state, allocator state, number of compilations)."""
    traces = []

    @jax.jit
    def step(adapted, opt_state, state, i):
        traces.append(None)
        grads = jax.grad(loss_of)(adapted.trainable, adapted)
        updates, opt_state = tx.update(grads, opt_state, adapted.trainable)
        adapted = adapted.replace(trainable=optax.apply_updates(adapted.trainable, updates))
        if allocator is not None:
            state, adapted = allocator.update(state, adapted, grads, i)
        return adapted, opt_state, state

    for i in steps:
        adapted, opt_state, state = step(adapted, opt_state, state, i)
    return adapted, opt_state, state, len(traces)
