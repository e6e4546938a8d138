"""Block-LoRA is LoRA of a lower rank and n times the step on B; triangular factors lose nothing but the redundancy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jlora

pytestmark = pytest.mark.usefixtures("x64")

RANDOM = np.random.default_rng(0)
W, X = RANDOM.normal(size=(7, 5)), RANDOM.normal(size=(4, 7))
KEY = jax.random.key(0)
run = jlora.lift(lambda params: jnp.sum(jnp.sin(jnp.asarray(X) @ params["kernel"])), on_materialize="error")


def train(adapted, tx, steps=4):
    trainable = adapted.trainable
    state = tx.init(trainable)
    step = jax.jit(
        lambda p, s: tx.update(jax.grad(lambda t: run(adapted.bind(t)))(p), s, p)  # updates, state
    )
    for _ in range(steps):
        updates, state = step(trainable, state)
        trainable = optax.apply_updates(trainable, updates)
    return adapted.replace(trainable=trainable)


def test_block_formula() -> None:
    adapted = jlora.adapt({"kernel": jnp.asarray(W)}, jlora.BlockLoRA(6, alpha=3.0, blocks=3), key=KEY)
    a, b = RANDOM.normal(size=(7, 2)), RANDOM.normal(size=(3, 2, 5))
    adapted = adapted.replace(trainable={"kernel": {"a": jnp.asarray(a), "b": jnp.asarray(b)}})
    # The product of the whole factors, A of three equal blocks.
    wanted = W + 0.5 * np.concatenate([a, a, a], axis=1) @ b.reshape(6, 5)
    np.testing.assert_allclose(jlora.merge(adapted)["kernel"], wanted, atol=1e-12)


@pytest.mark.parametrize("optimizer", [optax.sgd, optax.adam])
def test_block_trains_as_lora_with_a_larger_step_on_b(optimizer) -> None:
    blocks = jlora.adapt({"kernel": jnp.asarray(W)}, jlora.BlockLoRA(6, alpha=6.0, blocks=3), key=KEY)
    lora = jlora.adapt({"kernel": jnp.asarray(W)}, jlora.LoRA(2, alpha=2.0), key=KEY)
    pair = lora.trainable["kernel"]
    np.testing.assert_array_equal(pair.a, blocks.trainable["kernel"]["a"])
    labels = {"kernel": jlora.Factors("a", "b", pair.scale)}
    faster = optax.partition({"a": optimizer(1e-2), "b": optimizer(3e-2)}, labels)
    got, wanted = train(blocks, optimizer(1e-2)), train(lora, faster)
    np.testing.assert_allclose(jlora.merge(got)["kernel"], jlora.merge(wanted)["kernel"], atol=1e-12)
    b = np.asarray(got.trainable["kernel"]["b"])
    np.testing.assert_allclose(b, np.stack([b[0]] * 3), atol=1e-15)
    assert np.abs(b).max() > 1e-3


def test_block_errors() -> None:
    with pytest.raises(ValueError, match="one of 1, 2, 3, 6, nearest 3"):
        jlora.BlockLoRA(6, blocks=4)


def test_triangles_stay_through_noise_and_decay() -> None:
    adapted = jlora.adapt({"kernel": jnp.asarray(W)}, jlora.TriAdaptLoRA(3, alpha=6.0), key=KEY)
    pair = adapted.trainable["kernel"]
    assert np.all(np.triu(pair.a, 1) == 0) and np.all(pair.b == 0) and np.count_nonzero(pair.a) == 7 * 3 - 3
    trained = train(adapted, optax.adamw(1e-2, weight_decay=0.1)).trainable["kernel"]
    assert np.all(np.triu(trained.a, 1) == 0) and np.all(np.tril(trained.b, -1) == 0)
    assert np.count_nonzero(trained.b) == 3 * 5 - 3
    noisy = jlora.Factors(*(jnp.asarray(RANDOM.normal(size=leaf.shape)) for leaf in (pair.a, pair.b)), pair.scale)
    got = jlora.merge(adapted.replace(trainable={"kernel": noisy}))["kernel"]
    np.testing.assert_allclose(got, W + 2.0 * np.tril(noisy.a) @ np.triu(noisy.b), atol=1e-12)


def test_triangles_hold_any_matrix_of_the_rank() -> None:
    """By LU without pivoting, if the leading block is invertible: the count falls, what can be reached stays."""
    target = RANDOM.normal(size=(7, 3)) @ RANDOM.normal(size=(3, 5))
    a, rest = np.zeros((7, 3)), target.copy()
    b = np.zeros((3, 5))
    for j in range(3):
        a[:, j], b[j] = rest[:, j] / rest[j, j], rest[j]
        rest = rest - np.outer(a[:, j], b[j])
    np.testing.assert_allclose(rest, 0.0, atol=1e-10)
    a, b = np.where(np.abs(a) < 1e-10, 0, a), np.where(np.abs(b) < 1e-10, 0, b)
    adapted = jlora.adapt({"kernel": jnp.zeros((7, 5))}, jlora.TriAdaptLoRA(3, alpha=3.0), key=KEY)
    adapted = adapted.replace(trainable={"kernel": jlora.Factors(jnp.asarray(a), jnp.asarray(b), 1.0)})
    np.testing.assert_allclose(jlora.merge(adapted)["kernel"], target, atol=1e-9)
