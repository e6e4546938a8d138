"""SLTrain against the formula with everything dense."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jlora

pytestmark = pytest.mark.usefixtures("x64")

RANDOM = np.random.default_rng(0)
PARAMS = {"layers": RANDOM.normal(size=(2, 8, 8)), "head": RANDOM.normal(size=(8, 5))}
X = RANDOM.normal(size=(4, 8))


def model(p, x):
    x, _ = jax.lax.scan(lambda x, w: (x + jnp.tanh(x @ w), None), x, p["layers"])
    return x @ p["head"]


def small(method=None, **options):
    params = jax.tree.map(jnp.asarray, PARAMS)
    method = jlora.SLTrain(2, 0.2, alpha=3.0) if method is None else method
    return jlora.factorize(params, method, "**", fn=model, args=(jnp.asarray(X),), **options)


def dense(p: dict, at: np.ndarray, n_in: int, n_out: int) -> jax.Array:
    """1.5 A B + S, an entry at a time."""
    s = jnp.zeros(n_in * n_out).at[at[0] * n_out + at[1]].set(p["values"])
    return 1.5 * p["pair"].a @ p["pair"].b + s.reshape(n_in, n_out)


def test_start():
    adapted = small(key=jax.random.key(3))
    merged = jlora.merge(adapted)
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(adapted.base)) == 0
    for path, count in (("layers", 12), ("head", 8)):
        own, at = adapted.trainable[path], np.asarray(adapted.frozen[path]["places"])
        assert not own["pair"].b.any() and np.abs(own["pair"].a).max() <= 8**-0.5 < 1.2 * np.abs(own["pair"].a).max()
        assert own["values"].shape[-1] == count and np.abs(own["values"]).max() <= 8**-0.5
        flat = at[..., 0, :] * merged[path].shape[-1] + at[..., 1, :]
        assert (np.diff(flat) > 0).all() and np.count_nonzero(merged[path]) == own["values"].size
    assert not np.array_equal(adapted.frozen["layers"]["places"][0], adapted.frozen["layers"]["places"][1])
    other = small(key=jax.random.key(4))
    assert not np.array_equal(other.frozen["head"]["places"], adapted.frozen["head"]["places"])


def test_output_and_gradients_are_the_dense_formulas():
    adapted, x = small(), jnp.asarray(X)
    leaves, treedef = jax.tree.flatten(adapted.trainable)
    trainable = treedef.unflatten([leaf + 0.3 * RANDOM.normal(size=leaf.shape) for leaf in leaves])
    apply = jlora.lift(model, on_materialize="error")

    def plainly(t):
        at = jax.tree.map(np.asarray, adapted.frozen)
        layers = [
            dense(jax.tree.map(lambda leaf, i=i: leaf[i], t["layers"]), at["layers"]["places"][i], 8, 8)
            for i in range(2)
        ]
        return model({"layers": jnp.stack(layers), "head": dense(t["head"], at["head"]["places"], 8, 5)}, x)

    np.testing.assert_allclose(apply(adapted.bind(trainable), x), plainly(trainable), atol=1e-12)
    got, wanted = (
        jax.grad(lambda t, f=f: jnp.sum(jnp.sin(f(t))))(trainable)
        for f in (lambda t: apply(adapted.bind(t), x), plainly)
    )
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, atol=1e-12), got, wanted)


def test_is_of_full_rank_and_learns_what_a_product_cannot():
    """A map of full rank: the sparse part adds to what rank 1 can do, and a dense weight does it all."""
    target = np.eye(8) + 0.3 * RANDOM.normal(size=(8, 8))
    params = {"w": jnp.zeros((8, 8))}
    losses = {}
    for name, method in {
        "low rank": jlora.LoRA(1, alpha=1.0),
        "sltrain": jlora.SLTrain(1, 0.3, alpha=1.0),
        "full": jlora.Full(),
    }.items():
        adapted = jlora.adapt(
            params, method, "w", axes={} if name == "full" else {"w": jlora.Axes((0,), (1,))}, key=jax.random.key(0)
        )
        tx, apply = optax.adam(0.03), jlora.lift(lambda p: p["w"] * 1.0, on_materialize="silent")
        loss = lambda t, adapted=adapted, apply=apply: jnp.sum((apply(adapted.bind(t)) - target) ** 2)

        def step(carry, _, tx=tx, loss=loss):
            t, state = carry
            updates, state = tx.update(jax.grad(loss)(t), state, t)
            return (optax.apply_updates(t, updates), state), None

        (t, _), _ = jax.jit(lambda c, step=step: jax.lax.scan(step, c, None, 600))(
            (adapted.trainable, tx.init(adapted.trainable))
        )
        losses[name] = float(loss(t))
        if name == "sltrain":
            assert np.linalg.matrix_rank(jlora.merge(adapted.replace(trainable=t))["w"]) == 8
    assert losses["full"] < 1e-6 and losses["sltrain"] < 0.8 * losses["low rank"]


def test_bad_input():
    with pytest.raises(ValueError, match="a share between 0 and 1"):
        jlora.SLTrain(4, 1.5)
    with pytest.raises(ValueError, match="no free entry of 40"):
        small(jlora.SLTrain(2, 0.02))
    with pytest.raises(ValueError, match="cannot do without them: use jlora.adapt"):
        small(jlora.LoRA(2))
