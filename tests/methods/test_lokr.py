"""LoKr against numpy's Kronecker product, for every kind of product; what is formed on the way; and its sizes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from jlora.methods.lokr import factorization

pytestmark = pytest.mark.usefixtures("x64")

MATRIX, EXPERTS = jlora.Axes((0,), (1,)), jlora.Axes((1,), (2,), stack=(0,))
TABLE, WINDOW = jlora.Axes((0,), (1,), kind="embedding"), jlora.Axes((0, 1, 2), (3,), kind="conv")
IDS = jnp.array([[3, 0, 29], [5, 40, 1]])  # 40 is beyond the table


def conv(w, x):
    return jax.lax.conv_general_dilated(x, w, (2, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


USES = {
    "linear": ((24, 40), MATRIX, lambda w, x: x @ w, (5, 24)),
    "transposed": ((24, 40), MATRIX, lambda w, x: x @ w.T, (5, 40)),
    "clipped": ((30, 40), TABLE, lambda w, x: jnp.tanh(w.at[IDS].get(mode="clip") * x) @ w.T, (2, 3, 40)),
    "filled": ((30, 40), TABLE, lambda w, x: w.at[IDS].get(mode="fill", fill_value=2.0) * x, (2, 3, 40)),
    "ragged": ((2, 24, 40), EXPERTS, lambda w, x: jax.lax.ragged_dot(x, w, jnp.array([2, 3])), (5, 24)),
    "conv": ((3, 3, 12, 40), WINDOW, conv, (2, 5, 4, 12)),
}
METHODS = {
    "low_rank": jlora.LoKr(2, alpha=3.0),
    "both": jlora.LoKr(1, alpha=3.0, decompose_both=True),
    "whole": jlora.LoKr(20, alpha=3.0, zero="second"),
    "factor": jlora.LoKr(20, alpha=3.0, factor=2),
    "tucker": jlora.LoKr(2, alpha=3.0, effective_conv=True),
    "tucker_both": jlora.LoKr(1, alpha=3.0, decompose_both=True, zero="second", effective_conv=True),
}


def normal(seed: int, shape: tuple[int, ...]) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def change(t: dict, scale: float) -> jax.Array:
    """Of one matrix."""
    w1, w2 = (t[f"w{i}"] if f"w{i}" in t else t[f"a{i}"] @ t[f"b{i}"] for i in (1, 2))
    if "t2" in t:
        w2 = jnp.einsum("pjqk,nj,kl->pnql", t["t2"], t["a2"], t["b2"])
    if w2.ndim == 2:
        return scale * jnp.kron(w1, w2)
    return scale * jnp.stack([jnp.kron(w1, w2[i, :, 0]) for i in range(len(w2))])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("use", USES)
def test_every_product(use, method):
    (shape, axes, fn, x_shape), method = USES[use], METHODS[method]
    adapted = jlora.adapt({"w": normal(0, shape)}, method, "w", axes={"w": axes}, key=jax.random.key(0))
    np.testing.assert_array_equal(jlora.merge(adapted)["w"], adapted.base["w"])
    noise = lambda leaf: leaf + 0.3 * normal(leaf.size, leaf.shape)
    adapted, x = adapted.replace(trainable=jax.tree.map(noise, adapted.trainable)), normal(1, x_shape)
    assert method.count(adapted.sites["w"]) == sum(leaf.size for leaf in jax.tree.leaves(adapted.trainable))

    def formula(trainable, x):
        one = lambda t: change(t, 3.0 / method.rank)
        delta = jax.vmap(one)(trainable["w"]) if axes.stack else one(trainable["w"])
        return jnp.sum(jnp.sin(fn(adapted.base["w"] + delta.reshape(shape), x)))

    lifted = jlora.lift(lambda params, x: jnp.sum(jnp.sin(fn(params["w"], x))), on_materialize="error")
    got = jax.jit(jax.value_and_grad(lambda t, x: lifted(adapted.bind(t), x), (0, 1)))(adapted.trainable, x)
    wanted = jax.jit(jax.value_and_grad(formula, (0, 1)))(adapted.trainable, x)
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=1e-10, atol=1e-10), got, wanted)


@pytest.mark.parametrize("method", METHODS)
def test_the_kronecker_product_is_not_formed(method):
    adapted = jlora.adapt({"w": normal(0, (24, 40))}, METHODS[method], "w", key=jax.random.key(0), axes={"w": MATRIX})
    lifted = jlora.lift(lambda params, x: jnp.sum(jnp.sin(x @ params["w"])), on_materialize="error")
    step = jax.jit(jax.grad(lambda t, base, x: lifted(adapted.replace(base=base).bind(t), x)))
    text = step.lower(adapted.trainable, adapted.base, normal(1, (7, 24))).as_text()
    made = [line for line in text.splitlines() if "-> tensor<24x40xf64>" in line or "-> tensor<40x24xf64>" in line]
    assert not [line for line in made if "transpose" not in line]  # of the frozen weight, for dx


def test_rank_multiplies_and_sizes():
    adapted = jlora.adapt(
        {"w": normal(0, (36, 64))}, jlora.LoKr(2, decompose_both=True), "w", key=jax.random.key(0), axes={"w": MATRIX}
    )
    adapted = adapted.replace(trainable=jax.tree.map(lambda leaf: leaf + 0.3, adapted.trainable))
    noise = lambda leaf: leaf + normal(leaf.size, leaf.shape)
    adapted = adapted.replace(trainable=jax.tree.map(noise, adapted.trainable))
    assert np.linalg.matrix_rank(jlora.merge(adapted)["w"] - adapted.base["w"]) == 4
    # By the search as PEFT describes it: the pair with the smallest sum whose first is at most the factor.
    for size in range(1, 200):
        for factor in (-1, 1, 2, 5, 8):
            pairs = [(m, size // m) for m in range(1, size + 1) if size % m == 0 and m * m <= size]
            fitting = [pair for pair in pairs if factor < 0 or pair[0] <= factor]
            wanted = (factor, size // factor) if factor > 0 and size % factor == 0 else min(fitting, key=sum)
            assert factorization(size, factor) == wanted


@pytest.mark.parametrize("bad", [{"rank": 0}, {"factor": 0}, {"factor": -2}, {"zero": "both"}])
def test_bad_values(bad):
    with pytest.raises(ValueError, match="wanted|positive"):
        jlora.LoKr(**bad)


@pytest.mark.parametrize(
    ("shape", "axes", "core"),
    [
        ((3, 2, 12, 40), WINDOW, (6, 2, 1, 2)),
        ((40, 12, 3, 2), jlora.Axes((1, 2, 3), (0,), kind="conv"), (1, 2, 6, 2)),
        ((1, 1, 12, 40), WINDOW, None),
    ],
)
def test_tucker_form(shape, axes, core):
    """A core where there is a window and W_2 has a rank."""
    adapted = jlora.adapt({"w": normal(0, shape)}, METHODS["tucker"], "w", axes={"w": axes}, key=jax.random.key(0))
    shapes = jax.tree.map(jnp.shape, adapted.trainable["w"])
    assert shapes.get("t2") == core and shapes["b2"] == (2, 8)
    assert shapes["a2"] == ((4, 2) if core else (1, 4, 1, 2))
    whole = jlora.adapt(
        {"w": normal(0, shape)}, jlora.LoKr(4, effective_conv=True), "w", axes={"w": axes}, key=jax.random.key(0)
    )
    assert "t2" not in whole.trainable["w"]
