"""The learned allocator finds what pays, and the papers' rewards are their formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import adapt, moved

import jlora

pytestmark = pytest.mark.usefixtures("x64")


@pytest.mark.slow  # 400 choices
def test_finds_the_ranks_that_pay() -> None:
    """A matrix that matters by its e is worth three ranks, the others one: the policy has to find that by trial, from
    what it knows of matrices and a reward for all of them together."""
    adapted = moved(adapt(jlora.AdaLoRA(3)))
    matter = {"first": 5.0, "last": 0.1, "layers": np.array([5.0, 0.1, 5.0])}
    trainable = {
        p: own | {"e": jnp.ones(own["e"].shape) * jnp.asarray(matter[p])[..., None]}
        for p, own in adapted.trainable.items()
    }
    adapted = adapted.replace(trainable=trainable)
    wanted = {p: jnp.where(jnp.asarray(m) > 1, 3, 1) for p, m in matter.items()}
    ranks = jlora.rank.policy((1, 3), total_steps=400, learning_rate=3e-2, key=jax.random.key(0))
    state, adapted = ranks.init(adapted)
    used = lambda adapted, p: (adapted.frozen[p]["mask"] != 0).sum(-1)
    traces = []

    def step(carry, i):
        traces.append(None)
        state, adapted = carry
        reward = -sum(jnp.abs(used(adapted, p) - n).sum() for p, n in wanted.items()) / 10.0
        return ranks.update(state, adapted, trainable, i, reward=reward), reward

    (state, adapted), rewards = jax.jit(lambda c: jax.lax.scan(step, c, jnp.arange(402)))((state, adapted))
    assert len(traces) == 1 and rewards[1:40].mean() < -0.3
    for path, n in wanted.items():
        np.testing.assert_array_equal(used(adapted, path), n)
    repacked = jlora.repack(adapted)
    assert repacked.sites["last"].method.rank == 1 and repacked.sites["layers"].method.rank == 3


def test_options_that_are_not_safe_are_not_taken() -> None:
    ranks = jlora.rank.policy((1, 2, 3), total_steps=50, signals=2, key=jax.random.key(0))
    state, adapted = ranks.init(moved(adapt(jlora.AdaLoRA(3))))
    safe = {p: jnp.broadcast_to(jnp.array([False, True, False]), (*n.shape, 3)) for p, n in state.choice.items()}
    state, adapted = jax.jit(ranks.update)(
        state, adapted, adapted.trainable, 0, reward=0.0, signals=(0.5, 1.0), safe=safe
    )
    assert all(np.all(n == 1) for n in state.choice.values())
    np.testing.assert_allclose(jlora.rank.in_use(adapted), 2 * (12 + 11 + 3 * 13))


def test_rewards() -> None:
    numbers, bandwidth, snr, latency = 1000.0, 2000.0, 3.0, 10.0  # 4000 bits a second
    cost = 32_000 / 40_000
    got = jlora.rank.airllm_reward(0.7, numbers, bandwidth=bandwidth, snr=snr, latency=latency)
    np.testing.assert_allclose(got, -0.7 - 0.1 * cost, rtol=1e-12)
    late = jlora.rank.airllm_reward(0.7, numbers, bandwidth=bandwidth, snr=snr, latency=latency / 2)
    np.testing.assert_allclose(late, -10 * 2 * cost, rtol=1e-12)
    x, y = np.array([1.0, 2.0, 2.0]), np.array([2.0, 1.0, 2.0])
    np.testing.assert_allclose(jlora.rank.dr_rl_reward(x, y, 4e9, 0.5), 8 / 9 - 0.2 - 0.05, rtol=1e-12)


def test_perturbation_bounds_attention() -> None:
    """Of the logits exactly, in the Frobenius norm; times the norm of V, of what follows."""
    random = np.random.default_rng(0)
    q, v = random.normal(size=(7, 5)), random.normal(size=(5, 4))
    u, s, vh = np.linalg.svd(q, full_matrices=False)
    cut = lambda r: (u[:, :r] * s[:r]) @ vh[:r]
    for before in range(6):
        for after in range(6):
            change = float(jlora.rank.perturbation(jnp.asarray(s), before, after))
            np.testing.assert_allclose(change, np.linalg.norm(cut(before) - cut(after)), atol=1e-12)
            assert np.linalg.norm((cut(before) - cut(after)) @ v) <= change * np.linalg.norm(v) + 1e-12


def test_refusals() -> None:
    for options in ((1,), (2, 1), (0, 1)):
        with pytest.raises(ValueError, match="at least two ranks"):
            jlora.rank.policy(options, total_steps=1, key=jax.random.key(0))
    with pytest.raises(ValueError, match="an option has rank 4, and the adapter 3"):
        jlora.rank.policy((1, 4), total_steps=1, key=jax.random.key(0)).init(adapt(jlora.AdaLoRA(3)))
