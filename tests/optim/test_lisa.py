"""LISA and OwLore: which layers move, by how much, and what is remembered of the others."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jlora
from jlora.optim.lisa import drawn

pytestmark = pytest.mark.usefixtures("x64")

RANDOM = np.random.default_rng(0)
PARAMS = {"layers": {"w": RANDOM.normal(size=(5, 4, 6))}, "head": RANDOM.normal(size=(4, 6))}


def some(n: int) -> list:
    return [jax.tree.map(lambda x: jnp.asarray(RANDOM.normal(size=x.shape)), PARAMS) for _ in range(n)]


def walk(tx: optax.GradientTransformation, grads: list, params: dict = PARAMS) -> tuple[list, list]:
    """Updates and the states after them."""
    state, update, found = tx.init(params), jax.jit(tx.update), []
    for g in grads:
        u, state = update(g, state, params)
        params = optax.apply_updates(params, u)
        found.append((u, state))
    return [u for u, _ in found], [state for _, state in found]


def test_all_layers_active_is_the_inner_optimizer() -> None:
    grads, inner = some(4), optax.adamw(0.1, weight_decay=0.3)
    for moments in ("reset", "persist"):
        tx = jlora.optim.lisa(inner, 5, interval=3 if moments == "persist" else 10, moments=moments)
        for a, b in zip(walk(tx, grads)[0], walk(inner, grads)[0], strict=True):
            jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-12), a, b)


def test_only_the_drawn_layers_move() -> None:
    """Not by decay, not by momentum; for a whole interval; the head always does. A layer that is drawn begins like at
    a first step of Adam (a step of the rate by the gradient's sign), the head and the schedule go on."""
    rate = lambda step: 0.1 / (step + 1)
    tx = jlora.optim.lisa(optax.adamw(rate, eps=0.0, weight_decay=0.0), 2, interval=3)
    decayed = jlora.optim.lisa(optax.adamw(rate, weight_decay=0.3), 2, interval=3)
    grads = some(9)
    updates, states = walk(tx, grads)
    for i, (u, other, state) in enumerate(zip(updates, walk(decayed, grads)[0], states, strict=True)):
        active = np.asarray(state.active)
        assert len(set(active)) == 2 and np.array_equal(active, states[i - i % 3].active)
        for moved in (u, other):
            assert np.flatnonzero(np.any(moved["layers"]["w"], axis=(1, 2))).tolist() == active.tolist()
        if i % 3 == 0:
            wanted = -rate(i) * np.sign(grads[i]["layers"]["w"])[active]
            np.testing.assert_allclose(u["layers"]["w"][active], wanted, rtol=1e-9)
        assert np.all(u["head"])
    head = walk(optax.adamw(rate, eps=0.0, weight_decay=0.0), [g["head"] for g in grads], PARAMS["head"])[0]
    jax.tree.map(np.testing.assert_array_equal, [u["head"] for u in updates], head)
    assert len({tuple(np.asarray(state.active)) for state in states}) > 1
    assert states[0].layers[0].mu["layers"]["w"].shape == (2, 4, 6)


def test_moments_that_persist() -> None:
    """Heavy balls that stand still where a layer is frozen, in numpy."""
    tx = jlora.optim.lisa(optax.sgd(1.0, momentum=0.9), 2, interval=2, moments="persist")
    grads, m = some(10), np.zeros((5, 4, 6))
    for g, u, state in zip(grads, *walk(tx, grads), strict=True):
        active, wanted = np.asarray(state.active), np.zeros((5, 4, 6))
        m[active] = 0.9 * m[active] + g["layers"]["w"][active]
        wanted[active] = -m[active]
        np.testing.assert_allclose(u["layers"]["w"], wanted, atol=1e-12)


def test_how_often_layers_are_drawn() -> None:
    """As by numpy's choice without replacement, whose frequencies are summed over all orders of drawing."""
    p = np.array([0.4, 0.3, 0.2, 0.1, 0.0])
    wanted = np.zeros(5)
    for order in itertools.permutations(range(4), 2):
        wanted[list(order)] += p[order[0]] * p[order[1]] / (1 - p[order[0]])
    index = jax.vmap(lambda key: drawn(key, 7 * p, 2))(jax.random.split(jax.random.key(0), 20_000))
    assert np.all(index[:, 0] < index[:, 1])
    np.testing.assert_allclose(np.bincount(index.ravel(), minlength=5) / 20_000, wanted, atol=0.012)


def test_owlore_is_galore_of_the_drawn_layers() -> None:
    """Each begins with the first step of GaLore when it is drawn, on a basis of its own gradient."""
    inner = optax.adam(0.1, eps=1e-3)
    tx = jlora.optim.owlore(inner, 2, active=2, interval=2, period=100, solver="svd", scores=[1, 1, 1, 1, 0])
    grads = some(6)
    for i, (g, u, state) in enumerate(zip(grads, *walk(tx, grads), strict=True)):
        active = np.asarray(state.active)
        assert 4 not in active
        if i % 2 == 0:
            alone = jlora.optim.galore(inner, 2, scale=1.0, solver="svd")
            w = g["layers"]["w"][active]
            wanted, _ = alone.update(w, alone.init(w))
            np.testing.assert_allclose(u["layers"]["w"][active], wanted, atol=1e-9)
        assert np.linalg.matrix_rank(u["layers"]["w"][active[0]], 1e-9) == 2
    assert {leaf.shape for leaf in jax.tree.leaves(state.layers) if leaf.ndim} == {(2, 2, 6), (2, 4, 2)}


def test_outlier_ratios() -> None:
    """The share above 13 times the mean, all of a layer's matrices together; a layer with outliers is first."""
    w = {"a": RANDOM.normal(size=(3, 20, 30)), "b": RANDOM.normal(size=(3, 30, 10))}
    x = {"a": np.ones((3, 20)), "b": np.abs(RANDOM.normal(size=(3, 30)))}
    x["a"][1, :2] *= 300
    w["b"][2, 4, 5] = 1000
    wanted = np.zeros(3)
    for i in range(3):
        found = total = 0
        for name in w:
            q = np.abs(w[name][i]) * x[name][i][:, None]
            found, total = found + np.sum(q > 13 * q.mean()), total + q.size
        wanted[i] = found / total
    got = jlora.optim.outlier_ratios(*jax.tree.map(jnp.asarray, (w, x)))
    np.testing.assert_allclose(got, wanted, rtol=1e-6)
    assert np.argmax(got) == 1 and got[2] > got[0] == 0
    with pytest.raises(ValueError, match=r"a has \(3, 20, 30\), \(3, 30\)"):
        jlora.optim.outlier_ratios(w, {"a": x["b"], "b": x["b"]})


def test_bad_input() -> None:
    adam = optax.adam(0.1)
    for message, tx in {
        r"matches leaves that begin with nothing.*layers/w \(5, 4, 6\)": jlora.optim.lisa(adam, layers="blocks/**"),
        "of one L": jlora.optim.lisa(adam, layers="**"),
        "active is 6, of 5": jlora.optim.lisa(adam, 6),
        "there are 3 weights, of 5": jlora.optim.lisa(adam, 1, weights=[1, 2, 3]),
        "reset.* is wanted": jlora.optim.lisa(jlora.optim.quantized_state(adam, min_size=1), 2, moments="persist"),
    }.items():
        with pytest.raises(ValueError, match=message):
            tx.init(PARAMS)
    for options in ({"active": 0}, {"active": 2.0}, {"moments": "keep"}, {"weights": [1, 0, 0]}, {"interval": None}):
        with pytest.raises(ValueError, match="wanted|whole number"):
            jlora.optim.lisa(adam, **options)
