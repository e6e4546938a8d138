"""LoLA and the schedule with warm restarts, against cycles counted one by one."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jlora
from jlora.optim import warm_restarts

pytestmark = pytest.mark.usefixtures("x64")


def reference(step: float, peak: float, end: float, period: float, growth: float) -> float:
    while step >= period:
        step, period = step - period, period * growth
    return end + (peak - end) * 0.5 * (1 + np.cos(np.pi * step / period))


@pytest.mark.parametrize(("period", "growth"), [(10, 2), (7, 1), (3, 3), (5, 1.5)])
def test_warm_restarts(period, growth) -> None:
    schedule = warm_restarts(2e-5, period, growth=growth, end=1e-6)
    steps = np.arange(2000) if growth != 1.5 else np.arange(2000) + 0.25  # ends of cycles that are not whole numbers
    wanted = [reference(step, 2e-5, 1e-6, period, growth) for step in steps]
    np.testing.assert_allclose(jax.jit(schedule)(steps), wanted, rtol=0, atol=1e-15)


def test_warm_up() -> None:
    schedule = warm_restarts(1.0, 10, growth=2, end=0.2, warmup=4)
    np.testing.assert_allclose([schedule(t) for t in range(5)], [0.2, 0.4, 0.6, 0.8, 1.0])
    np.testing.assert_allclose([schedule(4 + t) for t in (5, 10, 30)], [0.6, 1.0, 1.0], atol=1e-12)
    tx = optax.adam(schedule)
    updates, _ = tx.update(jnp.ones(2), tx.init(jnp.ones(2)))
    np.testing.assert_allclose(updates, -0.2, rtol=1e-6)
    with pytest.raises(ValueError, match="a positive period"):
        warm_restarts(1.0, 0)


def test_lola() -> None:
    random = np.random.default_rng(0)
    w, x = random.normal(size=(7, 5)), random.normal(size=(4, 7))
    run = jlora.lift(lambda params, x: x @ params["kernel"], on_materialize="error")
    method = jlora.LoLA(2, alpha=3.0, period=10, growth=2, lowest=0.2, final=0.9)
    adapted = jlora.adapt({"kernel": jnp.asarray(w)}, method, key=jax.random.key(0))
    pair = jax.tree.map(lambda leaf: jnp.asarray(random.normal(size=leaf.shape)), adapted.trainable)
    adapted = adapted.replace(trainable=pair)
    branch = 1.5 * x @ np.asarray(pair["kernel"]["lora"].a) @ np.asarray(pair["kernel"]["lora"].b)
    np.testing.assert_allclose(run(adapted.bind(), x), x @ w + 0.9 * branch, atol=1e-12)
    np.testing.assert_allclose(x @ jlora.merge(adapted)["kernel"], x @ w + 0.9 * branch, atol=1e-12)
    at = jax.jit(lambda step: run(adapted.bind(context={"step": step}), x))
    for step in (0, 5, 9, 10, 25, 30):
        strength = reference(step, 1.0, 0.2, 10, 2)
        np.testing.assert_allclose(at(step), x @ w + strength * branch, atol=1e-12)
        np.testing.assert_allclose(run(adapted.bind(context={"step": step}), x), at(step), atol=1e-12)
    constant = jlora.LoLA(2, alpha=3.0, lowest=1.0)
    assert all(float(constant.strengths({"step": step})["lora"]) == 1.0 for step in (0, 700, 1500))
