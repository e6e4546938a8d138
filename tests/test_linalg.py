"""Decompositions that do not wait for each other, and inverses without pivoting."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jlora
from jlora.linalg import factor_svd, inverse, qr
from jlora.methods.oft import cayley

pytestmark = pytest.mark.usefixtures("x64")


def matrices(kind: str, size: int) -> np.ndarray:
    x = np.random.default_rng(0).normal(size=(3, size, size))
    eye = np.eye(size)
    return {
        "skew": eye + 10 * (x - x.mT),
        "definite": x @ x.mT + 1e-3 * eye,
        "triangular": np.triu(x, 1) + 0.5 * eye,
    }[kind]


@pytest.mark.parametrize("size", [1, 2, 9])
@pytest.mark.parametrize("kind", ["skew", "definite", "triangular"])
def test_inverse(kind: str, size: int) -> None:
    m, c = matrices(kind, size), np.random.default_rng(1).normal(size=(3, size, size))
    value = lambda inverse: lambda m: jnp.sum(jnp.sin(inverse(m)) * c)
    np.testing.assert_allclose(inverse(m), np.linalg.inv(m), rtol=1e-9, atol=1e-12)
    wanted = jax.grad(value(jnp.linalg.inv))(m)
    np.testing.assert_allclose(jax.grad(value(inverse))(m), wanted, rtol=1e-7, atol=1e-9 * np.abs(wanted).max())


def test_no_triangular_solves() -> None:
    """XLA's can wait for each other without end."""
    q = matrices("skew", 8) - np.eye(8)
    text = jax.jit(jax.grad(lambda q: jnp.sum(cayley(q) ** 3))).lower(q).as_text()
    assert "custom_call" not in text and "triangular_solve" not in text


@pytest.mark.parametrize("mapped", [0, 1, 2])
def test_qr(mapped: int) -> None:
    w = np.random.default_rng(0).normal(size=(2, 3, 5, 4))
    fn = qr
    for _ in range(mapped):
        fn = jax.vmap(fn)
    q, r = jax.jit(fn)(w)
    np.testing.assert_allclose(q @ r, w, atol=1e-14)
    wanted = np.linalg.qr(w)
    np.testing.assert_allclose(np.abs(q), np.abs(wanted.Q), atol=1e-13)
    np.testing.assert_allclose(np.abs(r), np.abs(wanted.R), atol=1e-13)


def galore(solver: str):
    tx = jlora.optim.galore(optax.adam(1e-3), 2, solver=solver)
    params = {name: jnp.ones((3, 80, 90)) for name in "abc"}
    return jax.jit(tx.update), (params, tx.init(params))


CALLS = {
    "vmap of a stack": lambda: (jax.jit(jax.vmap(qr)), (jnp.ones((2, 3, 4, 4)),)),
    "factor_svd": lambda: (factor_svd, (jnp.ones((3, 5, 2)), jnp.ones((3, 2, 4)))),
    "subspace iteration": lambda: galore("subspace"),
    "randomized": lambda: galore("randomized"),
}


@pytest.mark.parametrize("name", CALLS)
def test_no_decompositions_of_stacks(name: str) -> None:
    """Those of LAPACK can wait for each other without end."""
    fn, args = CALLS[name]()
    text = fn.lower(*args).as_text()
    shapes = re.findall(r"custom_call @lapack_\wgeqrf_ffi.*?: \(tensor<([\dx]+)x?f", text)
    assert shapes, "no QR in the program"
    assert all(shape.strip("x").count("x") == 1 for shape in shapes), shapes
