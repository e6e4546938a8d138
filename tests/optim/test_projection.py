"""Gradient projection: recorded traces of the authors' optimizers, and the identities of the projections in float64."""

import itertools
import json
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from recorded import DIRECTORY

import jlora
from jlora.optim import adam, projection
from jlora.optim.apollo import Gaussian
from jlora.optim.dct import Columns, cosine_transform, dct_columns
from jlora.optim.fira import limit_growth

pytestmark = pytest.mark.usefixtures("x64")

SIDES = {"std": "smaller", "reverse_std": "larger", "right": "in", "left": "out", "full": "both"}
RANDOM = np.random.default_rng(0)
SOLVERS = ["svd", "eigh", "randomized", "subspace"]


def discover() -> Iterator[Any]:
    for name, prefix in (("optimizers", "galore_"), ("fira", "")):
        file = DIRECTORY / f"{name}.npz"
        if not file.is_file():
            reason = f"no file {file}: set JLORA_ORACLES"
            yield pytest.param(None, None, id=name, marks=pytest.mark.skip(reason=reason))
            continue
        with np.load(file) as arrays:
            cases = sorted({key.partition("/")[0] for key in arrays.files if key.startswith(prefix)})
        for case in cases:
            yield pytest.param(file, case, id=f"{name}-{case}")


def moment_signs(state: Any, note: dict) -> Iterator[Any]:
    """The state with the first moments' signs in the projected axes in all combinations."""

    def flipped(leaf, left, right):
        return leaf * left[:, None] * right

    mu_shape = next(x.mu.shape for x in jax.tree.leaves(state, is_leaf=is_adam) if is_adam(x))
    choices = [itertools.product((1.0, -1.0), repeat=n) if n == note["rank"] else [np.ones(n)] for n in mu_shape]
    for left, right in itertools.product(*(list(c) for c in choices)):
        change = lambda x: x._replace(mu=flipped(x.mu, np.array(left), np.array(right))) if is_adam(x) else x  # noqa: B023
        yield jax.tree.map(change, state, is_leaf=is_adam)


def is_adam(x: Any) -> bool:
    return isinstance(x, optax.ScaleByAdamState)


def with_errors(r: jax.Array, state: tuple, params: Any = None, *, errors: jax.Array, **_: Any) -> tuple:
    return r + errors[: r.shape[0], : r.shape[1]] * jnp.abs(r).max(), state


@pytest.mark.parametrize("file,case", list(discover()))
def test_recorded_trace(file: pathlib.Path, case: str) -> None:
    """Ten steps of the authors' code, in float32. Ours is run in float64; how far errors of 2e-7 in the gradient and
    5e-8 in R move it is measured, and allowed besides 2e-6: Adam enlarges small entries, and where both sides are
    projected, all of the first R but its diagonal is rounding.

    The moments are kept when the basis is renewed, so the trace depends on the signs that LAPACK gave the singular
    vectors. They are not a convention: at a refresh all are tried.
    """
    with np.load(file) as arrays:
        z = {key.partition("/")[2]: arrays[key] for key in arrays.files if key.startswith(f"{case}/")}
    note = json.loads(str(z["note"]))
    (b1, b2), lr, gap = note["betas"], note["lr"], note["update_proj_gap"]
    options = dict(period=gap, side=SIDES[note["proj_type"]], solver="svd")
    if file.stem == "fira":
        options |= dict(scale=note["alpha"], limit=note["limiter"])
        tx = jlora.optim.fira(lr, note["rank"], b1=b1, b2=b2, eps=note["eps"], **options)
    else:
        rounding = optax.GradientTransformationExtraArgs(lambda params: (), with_errors)
        inner = optax.chain(
            rounding, adam.raw_adam(b1, b2, note["eps"]), adam.correct_bias(b1, b2), optax.scale_by_learning_rate(lr)
        )
        tx = jlora.optim.galore(inner, note["rank"], scale=note["scale"], **options)
    w0, x, target = (jnp.asarray(z[name], jnp.float64) for name in ("W0", "x", "target"))
    value = lambda w: 0.5 * jnp.mean((x @ w - target) ** 2)
    decay = 1 - lr * note["weight_decay"]  # after the step, there

    @jax.jit
    def step(w, state, noise):
        grads = jax.grad(value)(w)
        grads = grads + noise * jnp.abs(grads).max()
        updates, state = tx.update(grads, state, w, errors=noise / 4)
        return (w + updates) * decay, state

    def run(noise: np.ndarray) -> tuple[list, list, list]:
        w, state = w0.T, tx.init(w0.T)
        found, losses, limits = [], [float(value(w))], []
        for i in range(10):
            starts = moment_signs(state, note) if i and i % gap == 0 else [state]
            wanted = z[f"W{i + 1}"].T
            tried = (step(w, start, noise[i]) for start in starts)
            w, state = min(tried, key=lambda new: float(jnp.abs(new[0] - wanted).max()))
            found.append(np.asarray(w))
            losses.append(float(value(w)))
            limits += [np.asarray(e) for e in jax.tree.leaves(state[0].extra)] if file.stem == "fira" else []
        return found, losses, limits

    found, losses, limits = run(np.zeros((10, *w0.T.shape)))
    rounded = [run(2e-7 * np.random.default_rng(seed).normal(size=(10, *w0.T.shape)))[0] for seed in range(3)]
    for i, w in enumerate(found):
        allowed = 2e-6 + 3 * max(float(np.abs(other[i] - w).max()) for other in rounded)
        assert allowed < 2e-4
        np.testing.assert_allclose(w.T, z[f"W{i + 1}"], rtol=0, atol=allowed, err_msg=f"W{i + 1}")
    np.testing.assert_allclose(losses, z["losses"], rtol=2e-5)
    for i, norm in enumerate(limits):
        np.testing.assert_allclose(norm, z[f"limiter_norm{i + 1}"], rtol=1e-5)


def plan_of(shape: tuple[int, ...], rank: int, side: str) -> projection.Plan:
    return projection._plan(0, "w", jnp.zeros(shape), rank, side, {}, "**", None)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("side", ["in", "out", "both"])
def test_projection_is_optimal(solver: str, side: str) -> None:
    """Orthonormal, and what is left out is as small as any projection of that rank leaves it, for each of a stack."""
    left = np.linalg.qr(RANDOM.normal(size=(2, 12, 9)))[0]
    right = np.linalg.qr(RANDOM.normal(size=(2, 9, 9)))[0]
    s = np.geomspace(1, 1e-4, 9)
    g = jnp.asarray(left * s @ right.swapaxes(-1, -2))
    plan, source = plan_of(g.shape, 3, side), projection.Leading(solver)
    stored = source.init(plan)
    for count in range(20 if solver == "subspace" else 1):  # which starts from the basis before
        stored, _ = source.refresh(plan, stored, g, count)
    for basis in stored.values():
        np.testing.assert_allclose(basis.mT @ basis, np.broadcast_to(np.eye(3), (2, 3, 3)), atol=1e-12)
    r = plan.down(g, stored)
    assert r.shape == plan.projected_shape
    left_out = np.linalg.norm(g - plan.up(r, stored), axis=(-2, -1))
    np.testing.assert_allclose(left_out, np.sqrt((s[3:] ** 2).sum()), rtol=1e-6)
    np.testing.assert_allclose(plan.down(plan.up(r, stored), stored), r, atol=1e-12)


def test_larger_and_smaller_sides() -> None:
    sides = lambda shape, side: plan_of(shape, 2, side).sides
    assert sides((4, 6), "smaller") == sides((6, 4), "larger") == sides((5, 5), "smaller") == ("in",)
    assert sides((6, 4), "smaller") == sides((4, 6), "larger") == sides((5, 5), "larger") == ("out",)


G = list(RANDOM.normal(size=(6, 6, 9)))
W = RANDOM.normal(size=(6, 9))


def updates_of(tx: optax.GradientTransformation, grads: list = G, w: jax.Array | None = W) -> list:
    state, out = tx.init(grads[0]), []
    for g in grads:
        u, state = tx.update(g, state, w)
        out.append(np.asarray(u))
    return out


def close(got: list, wanted: list, atol: float = 1e-12) -> None:
    for a, b in zip(got, wanted, strict=True):
        np.testing.assert_allclose(a, b, atol=atol, rtol=0)


@pytest.mark.parametrize("solver", SOLVERS)
def test_full_rank_descent_is_descent(solver: str) -> None:
    sgd = optax.sgd(0.1, momentum=0.9)
    close(updates_of(jlora.optim.galore(sgd, 6, scale=1.0, period=10, solver=solver)), updates_of(sgd))
    close(
        updates_of(jlora.optim.galore(sgd, 6, scale=1.0, period=2, solver=solver, transport="rotate")), updates_of(sgd)
    )
    close(updates_of(jlora.optim.dct(sgd, 6)), updates_of(sgd))


def test_gradients_in_one_subspace() -> None:
    """Of dimension r: nothing is lost, whatever is refreshed, if the momentum is rotated along."""
    basis = np.linalg.qr(RANDOM.normal(size=(6, 2)))[0]
    grads = [basis @ basis.T @ g for g in G]
    sgd = optax.sgd(0.1, momentum=0.9)
    close(
        updates_of(jlora.optim.galore(sgd, 2, scale=1.0, period=2, transport="rotate"), grads), updates_of(sgd, grads)
    )
    kept = updates_of(jlora.optim.galore(sgd, 2, scale=1.0, period=2, transport="keep"), grads)
    assert np.abs(kept[-1] - updates_of(sgd, grads)[-1]).max() > 1e-3


def test_update_lies_in_the_basis_until_it_is_renewed() -> None:
    tx = jlora.optim.galore(optax.adam(0.1), 2, period=3)
    state, bases = tx.init(W), []
    for g in G:
        u, state = tx.update(g, state)
        p = state.stored["in"]
        bases.append(np.asarray(p))
        np.testing.assert_allclose(p @ (p.T @ u), u, atol=1e-12)
    assert all(np.array_equal(bases[i], bases[i - i % 3]) for i in range(6)) and not np.array_equal(bases[0], bases[3])


def test_transport_of_second_moments_stays_positive_and_reset_resets() -> None:
    for how in ("rotate", "reset"):
        tx = jlora.optim.galore(optax.adam(0.1), 2, period=2, transport=how)
        state = tx.init(W)
        for g in G[:2]:
            _, state = tx.update(g, state)
        old = state
        _, state = tx.update(G[2], state)
        r, z = state.stored["in"].T @ G[2], state.stored["in"].T @ old.stored["in"]
        adam_of = lambda s: s.inner[0]
        m, v = (z @ adam_of(old).mu, (z * z) @ adam_of(old).nu) if how == "rotate" else (0.0, 0.0)
        np.testing.assert_allclose(adam_of(state).mu, 0.9 * m + 0.1 * r, atol=1e-12)
        np.testing.assert_allclose(adam_of(state).nu, 0.999 * v + 0.001 * r * r, atol=1e-12)


def test_weight_decay_acts_on_the_weight_itself() -> None:
    """Neither projected nor scaled; a schedule's value; and only where the inner mask has it."""
    rate = lambda step: 0.1 / (step + 1)
    plain = updates_of(jlora.optim.galore(optax.adam(rate), 2))
    decayed = updates_of(jlora.optim.galore(optax.adamw(rate, weight_decay=0.3), 2))
    close(decayed, [u - 0.1 / (i + 1) * 0.3 * np.asarray(W) for i, u in enumerate(plain)])
    close(updates_of(jlora.optim.galore(optax.adamw(rate, weight_decay=0.3, mask=False), 2)), plain)


def test_contrib_galore_agrees() -> None:
    """optax's own projects the larger side, and decomposes in float32. One period: signs matter to kept moments."""
    contrib = pytest.importorskip("optax.contrib")
    if not hasattr(contrib, "scale_by_galore"):
        pytest.skip("an optax without GaLore")
    theirs = contrib.scale_by_galore(rank=3, update_proj_gap=10, base_optimizer=optax.scale_by_adam())
    for grads in (G, [g.T for g in G]):
        ours = jlora.optim.galore(optax.scale_by_adam(), 3, period=10, scale=1.0, side="larger", solver="svd")
        close(updates_of(ours, grads, None), updates_of(theirs, grads, None), atol=2e-6)


def test_fira_around_descent_is_descent() -> None:
    for residual, scale in (("reference", 0.25), ("orthogonal", 1.0)):
        tx = jlora.optim.scale_by_fira(optax.identity(), 2, scale=scale, residual=residual, limit=1e9)
        close(updates_of(tx), G, atol=1e-6)  # the 1e-8 beside the norms


def test_fira_at_full_rank_is_galore_and_its_residual_is_orthogonal() -> None:
    inner = adam.raw_adam()
    for solver in SOLVERS:
        same = dict(scale=1.0, period=10, solver=solver)
        full = jlora.optim.scale_by_fira(inner, 6, **same), jlora.optim.galore(inner, 6, **same)
        close(*(updates_of(tx) for tx in full))
    tx = jlora.optim.scale_by_fira(inner, 2, scale=0.0, residual="orthogonal")
    state = tx.init(W)
    u, state = tx.update(G[0], state)
    np.testing.assert_allclose(state.stored["in"].T @ u, 0, atol=1e-12)


def test_growth_is_limited_for_each_matrix() -> None:
    s, before = jnp.asarray(RANDOM.normal(size=(3, 4, 5))), jnp.array([-1.0, 0.5, 100.0])
    limited, norm = limit_growth(s, before, 1.01)
    close([limited[0], limited[2]], [s[0], s[2]])
    np.testing.assert_allclose(np.linalg.norm(limited[1]), 1.01 * (0.5 + 1e-8))
    np.testing.assert_allclose(norm, np.linalg.norm(limited, axis=(1, 2)))


def test_apollo_formula() -> None:
    """Against numpy, with the projections it drew."""
    for per, g in itertools.product(("channel", "tensor"), (G, [g.T for g in G])):
        tx = jlora.optim.scale_by_apollo(rank=2, per=per, scale=4.0, period=3)
        state = tx.init(g[0])
        plan = plan_of(g[0].shape, 2, "smaller")
        m = v = 0.0
        before = None
        for step, grad in enumerate(g):
            ((side, p),) = Gaussian(0, 3).basis(plan, (), step).items()
            r = p.T @ grad if side == "in" else grad @ p
            m, v = 0.9 * m + 0.1 * r, 0.999 * v + 0.001 * r * r
            axis = (0, 1) if per == "tensor" else (0 if side == "in" else 1)
            norm = lambda x: np.linalg.norm(x, axis=axis, keepdims=True)  # noqa: B023
            s = grad * norm(m / (np.sqrt(v) + 1e-6)) / (norm(r) + 1e-8)
            size = np.linalg.norm(s)
            if before is not None and size / (before + 1e-8) > 1.01:
                s = s * 1.01 * (before + 1e-8) / size
            before = np.linalg.norm(s)
            u, state = tx.update(grad, state)
            np.testing.assert_allclose(u, 2 * s, rtol=1e-10)
        assert state.stored == ()


@pytest.mark.parametrize("size", [1, 2, 7, 8])
def test_cosine_matrix(size: int) -> None:
    q = dct_columns(size, jnp.arange(size), jnp.float64)
    np.testing.assert_allclose(q.T @ q, np.eye(size), atol=1e-14)
    x = RANDOM.normal(size=(3, size))
    np.testing.assert_allclose(x @ q, jax.scipy.fft.dct(jnp.asarray(x), norm="ortho"), atol=1e-13)


@pytest.mark.parametrize("axis", [-1, -2])
@pytest.mark.parametrize("size", [7, 64, 96, 200])
def test_cosine_transform_in_halves(size: int, axis: int) -> None:
    x = RANDOM.normal(size=(2, 3, size) if axis == -1 else (2, size, 3))
    found = np.zeros_like(x)
    for index, part in cosine_transform(jnp.asarray(x), axis):
        found[(..., index) if axis == -1 else (..., index, slice(None))] = part
    np.testing.assert_allclose(found, jax.scipy.fft.dct(jnp.asarray(x), norm="ortho", axis=axis), atol=1e-12)


def test_columns_are_the_best_ones() -> None:
    """By the l2 norm no other set of columns leaves less out; what is left out is the sum of the others' squares."""
    for g in (G[0], G[0].T):
        plan, source = plan_of(g.shape, 2, "smaller"), Columns("l2")
        index, r = source.refresh(plan, source.init(plan), g, 0)
        np.testing.assert_allclose(r, plan.down(g, source.basis(plan, index, 0)), atol=1e-13)
        left_out = lambda i: float(jnp.linalg.norm(g - plan.up(plan.down(g, b := source.basis(plan, i, 0)), b)))  # noqa: B023
        sets = [jnp.array(i) for i in itertools.combinations(range(6), 2)]
        assert left_out(index) == pytest.approx(min(left_out(i) for i in sets), abs=1e-12)


def test_error_feedback_loses_nothing() -> None:
    """What was applied and what is kept add up to the gradients."""
    tx = jlora.optim.dct(optax.identity(), 2, error_feedback=True)
    state, applied = tx.init(W), 0.0
    for g in G:
        u, state = tx.update(g, state)
        applied = applied + u
    np.testing.assert_allclose(applied + state.extra, sum(G), atol=1e-12)


def test_moments_follow_their_columns() -> None:
    """Momentum of columns that stay chosen goes on; the others begin at zero."""
    tx = jlora.optim.dct(optax.trace(0.5), 2, norm="l2")
    q = dct_columns(6, jnp.arange(6), jnp.float64)
    row = lambda i: q[:, i : i + 1] * jnp.ones((1, 9))
    state = tx.init(W)
    _, state = tx.update(row(1) + row(4), state)
    u, state = tx.update(row(4) + row(0), state)
    np.testing.assert_array_equal(state.stored, [0, 4])
    np.testing.assert_allclose(u, 1.5 * row(4) + row(0), atol=1e-12)


def newton_schulz(x: np.ndarray) -> np.ndarray:
    x = x / np.linalg.norm(x)
    for _ in range(5):
        square = x @ x.T
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x


def test_trion_formula() -> None:
    """Against numpy, on both sides; and what is applied, made orthogonal or not, and what is kept add up."""
    q = np.asarray(dct_columns(6, jnp.arange(6), jnp.float64))
    for transposed in (False, True):
        turn = lambda x: x.T if transposed else x  # noqa: B023
        tx = jlora.optim.scale_by_trion(2, momentum=0.8, factor="dion")
        state, m, taken = tx.init(turn(W)), np.zeros((6, 9)), 0.0
        for g in G:
            b = m + g
            chosen = np.sort(np.argsort(np.abs(q.T @ b).sum(1))[-2:])
            r = q[:, chosen].T @ b
            m, taken = b - 0.2 * q[:, chosen] @ r, taken + 0.2 * q[:, chosen] @ r
            u, state = tx.update(turn(g), state)
            c = np.sqrt(u.shape[1] / u.shape[0])
            np.testing.assert_allclose(turn(u), c * q[:, chosen] @ newton_schulz(r), atol=1e-6)  # the 1e-7
            np.testing.assert_array_equal(state.stored, chosen)
        np.testing.assert_allclose(turn(state.extra), sum(G) - taken, atol=1e-12)


def test_trion_at_full_rank_is_muon() -> None:
    contrib = pytest.importorskip("optax.contrib")
    for momentum in (0.9, 0.0):
        ours = jlora.optim.scale_by_trion(6, momentum=momentum, factor="none")
        theirs = contrib.scale_by_muon(beta=momentum, nesterov=False)
        close(updates_of(ours), updates_of(theirs), atol=1e-6)
    state = ours.update(G[0], ours.init(W))[1]
    np.testing.assert_allclose(state.extra, 0, atol=1e-12)  # without momentum nothing is kept


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="highest rank possible is 6"):
        jlora.optim.trion(0.1, 7).init({"w": W, "b": jnp.zeros(3)})
    with pytest.raises(ValueError, match="highest rank possible is 6"):
        jlora.optim.galore(optax.adam(0.1), 7).init({"w": W, "b": jnp.zeros(3)})
    with pytest.raises(ValueError, match="static_args"):
        optax.inject_hyperparams(jlora.optim.fira)(learning_rate=0.1, rank=2).init(W)
    for make in (
        lambda: jlora.optim.galore(optax.adam(0.1), solver="qr"),
        lambda: jlora.optim.galore(optax.adam(0.1), side="left"),
        lambda: jlora.optim.galore(optax.adam(0.1), transport="move"),
        lambda: jlora.optim.fira(0.1, residual="none"),
        lambda: jlora.optim.fira(0.1, side="both"),
        lambda: jlora.optim.apollo(0.1, per="row"),
        lambda: jlora.optim.dct(optax.adam(0.1), norm="l3"),
        lambda: jlora.optim.trion(0.1, factor="muon"),
        lambda: jlora.optim.trion(0.1, side="both"),
    ):
        with pytest.raises(ValueError, match="wanted|Choose"):
            make()


def test_useless_gradients_leave_the_basis() -> None:
    """Zeros and what is not finite; each matrix of a stack by itself. ``apply_if_finite`` keeps all state."""
    for make in (jlora.optim.galore, jlora.optim.dct):
        tx = make(optax.sgd(0.1), 2, period=1)
        state = tx.init(jnp.stack([W, W]))
        first = tx.update(jnp.stack(G[:2]), state)[1].stored
        bad = jnp.asarray(G[2]).at[0, 0].set(jnp.nan)
        second = tx.update(jnp.stack([bad, G[3]]), state._replace(stored=first))[1].stored
        ((old, new),) = zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True)
        assert jnp.array_equal(old[0], new[0]) and not jnp.array_equal(old[1], new[1])
        guarded = optax.apply_if_finite(tx, 5)
        state = guarded.init(W)
        u, after = guarded.update(bad, state)
        assert not np.any(u)
        assert all(
            jnp.array_equal(a, b)
            for a, b in zip(*map(jax.tree.leaves, (state.inner_state, after.inner_state)), strict=True)
        )
    tx = jlora.optim.galore(optax.sgd(0.1), 2)
    state = tx.update(jnp.zeros_like(W), tx.init(W))[1]
    np.testing.assert_array_equal(state.stored["in"], np.eye(6, 2))


def test_heads_and_stacks() -> None:
    """A head-split kernel is projected as its matrix; a stack as its matrices."""
    tx = lambda **k: jlora.optim.galore(optax.adam(0.1), 2, period=2, **k)
    heads = tx(axes={"**": jlora.Axes((0,), (1, 2))})
    close(
        [u.reshape(6, 9) for u in updates_of(heads, [g.reshape(6, 3, 3) for g in G], W.reshape(6, 3, 3))],
        updates_of(tx()),
    )
    stacked = updates_of(tx(), [jnp.stack([g, 2 * g[::-1]]) for g in G], None)
    close([u[0] for u in stacked], updates_of(tx()), atol=1e-9)
    close([u[1] for u in stacked], updates_of(tx(), [2 * g[::-1] for g in G]), atol=1e-9)


def test_state_size() -> None:
    """In numbers, counts aside, for matrices [3, 8, 20]: k = 8, K = 20, r = 4."""
    params = {"w": jax.ShapeDtypeStruct((3, 8, 20), jnp.float32)}

    def numbers(tx):
        leaves = jax.tree.leaves(jax.eval_shape(tx.init, params))
        return sum(leaf.size for leaf in leaves if leaf.ndim)

    rate, inner, k, long, r = 0.1, optax.adam(0.1), 8, 20, 4
    assert numbers(jlora.optim.galore(inner, r)) == 3 * (k * r + 2 * long * r)
    assert numbers(jlora.optim.galore(inner, r, side="larger")) == 3 * (long * r + 2 * k * r)
    assert numbers(jlora.optim.galore(inner, r, side="both")) == 3 * (k * r + long * r + 2 * r * r)
    assert numbers(jlora.optim.fira(rate, r)) == 3 * (k * r + 2 * long * r + 1)
    assert numbers(jlora.optim.apollo(rate, r)) == 3 * (2 * long * r + 1)
    assert numbers(jlora.optim.dct(inner, r)) == 3 * (2 * long * r + r)
    assert numbers(jlora.optim.dct(inner, r, error_feedback=True)) == 3 * (2 * long * r + r + k * long)


@pytest.mark.parametrize("transport", projection.TRANSPORTS)
def test_dtypes(transport: str) -> None:
    """Those of the weights, or the one that is asked for, whatever the gradients have; updates as the gradients."""
    for given, wanted in ((None, jnp.bfloat16), (jnp.float32, jnp.float32)):
        tx = jlora.optim.galore(optax.trace(0.9), 2, dtype=given, transport=transport)
        w = jnp.asarray(W, jnp.bfloat16)
        state = tx.init(w)
        for grad in (jnp.float32, jnp.bfloat16):
            u, after = tx.update(jnp.asarray(G[0], grad), state, w)
            assert u.dtype == grad and after.stored["in"].dtype == wanted
            assert after.inner.trace.dtype == state.inner.trace.dtype == wanted
