"""The dense middle against formulas in float64 NumPy, and what the papers say of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from jlora.linalg import truncated_svd

pytestmark = pytest.mark.usefixtures("x64")

RANDOM = np.random.default_rng(0)
W, X = RANDOM.normal(size=(7, 5)), RANDOM.normal(size=(4, 7))
CORE = RANDOM.normal(size=(3, 3))


def adapt(method, w=W):
    return jlora.adapt({"kernel": jnp.asarray(w)}, method, key=jax.random.key(0))


def delta(adapted) -> np.ndarray:
    return np.asarray(jlora.merge(adapted)["kernel"]) - np.asarray(adapted.base["kernel"])


def with_middle(adapted, middle):
    return adapted.replace(trainable={"kernel": adapted.trainable["kernel"] | {"middle": jnp.asarray(middle)}})


def gradient_of_middle(adapted):
    """(dL/dM of the lifted model, dL/dW of the merged one) for L = sum sin(x W)."""
    run = jlora.lift(lambda params: jnp.sum(jnp.sin(jnp.asarray(X) @ params["kernel"])), on_materialize="error")
    grads = jax.grad(lambda trainable: run(adapted.bind(trainable)))(adapted.trainable)
    y = X @ np.asarray(jlora.merge(adapted)["kernel"])
    return grads["kernel"]["middle"], X.T @ np.cos(y)


def test_lora_xs() -> None:
    """delta = s U S M V^T in the leading singular spaces, and the gradient of M is s A^T G B^T."""
    start = adapt(jlora.LoRAXS(3, alpha=6.0))
    u, s, vh = np.linalg.svd(W, full_matrices=False)
    sign = np.sign(u[np.abs(u).argmax(0), np.arange(5)])
    a, b = (u * s * sign)[:, :3], (vh * sign[:, None])[:3]
    np.testing.assert_allclose(start.frozen["kernel"]["a"], a, atol=1e-12)
    np.testing.assert_allclose(start.frozen["kernel"]["b"], b, atol=1e-12)
    assert list(start.trainable["kernel"]) == ["middle"]
    np.testing.assert_array_equal(start.trainable["kernel"]["middle"], 0.0)
    adapted = with_middle(start, CORE)
    np.testing.assert_allclose(delta(adapted), 2.0 * a @ CORE @ b, atol=1e-12)
    got, of_weight = gradient_of_middle(adapted)
    np.testing.assert_allclose(got, 2.0 * a.T @ of_weight @ b.T, atol=1e-12)


def test_noise_of_the_start() -> None:
    middle = adapt(jlora.LoRAXS(3, start_std=1e-5)).trainable["kernel"]["middle"]
    assert 1e-6 < np.abs(middle).mean() < 2e-5


def test_lora_sb_starts_at_the_best_approximation_of_the_update() -> None:
    """And a step on M moves the weight by the projection of the step on the whole weight, at scale 1."""
    gradient = RANDOM.normal(size=W.shape)
    update = {"kernel": jnp.asarray(-0.1 * np.sign(gradient))}
    adapted = jlora.adapt(update, jlora.LoRAXS(3, alpha=3.0, start="update"), key=jax.random.key(0))
    adapted = adapted.replace(base={"kernel": jnp.asarray(W)})
    u, s, vh = np.linalg.svd(-0.1 * np.sign(gradient), full_matrices=False)
    np.testing.assert_allclose(delta(adapted), (u * s)[:, :3] @ vh[:3], atol=1e-12)
    got, of_weight = gradient_of_middle(adapted)
    stepped = with_middle(adapted, adapted.trainable["kernel"]["middle"] - 0.01 * got)
    wanted = -0.01 * u[:, :3] @ u[:, :3].T @ of_weight @ vh[:3].T @ vh[:3]
    np.testing.assert_allclose(delta(stepped) - delta(adapted), wanted, atol=1e-12)
    other = jlora.adapt(update, jlora.LoRAXS(3, alpha=7.0, start="update"), key=jax.random.key(0))
    np.testing.assert_allclose(delta(other), delta(adapted), atol=1e-12)


def test_slora_with_the_identity_is_lora() -> None:
    adapted = adapt(jlora.SLoRA(3, alpha=6.0))
    p = adapted.trainable["kernel"]
    b = RANDOM.normal(size=(3, 5))
    adapted = adapted.replace(trainable={"kernel": p | {"middle": jnp.eye(3), "b": jnp.asarray(b)}})
    np.testing.assert_allclose(delta(adapted), 2.0 * np.asarray(p["a"]) @ b, atol=1e-12)
    assert np.abs(p["a"]).max() <= 7**-0.5 and 0 < np.abs(p["middle"]).max() <= 3**-0.5


@pytest.mark.parametrize("method", [jlora.NLoRA, jlora.IntTune])
def test_nystrom_blocks(method) -> None:
    """The authors' blocks, displaced without the residual, at the base with it; and what training adds to them."""
    blocks = W[:, :3], W[:3, :3], W[:3]
    product = lambda a, m, b: 2.0 * a @ m @ b
    adapted = adapt(method(3, alpha=6.0, residual=False))
    np.testing.assert_allclose(delta(adapted), product(*blocks), atol=1e-12)
    adapted = adapt(method(3, alpha=6.0))
    np.testing.assert_allclose(delta(adapted), 0.0, atol=1e-12)
    moved = with_middle(adapted, CORE)
    np.testing.assert_allclose(delta(moved), product(blocks[0], CORE, blocks[2]) - product(*blocks), atol=1e-12)
    x = jnp.asarray(X)
    run = jlora.lift(lambda params: x @ params["kernel"], on_materialize="error")
    np.testing.assert_allclose(run(moved.bind()), X @ (W + delta(moved)), atol=1e-12)


def test_nystrom_formula_is_exact_for_a_matrix_of_the_rank() -> None:
    w = RANDOM.normal(size=(7, 3)) @ RANDOM.normal(size=(3, 5))
    adapted = adapt(jlora.NLoRA(3, alpha=3.0, start="nystrom_pinv", residual=False), w)
    np.testing.assert_allclose(delta(adapted), w, atol=1e-9)
    np.testing.assert_allclose(delta(adapt(jlora.NLoRA(3, start="nystrom_pinv"), w)), 0.0, atol=1e-9)


@pytest.mark.parametrize("ranks", [(2, 3), (3, 2), (3, 3)])
def test_flora(ranks) -> None:
    r0, r1 = ranks
    adapted = adapt(jlora.FLoRA(r0, 0.5, r1))
    core = CORE[:r0, :r1]
    a, b = (np.asarray(adapted.trainable["kernel"][name]) for name in "ab")
    assert a.shape == (7, r0) and b.shape == (r1, 5)
    np.testing.assert_allclose(delta(with_middle(adapted, core)), 0.5 * a @ core @ b, atol=1e-12)
    wide = adapt(jlora.FLoRA(300, 1.0, 200), np.zeros((1000, 800))).trainable["kernel"]
    assert abs(np.std(wide["a"]) / (0.5 / 300) ** 0.5 - 1) < 0.02
    assert abs(np.std(wide["b"]) / (0.5 / 200) ** 0.5 - 1) < 0.02


def test_frozen_factors_have_no_gradient_of_their_size() -> None:
    """Neither has the backward pass a temporary of the shape of A or B."""
    adapted = jlora.adapt({"kernel": jnp.ones((64, 48))}, jlora.LoRAXS(3, start="random"), key=jax.random.key(0))
    run = jlora.lift(lambda params, x: jnp.sum(jnp.sin(x @ params["kernel"])), on_materialize="error")
    step = jax.grad(lambda trainable, adapted, x: run(adapted.bind(trainable), x))
    text = str(jax.make_jaxpr(step)(adapted.trainable, adapted, jnp.ones((5, 64))))
    made = [line for line in text.splitlines() if "dot_general" in line]
    assert made and not any(f"f64[{m},{n}]" in line for line in made for m, n in ((64, 3), (3, 64), (3, 48), (48, 3)))


def test_truncated_svd_of_a_large_matrix() -> None:
    """Subspace iteration, where the whole decomposition would be waste; and signs that no platform chooses."""
    u, _ = np.linalg.qr(RANDOM.normal(size=(120, 80)))
    v, _ = np.linalg.qr(RANDOM.normal(size=(90, 80)))
    s = 0.9 ** np.arange(80)
    w = (u * s) @ v.T
    got_u, got_s, got_vh = truncated_svd(jnp.asarray(w), 5)
    np.testing.assert_allclose(got_s, s[:5], rtol=1e-9)
    np.testing.assert_allclose((got_u * got_s) @ got_vh, (u * s)[:, :5] @ v[:, :5].T, atol=1e-6)
    np.testing.assert_allclose(got_u.T @ got_u, np.eye(5), atol=1e-10)
    assert np.all(np.take_along_axis(np.asarray(got_u), np.abs(got_u).argmax(0)[None], 0) > 0)


def test_errors() -> None:
    with pytest.raises(ValueError, match="'middle' or 'all'"):
        jlora.LoRAXS(3, train="core")
    with pytest.raises(ValueError, match="one of svd, random"):
        jlora.LoRAXS(3, start="pissa")
    with pytest.raises(ValueError, match="would stay there"):
        jlora.SLoRA(3, train="middle")
    with pytest.raises(ValueError, match="at most 5"):
        adapt(jlora.LoRAXS(6))
    with pytest.raises(ValueError, match="rank 6 is above out = 5"):
        adapt(jlora.FLoRA(7, 1.0, 6))
