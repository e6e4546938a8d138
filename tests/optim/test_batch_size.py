"""Adaptive batch sizes: the statistics by plain formulas, however they are gathered, and the sizes they lead to."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jlora import optim

RANDOM = np.random.default_rng(0)
BATCH = 6
GRADS = {"w": 0.7 + RANDOM.normal(size=(BATCH, 3, 2)), "v": {"b": 1.5 + RANDOM.normal(size=(BATCH, 4))}}
FLAT = np.concatenate([GRADS["v"]["b"], GRADS["w"].reshape(BATCH, -1)], axis=1)


def written() -> tuple[float, float, float]:
    """v, the variance of <g_i, g>, and ||g||^2."""
    mean = FLAT.mean(0)
    return np.sum(np.var(FLAT, axis=0, ddof=1)), np.var(FLAT @ mean, ddof=1), mean @ mean


def test_statistics_by_the_formula(x64) -> None:
    for noise in (optim.gradient_noise(GRADS), jax.jit(optim.gradient_noise)(GRADS)):
        np.testing.assert_allclose(noise, written(), rtol=1e-12)
    v, along, norm2 = written()
    np.testing.assert_allclose(optim.norm_test(noise, 0.3), v / (0.09 * norm2), rtol=1e-12)
    np.testing.assert_allclose(optim.inner_product_test(noise, 0.3), along / (0.09 * norm2**2), rtol=1e-12)
    mean = FLAT.mean(0)
    across = FLAT - np.outer(FLAT @ mean / norm2, mean)
    wanted = np.sum(np.var(across, axis=0, ddof=1)) / (0.09 * norm2)
    np.testing.assert_allclose(optim.orthogonality_test(noise, 0.3), wanted, rtol=1e-12)


def test_sums_give_the_same(x64) -> None:
    """One gradient after another under a scan, as accumulation does it."""

    @jax.jit
    def accumulated(grads):
        start = optim.gradient_sums(jax.tree.map(lambda g: g[0], grads))
        return jax.lax.scan(lambda sums, g: (optim.add_gradients(sums, g), None), start, grads)[0]

    sums = accumulated(GRADS)
    v, _, norm2 = written()
    np.testing.assert_allclose(optim.noise_of_sums(sums)[::2], (v, norm2), rtol=1e-12)
    jax.tree.map(lambda t, g: np.testing.assert_allclose(t / BATCH, g.mean(0), rtol=1e-12), sums.total, GRADS)
    assert optim.noise_of_sums(sums).along is None
    with pytest.raises(ValueError, match="inner_product_test wants the gradients themselves"):
        optim.inner_product_test(optim.noise_of_sums(sums))


def test_devices(x64, devices) -> None:
    """Gradients lie two by two on three devices: sharded under jit, or summed in a shard_map."""
    mesh = jax.make_mesh((3,), ("data",), devices=devices[:3], axis_types=(jax.sharding.AxisType.Auto,))
    grads = jax.device_put(GRADS, NamedSharding(mesh, PartitionSpec("data")))
    np.testing.assert_allclose(jax.jit(optim.gradient_noise)(grads), written(), rtol=1e-12)

    def local(grads):
        sums = optim.gradient_sums(jax.tree.map(lambda g: g[0], grads))
        for i in range(2):
            sums = optim.add_gradients(sums, jax.tree.map(lambda g, i=i: g[i], grads))
        return optim.noise_of_sums(jax.lax.psum(sums, "data"))[::2]

    mapped = jax.shard_map(local, mesh=mesh, in_specs=PartitionSpec("data"), out_specs=PartitionSpec())
    np.testing.assert_allclose(jax.jit(mapped)(grads), np.array(written())[[0, 2]], rtol=1e-12)


def test_micro_batches_are_unbiased(x64) -> None:
    """4,000 draws of 5 micro-batches of 3 examples each, of known variances."""
    deviations = np.array([0.5, 1.0, 2.0])
    draws = 0.3 + deviations * RANDOM.normal(size=(4000, 5, 3, 3))
    means = jnp.asarray(draws.mean(axis=2))
    noise = jax.vmap(lambda g: optim.gradient_noise({"w": g}, size=3))(means)
    assert float(noise.variance.mean()) == pytest.approx(np.sum(deviations**2), rel=0.02)


def test_invariances(x64) -> None:
    test = lambda grads, eta=0.2: float(optim.norm_test(optim.gradient_noise(grads), eta))
    scaled = jax.tree.map(lambda g: 7.0 * g, GRADS)
    assert test(scaled) == pytest.approx(test(GRADS))
    assert test(GRADS, 0.1) == pytest.approx(4 * test(GRADS))
    alike = jax.tree.map(lambda g: np.repeat(g[:1], BATCH, axis=0), GRADS)
    assert test(alike) == pytest.approx(0.0, abs=1e-25)


def test_sizes() -> None:
    control = optim.AdaptiveBatch(rows=8, largest=100, interval=2)
    state = control.init()
    assert (state.size, control.passes(state), control.due(state)) == (8, 1, True)
    seen = []
    for wanted in (5.0, 60.0, 17.2, float("nan"), jnp.asarray(9.0), 1e9, jnp.inf, 3.0):
        state = control.update(state, wanted)
        seen.append(state.size)
    # The second, fourth, sixth and eighth are not due: 17.2 examples are three passes, hence four; 9 shrinks nothing.
    assert seen == [8, 8, 32, 32, 32, 32, 128, 128]
    assert control.passes(state) == 16 and not control.due(state)
    assert control.update(state, None) == (128, 9)
    every = optim.AdaptiveBatch(rows=8, largest=100, powers=False)
    state = every.update(every.init(9), 17.2)
    assert (every.init(9).size, state.size) == (16, 24)
    assert every.update(state, np.inf).size == 104
    for options in (dict(rows=0), dict(rows=8, largest=4), dict(rows=8, interval=0)):
        with pytest.raises(ValueError, match="a positive number of rows"):
            optim.AdaptiveBatch(**options)
    with pytest.raises(ValueError, match=r"got \[\(1, 2\)\]: two gradients or more"):
        optim.gradient_noise(jnp.ones((1, 2)))


def test_the_batch_grows_as_the_gradient_fades(x64) -> None:
    """Noisy least squares: far from the optimum one pass will do; near it the noise takes over. Few programs."""
    random = np.random.default_rng(0)
    truth = random.normal(size=4)
    control = optim.AdaptiveBatch(rows=8, largest=512)
    state, tx = control.init(), optim.adagrad_norm(10.0)
    w, traces = jnp.full(4, 10.0, float), []
    opt_state = tx.init(w)

    @jax.jit
    def step(w, opt_state, x, y):
        traces.append(x.shape)
        one = jax.grad(lambda w, x, y: 0.5 * jnp.square(x @ w - y))
        grads = jax.vmap(one, (None, 0, 0))(w, x.reshape(-1, 4), y.reshape(-1))
        updates, opt_state = tx.update(grads.mean(0), opt_state, w)
        return optax.apply_updates(w, updates), opt_state, optim.norm_test(optim.gradient_noise(grads), 0.5)

    sizes = []
    for _ in range(60):
        x = random.normal(size=(state.size, 4))
        y = x @ truth + random.normal(size=state.size)
        w, opt_state, wanted = step(w, opt_state, x, y)
        sizes.append(state.size)
        state = control.update(state, wanted)
    assert sizes == sorted(sizes) and sizes[0] == 8 and sizes[-1] >= 64
    assert len(traces) == len(set(sizes)) <= 7
    assert float(jnp.linalg.norm(w - truth)) < 0.3


def test_adagrad_norm_by_the_formula(x64) -> None:
    params = {"w": jnp.ones((3, 2)), "b": jnp.ones(4)}
    tx = optim.adagrad_norm(0.5, initial=0.04, eps=0.1)
    state, square = tx.init(params), {"w": 0.04, "b": 0.04}
    for i in range(3):
        grads = {"w": GRADS["w"][i], "b": GRADS["v"]["b"][i]}
        updates, state = tx.update(grads, state, params)
        for name, g in grads.items():
            square[name] += np.sum(g**2)
            np.testing.assert_allclose(updates[name], -0.5 * g / (np.sqrt(square[name]) + 0.1), rtol=1e-12)
    assert sum(leaf.size for leaf in jax.tree.leaves(state)) == 2
