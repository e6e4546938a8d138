"""Hydra, NOBLE, NeRA, bottleneck and invertible adapters and HGF: their formulas in numpy, for each kind of product,
and what each promises."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from jlora.methods import Follow, Method, Site
from jlora.methods.hgf import quantize, ternary
from jlora.methods.invertible import couple, uncouple

pytestmark = pytest.mark.usefixtures("x64")
RNG = np.random.default_rng(0)
KEY = jax.random.key(0)
W, B, X = RNG.normal(size=(6, 8)) / 2, RNG.normal(size=8), RNG.normal(size=(5, 6))
RAGGED, LAYERS = np.array([2, 0, 3]), jlora.Axes((1,), (2,), (0,))
WINDOW = jlora.Axes((0, 1, 2), (3,), kind="conv")


def adapt(method: Method, w: np.ndarray = W, axes: jlora.Axes | None = None) -> jlora.Adapted:
    """Adapted and moved away from its start by noise."""
    start = jlora.adapt({"w": jnp.asarray(w)}, method, "w", axes={"w": axes} if axes else None, key=KEY)
    rng = np.random.default_rng(1)
    noise = lambda leaf: leaf + 0.3 * jnp.asarray(rng.normal(size=leaf.shape))
    return start.replace(trainable=jax.tree.map(noise, start.trainable))


def lifted(fn, adapted: jlora.Adapted, *args) -> np.ndarray:
    return np.asarray(jlora.lift(lambda p, *args: fn(p["w"], *args), on_materialize="error")(adapted.bind(), *args))


def numbers(adapted: jlora.Adapted, index: int | None = None) -> dict:
    """The leaf's parameters in numpy; of one matrix of a stack."""
    return jax.tree.map(lambda leaf: np.asarray(leaf if index is None else leaf[index]), adapted.trainable["w"])


def conv(w, x, groups: int = 1):
    return jax.lax.conv_general_dilated(
        x, w, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=groups
    )


def patches(x: np.ndarray, h: int, w: int) -> np.ndarray:
    """[batch, height, width, h * w * features] of a convolution without padding."""
    windows = np.lib.stride_tricks.sliding_window_view(x, (h, w), axis=(1, 2))
    return np.moveaxis(windows, 3, -1).reshape(*windows.shape[:3], -1)


def relu(x: np.ndarray) -> np.ndarray:
    return np.maximum(x, 0)


def cosnet(h: np.ndarray, c: dict) -> np.ndarray:
    return np.cos(c["frequency2"] * (np.cos(c["frequency1"] * h + c["phase1"]) @ c["mix"]) + c["phase2"])


def noble(x: np.ndarray, w: np.ndarray, p: dict) -> np.ndarray:
    return x @ w + cosnet(x @ p["down"], p["cosnet"]) @ p["up"]


def net(x: np.ndarray, p: dict) -> np.ndarray:
    return relu(x @ p["down"] + p["down_bias"]) @ p["up"] + p["up_bias"]


def bottleneck(x: np.ndarray, w: np.ndarray, p: dict) -> np.ndarray:
    return x @ w + net(x @ w, p)


def nera(x: np.ndarray, w: np.ndarray, p: dict) -> np.ndarray:
    z = np.zeros((*x.shape[:-1], p["up"].shape[0]))
    for i in range(x.shape[-1]):
        for k in range(p["knots"].shape[1]):
            hat = relu(1 - np.abs(x[..., i] * p["gain"][i] - p["knots"][i, k]))
            z += hat[..., None] * p["coefficients"][i, k]
    return x @ w + p["scale"] * z @ p["up"]


def nice(x: np.ndarray, w: np.ndarray, p: dict) -> np.ndarray:
    y = x @ w
    n = y.shape[-1] // 2
    first = y[..., :n] + net(y[..., n:], p["f"])
    return np.concatenate([first, y[..., n:] + net(first, p["g"])], -1)


def hydra(x: np.ndarray, w: np.ndarray, p: dict) -> np.ndarray:
    f, g = p["parallel"], p["sequential"]
    return x @ w + 1.5 * x @ f.a @ f.b + 1.5 * x @ w @ g.a @ g.b


def hgf(x: np.ndarray, w: np.ndarray, p: dict) -> np.ndarray:
    gamma, delta = np.abs(w).mean(), np.abs(x).max(-1, keepdims=True) / 127
    rounded = gamma * np.sign(w) * (np.abs(w) > gamma / 2)
    correction = x @ p["factors"].a @ p["factors"].b
    return delta * np.round(x / delta) @ rounded + np.tanh(p["gate"]) * correction


FORMULAS = {
    "hydra": (jlora.Hydra(2, sequential=1, scale=1.5), hydra),
    "noble": (jlora.NOBLE(3), noble),
    "nera": (jlora.NeRA(2, knots=4), nera),
    "bottleneck": (jlora.Bottleneck(3), bottleneck),
    "invertible": (jlora.Invertible(), nice),
    "hgf": (jlora.HGF(2, gate="channel"), hgf),
}
over_formulas = pytest.mark.parametrize(("method", "formula"), FORMULAS.values(), ids=FORMULAS)


@over_formulas
def test_product(method: Method, formula) -> None:
    adapted = adapt(method)
    np.testing.assert_allclose(lifted(lambda w, x: x @ w, adapted, X), formula(X, W, numbers(adapted)), atol=1e-12)


@over_formulas
def test_experts(method: Method, formula) -> None:
    w = RNG.normal(size=(3, 6, 8)) / 2
    adapted = adapt(method, w, LAYERS)
    got = lifted(lambda w, x: jax.lax.ragged_dot(x, w, jnp.asarray(RAGGED)), adapted, X)
    rows = np.repeat(np.arange(3), RAGGED)
    wanted = [formula(x[None], w[e], numbers(adapted, e))[0] for x, e in zip(X, rows, strict=True)]
    np.testing.assert_allclose(got, wanted, atol=1e-12)
    every = lifted(lambda w, x: jnp.einsum("bi,eio->ebo", x, w), adapted, X)
    np.testing.assert_allclose(every, [formula(X, w[e], numbers(adapted, e)) for e in range(3)], atol=1e-12)


@pytest.mark.parametrize("name", ["hydra", "noble", "bottleneck"])
def test_convolution(name: str) -> None:
    (method, formula), w, x = FORMULAS[name], RNG.normal(size=(3, 2, 4, 8)) / 4, RNG.normal(size=(2, 5, 6, 4))
    adapted = adapt(method, w, WINDOW)
    wanted = formula(patches(x, 3, 2), w.reshape(-1, 8), numbers(adapted))
    np.testing.assert_allclose(lifted(conv, adapted, x), wanted, atol=1e-12)


def test_convolution_with_groups() -> None:
    """The groups of NOBLE bend their own inputs; a bottleneck adapter sees all features of the result."""
    w, x = RNG.normal(size=(3, 2, 2, 8)) / 4, RNG.normal(size=(2, 5, 6, 4))
    grouped = lambda w, x: conv(w, x, groups=2)
    adapted = adapt(jlora.NOBLE(3), w, WINDOW)
    wanted, p, halves = [], numbers(adapted), w.reshape(-1, 8)
    for group in range(2):
        out = slice(4 * group, 4 * group + 4)
        part = patches(x[..., 2 * group : 2 * group + 2], 3, 2)
        wanted.append(noble(part, halves[:, out], p | {"up": p["up"][:, out]}))
    np.testing.assert_allclose(lifted(grouped, adapted, x), np.concatenate(wanted, -1), atol=1e-12)
    adapted = adapt(jlora.Bottleneck(3), w, WINDOW)
    y = np.asarray(grouped(w, x))
    np.testing.assert_allclose(lifted(grouped, adapted, x), y + net(y, numbers(adapted)), atol=1e-12)


def test_hydra_with_its_bias() -> None:
    """y_0 of the paper is x W + b: b' = b + s (b A_s) B_s, by Follow."""
    method = jlora.Hydra(2, sequential=3, scale=0.1)
    params = {"w": jnp.asarray(W), "b": jnp.asarray(B)}
    adapted = jlora.adapt(params, {"w": method, "b": Follow(group="w", method=method)}, key=KEY)
    moved = jax.tree.map(lambda leaf: leaf + 0.3, adapted.trainable["w"])
    adapted = adapted.replace(trainable=adapted.trainable | {"w": moved})
    f, g = (jax.tree.map(np.asarray, moved[branch]) for branch in ("parallel", "sequential"))
    base = X @ W + B
    wanted = base + 0.1 * (X @ f.a) @ f.b + 0.1 * (base @ g.a) @ g.b
    fn = lambda p, x: x @ p["w"] + p["b"]
    np.testing.assert_allclose(jlora.lift(fn, on_materialize="error")(adapted.bind(), X), wanted, atol=1e-12)
    np.testing.assert_allclose(fn(jlora.merge(adapted), X), wanted, atol=1e-12)


def test_hydra_without_a_branch() -> None:
    """Without the sequential branch it is LoRA; with that alone, of full rank, it is W times any matrix."""
    adapted = adapt(jlora.Hydra(2, sequential=0, scale=2.0))
    pair = numbers(adapted)["parallel"]
    np.testing.assert_allclose(jlora.merge(adapted)["w"], W + 2 * pair.a @ pair.b, atol=1e-12)
    adapted = adapt(jlora.Hydra(0, sequential=8))
    pair = numbers(adapted)["sequential"]
    np.testing.assert_allclose(jlora.merge(adapted)["w"], W @ (np.eye(8) + pair.a @ pair.b), atol=1e-12)
    np.testing.assert_allclose(lifted(lambda w, x: x @ w, adapted, X), X @ jlora.merge(adapted)["w"], atol=1e-12)
    with pytest.raises(ValueError, match="at least one of them not 0"):
        jlora.Hydra(0)


def test_noble_with_a_trained_base() -> None:
    """Gradients of the base and of the branch, as its file says to take them."""
    adapted = adapt(jlora.NOBLE(3))
    apply = jlora.lift(lambda p, x: x @ p["w"], on_materialize="error")
    loss = lambda params, trainable: jnp.sin(apply(adapted.replace(base=params).bind(trainable), X)).sum()
    got = jax.grad(loss, (0, 1))(adapted.base, adapted.trainable)

    def plainly(params, trainable):
        p = trainable["w"]
        h = jnp.cos(p["cosnet"]["frequency1"] * (X @ p["down"]) + p["cosnet"]["phase1"]) @ p["cosnet"]["mix"]
        return jnp.sin(X @ params["w"] + jnp.cos(p["cosnet"]["frequency2"] * h + p["cosnet"]["phase2"]) @ p["up"]).sum()

    wanted = jax.grad(plainly, (0, 1))(adapted.base, adapted.trainable)
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, atol=1e-12), got, wanted)
    np.testing.assert_allclose(got[0]["w"], X.T @ np.cos(noble(X, W, numbers(adapted))), atol=1e-12)


@pytest.mark.parametrize(("activation", "phi"), [("relu", relu), ("tanh", np.tanh), ("cos", np.cos)])
def test_noble_with_a_plain_activation(activation: str, phi) -> None:
    adapted = adapt(jlora.NOBLE(3, activation=activation))
    p = numbers(adapted)
    assert p.keys() == {"down", "up"}
    np.testing.assert_allclose(lifted(lambda w, x: x @ w, adapted, X), X @ W + phi(X @ p["down"]) @ p["up"], atol=1e-12)


def test_slices_along_the_outputs() -> None:
    """A slice of NOBLE's or NeRA's outputs is the branch with a slice of B. What acts on outputs together has none."""
    for name in ("noble", "nera"):
        method, formula = FORMULAS[name]
        adapted = adapt(method)
        got = lifted(lambda w, x: x @ w[:, 3:6], adapted, X)
        np.testing.assert_allclose(got, formula(X, W, numbers(adapted))[:, 3:6], atol=1e-12)
    run = jlora.lift(lambda p, x: x @ p["w"][:, :4], on_materialize="silent")
    with pytest.raises(ValueError, match="Bottleneck acts on activations"):
        run(adapt(jlora.Bottleneck(2)).bind(), X)


def test_nera_by_finite_differences() -> None:
    adapted = adapt(jlora.NeRA(2, knots=4))
    apply = jlora.lift(lambda p, x: x @ p["w"], on_materialize="error")
    loss = lambda trainable: jnp.sin(apply(adapted.bind(trainable), X)).sum()
    gradient = jax.grad(loss)(adapted.trainable)["w"]
    for name, leaf in adapted.trainable["w"].items():
        direction, h = jnp.asarray(RNG.normal(size=leaf.shape)), 1e-6
        at = lambda t, name=name, leaf=leaf, d=direction: loss({"w": adapted.trainable["w"] | {name: leaf + t * d}})
        np.testing.assert_allclose(jnp.sum(gradient[name] * direction), (at(h) - at(-h)) / (2 * h), rtol=1e-6)


def test_nera_moves_with_its_knots() -> None:
    """Knots and inputs shifted together change the base's part only, and inputs beyond all hats change nothing."""
    adapted = adapt(jlora.NeRA(2, knots=4))
    p = numbers(adapted) | {"gain": np.ones(6)}
    branch = lambda x, p: lifted(lambda w, x: x @ w, adapted.replace(trainable={"w": p}), x) - x @ W
    shifted = p | {"knots": p["knots"] + 0.7}
    np.testing.assert_allclose(branch(X + 0.7, shifted), branch(X, p), atol=1e-12)
    assert np.abs(branch(X, p)).max() > 1e-2
    np.testing.assert_allclose(branch(X + 100, p), 0, atol=1e-12)


def test_starts() -> None:
    """The libraries' own starts are close to the base and not at it."""
    for near in (jlora.NeRA(2, deviation=1e-3), jlora.Bottleneck(2, start="bert"), jlora.Invertible(start="bert")):
        start = jlora.adapt({"w": jnp.asarray(W)}, near, "w", key=KEY)
        change = np.abs(lifted(lambda w, x: x @ w, start, X) - X @ W).max()
        assert 0 < change < 0.05, near


def test_bottleneck_sees_the_bias_through_its_own() -> None:
    """An adapter behind x W + b is this one with another bias."""
    adapted = adapt(jlora.Bottleneck(2))
    p = numbers(adapted)
    behind = (X @ W + B) + net(X @ W + B, p)
    moved = adapted.replace(trainable={"w": p | {"down_bias": p["down_bias"] + B @ p["down"]}})
    np.testing.assert_allclose(lifted(lambda w, x: x @ w, moved, X) + B, behind, atol=1e-12)


@pytest.mark.parametrize("coupling", ["nice", "glow"])
@pytest.mark.parametrize("n_out", [8, 7])
def test_invertible(coupling: str, n_out: int) -> None:
    """On a tied embedding: f on the way in, the inverse on the way out, each the other's inverse."""
    table = RNG.normal(size=(9, n_out))
    method = jlora.Invertible(coupling)
    adapted = adapt(method, table, jlora.Axes((0,), (1,), kind="embedding"))
    assert method.count(adapted.sites["w"]) == sum(leaf.size for leaf in jax.tree.leaves(adapted.trainable))
    ids, hidden = jnp.array([[1, 4, 8], [0, 1, 1]]), jnp.asarray(RNG.normal(size=(4, n_out)))
    rows = lifted(lambda w, ids: w[ids], adapted, ids)
    scores = lifted(lambda w, x: x @ w.T, adapted, hidden)
    p, n, clamp = numbers(adapted), n_out // 2, 5.0 if coupling == "glow" else None
    x, first = table[np.asarray(ids)], None
    if coupling == "nice":
        first = x[..., :n] + net(x[..., n:], p["f"])
        second = x[..., n:] + net(first, p["g"])
    else:
        gain = lambda s: np.exp(5 * 0.636 * np.arctan(s / 5))
        a, b = np.split(net(x[..., n:], p["f"]), 2, -1)
        first = gain(a) * x[..., :n] + b
        c, d = np.split(net(first, p["g"]), 2, -1)
        second = gain(c) * x[..., n:] + d
    np.testing.assert_allclose(rows, np.concatenate([first, second], -1), atol=1e-12)
    np.testing.assert_allclose(scores, uncouple(hidden, adapted.trainable["w"], clamp=clamp) @ table.T, atol=1e-12)
    round_trip = uncouple(jnp.asarray(rows), adapted.trainable["w"], clamp=clamp)
    np.testing.assert_allclose(round_trip, x, atol=1e-12)
    np.testing.assert_allclose(couple(round_trip, adapted.trainable["w"], clamp=clamp), rows, atol=1e-12)
    # Of a lookup and the head together, what is left is the table with itself.
    both = lifted(lambda w, ids: w[ids] @ w.T, adapted, ids)
    np.testing.assert_allclose(both, x @ table.T, atol=1e-12)


def test_invertible_undoes_itself_in_low_precision() -> None:
    """The coupling is float32 inside: what a bfloat16 model loses is the rounding of its own activations."""
    table = jnp.asarray(RNG.normal(size=(9, 8)), jnp.bfloat16)
    axes = {"w": jlora.Axes((0,), (1,), kind="embedding")}
    adapted = jlora.adapt({"w": table}, jlora.Invertible(start="bert"), "w", axes=axes, key=KEY)
    assert {leaf.dtype for leaf in jax.tree.leaves(adapted.trainable)} == {jnp.dtype("float32")}
    both = jlora.lift(lambda p, ids: p["w"][ids] @ p["w"].T)(adapted.bind(), jnp.arange(9))
    assert both.dtype == jnp.bfloat16
    wide = np.asarray(table, np.float64)
    np.testing.assert_allclose(np.asarray(both, np.float64), wide @ wide.T, atol=0.02 * np.abs(wide @ wide.T).max())


def test_hgf_rounds() -> None:
    w, gamma = jnp.asarray(W), np.abs(W).mean()
    assert set(np.round(np.unique(ternary(w)) / gamma, 12)) == {-1.0, 0.0, 1.0}
    assert {float(v) for v in np.unique(ternary(w.astype(jnp.bfloat16)))} == {
        -float(jnp.bfloat16(gamma)),
        0.0,
        float(jnp.bfloat16(gamma)),
    }
    q = np.asarray(quantize(jnp.asarray(X), 8))
    steps = q / (np.abs(X).max(-1, keepdims=True) / 127)
    np.testing.assert_allclose(steps, np.round(steps), atol=1e-10)
    assert np.abs(q - X).max() <= np.abs(X).max() / 254 + 1e-12
    np.testing.assert_array_equal(quantize(jnp.zeros((2, 3)), 8), 0)
    for fn, at in ((ternary, w), (lambda x: quantize(x, 8), jnp.asarray(X))):
        np.testing.assert_array_equal(jax.grad(lambda x, fn=fn: fn(x).sum())(at), 1)


def test_hgf_gate() -> None:
    """A closed gate is BitNet, an open one of full rank gives the weight back. It merges without q, and only then."""
    method = jlora.HGF(6, activation_bits=None)
    adapted = jlora.adapt({"w": jnp.asarray(W)}, method, "w", key=KEY)
    rounded = np.asarray(ternary(jnp.asarray(W)))
    np.testing.assert_allclose(jlora.merge(adapted)["w"], rounded, atol=1e-15)  # at the start B = 0
    gate = adapted.trainable["w"]["gate"]
    pair = jlora.Factors(jnp.eye(6), jnp.asarray(W - rounded) / jnp.tanh(gate))
    back = adapted.replace(trainable={"w": {"factors": pair, "gate": gate}})
    np.testing.assert_allclose(jlora.merge(back)["w"], W, atol=1e-12)
    np.testing.assert_allclose(lifted(lambda w, x: x @ w, back, X), X @ W, atol=1e-12)
    closed = adapted.replace(trainable={"w": {"factors": pair, "gate": 0 * gate}})
    np.testing.assert_allclose(lifted(lambda w, x: x @ w, closed, X), X @ rounded, atol=1e-12)
    with pytest.raises(ValueError, match="no weight to merge"):
        jlora.merge(adapt(jlora.HGF(2)))
    with pytest.raises(ValueError, match="HGF acts on activations"):
        jlora.lift(lambda p: p["w"] + 1, on_materialize="silent")(adapt(jlora.HGF(2)).bind())


def test_hgf_of_a_convolution_and_transposed() -> None:
    method = jlora.HGF(2, activation_bits=None)
    w, x = RNG.normal(size=(3, 2, 4, 8)) / 4, RNG.normal(size=(2, 5, 6, 4))
    adapted = adapt(method, w, WINDOW)
    np.testing.assert_allclose(lifted(conv, adapted, x), conv(jlora.merge(adapted)["w"], x), atol=1e-12)
    adapted, back = adapt(method), RNG.normal(size=(5, 8))
    merged = jlora.merge(adapted)["w"]
    np.testing.assert_allclose(lifted(lambda w, x: x @ w.T, adapted, back), back @ merged.T, atol=1e-12)


def test_refusals() -> None:
    embedding, window = jlora.Axes((0,), (1,), kind="embedding"), Site(None, WINDOW, (3, 2, 4, 8))
    for method in (jlora.NOBLE(2), jlora.NeRA(2), jlora.Bottleneck(), jlora.HGF(2)):
        assert method.check(Site(method, embedding, (9, 8)))
    assert "use LoRA" in jlora.NeRA(2).check(window)
    assert "activation_bits=None" in jlora.HGF(2).check(window)
    assert "Bottleneck" in jlora.Invertible().check(window)
    with pytest.raises(ValueError, match="NOBLE acts on activations"):
        jlora.lift(lambda p, x: x @ p["w"].T)(adapt(jlora.NOBLE(2)).bind(), RNG.normal(size=(5, 8)))
