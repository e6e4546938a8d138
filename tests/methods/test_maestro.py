"""Maestro: widths, penalty and shrinking against loops, and the SVD that it finds."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jlora
from jlora.methods import maestro

pytestmark = pytest.mark.usefixtures("x64")

RANDOM = np.random.default_rng(0)
PARAMS = {"layers": RANDOM.normal(size=(2, 6, 6)), "head": RANDOM.normal(size=(6, 4))}
X = RANDOM.normal(size=(5, 6))


def model(p, x):
    x, _ = jax.lax.scan(lambda x, w: (x + jnp.tanh(x @ w), None), x, p["layers"])
    return x @ p["head"]


def adapted(method=jlora.Maestro()):  # noqa: B008
    params = jax.tree.map(jnp.asarray, PARAMS)
    return jlora.adapt(params, method, "**", fn=model, args=(jnp.asarray(X),), key=jax.random.key(0))


def best(w: np.ndarray, rank: int) -> np.ndarray:
    u, s, vh = np.linalg.svd(w, full_matrices=False)
    return u[:, :rank] * s[:rank] @ vh[:rank]


def test_widths_cut_to_the_best_of_their_rank_at_the_start():
    a, apply = adapted(), jlora.lift(model, on_materialize="error")
    np.testing.assert_allclose(apply(a.bind(), X), model(PARAMS, X), atol=1e-12)
    got = apply(a.bind(context={"widths": {"layers": jnp.array([2, 6]), "head": jnp.array(3)}}), X)
    cut = {"layers": np.stack([best(PARAMS["layers"][0], 2), PARAMS["layers"][1]]), "head": best(PARAMS["head"], 3)}
    np.testing.assert_allclose(got, model(cut, X), atol=1e-12)
    with pytest.raises(ValueError, match=r"'layers': widths of the shape \(2,\) are wanted"):
        a.bind(context={"widths": {"layers": jnp.array(2)}})


def test_every_pair_of_matrix_and_width_is_drawn_as_often():
    a = adapted()
    drawn = jax.vmap(lambda key: maestro.widths(a, key)["widths"])(jax.random.split(jax.random.key(0), 3200))
    flat = np.concatenate([drawn["layers"], drawn["head"][:, None]], axis=1)
    assert set(map(tuple, flat)) == {
        *((w, 6, 4) for w in range(1, 7)), *((6, w, 4) for w in range(1, 7)), *((6, 6, w) for w in range(1, 5))
    }  # fmt: skip
    cut = [(i, row[i]) for row in flat for i in range(3) if row[i] < (6, 6, 4)[i]]
    counts = np.unique(cut, axis=0, return_counts=True)[1]
    assert len(counts) == 13 and np.abs(counts - 200).max() < 70
    every = maestro.widths(a, jax.random.key(1), every=True)["widths"]
    assert every["layers"].shape == (2,) and every["head"].shape == () and 1 <= every["head"] <= 4


def test_penalty_by_loops():
    a = adapted()
    wanted = 0.0
    for pair in [
        *(jlora.Factors(a.trainable["layers"].a[i], a.trainable["layers"].b[i]) for i in range(2)),
        a.trainable["head"],
    ]:
        for k in range(pair.rank):
            wanted += np.linalg.norm(pair.a[:, k:]) + np.linalg.norm(pair.b[k:])
    assert maestro.penalty(a, a.trainable) == pytest.approx(wanted)
    zero = jax.tree.map(jnp.zeros_like, a.trainable)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(jax.grad(lambda t: maestro.penalty(a, t))(zero)))


def test_what_does_not_matter_is_dropped():
    a = adapted()
    low = {
        name: np.stack([best(w, 2 + i) for i, w in enumerate(each)]) if each.ndim == 3 else best(each, 1)
        for name, each in PARAMS.items()
    }
    a = jlora.adapt(jax.tree.map(jnp.asarray, low), jlora.Maestro(), "**", fn=model, args=(X,), key=jax.random.key(0))
    smaller = jlora.repack(maestro.shrink(a))
    assert smaller.trainable["layers"].rank == 3 and smaller.trainable["head"].rank == 1
    np.testing.assert_array_equal(smaller.frozen["layers"]["mask"], [[1, 1, 0], [1, 1, 1]])
    apply = jlora.lift(model, on_materialize="error")
    np.testing.assert_allclose(apply(smaller.bind(), X), model(low, X), atol=1e-9)
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, atol=1e-9), jlora.merge(smaller), low)
    with pytest.raises(ValueError, match="No leaf is adapted by Maestro"):
        maestro.shrink(
            jlora.adapt(
                {"w": jnp.ones((4, 4))}, jlora.LoRA(2), "w", axes={"w": jlora.Axes((0,), (1,))}, key=jax.random.key(0)
            )
        )
    broken = a.replace(trainable=a.trainable | {"head": jax.tree.map(lambda leaf: leaf * jnp.nan, a.trainable["head"])})
    with pytest.raises(ValueError, match="'head': the importance of its columns is not finite"):
        maestro.shrink(broken)


def test_finds_the_singular_vectors_of_a_linear_map_in_order():
    """With isotropic inputs the loss at width b is the squared distance; a step takes one width. From a start that is
    another matrix's decomposition, every prefix comes to the best of its rank."""
    u, v = (np.linalg.qr(RANDOM.normal(size=(5, 5)))[0] for _ in range(2))
    target = u * np.array([3.0, 2.0, 1.2, 0.6, 0.25]) @ v
    a = jlora.adapt(
        {"w": jnp.asarray(RANDOM.normal(size=(5, 5)))},
        jlora.Maestro(),
        "w",
        axes={"w": jlora.Axes((0,), (1,))},
        key=jax.random.key(0),
    )
    apply = jlora.lift(lambda p, x: x @ p["w"], on_materialize="error")
    eye, tx = jnp.eye(5), optax.adam(optax.cosine_decay_schedule(0.03, 4000))

    def step(carry, key):
        t, state = carry
        cut = lambda t: jnp.sum((apply(a.bind(t, maestro.widths(a, key)), eye) - target) ** 2)
        updates, state = tx.update(jax.grad(cut)(t), state, t)
        return (optax.apply_updates(t, updates), state), None

    keys = jax.random.split(jax.random.key(1), 4000)
    (t, _), _ = jax.jit(lambda carry: jax.lax.scan(step, carry, keys))((a.trainable, tx.init(a.trainable)))
    for width in range(1, 6):
        got = t["w"].a[:, :width] @ t["w"].b[:width]
        np.testing.assert_allclose(got, best(target, width), atol=0.03)
