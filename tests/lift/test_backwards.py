"""A window that runs backwards: transposed convolutions as PyTorch, Keras and Haiku define them (a weight's `rev`)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora

X = jax.random.normal(jax.random.key(0), (2, 4, 3, 6))
W = jax.random.normal(jax.random.key(1), (2, 3, 5, 6)) * 0.3  # [*window, out, in], as the forward convolution has it
METHODS = {
    "lora": jlora.LoRA(2),
    "dora": jlora.DoRA(2),
    "vera": jlora.VeRA(3),
    "conv_lora": jlora.ConvLoRA(2),
    "tucker": jlora.TuckerLoRA(2),
    "loha": jlora.LoHa(2),
}


def transposed(params, x):
    return jax.lax.conv_transpose(
        x, params["w"], (2, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), transpose_kernel=True
    )


def moved(adapted):
    keys = iter(jax.random.split(jax.random.key(2), 50))
    return adapted.replace(
        trainable=jax.tree.map(lambda x: x + 0.3 * jax.random.normal(next(keys), x.shape), adapted.trainable)
    )


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_transposed_convolution_equals_the_merged_one(method):
    adapted = moved(jlora.adapt({"w": W}, method, "**", fn=transposed, args=(X,), key=jax.random.key(3)))
    assert adapted.sites["w"].axes == jlora.Axes((0, 1, 3), (2,), kind="conv", features=3)
    assert adapted.sites["w"].features_axis == 2
    lifted = jlora.lift(transposed, on_materialize="error")
    loss = lambda trainable: jnp.sin(lifted(adapted.bind(trainable), X)).sum()
    merged = lambda trainable: jnp.sin(transposed(jlora.merge(adapted.replace(trainable=trainable)), X)).sum()
    got, want = (jax.jit(jax.value_and_grad(fn))(adapted.trainable) for fn in (loss, merged))
    assert abs(want[0] - jnp.sin(transposed({"w": W}, X)).sum()) > 1e-2
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=1e-4, atol=1e-4), got, want)


def test_quantized_transposed_convolution():
    params = jlora.quant.quantize({"w": W}, jlora.quant.Int8, "**", fn=transposed, args=(X,))
    adapted = moved(jlora.adapt(params, jlora.LoRA(2), "**", fn=transposed, args=(X,), key=jax.random.key(3)))
    y = jlora.lift(transposed, on_materialize="error")(adapted.bind(), X)
    np.testing.assert_allclose(y, transposed(jlora.merge(adapted), X), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "fn",
    [
        lambda p, x: x @ p["w"][::-1],
        lambda p, x: p["w"][::-1][jnp.array([0, 2])] @ x.T,
        lambda p, x: x @ jnp.flip(p["w"])[:, 1:3],
        lambda p, x: x @ jnp.flip(p["w"]).reshape(2, 2, 4).reshape(4, 4),
    ],
    ids=["product", "lookup", "slice", "reshape"],
)
def test_elsewhere_a_weight_that_runs_backwards_is_formed_and_said(fn):
    axes = {"w": jlora.Axes((0,), (1,))}
    x = jax.random.normal(jax.random.key(4), (3, 4))
    adapted = moved(jlora.adapt({"w": W[0, 0, :4, :4]}, jlora.LoRA(2), "**", axes=axes, key=jax.random.key(3)))
    with pytest.warns(jlora.MaterializeWarning, match="'w'"):
        got = jlora.lift(fn)(adapted.bind(), x)
    np.testing.assert_allclose(got, fn(jlora.merge(adapted), x), rtol=1e-5, atol=1e-5)


def test_a_reversed_stack_is_formed_and_said():
    fn = lambda p, x: jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["w"][::-1])[0]
    axes = {"w": jlora.Axes((1,), (2,), (0,))}
    x = jax.random.normal(jax.random.key(4), (3, 4))
    w = jax.random.normal(jax.random.key(5), (3, 4, 4))
    adapted = moved(jlora.adapt({"w": w}, jlora.LoRA(2), "**", axes=axes, key=jax.random.key(3)))
    with pytest.warns(jlora.MaterializeWarning, match="'w'.*rev"):
        got = jlora.lift(fn)(adapted.bind(), x)
    np.testing.assert_allclose(got, fn(jlora.merge(adapted), x), rtol=1e-5, atol=1e-5)
