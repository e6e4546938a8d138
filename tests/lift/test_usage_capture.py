"""usage finds out how leaves are used; capture collects what they are used on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora

pytestmark = pytest.mark.usefixtures("x64")
RNG = np.random.default_rng(0)
SHAPES = {"table": (9, 6), "layers": (3, 6, 6), "heads": (6, 2, 4), "back": (2, 4, 6), "conv": (3, 6, 6)}
PARAMS = {name: RNG.normal(size=shape) / 2 for name, shape in SHAPES.items()}
PARAMS |= {"experts": RNG.normal(size=(2, 6, 6)), "bias": np.ones((1, 6)), "unused": np.ones((4, 4))}
IDS = np.arange(8).reshape(2, 4)


def model(p, ids, flag="on"):
    x = jnp.take(p["table"], ids, axis=0)

    def body(x, w):
        return jnp.tanh(x @ w), None

    x, _ = jax.lax.scan(jax.checkpoint(body), x, p["layers"])
    x = x + jnp.einsum("bthk,hkd->btd", jnp.einsum("btd,dhk->bthk", x, p["heads"]), p["back"])
    x = jax.lax.conv_general_dilated(x, p["conv"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"))
    x = jax.lax.ragged_dot(x.reshape(-1, 6), p["experts"], jnp.array([3, 5])).reshape(x.shape) + p["bias"]
    return x @ p["table"].T if flag == "on" else x


def loss(p, ids):
    return jnp.sin(model(p, ids)).sum()


def test_usage():
    found = jlora.usage(model, PARAMS, IDS, flag="on")
    axes = {path: use.axes for path, use in found.items()}
    A = jlora.Axes
    assert axes == {
        "table": A((0,), (1,), kind="embedding"),
        "layers": A((1,), (2,), (0,)),
        "heads": A((0,), (1, 2)),
        "back": A((0, 1), (2,)),
        "conv": A((0, 1), (2,), kind="conv"),
        "experts": A((1,), (2,), (0,)),
    }
    assert found["table"].kinds == ("lookup", "linear")
    assert found["layers"].flops == 3 * 2 * 8 * 6 * 6 and found["conv"].flops == 2 * 8 * 3 * 6 * 6
    shapes = jax.eval_shape(lambda: (PARAMS, IDS))
    assert jlora.usage(model, *shapes) == found


def test_usage_names_what_would_form_the_weight():
    found = jlora.usage(lambda p, x: x @ p["w"] + p["w"].sum(), {"w": jnp.ones((4, 4))}, jnp.ones((2, 4)))
    assert found["w"].other == ("reduce_sum",)
    conflict = jlora.usage(
        lambda p, x: (jnp.einsum("bi,ijk->bjk", x, p["w"]), jnp.einsum("bij,ijk->bk", jnp.ones((2, 4, 4)), p["w"])),
        {"w": jnp.ones((4, 4, 4))},
        jnp.ones((2, 4)),
    )
    assert conflict["w"].axes is None


def test_capture_sums_inputs_and_gradients_in_one_backward_pass():
    stats = jax.jit(lambda p: jlora.capture(loss, p, IDS))(PARAMS)
    grads = jax.grad(loss)(PARAMS, IDS)
    for path, s in stats.items():
        np.testing.assert_allclose(s.g.reshape(grads[path].shape), grads[path], rtol=1e-9, atol=1e-9, err_msg=path)
    # By hand: the inputs of the scanned layers.
    x = PARAMS["table"][IDS].reshape(-1, 6)
    for layer in range(3):
        np.testing.assert_allclose(stats["layers"].xx[layer], x.T @ x, rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(stats["layers"].x[layer], x.sum(0), rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(stats["layers"].absx[layer], jnp.abs(x).sum(0), rtol=1e-9, atol=1e-9)
        assert stats["layers"].n[layer] == 8
        x = jnp.tanh(x @ PARAMS["layers"][layer])
    assert stats["conv"].xx is None and stats["conv"].g is not None


def test_capture_with_token_weights_and_sketches():
    weights = jnp.array([[1.0, 1, 0, 0], [1, 1, 1, 1]])
    stats = jlora.capture(loss, PARAMS, IDS, targets="layers", token_weights=weights, gradient=4, key=jax.random.key(0))
    x = PARAMS["table"][IDS].reshape(-1, 6)
    s = stats["layers"]
    np.testing.assert_allclose(s.xx[0], (x * weights.reshape(-1, 1)).T @ x, rtol=1e-9, atol=1e-9)
    np.testing.assert_array_equal(s.n, [6, 6, 6])
    grads = jax.grad(loss)(PARAMS, IDS)
    np.testing.assert_allclose(s.g, grads["layers"] @ s.omega, rtol=1e-9, atol=1e-9)
    for path in ("table", "conv", "experts", "heads"):
        s = jlora.capture(loss, PARAMS, IDS, targets=path, gradient=4, key=jax.random.key(0))[path]
        np.testing.assert_allclose(s.g, grads[path].reshape(*s.g.shape[:-1], -1) @ s.omega, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"targets": "nothing"}, "selects none"),
        ({"gradient": "half"}, "gradient is 'full'"),
        ({"gradient": 3}, "pass key="),
        ({"token_weights": jnp.ones((2, 5)), "targets": "layers"}, "token_weights has shape"),
        ({"token_weights": jnp.zeros((2, 4)), "targets": "layers"}, "No tokens were captured at 'layers'"),
    ],
)
def test_capture_errors(kwargs, message):
    with pytest.raises(ValueError, match=message):
        jlora.capture(loss, PARAMS, IDS, **kwargs)
