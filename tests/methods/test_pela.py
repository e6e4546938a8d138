"""PELA against NumPy's SVD, and the smaller model without its weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from jlora.methods import pela
from jlora.methods.pela import distillation, perturbation

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


def test_distillation() -> None:
    student, teacher = ([RANDOM.normal(size=shape) for shape in ((2, 3), (4, 5))] for _ in range(2))
    wanted = np.mean([np.mean((s - t) ** 2) for s, t in zip(student, teacher, strict=True)])
    np.testing.assert_allclose(distillation(student, teacher), wanted, rtol=1e-14)
    of_student, of_teacher = jax.grad(distillation, (0, 1))(*jax.tree.map(jnp.asarray, (student, teacher)))
    np.testing.assert_allclose(of_student[1], 2 * (student[1] - teacher[1]) / 20 / 2, rtol=1e-12)
    assert not any(g.any() for g in of_teacher)
    half = distillation(jnp.float16(np.full(100, 300.0)), jnp.zeros(100, jnp.float16))  # in more than 16 bits
    assert half == 300.0**2


def test_perturbation(monkeypatch) -> None:
    """The value and its gradient, of products that are formed all at once; here they are in blocks with a remainder."""
    monkeypatch.setattr(pela, "_ROWS", 4)
    adapted = jlora.adapt(params(), jlora.PELA(2.0), **OPTIONS, key=jax.random.key(0))
    weights = [W, *LAYERS]

    def plainly(trainable):
        first, layers = trainable["first/kernel"], trainable["layers/kernel"]
        products = [first.product(), *layers.product()]
        largest = [jnp.max(jnp.abs(p - w)) for p, w in zip(products, weights, strict=True)]
        return sum((each - 0.05) ** 2 for each in largest) / 4

    ours = lambda trainable: perturbation(adapted, trainable, eps=0.05)
    got, wanted = (jax.jit(jax.value_and_grad(fn))(adapted.trainable) for fn in (ours, plainly))
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=1e-12, atol=1e-14), got, wanted)
    assert {int((g != 0).any(-1).sum()) for g in got[1]["layers/kernel"].a} == {1}
    exact = jlora.adapt(params(), jlora.PELA(0.1), **OPTIONS, key=jax.random.key(0))
    assert perturbation(exact, exact.trainable, eps=0.0) < 1e-24
    narrow = jax.tree.map(lambda w: jnp.asarray(w, jnp.float32), PARAMS)
    quantized = jlora.quant.quantize(narrow, jlora.quant.Int8, "first/*", axes={"first/*": jlora.Axes((0,), (1,))})
    adapted = jlora.adapt(quantized, jlora.PELA(2.0), "first/*", key=jax.random.key(0))
    largest = np.abs(adapted.trainable["first/kernel"].product() - quantized["first"]["kernel"].dequantize()).max()
    np.testing.assert_allclose(perturbation(adapted, adapted.trainable, eps=0.0), largest**2, rtol=1e-5)


def test_training_with_the_teacher_comes_closer() -> None:
    """PELA's claim, small: features and weights as a loss lower the error of what the truncated model computes."""
    adapted = jlora.adapt(params(), jlora.PELA(2.0), **OPTIONS, key=jax.random.key(0))
    x = jnp.asarray(RANDOM.normal(size=(64, 10)))
    lifted, teacher = jlora.lift(model, on_materialize="error"), model(adapted.base, x)
    error = lambda t: distillation(lifted(adapted.bind(t), x), teacher)
    loss = lambda t: error(t) + 0.1 * perturbation(adapted, t)
    step = jax.jit(lambda t: jax.tree.map(lambda p, g: p - 0.02 * g, t, jax.grad(loss)(t)))
    trainable = adapted.trainable
    for _ in range(100):
        trainable = step(trainable)
    assert error(trainable) < 0.8 * error(adapted.trainable)


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"shapes \(2, 3\), the teacher's \(3,\)"):
        distillation(np.zeros((2, 3)), np.zeros(3))
    small = jlora.factorize(params(), 2.0, **OPTIONS)
    with pytest.raises(ValueError, match="'first/kernel' is gone"):
        perturbation(small, small.trainable)
    lora = jlora.adapt(params(), jlora.LoRA(2), **OPTIONS, key=jax.random.key(0))
    with pytest.raises(ValueError, match="no leaf is adapted by PELA"):
        perturbation(lora, lora.trainable)
    with pytest.raises(ValueError, match="positive number"):
        jlora.PELA(0)
    with pytest.raises(ValueError, match="at most 6"):
        jlora.factorize(params(), 7.0, **OPTIONS)
