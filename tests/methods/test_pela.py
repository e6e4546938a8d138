"""PELA against NumPy's SVD, and the smaller model without its weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora

pytestmark = pytest.mark.usefixtures("x64")

RANDOM = np.random.default_rng(0)
W, LAYERS, X = RANDOM.normal(size=(10, 15)), RANDOM.normal(size=(3, 15, 15)) / 4, RANDOM.normal(size=(4, 10))
PARAMS = {"first": {"kernel": W}, "layers": {"kernel": LAYERS}}
AXES = {"layers/kernel": jlora.Axes((1,), (2,), stack=(0,))}
OPTIONS = dict(targets="**/kernel", axes=AXES)


def model(params, x):
    y, _ = jax.lax.scan(
        lambda y, w: (y + jnp.tanh(y @ w), None), x @ params["first"]["kernel"], params["layers"]["kernel"]
    )
    return y


def params():
    return jax.tree.map(jnp.asarray, PARAMS)  # in the 64 bits that tests switch on


def best(w: np.ndarray, rank: int) -> np.ndarray:
    u, s, vh = np.linalg.svd(w, full_matrices=False)
    return (u * s)[..., :rank] @ vh[..., :rank, :] if w.ndim == 2 else np.stack([best(each, rank) for each in w])


def test_is_the_best_pair_of_its_rank() -> None:
    adapted = jlora.adapt(params(), jlora.PELA(2.0), **OPTIONS, key=jax.random.key(0))
    pair = adapted.trainable["first/kernel"]
    assert pair.rank == 10 * 15 // (2 * (10 + 15)) == 3 and adapted.trainable["layers/kernel"].rank == 3
    np.testing.assert_allclose(pair.product(), best(W, 3), atol=1e-12)
    np.testing.assert_allclose(np.sum(pair.a**2, axis=0), np.sum(pair.b**2, axis=1), rtol=1e-10)
    tail = np.linalg.svd(W, compute_uv=False)[3:]
    np.testing.assert_allclose(np.sum((np.asarray(pair.product()) - W) ** 2), np.sum(tail**2), rtol=1e-10)
    merged = jlora.merge(adapted)
    np.testing.assert_allclose(merged["layers"]["kernel"], best(LAYERS, 3), atol=1e-12)
    whole = jlora.adapt(params(), jlora.PELA(0.1), **OPTIONS, key=jax.random.key(0))
    np.testing.assert_allclose(jlora.merge(whole)["first"]["kernel"], W, atol=1e-12)


@pytest.mark.optimized
def test_factorize_keeps_nothing_of_the_weights() -> None:
    small = jlora.factorize(params(), 2.0, **OPTIONS)
    beside = jlora.adapt(params(), jlora.PELA(2.0), **OPTIONS, key=jax.random.key(0))
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(small.base)) == 0
    lifted, x = jlora.lift(model, on_materialize="error"), jnp.asarray(X)
    loss = lambda adapted: lambda t: jnp.sum(jnp.sin(lifted(adapted.bind(t), x)))
    merged = jlora.merge(small)
    np.testing.assert_allclose(lifted(small.bind(), x), model(merged, x), atol=1e-12)
    assert merged["layers"]["kernel"].shape == LAYERS.shape and merged["layers"]["kernel"].dtype == LAYERS.dtype
    got, wanted = (jax.jit(jax.value_and_grad(loss(each)))(beside.trainable) for each in (small, beside))
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, atol=1e-10), got, wanted)
    compiled = jax.jit(loss(small)).lower(small.trainable).compile()
    assert "f64[10,15]" not in compiled.as_text() and "f64[15,15]" not in compiled.as_text()
    assert "first/kernel" in jlora.summary(small)


def test_factorize_plans_without_numbers() -> None:
    small = jlora.factorize(jax.eval_shape(params), 2.0, **OPTIONS)
    concrete = jlora.factorize(params(), 2.0, **OPTIONS)
    assert jax.tree.structure(small) == jax.tree.structure(concrete)
    shapes = lambda tree: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)
    assert shapes(small) == shapes(concrete)


def test_a_convolution_becomes_two() -> None:
    kernel, x = RANDOM.normal(size=(3, 3, 4, 8)), jnp.asarray(RANDOM.normal(size=(1, 5, 5, 4)))
    conv = lambda params, x: jax.lax.conv_general_dilated(
        x, params["w"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    small = jlora.factorize({"w": jnp.asarray(kernel)}, 3.0, "w", fn=conv, args=(x,))
    rank = 36 * 8 // (3 * 44)
    assert small.trainable["w"].rank == rank
    wanted = conv({"w": jnp.asarray(best(kernel.reshape(36, 8), rank).reshape(kernel.shape))}, x)
    np.testing.assert_allclose(jlora.lift(conv, on_materialize="error")(small.bind(), x), wanted, atol=1e-12)


def test_errors() -> None:
    with pytest.raises(ValueError, match="positive number"):
        jlora.PELA(0)
    with pytest.raises(ValueError, match="at most 6"):
        jlora.factorize(params(), 7.0, **OPTIONS)
