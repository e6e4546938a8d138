"""The fast and the slow adapter: what each is drawn to, who is which, and what comes of several."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_dpo import BASE, BATCH, VOCAB

import jlora
from jlora.train import fast_slow
from jlora.train.call import Call
from jlora.train.config import DataOptions
from jlora.train.loop import make_train_step
from jlora.train.tasks.dpo import DPO

TASK = DPO(DataOptions(task="dpo", dpo_beta=0.5))
KEY = jax.random.key(0)
A, B = np.random.default_rng(1).normal(size=(2, 2, VOCAB, 2)).swapaxes(0, 1).copy()


def model(variables, ids, positions, segment_ids):
    return jax.nn.one_hot(ids, VOCAB) @ variables["params"]["kernel"]


APPLY = jlora.lift(model)
ADAPTED = jlora.adapt({"kernel": jnp.asarray(BASE, jnp.float32)}, jlora.LoRA(2, 2.0), key=KEY)
FIXED = ADAPTED.replace(trainable={})


def module(i: int) -> dict[str, jlora.Factors]:
    return {"kernel": jlora.Factors(jnp.asarray(A[i], jnp.float32), jnp.asarray(B[i].T, jnp.float32), 1.0)}


@jax.jit
def margins_of(adapted: jlora.Adapted) -> jax.Array:
    rewards, _ = TASK.rewards(Call(APPLY, adapted.bind(), adapted.base), BATCH)
    return rewards[:, 0] - rewards[:, 1]


def test_losses_by_the_formula(x64):
    """And by differences: F is drawn ahead of where S is, S after where F is."""
    h, alpha = np.array([[0.3, -1.0, 2.0], [0.7, 0.5, -0.4]]), 0.3
    soft = lambda x: np.log1p(np.exp(-x))
    chase = lambda f, s: soft(f - s)
    for fast, slow in ((0, 1), (1, 0)):
        losses, own = fast_slow.chasing_losses(jnp.asarray(h), jnp.asarray(fast), alpha)
        np.testing.assert_allclose(own, soft(h), rtol=1e-6)
        np.testing.assert_allclose(losses[fast], soft(h[fast]) + alpha * chase(h[fast], h[slow]), rtol=1e-6)
        np.testing.assert_allclose(losses[slow], soft(h[slow]) - alpha * chase(h[fast], h[slow]), rtol=1e-6)
        got = jax.grad(lambda h, fast=fast: fast_slow.chasing_losses(h, jnp.asarray(fast), alpha)[0].sum())(h)
        slope = lambda f, at: (f(at + 1e-6) - f(at - 1e-6)) / 2e-6
        of_fast = slope(lambda f, s=h[slow]: soft(f) + alpha * chase(f, s), h[fast])
        of_slow = slope(lambda s, f=h[fast]: soft(s) - alpha * chase(f, s), h[slow])
        np.testing.assert_allclose(got[fast], of_fast, rtol=1e-5)
        np.testing.assert_allclose(got[slow], of_slow, rtol=1e-5)
        assert np.all(got < 0)  # both margins rise
    beyond = jax.grad(lambda h: fast_slow.chasing_losses(h, jnp.asarray(0), alpha, limit=0.1)[0].sum())(h)
    np.testing.assert_allclose(beyond, -1 / (1 + np.exp(h)), rtol=1e-6)


def test_without_alpha_they_are_two_runs_of_dpo():
    rates = 0.3, 0.1
    step = fast_slow.make_step(APPLY, TASK, optax.scale_by_adam(), rates, alpha=0.0)
    state = fast_slow.start(ADAPTED.trainable, optax.scale_by_adam())
    for _ in range(3):
        state, metrics = step(state, FIXED, BATCH, KEY)
    for which, rate in enumerate(rates):
        tx = optax.adam(rate)
        alone = make_train_step(APPLY, tx, TASK.loss)
        trainable = jax.tree.map(jnp.copy, ADAPTED.trainable)
        opt_state = tx.init(trainable)
        batch = {name: values[None] for name, values in BATCH.items()}
        for number in range(3):
            trainable, opt_state, wanted = alone(trainable, opt_state, FIXED, batch, KEY, number)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), state.module(which), trainable)
        np.testing.assert_allclose(metrics["loss"][which], wanted["loss"], rtol=1e-5)


@pytest.mark.slow
def test_equal_ones_draw_apart():
    """The fast one by alpha / 2 more than DPO, and so does the slow one: the term never fades."""
    state = fast_slow.start(module(0), optax.identity())
    step = fast_slow.make_step(APPLY, TASK, optax.identity(), (1.0, 1.0), alpha=0.4)
    state, _ = step(state, FIXED, BATCH, KEY)
    weights = jax.nn.sigmoid(-margins_of(ADAPTED.replace(trainable=module(0)))) + 0.2
    margins = lambda trainable: margins_of(ADAPTED.replace(trainable=trainable))
    wanted = jax.jit(jax.grad(lambda trainable: jnp.mean(weights * margins(trainable))))(module(0))
    for which in (0, 1):
        moved = jax.tree.map(lambda a, b: a - b, state.module(which), module(0))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), moved, wanted)


def test_the_better_one_becomes_the_fast_one_and_bad_steps_are_passed_over():
    step = fast_slow.make_step(APPLY, TASK, optax.scale_by_adam(), (0.0, 0.0), interval=2)
    state = fast_slow.start(module(0), optax.scale_by_adam())
    losses = [np.logaddexp(0, -margins_of(ADAPTED.replace(trainable=module(i)))).mean() for i in (0, 1)]
    better = int(losses[1] < losses[0])
    both = jax.tree.map(lambda *leaves: jnp.stack(leaves), module(better), module(1 - better))  # the better one first
    state = state._replace(trainable=both, fast=jnp.asarray(1, jnp.int32))
    state, metrics = step(state, FIXED, BATCH, KEY)
    assert int(metrics["fast"]) == 1
    state, metrics = step(state, FIXED, BATCH, KEY)
    assert int(metrics["fast"]) == int(state.fast) == 0 and not np.any(state.losses)

    broken = jax.tree.map(lambda leaf: leaf.at[1].multiply(jnp.nan), state.trainable)
    before = jax.tree.map(np.array, (broken, state.opt_state))
    step = fast_slow.make_step(APPLY, TASK, optax.scale_by_adam(), (0.1, 0.1))
    after, _ = step(state._replace(trainable=broken), FIXED, BATCH, KEY)
    jax.tree.map(np.testing.assert_array_equal, (after.trainable, after.opt_state), before)


def test_combination_is_exact():
    combined = fast_slow.combine(ADAPTED, [module(0), module(1)], [0.3, -1.2])
    wanted = BASE + 0.3 * A[0] @ B[0].T - 1.2 * A[1] @ B[1].T
    np.testing.assert_allclose(jlora.merge(combined)["kernel"], wanted, rtol=1e-5, atol=1e-6)
    alone = fast_slow.combine(ADAPTED, [module(0), module(1)], [0.0, 1.0])
    one = ADAPTED.replace(trainable=module(1))
    np.testing.assert_allclose(margins_of(alone), margins_of(one), rtol=1e-4, atol=1e-5)
    assert combined.sites["kernel"].method == jlora.LoRA(4, 4.0)
    with pytest.raises(ValueError, match="2 modules and 1 coefficients"):
        fast_slow.combine(ADAPTED, [module(0), module(1)], [1.0])
    dora = jlora.adapt(ADAPTED.base, jlora.DoRA(2), key=KEY)
    with pytest.raises(ValueError, match=r"plain LoRA.*'kernel' has DoRA"):
        fast_slow.combine(dora, [dora.trainable], [1.0])


@pytest.mark.slow
def test_two_domains():
    """Each is learnt by a pair of its own; one adapter of both winners serves both better than either winner."""
    domains = [{name: values[i : i + 2] for name, values in BATCH.items()} for i in range(2)]
    winners = []
    step = fast_slow.make_step(APPLY, TASK, optax.scale_by_adam(), (0.2, 0.1), interval=10)
    for batch in domains:
        state = fast_slow.start(ADAPTED.trainable, optax.scale_by_adam())
        margins = []
        for _ in range(20):
            state, metrics = step(state, FIXED, batch, KEY)
            margins.append(float(metrics["reward_margin"][state.fast]))
        assert margins[-1] > 1.0 > margins[0] == 0.0
        winners.append(state.module(state.fast))

    def loss(adapted):
        call = Call(APPLY, adapted.bind(), adapted.base)
        return sum(total / count for total, count in (TASK.loss(call, batch, None) for batch in domains))

    c = fast_slow.fit_coefficients(ADAPTED, winners, loss, steps=40)
    assert float(c.sum()) == pytest.approx(1.0)
    sums = [float(jax.jit(loss)(fast_slow.combine(ADAPTED, winners, each))) for each in (c, *jnp.eye(2))]
    assert sums[0] <= min(sums[1:]) + 1e-3
