"""The optimizers of pairs: recorded numbers of other implementations, identities in float64, and what they refuse."""

import itertools
import json
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from recorded import DIRECTORY

import jlora
from jlora.factors import Factors
from jlora.optim.adam import correct_bias, raw_adam
from jlora.optim.lora_pro import MODES
from jlora.optim.pairs import orthonormal

pytestmark = pytest.mark.usefixtures("x64")

RANDOM = np.random.default_rng(0)
M, N, R, S = 7, 6, 3, 1.5
A, B, G = (RANDOM.normal(size=shape) for shape in ((M, R), (R, N), (M, N)))
Q = RANDOM.normal(size=(R, R))  # any invertible matrix
ROTATION = np.linalg.qr(Q)[0]


def steps(tx: optax.GradientTransformation, loss: Callable, params: Any, number: int) -> Iterator[Any]:
    """The parameters before each of some steps, and after the last."""
    state = tx.init(params)

    def step(params, state):
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    step = jax.jit(step)
    for _ in range(number):
        yield params
        params, state = step(params, state)
    yield params


# Recorded numbers.


def discover(file: str, prefixes: tuple[str, ...] = ("",)) -> list[Any]:
    path = DIRECTORY / f"{file}.npz"
    if not path.is_file():
        return [pytest.param(None, id="absent", marks=pytest.mark.skip(reason=f"no {path}: set JLORA_ORACLES"))]
    with np.load(path) as arrays:
        cases = sorted({key.split("/")[0] for key in arrays.files})
    return [pytest.param((path, case), id=case) for case in cases if case.startswith(prefixes)]


def recorded(of: tuple[pathlib.Path, str]) -> tuple[dict[str, np.ndarray], dict]:
    path, case = of
    with np.load(path) as arrays:
        case = {key.removeprefix(f"{case}/"): arrays[key] for key in arrays.files if key.startswith(f"{case}/")}
    return case, json.loads(str(case["note"]))


def transformers_adamw(note: dict) -> optax.GradientTransformation:
    """Decay comes after the step, and shrinks what the step has made."""
    keep = 1 - note["lr"] * note["weight_decay"]
    decay = optax.stateless(lambda updates, params: jax.tree.map(lambda u, p: keep * (p + u) - p, updates, params))
    adam = raw_adam(*note["betas"], note["eps"]), correct_bias(*note["betas"])
    return optax.chain(*adam, optax.scale(-note["lr"]), decay)


def adamw(note: dict) -> optax.GradientTransformation:
    return optax.adamw(note["lr"], *note["betas"], note["eps"], weight_decay=note["weight_decay"])


MAKE = {
    "loraplus_adamw": lambda note: jlora.optim.lora_plus(adamw(note), note["ratio"]),
    "loraplus_sgd": lambda note: jlora.optim.lora_plus(optax.sgd(note["lr"]), note["ratio"]),
    "lorafa": lambda note: jlora.optim.lora_fa(transformers_adamw(note)),
    "riemannian": lambda note: jlora.optim.riemannian(adamw(note), note["reg"]),
    "riemannian_sgd": lambda note: jlora.optim.scaled_gd(note["lr"], note["reg"]),
}


@pytest.mark.parametrize("of", discover("optimizers", tuple(MAKE)))
def test_recorded_steps(of: tuple) -> None:
    """Ten steps of PEFT's optimizers."""
    case, note = recorded(of)
    tx = MAKE[of[1].partition("_wd")[0]](note)
    layers = {key.split("/")[1].partition(".")[0] for key in case if key.startswith("base/")}
    base = {layer: (case[f"base/{layer}.weight"].T, case[f"base/{layer}.bias"]) for layer in layers}
    scale = note["scaling"] if "scaling" in note else note["lora_alpha"] / note["r"]

    def loss(params):
        linear = lambda layer, x: x @ base[layer][0] + base[layer][1] + x @ params[layer].product()
        return 0.5 * jnp.mean((linear("lin1", jnp.tanh(linear("lin0", case["x"]))) - case["target"]) ** 2)

    def at(step: int):
        factor = lambda layer, which: jnp.asarray(case[f"step{step:02d}/{layer}.lora_{which}.weight"].T)
        return {layer: Factors(factor(layer, "A"), factor(layer, "B"), scale) for layer in layers}

    for step, params in enumerate(steps(tx, loss, at(0), 10)):
        np.testing.assert_allclose(loss(params), case["losses"][step], atol=1e-10, rtol=0)
        if any(key.startswith(f"step{step:02d}/") for key in case):
            jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-10, rtol=0), params, at(step))


def with_x(x: Callable) -> optax.GradientTransformation:
    """LoRA-Pro as it is published, with Y = x(a, b, g_a, g_b, s)."""

    def update(g, params):
        a, b, s = params.a, params.b, params.scale
        y = x(a, b, g.a, g.b, s)
        over_a, over_b = jnp.linalg.inv(a.T @ a), jnp.linalg.inv(b @ b.T)
        outside = g.b - (g.b @ b.T) @ over_b @ b
        return Factors(g.a @ over_b / s**2 + a @ y, over_a @ outside / s**2 - y @ b, s)

    return optax.stateless(update)


def symmetric_y(a, b, g_a, g_b, s):
    return -0.5 / s**2 * jnp.linalg.inv(a.T @ a) @ (g_b @ b.T) @ jnp.linalg.inv(b @ b.T)


def recorded_symmetric_y(a, b, g_a, g_b, s):
    """The recorded code multiplies by a^T a where it should by its inverse: the halves are then not halves. That these
    are its numbers, and that the right ones are ours, is what the tests show."""
    return -0.5 / s**2 * (a.T @ a) @ (g_b @ b.T) @ jnp.linalg.inv(b @ b.T)


@pytest.mark.parametrize("of", [*discover("lora_pro", ("full_start",)), *discover("lora_pro_adamw")])
def test_recorded_lora_pro(of: tuple) -> None:
    """Ten steps of the authors' AdamW form, and of AdamW on the gradients of the factors; recorded in float32. (The
    cases not run are the first with a second moment rounded to bfloat16.)"""
    case, note = recorded(of)
    start = note.get("global_step_at_first_call", 0)
    if "X_mode" not in note:
        # A plain step at the end is the same before and after: (d_A, d_B) are linear in N.
        adam = optax.chain(optax.scale_by_adam(*note["betas"], note["eps"]), optax.scale(-note["lr"]))
        tx = jlora.optim.lora_pro_full(adam, damping=note["delta"])
    elif note["X_mode"] == "symmetry":
        tx = optax.chain(with_x(recorded_symmetric_y), adamw(note))
    else:
        tx = jlora.optim.lora_pro(adamw(note), note["X_mode"], damping=1e-8)

    def init(params, init=tx.init):
        """Theirs can be called with its count ahead of its moments."""
        state = init(params)
        return optax.tree.set(state, count=jnp.asarray(start)) if start else state

    w = jnp.asarray(case["W"].T, jnp.float64)
    loss = lambda p: 0.5 * jnp.mean((case["x"].astype(float) @ (w + p.product()) - case["target"]) ** 2)
    first = Factors(*(jnp.asarray(case[name].T, jnp.float64) for name in ("A0", "B0")), note.get("scaling", 2.0))
    for step, params in enumerate(steps(tx._replace(init=init), loss, first, 10)):
        np.testing.assert_allclose(loss(params), case["losses"][step], rtol=1e-5)
        if step:
            for name, factor in (("A", params.a), ("B", params.b)):
                np.testing.assert_allclose(factor, case[f"step{step - 1:02d}/{name}"].T, atol=2e-4, rtol=0)


# Identities. The loss is <G, W>: the factors' gradients are those of a weight whose gradient is G.


def linear(params: Factors) -> jax.Array:
    return jnp.sum(G * params.product())


def quadratic(params: Factors) -> jax.Array:
    return 0.5 * jnp.sum((params.product() - G) ** 2)


def direction(tx: optax.GradientTransformation, a=A, b=B, loss: Callable = linear, dtype=None) -> Factors:
    pair = jax.tree.map(lambda leaf: leaf.astype(dtype or leaf.dtype), Factors(a, b, S))
    return tx.update(jax.grad(loss)(pair), tx.init(pair), pair)[0]


def change(d: Factors, a=A, b=B) -> jax.Array:
    """Of the weight, to first order."""
    return S * (d.a @ b + a @ d.b)


def close(x: Any, y: Any, atol: float = 1e-10) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=atol, rtol=0), x, y)


def projections() -> tuple[jax.Array, jax.Array]:
    return A @ jnp.linalg.pinv(A), jnp.linalg.pinv(B) @ B


@pytest.mark.parametrize("mode", MODES)
def test_lora_pro_projects_on_the_tangent_space(mode: str) -> None:
    """The nearest change of all, by least squares over every (d_A, d_B); independent of the mode and of the split."""
    tx = jlora.optim.scale_by_lora_pro(mode)
    d = direction(tx)
    columns = [S * np.kron(np.eye(M), B.T), S * np.kron(A, np.eye(N))]  # of row-major d_A and d_B
    jacobian = np.concatenate(columns, axis=1)
    best = np.linalg.lstsq(jacobian, np.asarray(G).ravel(), rcond=None)[0]
    close(change(d), (jacobian @ best).reshape(M, N))
    p_a, p_b = projections()
    close(change(d), p_a @ G + G @ p_b - p_a @ G @ p_b)
    close(change(direction(tx, A @ Q, jnp.linalg.inv(Q) @ B), A @ Q, jnp.linalg.inv(Q) @ B), change(d))
    g = jax.grad(linear)(Factors(A, B, S))
    np.testing.assert_allclose(jnp.sum(g.a * d.a) + jnp.sum(g.b * d.b), jnp.sum(change(d) ** 2), rtol=1e-12)


def test_lora_pro_solves_the_sylvester_equation() -> None:
    """By a dense solver; and the modes are the published formula with their Y."""

    def y(a, b, g_a, g_b, s):
        system = np.kron(a.T @ a, np.eye(R)) + np.kron(np.eye(R), b @ b.T)
        right = -1 / s**2 * a.T @ g_a @ jnp.linalg.inv(b @ b.T)
        return jnp.linalg.solve(system, right.ravel()).reshape(R, R)

    for mode, x in {"sylvester": y, "symmetry": symmetric_y, "zero": lambda *_: jnp.zeros((R, R))}.items():
        close(direction(jlora.optim.scale_by_lora_pro(mode)), direction(with_x(x)))


def test_lora_pro_and_the_split() -> None:
    """The factors' steps turn with a rotation of the split, and with nothing else."""
    tx = jlora.optim.scale_by_lora_pro()
    d, turned = direction(tx), direction(tx, A @ ROTATION, ROTATION.T @ B)
    close(turned, Factors(d.a @ ROTATION, ROTATION.T @ d.b, S))
    other = direction(tx, A @ Q, jnp.linalg.inv(Q) @ B)
    assert np.abs(other.a - d.a @ jnp.linalg.inv(Q).T).max() > 1e-2 and np.abs(other.a - d.a @ Q).max() > 1e-2


@pytest.mark.parametrize("size", [1.0, 1e-2, 1e-4])
def test_lora_pro_in_float32(size: float) -> None:
    """A small B of bad condition, where the published form loses all digits."""
    random = np.random.default_rng(0)
    a, g = random.normal(size=(64, 8)), random.normal(size=(64, 48))
    b = size * np.logspace(-2, 0, 8)[:, None] * random.normal(size=(8, 48))
    loss = lambda p: jnp.sum(g * p.product())
    tx = jlora.optim.scale_by_lora_pro()
    wanted = change(direction(tx, a, b, loss), a, b)
    got = direction(tx, a, b, lambda p: jnp.sum(g.astype(np.float32) * p.product()), jnp.float32)
    assert got.a.dtype == jnp.float32
    got = change(jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), got), np.float32(a), np.float32(b))
    # B B^T has the square of its condition, 100: so many of the digits of float32 are lost.
    assert np.linalg.norm(got - wanted) < 100**2 * np.finfo(np.float32).eps * np.linalg.norm(wanted)


def test_lora_pro_at_the_ends() -> None:
    """B = 0; and a rank that leaves nothing out, where the change is full fine-tuning's."""
    tx = jlora.optim.scale_by_lora_pro()
    d = direction(tx, A, 0 * B)
    close(d, Factors(0 * A, jnp.linalg.inv(A.T @ A) @ A.T @ G / S, S))
    a, b = RANDOM.normal(size=(M, N)), RANDOM.normal(size=(N, N))
    close(change(direction(tx, a, b), a, b), G, 1e-8)


def test_lora_pro_full_is_full_fine_tuning() -> None:
    """At full rank, to first order: the weight changes by the base's step for G; what decays is its change."""
    a, b = RANDOM.normal(size=(M, N)), np.eye(N)
    base = optax.adamw(1e-3, weight_decay=0.1)
    d = direction(jlora.optim.lora_pro_full(base), a, b)
    w = S * a @ b
    close(change(d, a, b), base.update(G, base.init(w), w)[0], 1e-8)


def test_one_sided_projections() -> None:
    """AltLoRA's halves, and LoRA-FA's; ScaledGD is AltLoRA without momentum but for 1 / s^2."""
    p_a, p_b = projections()
    d = direction(jlora.optim.scale_by_altlora(0.0, damping=0.0))
    close(S * d.a @ B, G @ p_b)
    close(S * A @ d.b, p_a @ G)
    scaled = direction(jlora.optim.scale_by_gram_inverse(0.0))
    close(jax.tree.map(lambda x: x / S**2, scaled), d)
    close(direction(jlora.optim.lora_fa(optax.sgd(1.0))), Factors(0 * A, -d.b, S), 1e-7)
    q_a, q_b = jnp.linalg.qr(A)[0], jnp.linalg.qr(B.T)[0].T  # Gram matrices I: nothing to do
    plain = jax.grad(linear)(Factors(q_a, q_b, S))
    close(direction(jlora.optim.scale_by_gram_inverse(0.0), q_a, q_b), plain)


def test_momentum_is_carried_over_by_least_squares() -> None:
    """After a step that moves B, M_A is the X for which X B is nearest to M_A' B'; before it, the transport is none."""
    tx = jlora.optim.scale_by_altlora(0.9, damping=0.0)
    pair = Factors(A, B, S)
    _, state = tx.update(jax.grad(linear)(pair), tx.init(pair), pair)
    zero = jax.tree.map(jnp.zeros_like, pair)
    _, still = tx.update(zero, state, pair)
    close(still.momentum, jax.tree.map(lambda m: 0.9 * m, state.momentum))
    moved = Factors(A, B + RANDOM.normal(size=B.shape), S)
    _, after = tx.update(zero, state, moved)
    best = np.linalg.lstsq(moved.b.T, (state.momentum.a @ B).T, rcond=None)[0].T
    close(after.momentum.a, 0.9 * best)


INVARIANT = {
    "scaled_gd": (lambda: jlora.optim.scaled_gd(0.05, 0.0), True),
    "altlora": (lambda: jlora.optim.altlora(0.05, damping=0.0), True),
    "altlora_joint": (lambda: jlora.optim.altlora(0.05, damping=0.0, order="joint"), True),
    "altlora_alternate": (lambda: jlora.optim.altlora(0.05, damping=0.0, order="alternate"), True),
    "altlora_relative": (lambda: jlora.optim.altlora(0.05, damping=0.1, relative=True), False),
    "altlora_plus": (lambda: jlora.optim.altlora_plus(0.01, damping=0.0), False),
    "lora_rite": (lambda: jlora.optim.lora_rite(0.05, skip=None), True),
    "lora_rite_escape": (lambda: jlora.optim.lora_rite(0.05, cap=0.5, escape=True), True),
    "adam": (lambda: optax.adam(0.05), False),
    "scaled_adam": (lambda: jlora.optim.scaled_adam(0.05, damping=0.0), False),
}


@pytest.mark.parametrize("name", INVARIANT)
def test_indifferent_to_the_split(name: str) -> None:
    """Whether the course of A B from (A Q, Q^-1 B) is that from (A, B), for any invertible Q."""
    make, holds = INVARIANT[name]
    courses = []
    for q in (jnp.eye(R), Q):
        *_, last = steps(make(), quadratic, Factors(A @ q, jnp.linalg.inv(q) @ B, S), 6)
        courses.append(last.product())
    gap = np.abs(courses[0] - courses[1]).max()
    assert (gap < 1e-8) if holds else (gap > 1e-3), gap


def altlora_formula(a, b, grads: Callable, rate, beta, delta, number, plus=None, eps=1e-6, carry=True, s=1.0):
    """The authors' order of things, in NumPy; a [r, in], b [out, r], as there."""
    zeros = np.zeros_like
    m_a, m_b, b_old, a_old, v_a, v_b = zeros(a), zeros(b), zeros(b), zeros(a), zeros(a), zeros(b)
    eye = np.eye(a.shape[0])
    for t in range(1, number + 1):
        g_a, g_b = grads(a, b)
        inverse = np.linalg.inv(b.T @ b + delta * eye)
        scaled, carried = inverse @ g_a / s**2, inverse @ b.T @ b_old @ m_a
        new = beta * carried + (1 - beta) * scaled
        m_a = new if carry else beta * m_a + (1 - beta) * scaled
        if plus is not None:
            v_a = plus * v_a + (1 - plus) * scaled**2
            new = new / (np.sqrt(v_a) + eps)
        a, b_old = a - rate / (1 - beta**t) * new, b
        inverse = np.linalg.inv(a @ a.T + delta * eye)
        scaled, carried = g_b @ inverse / s**2, m_b @ a_old @ a.T @ inverse
        new = beta * carried + (1 - beta) * scaled
        m_b = new if carry else beta * m_b + (1 - beta) * scaled
        if plus is not None:
            v_b = plus * v_b + (1 - plus) * scaled**2
            new = new / (np.sqrt(v_b) + eps)
        b, a_old = b - rate / (1 - beta**t) * new, a
    return a, b


def rite_formula(a, b, grads: Callable, rate, number, beta=(0.9, 0.999), eps=1e-6, clip=1.0, skip=1.0, cap=0.0):
    """The authors' steps with their QR decompositions, in NumPy; a [in, r], b [r, out], no escape."""
    r = a.shape[1]
    sides = [{"m": np.zeros_like(x), "v": np.zeros((r, r)), "q": np.zeros_like(y)} for x, y in ((a, b.T), (b.T, a))]
    sides[1]["m"], sides[0]["q"] = np.zeros_like(b.T), np.zeros_like(b.T)
    for t in range(1, number + 1):
        x, g = [a, b.T], list(grads(a, b))
        g[1] = g[1].T
        qr = [np.linalg.qr(y) for y in x]
        us = []
        for i in (0, 1):
            u = g[i] @ np.linalg.pinv(qr[1 - i][1])
            us.append(u if np.sqrt(np.mean(u**2)) <= skip else 0 * u)
        norm = np.sqrt(sum(np.sum(u**2) for u in us))
        us = [u * clip / max(norm, clip) for u in us]
        decay = [d * (1 - d ** (t - 1)) / (1 - d**t) for d in beta]
        for i, side in enumerate(sides):
            q, way = qr[1 - i][0], qr[1 - i][0].T @ side["q"]
            v = decay[1] * way @ side["v"] @ way.T + (1 - decay[1]) * us[i].T @ us[i] / len(us[i])
            w, vectors = np.linalg.eigh(v)
            scaled = us[i] @ vectors / (np.sqrt(np.maximum(w, 0)) + eps) @ vectors.T
            m = decay[0] * side["m"] @ way.T + (1 - decay[0]) * scaled
            side |= {"m": m, "v": v, "q": q}
            step = m / max(1.0, np.sqrt(np.mean(m**2)) / cap) if cap else m
            x[i] = x[i] - rate * step @ np.linalg.pinv(qr[1 - i][1]).T
        a, b = x[0], x[1].T
    return a, b


def numpy_grads(a, b, s=S):
    """Of ``quadratic`` at the scale s; a [in, r], b [r, out]."""
    g = s * a @ b - np.asarray(G)
    return s * g @ b.T, s * a.T @ g


@pytest.mark.parametrize("plus, carry", [(None, True), (0.99, True), (0.99, False)])
def test_altlora_against_the_formula(plus: float | None, carry: bool) -> None:
    def grads(a, b):
        g_a, g_b = numpy_grads(a.T, b.T)
        return g_a.T, g_b.T

    options = dict(damping=1e-3, other=optax.identity())
    if plus is None:
        tx = jlora.optim.altlora(0.02, 0.9, **options)
    else:
        tx = jlora.optim.altlora_plus(0.02, 0.9, plus, carry=carry, **options)
    a, b = altlora_formula(np.asarray(A).T, np.asarray(B).T, grads, 0.02, 0.9, 1e-3, 5, plus=plus, carry=carry, s=S)
    *_, last = steps(tx, quadratic, Factors(A, B, S), 5)
    close(last, Factors(a.T, b.T, S))


@pytest.mark.parametrize("options", [{"skip": 100.0}, {"skip": 3.0}, {"cap": 0.7, "clip": 100.0, "skip": 100.0}])
def test_lora_rite_against_the_formula(options: dict) -> None:
    wanted = rite_formula(np.asarray(A), np.asarray(B), numpy_grads, 0.02, 5, **options)
    *_, last = steps(jlora.optim.lora_rite(0.02, **options), quadratic, Factors(A, B, S), 5)
    close(last, Factors(*wanted, S), 1e-8)


def test_altlora_alternates() -> None:
    """Two steps of B, two of A, and so on: what does not step keeps its state."""
    tx = jlora.optim.altlora(0.02, order="alternate", period=2)
    for i, (before, after) in enumerate(itertools.pairwise(steps(tx, quadratic, Factors(A, B, S), 6))):
        of_b = i // 2 % 2 == 0
        assert np.any(before.a != after.a) != of_b and np.any(before.b != after.b) == of_b
    assert int(tx.init(Factors(A, B, S))[0].count_a) == 0


def test_allora() -> None:
    """B's gradient is the rule's exactly; A's where all channels have the same factor; norms are those of A B."""
    eta = 2.0
    d = direction(jlora.optim.scale_by_allora_approx(eta))
    c = (np.linalg.norm(S * A @ B, axis=0) + 1 / eta**2) ** -0.5
    g = jax.grad(linear)(Factors(A, B, S))
    close(d, Factors(c.mean() * g.a, g.b * c, S))
    start = direction(jlora.optim.scale_by_allora_approx(eta), A, 0 * B)
    close(start, jax.tree.map(lambda x: eta * x, jax.grad(linear)(Factors(A, 0 * B, S))))
    close(direction(jlora.optim.scale_by_allora_approx(eta), A @ Q, jnp.linalg.inv(Q) @ B).a @ Q.T, d.a, 1e-9)


def test_lora_plus_and_ffa() -> None:
    """With ratio 1 the base; A's steps are the base's with any ratio; a frozen factor does not decay either."""
    base = optax.adamw(0.1, weight_decay=0.1)
    plain = direction(base)
    close(direction(jlora.optim.lora_plus(base, 1.0)), plain, 0)
    close(direction(jlora.optim.lora_plus(base, 4.0)), Factors(plain.a, 4 * plain.b, S), 0)
    close(direction(jlora.optim.ffa(base)), Factors(0 * A, plain.b, S), 1e-15)
    close(direction(jlora.optim.ffa(base, "b")), Factors(plain.a, 0 * B, S), 1e-15)
    sizes = lambda tx: sum(leaf.size for leaf in jax.tree.leaves(tx.init(Factors(A, B, S))))
    assert sizes(jlora.optim.ffa(optax.adam(0.1))) == 2 * B.size + 1


def test_orthonormal() -> None:
    """Also far from well conditioned, and without full rank."""
    x = jnp.asarray(RANDOM.normal(size=(40, 4)) * np.logspace(-2, 0, 4), jnp.float32)
    q, k = orthonormal(x)
    close(q.T @ q, np.eye(4), 1e-5)
    close(x @ k, q, 1e-2)
    q, _ = orthonormal(x.at[:, 1].set(0))
    close(jnp.linalg.eigvalsh(q.T @ q), np.array([0, 1, 1, 1]), 1e-5)
    close(orthonormal(0 * x), (0 * x, jnp.zeros((4, 4))), 0)


# The tree around the pairs.


def test_stacks_dicts_and_scales() -> None:
    """Each index of a stack, each pair of a dict, each scale gets the step of a pair alone; padded ranks stay zero."""
    stack = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), Factors(A, B, S))
    padded = Factors(jnp.asarray(A).at[:, -1].set(0), jnp.asarray(B).at[-1].set(0), 0.5)
    params = {"stack": {"factors": stack, "magnitude": jnp.ones(N)}, "branches": {"x": Factors(A, B, 2.0), "y": padded}}
    makers = [
        lambda: jlora.optim.lora_pro(optax.sgd(0.1)),
        lambda: jlora.optim.lora_pro_full(optax.adam(0.1)),
        lambda: jlora.optim.altlora(0.1, 0.5, damping=0.0),
        lambda: jlora.optim.lora_rite(0.1, clip=None, skip=None),
        lambda: jlora.optim.allora_approx(optax.sgd(0.1)),
    ]
    loss = lambda p: jnp.sum(G * p.product())

    def of_all(params):
        pairs, others = params["branches"].values(), params["stack"]["magnitude"]
        return loss(params["stack"]["factors"]) + sum(map(loss, pairs)) + jnp.sum(others**2)

    for make in makers:
        alone = lambda pair, make=make: [*steps(make(), loss, pair, 2)][-1]
        *_, got = steps(make(), of_all, params, 2)
        for i in range(2):
            at = lambda leaf, i=i: leaf[i]
            close(jax.tree.map(at, got["stack"]["factors"]), alone(jax.tree.map(at, stack)), 1e-9)
        for name in ("x", "y"):
            close(got["branches"][name], alone(params["branches"][name]), 1e-9)
        assert np.all(got["branches"]["y"].a[:, -1] == 0) and np.all(got["branches"]["y"].b[-1] == 0)
        assert np.all(got["stack"]["magnitude"] != 1)


def test_roles() -> None:
    params = {"w": {"factors": Factors(A, B, S), "magnitude": jnp.ones(N)}}
    labels = jlora.optim.roles(params)
    assert labels == {"w": {"factors": Factors("a", "b", S), "magnitude": "other"}}
    assert jax.tree.structure(labels) == jax.tree.structure(params)


TRANSFORMATIONS = [
    lambda: jlora.optim.lora_plus(optax.sgd(0.1)),
    lambda: jlora.optim.ffa(optax.sgd(0.1)),
    jlora.optim.scale_by_gram_inverse,
    jlora.optim.scale_by_lora_pro,
    lambda: jlora.optim.lora_pro_full(optax.sgd(0.1)),
    jlora.optim.scale_by_altlora,
    jlora.optim.scale_by_allora_approx,
    jlora.optim.scale_by_lora_rite,
    lambda: jlora.optim.lora_fa(optax.sgd(0.1)),
    lambda: jlora.optim.altlora_plus(0.1),
    lambda: jlora.optim.scaled_adam(0.1),
]


@pytest.mark.parametrize("make", TRANSFORMATIONS)
def test_refusals(make: Callable) -> None:
    """No pair, half a pair, no parameters: said at once, by name. Whole pairs under one label are fine."""
    tx = make()
    with pytest.raises(ValueError, match="finds no pair of factors"):
        tx.init({"kernel": A})
    params = {"w": Factors(A, B, S), "v": Factors(A, B, S), "bias": jnp.ones(3)}
    labels = lambda p: jax.tree.map(lambda role: "yes" if role == "a" else "no", jlora.optim.roles(p))
    with pytest.raises(ValueError, match=r"\['v'\].*`a` without `b`"):
        optax.partition({"yes": tx, "no": optax.sgd(0.1)}, labels).init(params)
    whole = optax.partition({"yes": tx, "no": optax.sgd(0.1)}, {"w": "yes", "v": "no", "bias": "no"})
    updates, _ = whole.update(params, whole.init(params), params)
    close(updates["v"], jax.tree.map(lambda leaf: -0.1 * leaf, params["v"]))


@pytest.mark.parametrize("make", [make for make in TRANSFORMATIONS if make is not jlora.optim.scale_by_lora_rite])
def test_a_bad_gradient_reaches_no_other_pair(make: Callable) -> None:
    """But for LoRA-RITE, which clips by the norm of all. (What ``optax.apply_if_finite`` does of it: the battery.)"""
    params = {"w": Factors(A, B, S), "v": Factors(A, B, S)}
    bad = {"w": Factors(A, jnp.full_like(B, jnp.nan), S), "v": params["v"]}
    tx = make()
    got, wanted = (tx.update(grads, tx.init(params), params)[0] for grads in (bad, params))
    close(got["v"], wanted["v"], 0)
    assert not all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(got["w"]))


def test_parameters_are_wanted() -> None:
    pair = Factors(A, B, S)
    for make in TRANSFORMATIONS[2:]:
        tx = make()
        with pytest.raises(ValueError, match="wants the parameters"):
            tx.update(pair, tx.init(pair))
    with pytest.raises(ValueError, match="one of sylvester, symmetry, zero"):
        jlora.optim.lora_pro(optax.sgd(0.1), "sylvestre")
    with pytest.raises(ValueError, match="learning_rate that follows"):
        jlora.optim.scale_by_altlora(order="sequential")
    with pytest.raises(ValueError, match="one of sequential, joint, alternate"):
        jlora.optim.altlora(0.1, order="both")
    with pytest.raises(ValueError, match='"a" or "b"'):
        jlora.optim.ffa(optax.sgd(0.1), "A")
