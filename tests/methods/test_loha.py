"""LoHa against its formula, in both of the forms in which it runs, for every kind of product."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from jlora.weight import Params

pytestmark = pytest.mark.usefixtures("x64")

MATRIX, EXPERTS = jlora.Axes((0,), (1,)), jlora.Axes((1,), (2,), stack=(0,))
TABLE, WINDOW = jlora.Axes((0,), (1,), kind="embedding"), jlora.Axes((0, 1, 2), (3,), kind="conv")
IDS = jnp.array([[3, 0, 29], [5, 5, 1]])


def conv(w, x):
    return jax.lax.conv_general_dilated(x, w, (2, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


USES = {
    "linear": ((32, 40), MATRIX, lambda w, x: x @ w, (5, 32)),
    "transposed": ((32, 40), MATRIX, lambda w, x: x @ w.T, (5, 40)),
    "table": ((30, 40), TABLE, lambda w, x: jnp.tanh(w[IDS] * x) @ w.T, (2, 3, 40)),
    "ragged": ((2, 32, 40), EXPERTS, lambda w, x: jax.lax.ragged_dot(x, w, jnp.array([2, 3])), (5, 32)),
    "conv": ((3, 3, 8, 40), WINDOW, conv, (2, 5, 4, 8)),
}


def normal(seed: int, shape: tuple[int, ...]) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def moved(shape, axes, method) -> jlora.Adapted:
    adapted = jlora.adapt({"w": normal(0, shape)}, method, "w", axes={"w": axes}, key=jax.random.key(0))
    noise = lambda leaf: leaf + 0.3 * normal(leaf.size, leaf.shape)
    return adapted.replace(trainable=jax.tree.map(noise, adapted.trainable))


@pytest.mark.parametrize(("rank", "factored"), [(2, True), (3, False)])
@pytest.mark.parametrize("use", USES)
def test_both_forms_are_the_formula(use, rank, factored):
    shape, axes, fn, x_shape = USES[use]
    method, x = jlora.LoHa(rank, alpha=5.0), normal(1, x_shape)
    adapted = moved(shape, axes, method)
    one = jax.tree.map(lambda leaf: leaf[0] if axes.stack else leaf, adapted.trainable["w"])
    assert (method.factors(jnp.zeros(axes.canonical_shape(shape)[1:]), Params(one)) is not None) == factored

    def formula(trainable, x):
        t = trainable["w"]
        delta = 5.0 / rank * (t["a1"] @ t["b1"]) * (t["a2"] @ t["b2"])
        return jnp.sum(jnp.sin(fn(adapted.base["w"] + delta.reshape(shape), x)))

    lifted = jlora.lift(lambda params, x: jnp.sum(jnp.sin(fn(params["w"], x))), on_materialize="error")
    got = jax.jit(jax.value_and_grad(lambda t, x: lifted(adapted.bind(t), x), (0, 1)))(adapted.trainable, x)
    wanted = jax.jit(jax.value_and_grad(formula, (0, 1)))(adapted.trainable, x)
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=1e-10, atol=1e-10), got, wanted)


def test_rank_is_squared_and_the_products_exchange():
    adapted = moved((32, 40), MATRIX, jlora.LoHa(3))
    change = lambda adapted: np.asarray(jlora.merge(adapted)["w"] - adapted.base["w"])
    assert np.linalg.matrix_rank(change(adapted)) == 9
    t = adapted.trainable["w"]
    exchanged = {"a1": t["a2"], "a2": t["a1"], "b1": t["b2"], "b2": t["b1"]}
    np.testing.assert_allclose(change(adapted.replace(trainable={"w": exchanged})), change(adapted), atol=1e-12)


@pytest.mark.parametrize(
    ("shape", "axes", "last"),
    [
        ((3, 2, 8, 6), WINDOW, True),
        ((6, 8, 3, 2), jlora.Axes((1, 2, 3), (0,), kind="conv"), False),
    ],
)
def test_tucker_form(shape, axes, last):
    """Either layout of a kernel: the change at each place of the window is that of the core there."""
    method = jlora.LoHa(2, alpha=3.0, effective_conv=True)
    adapted = moved(shape, axes, method)
    site, t = adapted.sites["w"], {name: np.asarray(leaf) for name, leaf in adapted.trainable["w"].items()}
    assert method.count(site) == 2 * (2 * (8 + 6) + 4 * 6) == sum(leaf.size for leaf in t.values())
    change = np.asarray(jlora.merge(adapted)["w"] - adapted.base["w"])
    change = change if last else change.transpose(2, 3, 1, 0)
    for h in range(3):
        for w in range(2):
            p = 2 * h + w
            at = lambda i, p=p: t[f"t{i}"][p, :, 0] if last else t[f"t{i}"][0, :, p]
            wanted = 1.5 * (t["a1"] @ at(1) @ t["b1"]) * (t["a2"] @ at(2) @ t["b2"])
            np.testing.assert_allclose(change[h, w], wanted, atol=1e-12)
    start = jlora.adapt(adapted.base, method, "w", axes={"w": axes}, key=jax.random.key(0))
    np.testing.assert_array_equal(jlora.merge(start)["w"], adapted.base["w"])
