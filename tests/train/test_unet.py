"""Adapters on convolutions of every kind: strided, transposed, 1x1, beside each other through skip connections."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jlora
from jlora.train.models.unet import UNet

MODEL = UNet(2, widths=(8, 12), groups=4)
X = jax.random.normal(jax.random.key(0), (2, 8, 12, 3))
T = jnp.array([0.1, 0.9])
KERNELS = 3 * 2 + 1 + 1 + 1  # of the blocks, halving, doubling, and the head


def fn(params, x, t):
    return MODEL.apply({"params": params}, x, t)


@pytest.fixture(scope="module")
def params():
    shapes = jax.eval_shape(MODEL.init, jax.random.key(1), X, T)["params"]
    size = lambda leaf: 1.0 if len(leaf.shape) == 1 else np.prod(leaf.shape[:-1]) ** -0.5
    return jax.tree.map(lambda leaf: size(leaf) * jax.random.normal(jax.random.key(leaf.size), leaf.shape), shapes)


METHODS = {
    "lora": pytest.param(jlora.LoRA(2), marks=pytest.mark.slow),  # a minute of compilation each
    "conv_lora": pytest.param(jlora.ConvLoRA(2), marks=pytest.mark.slow),
    "dora": pytest.param(jlora.DoRA(2), marks=pytest.mark.slow),
    "rules": {
        "**/conv_*/kernel": jlora.DoRA(2),
        "{halve,double}_*/kernel": jlora.ConvLoRA(3),
        "**/{shortcut,time}/kernel": jlora.LoRA(2),
        "**/norm_*/*": jlora.Full(),
    },
}


@pytest.mark.parametrize("methods", METHODS.values(), ids=METHODS)
def test_lifted_equals_merged_and_no_kernel_is_formed(methods, params):
    targets = None if isinstance(methods, dict) else re.compile(r"(^|/)(conv|halve|double)_\d/kernel|^head/kernel")
    adapted = jlora.adapt(params, methods, targets, fn=fn, args=(X, T), key=jax.random.key(2))
    if targets:
        assert len(adapted.sites) == KERNELS
        assert {site.axes.kind for site in adapted.sites.values()} == {"conv"}
    lifted = jlora.lift(fn, on_materialize="error")
    keys = iter(jax.random.split(jax.random.key(3), 200))
    moved = jax.tree.map(lambda x: x + 0.05 * jax.random.normal(next(keys), x.shape), adapted.trainable)

    @jax.jit
    def both(adapted, moved):
        loss = lambda moved: jnp.sin(lifted(adapted.bind(moved), X, T)).sum()
        merged = lambda moved: jnp.sin(fn(jlora.merge(adapted.replace(trainable=moved)), X, T)).sum()
        start = lifted(adapted.bind(), X, T) - fn(adapted.base, X, T)
        return start, jax.value_and_grad(loss)(moved), jax.value_and_grad(merged)(moved)

    start, got, want = both(adapted, moved)
    np.testing.assert_allclose(start, 0, atol=1e-4)
    assert abs(want[0] - jnp.sin(fn(params, X, T)).sum()) > 0.1
    for g, w in zip(*map(jax.tree.leaves, (got, want)), strict=True):
        np.testing.assert_allclose(g, w, atol=1e-4 * max(1.0, float(jnp.abs(w).max())))


@pytest.mark.slow  # compiles a step of training
def test_adapters_learn_to_segment():
    """Which pixels are brighter than the mean of their image, by adapters on a random frozen base."""
    model = UNet(1, widths=(8, 12), groups=4)
    x = jax.random.normal(jax.random.key(4), (8, 8, 8, 1))
    want = (x > x.mean((1, 2), keepdims=True)).astype(jnp.float32)
    params = jax.jit(model.init)(jax.random.key(5), x)["params"]
    fn = lambda params, x: model.apply({"params": params}, x)
    targets = "**/conv_*/kernel", "halve_*/kernel", "double_*/kernel"
    adapted = jlora.adapt(params, jlora.LoRA(4), targets, fn=fn, args=(x,), key=jax.random.key(6))
    apply, tx = jlora.lift(fn, on_materialize="error"), optax.adam(1e-2)

    @jax.jit
    def train(trainable):
        def step(carry, _):
            trainable, state = carry
            loss = lambda trainable: optax.sigmoid_binary_cross_entropy(apply(adapted.bind(trainable), x), want).mean()
            value, grads = jax.value_and_grad(loss)(trainable)
            updates, state = tx.update(grads, state)
            return (optax.apply_updates(trainable, updates), state), value

        return jax.lax.scan(step, (trainable, tx.init(trainable)), None, length=60)[1]

    losses = train(adapted.trainable)
    assert losses[-1] < losses[0] / 3


def test_images_that_cannot_be_halved_are_refused(params):
    with pytest.raises(ValueError, match=r"images of \(8, 11\) cannot be halved 1 times"):
        fn(params, X[:, :, :11], T)
