"""The ranks of Sculpting Subspaces, and two tasks one after the other."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jlora

pytestmark = pytest.mark.usefixtures("x64")


def normal(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def model(p, x):
    x, _ = jax.lax.scan(lambda x, w: (x @ w, None), x, p["layers"])
    return x @ p["head"]


def test_ranks_by_the_rule():
    eye = jnp.eye(12)
    params = {
        "layers": jnp.stack([eye + 0.2 * normal(0, 12, 12), eye + 0.4 * normal(1, 12, 12)]),
        "head": (eye + 0.8 * normal(2, 12, 12))[:, :8],
    }
    x = normal(3, 4, 5, 12)
    rules = jlora.rank.sculpting(model, params, (x,), "**", least=0.1, most=0.6)
    importance, h = [], x
    for w in (*params["layers"], params["head"]):
        y = h @ w
        cosines = [
            np.dot(a[: len(b)], b) / np.linalg.norm(a[: len(b)]) / np.linalg.norm(b)
            for a, b in zip(np.reshape(h, (-1, 12)), np.reshape(y, (20, -1)), strict=True)
        ]
        importance, h = [*importance, np.mean(cosines)], y
    share = 0.1 + np.array(importance) / np.mean(importance) * 0.5
    assert rules == {"layers": jlora.OSF(int(share[:2].max() * 12)), "head": jlora.OSF(int(share[2] * 8))}
    assert len({rule.kept for rule in rules.values()}) == 2
    adapted = jlora.adapt(params, rules, fn=model, args=(x,), key=jax.random.key(0))
    assert adapted.trainable["head"]["s"].shape == (8 - rules["head"].kept,)


def test_bad_input():
    params, x = {"layers": normal(0, 2, 6, 6), "head": normal(1, 6, 4)}, normal(2, 3, 6)
    with pytest.raises(ValueError, match="least <= most < 1"):
        jlora.rank.sculpting(model, params, (x,), "**", least=0.9)
    with pytest.raises(ValueError, match="not finite"):
        jlora.rank.sculpting(model, params, (x * jnp.nan,), "**")
    turned = {"layers": -jnp.stack([jnp.eye(6)] * 2), "head": -jnp.eye(6)}
    with pytest.raises(ValueError, match="mean cosine of inputs and outputs is -1"):
        jlora.rank.sculpting(model, turned, (x,), "**")


def test_a_second_task_costs_the_first_less_than_full_training():
    """The inputs of the first task are along the six strong directions; the second wants another map altogether, of all
    inputs. Full training gives it that; OSF all but what it holds on to."""
    u, v = (np.linalg.qr(normal(seed, 16, 16))[0] for seed in (0, 1))
    params = {"w": jnp.asarray(u[:, :6] * 3.0 @ v[:6]) + 0.05 * normal(2, 16, 16)}
    fn = lambda p, x: x @ p["w"]
    first, second = normal(3, 64, 6) @ u[:, :6].T, normal(4, 64, 16)
    wanted = fn(params, second) + second @ normal(5, 16, 16) / 4
    losses = {}
    for name, method in {"osf": jlora.OSF(6), "full": jlora.Full()}.items():
        adapted = jlora.adapt(
            params,
            method,
            "w",
            **({} if name == "full" else {"axes": {"w": jlora.Axes((0,), (1,))}}),
            key=jax.random.key(0),
        )
        apply, tx = jlora.lift(fn), optax.adam(0.03)
        loss = lambda t, adapted=adapted, apply=apply: jnp.mean((apply(adapted.bind(t), second) - wanted) ** 2)

        def step(carry, _, tx=tx, loss=loss):
            t, state = carry
            updates, state = tx.update(jax.grad(loss)(t), state, t)
            return (optax.apply_updates(t, updates), state), None

        start = (adapted.trainable, tx.init(adapted.trainable))
        (t, _), _ = jax.jit(lambda c, step=step: jax.lax.scan(step, c, None, 200))(start)
        after = jlora.merge(adapted.replace(trainable=t))
        forgotten = jnp.mean((fn(after, first) - fn(params, first)) ** 2)
        losses[name] = (float(loss(adapted.trainable)), float(loss(t)), float(forgotten))
    # Inputs and outputs of what is trained are both orthogonal to what is kept: (10 / 16)^2 of the map is in reach.
    assert losses["full"][1] < 0.01 * losses["full"][0] and losses["osf"][1] < (1 - 0.39 + 0.1) * losses["osf"][0]
    # The kept directions are those of the perturbed weight: they are the strong ones up to the perturbation.
    assert losses["osf"][2] < 0.01 * losses["full"][2], losses
