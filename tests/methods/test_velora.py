"""VeLoRA: its gradient by the formula, what it keeps until the backward pass, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora

pytestmark = pytest.mark.usefixtures("x64")
RANDOM = np.random.default_rng(0)
X, W, C = (RANDOM.normal(size=shape) for shape in ((2, 5, 10), (10, 6), (2, 5, 6)))
KEY = jax.random.key(0)


def setting(**options):
    adapted = jlora.adapt({"w": W}, jlora.VeLoRA(3, 6.0, **options), key=KEY)
    trainable = jax.tree.map(lambda leaf: leaf + 0.1, adapted.trainable)
    lifted = jlora.lift(lambda params, x: x @ params["w"])
    return adapted, trainable, lambda trainable, x: lifted(adapted.bind(trainable), x)


@pytest.mark.parametrize("direction", ["average", "fixed"])
def test_gradients_by_the_formula(direction):
    """Four groups of ten features: the last is padded. Token by token, group by group, in NumPy."""
    adapted, trainable, f = setting(groups=4, gain=0.7, direction=direction)
    got, got_x = jax.grad(lambda t, x: jnp.sum(f(t, x) * C), (0, 1))(trainable, X)
    a, b = np.asarray(trainable["w"].a), np.asarray(trainable["w"].b)
    x, c = X.reshape(-1, 10), C.reshape(-1, 6)
    groups = np.pad(x, ((0, 0), (0, 2))).reshape(-1, 4, 3)
    v = groups.mean((0, 1)) if direction == "average" else np.asarray(adapted.frozen["w"]["direction"])
    v = v / np.linalg.norm(v)
    seen = np.zeros((10, 12))
    for t in range(10):
        for g in range(4):
            seen[t, 3 * g : 3 * g + 3] = 0.7 * (groups[t, g] @ v) * v
    h = 2.0 * c @ b.T
    np.testing.assert_allclose(got["w"].a, seen[:, :10].T @ h, rtol=1e-12)
    np.testing.assert_allclose(got["w"].b, 2.0 * (x @ a).T @ c, rtol=1e-12)
    np.testing.assert_allclose(got_x.reshape(-1, 10), c @ (W + 2.0 * a @ b).T, rtol=1e-12)


def test_a_group_for_each_feature_is_exact():
    _, trainable, f = setting(groups=10)
    lora = jlora.adapt({"w": W}, jlora.LoRA(3, 6.0), key=KEY)
    plain = jlora.lift(lambda params, x: x @ params["w"])
    got = jax.grad(lambda t: jnp.sum(f(t, X) * C))(trainable)
    wanted = jax.grad(lambda t: jnp.sum(plain(lora.bind(t), X) * C))(trainable)
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=1e-12), got, wanted)


def test_the_input_is_not_kept():
    _, trainable, f = setting(groups=2)
    kept = lambda f, t: {leaf.shape for leaf in jax.tree.leaves(jax.vjp(lambda t: f(t, X), t)[1])}
    lora = jlora.adapt({"w": W}, jlora.LoRA(3, 6.0), key=KEY)
    plain = jlora.lift(lambda params, x: x @ params["w"])
    assert X.shape in kept(lambda t, x: plain(lora.bind(t), x), trainable)
    shapes = kept(f, trainable)
    assert X.shape not in shapes and (2, 5, 2) in shapes


def test_refusals():
    with pytest.raises(ValueError, match="11 groups of 10 features; choose at most 10"):
        setting(groups=11)
    with pytest.raises(ValueError, match="'average' or 'fixed'"):
        jlora.VeLoRA(direction="mean")
    with pytest.raises(ValueError, match="no ranks and alphas"):
        jlora.VeLoRA(2, ranks=(2, 1))
