"""LoRAPrune's scores and LoRAM's way to a smaller model and back, stacked and not."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jlora

pytestmark = pytest.mark.usefixtures("x64")
close = functools.partial(np.testing.assert_allclose, atol=1e-10)
RANDOM = np.random.default_rng(0)
SHAPES = {"up": (2, 4, 6), "gate": (2, 4, 6), "bias": (2, 6), "down": (2, 6, 4)}
PARAMS = {name: RANDOM.normal(size=shape) for name, shape in SHAPES.items()}
AXES = {name: jlora.Axes((1,), (2,), stack=(0,)) for name in ("up", "gate", "down")}
X = RANDOM.normal(size=(7, 4))


def model(params, x):
    def layer(x, p):
        hidden = jnp.tanh(x @ p["gate"]) * (x @ p["up"] + p["bias"])
        return x + hidden @ p["down"], None

    return jax.lax.scan(layer, x, params)[0]


def channels(size: int = 1) -> jlora.rank.Channels:
    return jlora.rank.Channels(outputs={"up": size, "gate": size, "bias": size}, inputs={"down": size})


def adapt(params):
    params = jax.tree.map(jnp.asarray, params)
    adapted = jlora.adapt(params, jlora.LoRA(2, alpha=3.0), ["up", "gate", "down"], axes=AXES, key=jax.random.key(0))
    random = np.random.default_rng(1)
    return adapted.replace(
        trainable=jax.tree.map(lambda p: jnp.asarray(random.normal(size=p.shape)), adapted.trainable)
    )


run = jax.jit(lambda adapted: jlora.lift(model)(adapted.bind(), X))


def test_scores() -> None:
    """By hand, from the gradient of the merged weights seen through the pair; of single channels and of pairs."""
    adapted = adapt(PARAMS)
    whole = jax.jit(jax.grad(lambda p: jnp.sum(jnp.sin(model(p, X)))))(jlora.merge(adapted))
    grads = jax.jit(jax.grad(lambda t: jnp.sum(jnp.sin(jlora.lift(model)(adapted.bind(t), X)))))(adapted.trainable)
    for size in (1, 2):
        total = 0.0
        for path, side in (("up", 2), ("gate", 2), ("down", 1)):
            f, g, s = adapted.trainable[path], whole[path], 1.5
            bt, at = f.b.swapaxes(1, 2), f.a.swapaxes(1, 2)
            proxy = s * (g @ bt @ f.b + f.a @ at @ g) - s**2 * g @ bt @ at @ g
            each = np.abs(proxy * (PARAMS[path] + s * f.a @ f.b)).sum(3 - side).reshape(2, -1, size).sum(-1)
            total += each / np.linalg.norm(each, axis=-1, keepdims=True)
        np.testing.assert_allclose(channels(size).scores(adapted, grads), total, rtol=1e-6)
    ranks = jlora.rank.loraprune(channels())
    state, _ = ranks.init(adapted)
    once = channels().scores(adapted, grads)
    for _ in range(2):
        state, same = jax.jit(ranks.update)(state, adapted, grads, 0)
    close(state, 0.19 * once)
    jax.tree.map(np.testing.assert_array_equal, same, adapted)


def test_cut_is_masked_and_recovered_is_cut() -> None:
    """A unit whose outputs are zero is not there; what the small model learned is the large one's."""
    for size in (1, 3):
        group = channels(size)
        keep = group.keep(RANDOM.normal(size=(2, 6 // size)), 0.5)
        kept = np.zeros((2, 6), bool)
        for layer, units in enumerate(keep):
            kept[layer, (units[:, None] * size + np.arange(size)).ravel()] = True
        masked = PARAMS | {"up": PARAMS["up"] * kept[:, None], "bias": PARAMS["bias"] * kept}
        small = group.cut(PARAMS, keep)
        assert {name: leaf.shape for name, leaf in small.items()} == {
            "up": (2, 4, 3), "gate": (2, 4, 3), "bias": (2, 3), "down": (2, 3, 4)
        }  # fmt: skip
        close(model(small, X), model(masked, X))
        adapted = adapt(small)
        whole = group.recover(adapted, masked, keep)
        close(run(whole), run(adapted))
        assert np.all(np.asarray(whole.trainable["up"].b)[:, :, :].swapaxes(1, 2)[~kept] == 0)
        assert jax.tree.structure(group.recover(adapted, PARAMS, keep)) == jax.tree.structure(adapt(PARAMS))


@pytest.mark.slow  # it trains
@pytest.mark.optimized
def test_training_small_helps_the_large() -> None:
    """LoRAM's claim in the small: units that matter little are cut, the rest is trained, and the whole is better."""
    base = PARAMS | {"down": PARAMS["down"] * np.where(np.arange(6) < 4, 1.0, 0.05)[:, None]}
    base = jax.tree.map(jnp.asarray, base)
    target = model(base, X) + RANDOM.normal(size=X.shape) / 2
    keep = channels().keep(np.linalg.norm(base["down"], axis=-1), 4 / 6)
    np.testing.assert_array_equal(keep, [[0, 1, 2, 3]] * 2)
    small = channels().cut(base, keep)
    adapted = jlora.adapt(small, jlora.LoRA(2), ["up", "gate", "down"], axes=AXES, key=jax.random.key(0))
    loss = lambda a: jnp.mean(jnp.square(jlora.lift(model)(a.bind(), X) - target))
    tx = optax.adam(1e-2)

    def step(carry, _):
        trainable, state = carry
        updates, state = tx.update(jax.grad(lambda t: loss(adapted.replace(trainable=t)))(trainable), state)
        return (optax.apply_updates(trainable, updates), state), None

    first = (adapted.trainable, tx.init(adapted.trainable))
    (trainable, _), _ = jax.jit(lambda carry: jax.lax.scan(step, carry, None, length=200))(first)
    after = loss(channels().recover(adapted.replace(trainable=trainable), base, keep))
    assert after < 0.7 * jnp.mean(jnp.square(model(base, X) - target))


def test_refusals() -> None:
    with pytest.raises(ValueError, match="no leaf 'ups'"):
        jlora.rank.Channels({"ups": 1}, {}).units(PARAMS)
    with pytest.raises(ValueError, match="does not divide into units of 4"):
        channels(4).units(PARAMS)
    with pytest.raises(ValueError, match="as many units"):
        jlora.rank.Channels({"up": 1}, {"down": 2}).units(PARAMS)
    with pytest.raises(ValueError, match="keeps none of 6"):
        channels().keep(np.ones((2, 6)), 0.1)
    with pytest.raises(ValueError, match="not all numbers"):
        channels().keep(np.full((2, 6), np.nan), 0.5)
