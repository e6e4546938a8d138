"""SoRA against its formula, its proximal step against the closed form, and what pruning leaves."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jlora
from jlora.optim.sora import shrink

pytestmark = pytest.mark.usefixtures("x64")

RANDOM = np.random.default_rng(0)
W, KEY = RANDOM.normal(size=(7, 5)), jax.random.key(0)
A, B, GATE = RANDOM.normal(size=(7, 4)), RANDOM.normal(size=(4, 5)), np.array([0.5, 0.0, -2.0, 0.0])


def adapt(gate=GATE):
    adapted = jlora.adapt({"kernel": jnp.asarray(W)}, jlora.SoRA(4, alpha=6.0), key=KEY)
    pair = jlora.Factors(jnp.asarray(A), jnp.asarray(B), 1.5)
    return adapted.replace(trainable={"kernel": {"factors": pair, "gate": jnp.asarray(gate)}})


def test_formula() -> None:
    np.testing.assert_allclose(jlora.merge(adapt())["kernel"], W + 1.5 * A @ np.diag(GATE) @ B, atol=1e-12)
    np.testing.assert_allclose(jlora.merge(adapt(np.ones(4)))["kernel"], W + 1.5 * A @ B, atol=1e-12)


def test_prune() -> None:
    """The live ranks, folded, at the scale of the rank it started with; a fresh LoRA of that rank has its structure."""
    pruned = jlora.rank.prune(adapt())
    pair = pruned.trainable["kernel"]
    np.testing.assert_allclose(pair.a, (A * GATE)[:, [0, 2]], atol=1e-15)
    np.testing.assert_allclose(pair.b, B[[0, 2]], atol=1e-15)
    np.testing.assert_allclose(jlora.merge(pruned)["kernel"], jlora.merge(adapt())["kernel"], atol=1e-12)
    fresh = jlora.adapt(pruned.base, pruned.sites["kernel"].method, key=KEY)
    assert jax.tree.structure(fresh) == jax.tree.structure(pruned)
    assert jlora.rank.prune(adapt(np.zeros(4))).sites == {}
    with pytest.raises(ValueError, match="nothing to prune"):
        jlora.rank.prune(jlora.adapt({"kernel": jnp.zeros((4, 4))}, jlora.LoRA(2), key=KEY))


def test_prune_of_a_stack() -> None:
    w = jnp.asarray(RANDOM.normal(size=(3, 5, 4)))
    adapted = jlora.adapt({"w": w}, jlora.SoRA(3), "w", axes={"w": jlora.Axes((1,), (2,), (0,))}, key=KEY)
    pair = jlora.Factors(jnp.asarray(RANDOM.normal(size=(3, 5, 3))), jnp.asarray(RANDOM.normal(size=(3, 3, 4))), 16 / 3)
    gate = jnp.array([[0.0, 2.0, 0.0], [0.0, 0.0, 0.0], [1.0, 0.0, -1.0]])
    adapted = adapted.replace(trainable={"w": {"factors": pair, "gate": gate}})
    pruned = jlora.rank.prune(adapted)
    assert pruned.trainable["w"].a.shape == (3, 5, 2)
    np.testing.assert_allclose(jlora.merge(pruned)["w"], jlora.merge(adapted)["w"], atol=1e-12)
    assert np.all(pruned.trainable["w"].a[1] == 0) and np.all(pruned.trainable["w"].b[1] == 0)  # and stays so


def test_shrink() -> None:
    v = jnp.array([2.5, 2.0, 1.9, 1.5, 1.0, 0.5, -2.5, -1.0, 0.0])
    np.testing.assert_allclose(shrink(v, 1.0), [1.5, 1.0, 0.9, 0.5, 0, 0, -1.5, 0, 0], atol=1e-15)
    np.testing.assert_array_equal(shrink(v, 1.0, reference=True), [1.5, 1.0, 0, 0, 1.0, 0, -1.5, -1.0, 0])


def test_soft_threshold_is_the_proximal_step() -> None:
    """argmin of (z - v)^2 / 2 + lambda |z|, found on a grid; and it brings no two points further apart."""
    grid = np.linspace(-3, 3, 6001)
    for v in (-2.3, -0.4, 0.3, 1.7):
        wanted = grid[np.argmin((grid - v) ** 2 / 2 + 0.5 * np.abs(grid))]
        np.testing.assert_allclose(shrink(jnp.array(v), 0.5), wanted, atol=1e-3)
    u, v = RANDOM.normal(size=(2, 50))
    assert np.all(np.abs(shrink(jnp.asarray(u), 0.5) - shrink(jnp.asarray(v), 0.5)) <= np.abs(u - v) + 1e-15)


def test_transformation_touches_gates_only() -> None:
    """After any optimizer; exactly zero below the threshold; a schedule counts steps."""
    trainable = adapt(np.array([0.5, 0.01, -2.0, -0.15])).trainable
    grads = jax.tree.map(lambda p: 0.1 * jnp.ones_like(p), trainable)
    tx = optax.chain(optax.sgd(1.0), jlora.optim.soft_threshold(lambda step: jnp.where(step == 0, 0.3, 0.1)))
    state = tx.init(trainable)
    step = jax.jit(lambda p, s: (lambda u: (optax.apply_updates(p, u[0]), u[1]))(tx.update(grads, s, p)))
    trainable, state = step(trainable, state)
    pair = trainable["kernel"]["factors"]
    np.testing.assert_allclose(pair.a, A - 0.1, atol=1e-15)
    np.testing.assert_allclose(pair.b, B - 0.1, atol=1e-15)
    np.testing.assert_allclose(trainable["kernel"]["gate"], [0.1, 0.0, -1.8, 0.0], atol=1e-15)
    np.testing.assert_array_equal(np.asarray(trainable["kernel"]["gate"])[[1, 3]], 0.0)
    trainable, state = step(trainable, state)  # the second threshold
    np.testing.assert_allclose(trainable["kernel"]["gate"], [0.0, 0.0, -1.8, 0.0], atol=1e-15)


def test_transformation_errors() -> None:
    tx = jlora.optim.soft_threshold(0.1)
    with pytest.raises(ValueError, match="no gate"):
        tx.init({"kernel": jlora.Factors(jnp.ones((3, 1)), jnp.ones((1, 3)))})
    with pytest.raises(ValueError, match="wants the parameters"):
        tx.update(adapt().trainable, tx.init(adapt().trainable))
    with pytest.raises(ValueError, match="no gate"):
        jlora.optim.gate_penalty({"a": jnp.ones(3)})


def test_penalty() -> None:
    np.testing.assert_allclose(jlora.optim.gate_penalty(adapt().trainable), np.abs(GATE).mean(), atol=1e-15)


def test_finds_the_rank_of_the_target() -> None:
    """A change of rank 2, adapted at rank 6: two gates stay, and pruning gives a LoRA of rank 2."""
    random = np.random.default_rng(0)
    change = random.normal(size=(8, 2)) @ random.normal(size=(2, 8))
    adapted = jlora.adapt({"kernel": jnp.zeros((8, 8))}, jlora.SoRA(6, alpha=6.0), key=KEY)
    run = jlora.lift(lambda params: jnp.eye(8) @ params["kernel"], on_materialize="error")
    loss = lambda trainable: jnp.mean(jnp.square(run(adapted.bind(trainable)) - change))
    tx = optax.chain(optax.adam(2e-2), jlora.optim.soft_threshold(1e-2))

    def step(carry, _):
        trainable, state = carry
        updates, state = tx.update(jax.grad(loss)(trainable), state, trainable)
        return (optax.apply_updates(trainable, updates), state), None

    run_all = jax.jit(lambda carry: jax.lax.scan(step, carry, None, length=1500)[0])
    trainable, _ = run_all((adapted.trainable, tx.init(adapted.trainable)))
    assert float(loss(trainable)) < 1e-4 * float(np.mean(change**2))
    pruned = jlora.rank.prune(adapted.replace(trainable=trainable))
    assert pruned.sites["kernel"].method.rank == 2
