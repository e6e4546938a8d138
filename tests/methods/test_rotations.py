"""The methods that rotate: OFT, BOFT, HRA and RoAd against dense matrices in numpy, and what their papers promise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from jlora.adapt import build
from jlora.methods import Follow, Method, Site, oft
from jlora.weight import Params

pytestmark = pytest.mark.usefixtures("x64")
RNG = np.random.default_rng(0)
W, X = RNG.normal(size=(16, 12)), RNG.normal(size=(5, 16))


def adapted(method: Method, trainable: dict) -> jlora.Adapted:
    start = jlora.adapt({"kernel": jnp.asarray(W)}, method, "kernel", key=jax.random.key(0))
    assert jax.tree.map(jnp.shape, start.trainable["kernel"]) == jax.tree.map(np.shape, trainable)
    return start.replace(trainable={"kernel": jax.tree.map(jnp.asarray, trainable)})


def check(method: Method, trainable: dict, wanted: np.ndarray) -> None:
    """Forward pass, transposed one and merged weight are those of the wanted matrix."""
    one = adapted(method, trainable)
    run = jlora.lift(lambda p, x: (x @ p["kernel"], (x @ W) @ p["kernel"].T), on_materialize="error")
    for got, y in zip(run(one.bind(), jnp.asarray(X)), (X @ wanted, X @ W @ wanted.T), strict=True):
        np.testing.assert_allclose(got, y, atol=1e-12)
    np.testing.assert_allclose(jlora.merge(one)["kernel"], wanted, atol=1e-12)


def dense(blocks: np.ndarray) -> np.ndarray:
    n, size, _ = blocks.shape
    out = np.zeros((n * size, n * size))
    for i, block in enumerate(blocks):
        out[i * size : (i + 1) * size, i * size : (i + 1) * size] = block
    return out


def cayley(q: np.ndarray) -> np.ndarray:
    return (np.eye(len(q)) - q) @ np.linalg.inv(np.eye(len(q)) + q)


def skew(entries: np.ndarray, size: int) -> np.ndarray:
    q = np.zeros((size, size))
    q[np.triu_indices(size, 1)] = entries
    return q - q.T


@pytest.mark.parametrize("share", [False, True])
def test_oft(share: bool) -> None:
    q = RNG.normal(size=(1 if share else 4, 6))
    r = dense(np.array([cayley(skew(q[0 if share else i], 4)) for i in range(4)]))
    np.testing.assert_allclose(r @ r.T, np.eye(16), atol=1e-12)
    check(jlora.OFT(4, share=share, neumann=None), {"q": q}, r @ W)
    check(jlora.OFT(blocks=4, share=share, neumann=None), {"q": q}, r @ W)


def test_cayley_gradient_is_that_of_the_solve() -> None:
    q, eye = jnp.asarray(RNG.normal(size=(2, 3, 3))), jnp.eye(3)
    solved = lambda q: jnp.linalg.solve(eye + q, eye - q)
    gradient = lambda fn: jax.grad(lambda q: jnp.sum(jnp.sin(fn(q))))(q)
    np.testing.assert_allclose(gradient(oft.cayley), gradient(solved), rtol=1e-10)


def test_oft_neumann_is_the_inverse_rotation_as_far_as_its_terms_go() -> None:
    q = RNG.normal(size=(4, 6)) / 20
    exact = dense(np.array([cayley(skew(v, 4)) for v in q])).T @ W
    errors = []
    for terms in (4, 6, 8):
        merged = jlora.merge(adapted(jlora.OFT(4, neumann=terms), {"q": q}))["kernel"]
        errors.append(np.abs(merged - exact).max())
    assert errors[2] < errors[1] / 10 < errors[0] / 100


def test_constrained_oft() -> None:
    q = RNG.normal(size=(4, 6))
    method = jlora.OFT(4, coft=0.1)
    one = adapted(method, {"q": q})
    kept = method.project(Params(one.trainable["kernel"]))
    np.testing.assert_allclose(np.sqrt(2) * np.linalg.norm(kept["q"], axis=1), 0.1 / 2, rtol=1e-6)
    again = method.project(Params(kept))
    np.testing.assert_allclose(again["q"], kept["q"], rtol=1e-12)
    np.testing.assert_allclose(
        jlora.merge(one)["kernel"], jlora.merge(one.replace(trainable={"kernel": kept}))["kernel"], atol=1e-12
    )
    grads = jax.grad(lambda t: jlora.merge(one.replace(trainable=t))["kernel"][0, 0])(one.trainable)
    assert np.abs(grads["kernel"]["q"]).max() > 0  # as if q were where it is drawn back to


@pytest.mark.parametrize(
    ("eps", "blocks", "bound"),
    [
        (6e-05, 2, 4.242640352458693e-05),
        (6e-05, 4, 2.9999999242136255e-05),
        (0.1, 8, 0.035355340689420700),
        (1e-4, 7, 3.7796449760207906e-05),
    ],
)
def test_bound_of_constrained_oft(eps: float, blocks: int, bound: float) -> None:
    """As PEFT 0.21.2 has it with torch 2.13.0: the reciprocal root of the number of blocks, times eps, in float32."""
    q = jnp.asarray(RNG.normal(size=(blocks, 6)))
    kept = jlora.OFT(4, coft=eps).project(Params({"q": q}))["q"]
    np.testing.assert_allclose(np.sqrt(2) * np.linalg.norm(kept, axis=1), bound, rtol=1e-12)


@pytest.mark.parametrize("rank", [1, 3, 4])
def test_hra(rank: int) -> None:
    u, wanted = RNG.normal(size=(16, rank)), W
    for column in u.T:
        wanted = wanted - 2 * np.outer(column, column @ wanted) / (column @ column)
    check(jlora.HRA(rank), {"u": u}, wanted)
    np.testing.assert_allclose(wanted.T @ wanted, W.T @ W, atol=1e-12)  # all angles and lengths are kept
    assert np.linalg.matrix_rank(wanted - W, tol=1e-9) == rank
    q, _ = np.linalg.qr(u)
    check(jlora.HRA(rank, orthogonal=True), {"u": u}, W - 2 * q @ (q.T @ W))


def test_butterfly() -> None:
    """Four blocks of four, three levels: every input meets every other, and nothing is stretched."""
    q, s, rotation = RNG.normal(size=(3, 4, 4, 4)), RNG.normal(size=12), np.eye(16)
    for level in range(3):
        # The halves of blocks in groups of 2^level blocks: the even ones first.
        halves = np.arange(16).reshape(-1, 2**level, 2, 2)
        p = np.eye(16)[halves.swapaxes(1, 2).reshape(-1)]
        blocks = np.array([cayley((v - v.T) / 2) for v in q[level]])
        rotation = p @ dense(blocks) @ p.T @ rotation
    np.testing.assert_allclose(rotation @ rotation.T, np.eye(16), atol=1e-12)
    assert np.abs(rotation).min() > 0
    check(jlora.BOFT(4, levels=3), {"q": q, "s": s}, rotation @ W * s)
    check(jlora.BOFT(blocks=4, levels=3), {"q": q, "s": s}, rotation @ W * s)


@pytest.mark.parametrize("variant", [1, 2, 4])
def test_road(variant: int) -> None:
    theta, alpha = RNG.normal(size=6 * variant), RNG.normal(size=6 * variant)
    wanted = np.zeros_like(W)
    for group in range(3):
        for i in range(2):
            first, second = 4 * group + i, 4 * group + i + 2
            if variant == 1:
                at = [(2 * group + i,) * 2] * 2
            elif variant == 2:
                at = [(first, first), (second, second)]
            else:
                at = [(8 * group + j, 8 * group + 4 + j) for j in (i, i + 2)]
            (c1, s1), (c2, s2) = [(alpha[c] * np.cos(theta[c]), alpha[s] * np.sin(theta[s])) for c, s in at]
            wanted[:, first] = c1 * W[:, first] - s1 * W[:, second]
            wanted[:, second] = s2 * W[:, first] + c2 * W[:, second]
    check(jlora.RoAd(variant, group_size=4), {"theta": theta, "alpha": alpha}, wanted)


def test_a_bias_that_follows() -> None:
    """PEFT's RoAd: the product and the bias are rotated together, layer by layer where they are stacked."""
    method, stacked = jlora.RoAd(group_size=4), jlora.Axes((1,), (2,), (0,))
    params = {"kernel": jnp.asarray(RNG.normal(size=(3, 16, 12))), "bias": jnp.asarray(RNG.normal(size=(3, 12)))}
    sites = {
        "kernel": Site(method, stacked, (3, 16, 12)),
        "bias": Site(Follow(group="kernel", method=method, n_stack=1), None, (3, 12)),
    }
    one = build(params, sites, key=jax.random.key(0))
    own = {"theta": jnp.asarray(RNG.normal(size=(3, 6))), "alpha": jnp.asarray(RNG.normal(size=(3, 6)))}
    one = one.replace(trainable=one.trainable | {"kernel": own})
    assert sum(leaf.size for leaf in jax.tree.leaves(one.trainable)) == 36
    run = lambda p, x: jnp.einsum("bi,lio->lbo", x, p["kernel"]) + p["bias"][:, None]
    y = jlora.lift(run, on_materialize="error")(one.bind(), jnp.asarray(X))
    rows = jlora.merge(one.replace(base=params | {"kernel": jnp.concatenate([run(params, X)[:, :4]] * 4, axis=1)}))
    np.testing.assert_allclose(y[:, :4], rows["kernel"][:, :4], atol=1e-12)
    np.testing.assert_allclose(y, run(jlora.merge(one), jnp.asarray(X)), atol=1e-12)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (jlora.OFT(5), "block_size 5 does not divide 16 inputs; 4 does"),
        (jlora.OFT(blocks=7), "blocks 7 does not divide 16 inputs; 8 does"),
        (jlora.BOFT(3), "block_size 3 does not divide 16 inputs; the nearest that does is 2"),
        (jlora.BOFT(4, levels=4), "4 blocks of 4, which allow 3"),
        (jlora.HRA(17, orthogonal=True), "at most 16"),
        (jlora.RoAd(group_size=8), "group_size 8 does not divide 12 outputs; the nearest that does is 6|12"),
    ],
)
def test_sizes_that_do_not_fit(method: Method, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        adapted(method, {})
    assert jlora.OFT(5, adjust=True).sizes(16) == (4, 4)


def test_vocabularies_are_not_rotated() -> None:
    for method in (jlora.OFT(2), jlora.BOFT(2), jlora.HRA(2)):
        with pytest.raises(ValueError, match="vocabulary"):
            jlora.adapt({"embedding": jnp.zeros((8, 4))}, method, "embedding", key=jax.random.key(0))
