"""`product`: its gradient is JAX's own, in the dtypes of the arguments, and keeps no x for a constant matrix."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora.kernels import product

pytestmark = pytest.mark.optimized


def arguments(k: int, n: int) -> tuple[jax.Array, jax.Array]:
    x, m = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate([(2, 3, k), (k, n)]))
    return x, m


@pytest.mark.parametrize(("k", "n"), [(4, 9), (9, 4), (1, 5)])
@pytest.mark.parametrize("implementation", [None, "plain"])
def test_gradient(k: int, n: int, implementation: str | None) -> None:
    loss = lambda times: lambda x, m: jnp.sum(jnp.sin(times(x, m)))
    ours = loss(lambda x, m: product(x, m, implementation=implementation))
    for got, wanted in zip(
        jax.grad(ours, (0, 1))(*arguments(k, n)), jax.grad(loss(jnp.matmul), (0, 1))(*arguments(k, n)), strict=True
    ):
        np.testing.assert_allclose(got, wanted, atol=1e-5)


def test_dtypes() -> None:
    x, m = arguments(4, 9)
    x = x.astype(jnp.bfloat16)
    assert product(x, m).dtype == jnp.bfloat16
    assert product(x, m, preferred_element_type=jnp.float32).dtype == jnp.float32
    dx, dm = jax.grad(lambda x, m: jnp.sum(product(x, m)), (0, 1))(x, m)
    assert (dx.dtype, dm.dtype) == (jnp.bfloat16, jnp.float32)


def test_a_constant_matrix_keeps_no_x() -> None:
    x, m = arguments(4, 9)
    _, back = jax.vjp(lambda x: product(x, m), x)
    assert x.shape not in [leaf.shape for leaf in jax.tree.leaves(back)]
