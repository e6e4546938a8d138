"""Inverses without pivoting."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora.linalg import inverse
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
