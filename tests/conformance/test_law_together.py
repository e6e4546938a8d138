"""For every method whose products of one activation are computed together: they are those of the merged weights."""

import jax
import jax.numpy as jnp
import pytest
from registry import PRODUCTS, Row, assert_close, effective, moved, normal

import jlora
from jlora.methods import Site

SHAPE = (8, 16)


def branches() -> list:
    site = lambda method: Site(method, jlora.Axes((0,), (1,)), SHAPE)
    kept = [row for row in PRODUCTS if row.method.is_branch(False) and not row.stacked]
    return [pytest.param(row, id=row.name) for row in kept if not row.method.check(site(row.method))]


def model(params: dict, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ params["q"]) * (x @ params["k"])


@pytest.mark.parametrize("row", branches())
def test_products_of_one_activation(row: Row) -> None:
    params = {"q": normal(1, SHAPE) / 2, "k": normal(2, SHAPE) / 2}
    adapted = jlora.adapt(params, row.method, "*", key=jax.random.key(0))
    lifted = jlora.lift(model, on_materialize="error")

    @jax.jit
    def run(adapted, trainable, x):
        with_gradients = lambda fn: jax.value_and_grad(lambda *args: jnp.sin(fn(*args)).sum(), (0, 1))(trainable, x)
        return (
            with_gradients(lambda trainable, x: lifted(adapted.bind(trainable), x)),
            with_gradients(lambda trainable, x: model(effective(adapted.replace(trainable=trainable)), x)),
        )

    assert_close(*run(adapted, moved(adapted.trainable), normal(3, (5, 8))))
