"""ViDA: its two branches and, around them, the pure functions of a step at test time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from jlora.methods import vida

pytestmark = pytest.mark.usefixtures("x64")

RANDOM = np.random.default_rng(0)
W, X = RANDOM.normal(size=(7, 5)), RANDOM.normal(size=(6, 7))
run = jlora.lift(lambda params, x: x @ params["kernel"], on_materialize="error")


def test_strengths_of_the_branches() -> None:
    adapted = jlora.adapt({"kernel": jnp.asarray(W)}, jlora.ViDA(1, high_rank=4), key=jax.random.key(0))
    pairs = jax.tree.map(lambda leaf: jnp.asarray(RANDOM.normal(size=leaf.shape)), adapted.trainable["kernel"])
    adapted = adapted.replace(trainable={"kernel": pairs})
    low, high = (X @ np.asarray(pairs[name].product()) for name in ("low", "high"))
    close = lambda context, wanted: np.testing.assert_allclose(
        run(adapted.bind(context=context), X), X @ W + wanted, rtol=0, atol=1e-12
    )
    close(None, low + high)
    close({"strengths": (1, 1)}, low + high)
    close({"strengths": (0.7, 1.3)}, 0.7 * low + 1.3 * high)
    close({"strengths": jnp.array([0.7, 1.3])}, 0.7 * low + 1.3 * high)
    each = np.linspace(0.5, 1.5, 6)
    close({"strengths": (jnp.asarray(each), 1.0)}, each[:, None] * low + high)
    close({"strengths": (each, 2 - each)}, each[:, None] * low + (2 - each)[:, None] * high)
    with pytest.raises(ValueError, match="holds two"):
        close({"strengths": (1.0,)}, low)


def test_start() -> None:
    adapted = jlora.adapt({"kernel": jnp.zeros((4000, 64))}, jlora.ViDA(2, high_rank=8), key=jax.random.key(0))
    for name, rank in (("low", 2), ("high", 8)):
        np.testing.assert_allclose(adapted.trainable["kernel"][name].a.std(), 1 / rank**2, rtol=0.05)
        assert not adapted.trainable["kernel"][name].b.any()


def test_functions() -> None:
    logits = RANDOM.normal(size=(10, 6, 3))
    u = vida.uncertainty(jnp.asarray(logits))
    np.testing.assert_allclose(u, 0.1 * logits.var(axis=0, ddof=1).mean(), rtol=1e-12)
    np.testing.assert_allclose(vida.strengths(0.3, 0.2), (0.7, 1.3))
    np.testing.assert_allclose(vida.strengths(0.2, 0.2), (0.8, 1.2))
    np.testing.assert_allclose(vida.strengths(jnp.array(0.1), 0.2), (1.1, 0.9))
    teacher, student = {"a": jnp.ones(3)}, {"a": jnp.zeros(3)}
    np.testing.assert_allclose(vida.teacher_update(teacher, student)["a"], 0.999)
    softmax = lambda x: np.exp(x) / np.exp(x).sum(-1, keepdims=True)
    loss = -(softmax(logits[0]) * np.log(softmax(logits[1]))).sum(-1).mean()
    np.testing.assert_allclose(vida.consistency(jnp.asarray(logits[1]), jnp.asarray(logits[0])), loss, rtol=1e-12)
    assert not jax.grad(vida.consistency, 1)(jnp.asarray(logits[1]), jnp.asarray(logits[0])).any()


def test_restore() -> None:
    student, source = {"a": jnp.ones(20000), "b": jnp.ones(20000)}, {"a": jnp.zeros(20000), "b": jnp.zeros(20000)}
    restored = vida.restore(jax.random.key(0), student, source, 0.25)
    assert all(abs(float(leaf.mean()) - 0.75) < 0.02 for leaf in restored.values())
    assert np.any(restored["a"] != restored["b"])
    assert not any(leaf.any() for leaf in vida.restore(jax.random.key(0), student, source, 1.0).values())
    assert all(leaf.all() for leaf in vida.restore(jax.random.key(0), student, source, 0.0).values())
