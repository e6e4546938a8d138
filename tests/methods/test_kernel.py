"""Convolutions whose kernel is changed along its axes: the formulas in float64, in all layouts, and what runs."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora

pytestmark = pytest.mark.usefixtures("x64")


@dataclasses.dataclass(frozen=True)
class Conv:
    """A convolution: shape of the kernel in the layout ``numbers[1]``, shape of its input, options."""

    numbers: tuple[str, str, str]
    kernel: tuple[int, ...]
    x: tuple[int, ...]
    strides: tuple[int, ...]
    padding: Any = "SAME"
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def axes(self) -> jlora.Axes:
        out = self.numbers[1].index("O")
        return jlora.Axes(tuple(a for a in range(len(self.kernel)) if a != out), (out,), kind="conv")

    def __call__(self, w, x):
        return jax.lax.conv_general_dilated(
            x, w, self.strides, self.padding, dimension_numbers=self.numbers, **dict(self.options)
        )


CONVS = {
    "one_axis": Conv(("NWC", "WIO", "NWC"), (5, 6, 7), (2, 9, 6), (2,)),
    "dilated": Conv(("NHWC", "HWIO", "NHWC"), (3, 2, 6, 5), (2, 9, 8, 6), (2, 1), "VALID", (("rhs_dilation", (1, 2)),)),
    "features_first": Conv(("NCHW", "OIHW", "NCHW"), (5, 4, 3, 3), (2, 4, 6, 5), (1, 2), ((1, 1), (0, 2))),
    "groups": Conv(("NHWC", "HWIO", "NHWC"), (3, 3, 4, 6), (2, 5, 5, 8), (1, 1), "SAME", (("feature_group_count", 2),)),
    "groups_features_first": Conv(
        ("NCHW", "OIHW", "NCHW"), (6, 4, 3, 2), (1, 12, 5, 5), (1, 1), "SAME", (("feature_group_count", 3),)
    ),
    "three_axes": Conv(("NDHWC", "DHWIO", "NDHWC"), (2, 3, 3, 6, 5), (1, 4, 5, 4, 6), (1, 2, 1)),
    "transposed": Conv(
        ("NHWC", "HWIO", "NHWC"), (3, 3, 4, 5), (2, 4, 4, 4), (1, 1), ((2, 2), (2, 1)), (("lhs_dilation", (2, 2)),)
    ),
    "patches": Conv(("NHWC", "HWIO", "NHWC"), (4, 4, 3, 8), (1, 8, 8, 3), (4, 4), "VALID"),
    "features_between": Conv(("NHWC", "HIOW", "NHWC"), (3, 4, 5, 2), (1, 5, 5, 4), (1, 1)),
}
METHODS = {
    "conv": jlora.ConvLoRA(2, alpha=3.0),
    "cp": jlora.CPLoRA(3, alpha=6.0),
    "tucker": jlora.TuckerLoRA(3, 0.7, rank_out=2),
    "conv_magnitude": jlora.DoRA(method=jlora.ConvLoRA(2, alpha=3.0)),
    "cp_magnitude": jlora.DoRA(method=jlora.CPLoRA(3, alpha=6.0)),
}


def normal(seed: int, shape: tuple[int, ...]) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def adapt(conv: Conv, method, kernel=None, moved: bool = True) -> jlora.Adapted:
    kernel = normal(0, conv.kernel) if kernel is None else kernel
    adapted = jlora.adapt({"w": kernel}, method, "w", axes={"w": conv.axes}, key=jax.random.key(0))
    if not moved:
        return adapted
    noise = lambda leaf: leaf + 0.3 * normal(leaf.size, leaf.shape)
    return adapted.replace(trainable=jax.tree.map(noise, adapted.trainable))


def change(conv: Conv, method, p, np=jnp):
    """The change in the layout [out, in, *window], from its formula."""
    layout = conv.numbers[1]
    inputs = layout.replace("O", "")
    sizes = {letter: size for letter, size in zip(layout, conv.kernel, strict=True)}
    window = inputs.replace("I", "")
    if isinstance(method, jlora.ConvLoRA):
        first, others = sizes[window[0]], math.prod(sizes[axis] for axis in window[1:])
        a, b = p["a"], p["b"]
        if layout.index("I") == len(layout) - 2:  # [w, in, 1, r h] and [h, r h, 1, out]
            lora_a = a[:, :, 0].transpose(2, 1, 0).reshape(-1, sizes["I"] * others)
            lora_b = b[:, :, 0].transpose(2, 0, 1).reshape(sizes["O"] * first, -1)
        else:
            lora_a = a[0].transpose(2, 0, 1).reshape(-1, sizes["I"] * others)
            lora_b = b[0].transpose(2, 1, 0).reshape(sizes["O"] * first, -1)
        view = (sizes["O"], sizes["I"], *(sizes[axis] for axis in window))
        return method.alpha / method.rank * (lora_b @ lora_a).reshape(view)
    parts = [p["a"][inputs.index(axis)] for axis in ("I", *window)]
    if isinstance(method, jlora.CPLoRA):
        lower = "ihwd"[: len(parts)]
        terms = ",".join(f"{axis}p" for axis in lower)
        return method.alpha / method.rank * np.einsum(f"po,{terms}->o{lower}", p["b"], *parts)
    core = np.moveaxis(p["core"], inputs.index("I"), 0)
    lower, upper = "ihwd"[: len(parts)], "IHWD"[: len(parts)]
    terms = ",".join(f"{i}{j}" for i, j in zip(lower, upper, strict=True))
    return method.alpha * np.einsum(f"{upper}q,qo,{terms}->o{lower}", core, p["b"], *parts)


def adapted_kernel(conv: Conv, method, kernel, p, np=jnp):
    """In the layout of the leaf."""
    layout = conv.numbers[1]
    from_ours = [
        "OI".find(axis) if axis in "OI" else 2 + layout.replace("O", "").replace("I", "").index(axis) for axis in layout
    ]
    if not isinstance(method, jlora.DoRA):
        return kernel + change(conv, method, p, np).transpose(from_ours)
    kernel = kernel + change(conv, method.method, p["factors"], np).transpose(from_ours)
    axes = tuple(a for a, letter in enumerate(layout) if letter != "O")
    norms = np.sqrt(np.sum(kernel**2, axis=axes, keepdims=True))
    norms = jax.lax.stop_gradient(norms) if np is jnp else norms
    shape = [-1 if letter == "O" else 1 for letter in layout]
    return kernel * (p["magnitude"].reshape(shape) / norms)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("conv", CONVS)
def test_is_the_formula(conv, method, request):
    conv, method = CONVS[conv], METHODS[method]
    if method.check(jlora.methods.Site(method, conv.axes, conv.kernel)):
        assert "HIOW" in conv.numbers and "conv" in request.node.name
        return
    adapted, x = adapt(conv, method), normal(1, conv.x)
    p = adapted.trainable["w"]
    wanted = adapted_kernel(conv, method, *jax.tree.map(np.asarray, (adapted.base["w"], p)), np=np)
    np.testing.assert_allclose(jlora.merge(adapted)["w"], wanted, atol=1e-12)

    formula = lambda t, x: jnp.sum(jnp.sin(conv(adapted_kernel(conv, method, adapted.base["w"], t["w"]), x)))
    lifted = jlora.lift(lambda params, x: jnp.sum(jnp.sin(conv(params["w"], x))), on_materialize="error")
    got = jax.jit(jax.value_and_grad(lambda t, x: lifted(adapted.bind(t), x), (0, 1)))(adapted.trainable, x)
    wanted = jax.jit(jax.value_and_grad(formula, (0, 1)))(adapted.trainable, x)
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=1e-10, atol=1e-10), got, wanted)
    assert method.count(adapted.sites["w"]) == sum(leaf.size for leaf in jax.tree.leaves(adapted.trainable))
    start = adapt(conv, method, moved=False)
    np.testing.assert_allclose(jlora.merge(start)["w"], adapted.base["w"], atol=1e-14)


def test_counts():
    conv = CONVS["features_first"]  # 5 outputs, 4 features, a window of 3 x 3
    count = lambda method: method.count(jlora.methods.Site(method, conv.axes, conv.kernel))
    assert count(METHODS["conv"]) == 2 * 3 * (4 * 3 + 5 * 3)
    assert count(METHODS["cp"]) == 3 * (3 + 3 + 4 + 5)
    assert count(METHODS["tucker"]) == 3 * 4 + 2 * 5 + 2 * (3 + 3) + 3 * 2 * 2**2
    assert count(METHODS["cp_magnitude"]) == 3 * (3 + 3 + 4 + 5) + 5


def convolutions(method, conv: Conv) -> list[tuple[int, ...]]:
    """Shapes of the kernels of the convolutions that the forward pass runs beside the base's."""
    adapted = adapt(conv, method)
    lifted = jlora.lift(lambda params, x: conv(params["w"], x), on_materialize="error")
    jaxpr = jax.make_jaxpr(lambda t, x: lifted(adapted.bind(t), x))(adapted.trainable, normal(1, conv.x))
    found = []

    def walk(jaxpr):
        for eqn in jaxpr.eqns:
            if eqn.primitive.name == "conv_general_dilated":
                found.append(eqn.invars[1].aval.shape)
            for inner in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda v: hasattr(v, "eqns")):
                if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                    walk(getattr(inner, "jaxpr", inner))

    walk(jaxpr.jaxpr)
    found.remove(conv.kernel)
    return found


def test_the_window_meets_the_narrowed_features_only():
    """And the image's features meet no window but the frozen kernel's."""
    assert convolutions(METHODS["cp"], CONVS["dilated"]) == [(3, 2, 1, 3)]
    assert convolutions(METHODS["tucker"], CONVS["transposed"]) == [(3, 3, 3, 2)]
    assert convolutions(METHODS["cp"], CONVS["groups"]) == [(3, 3, 1, 2 * 3)]
    assert convolutions(METHODS["tucker"], CONVS["groups"]) == [(3, 3, 3, 2 * 2)]
    assert convolutions(METHODS["cp"], CONVS["groups_features_first"]) == [(3 * 3, 1, 3, 2)]
    # A 1x1 convolution at every place of an image of which a window takes each place once is no saving.
    assert convolutions(METHODS["cp"], CONVS["patches"]) == [(4, 4, 3, 3)]


@pytest.mark.optimized
def test_cost():
    """FLOPs of a step as XLA counts them: less than LoRA's of the same rank, and no gradient of a kernel."""
    conv = Conv(("NHWC", "HWIO", "NHWC"), (3, 3, 32, 32), (1, 12, 12, 32), (1, 1))

    def flops(method):
        adapted = adapt(conv, method)
        lifted = jlora.lift(lambda params, x: jnp.sum(jnp.sin(conv(params["w"], x))), on_materialize="error")
        step = jax.grad(lambda t, adapted, x: lifted(adapted.bind(t), x), (0, 2))
        lowered = jax.jit(step).lower(adapted.trainable, adapted.replace(trainable=None), normal(1, conv.x))
        return lowered.compile().cost_analysis()["flops"]

    x, kernel = normal(1, conv.x), normal(0, conv.kernel)
    plain = jax.jit(jax.grad(lambda x, w: jnp.sum(jnp.sin(conv(w, x))))).lower(x, kernel)
    floor = plain.compile().cost_analysis()["flops"]
    for method in (jlora.CPLoRA(8), jlora.TuckerLoRA(8)):
        assert flops(method) - floor < 0.5 * (flops(jlora.LoRA(8)) - floor)
    assert flops(jlora.ConvLoRA(8)) - floor < floor  # formed, and its gradient


def test_conv_lora_is_the_code_it_names():
    """The kernel [out, in, k, k] is lora_B @ lora_A viewed; and as a matrix it has a rank above that of the two."""
    conv = CONVS["features_first"]
    adapted = adapt(conv, jlora.ConvLoRA(1, alpha=0.5))
    p = jax.tree.map(np.asarray, adapted.trainable["w"])
    lora_a = p["a"].reshape(4 * 3, 3).T
    lora_b = np.stack([p["b"][0, :, m, o] for o in range(5) for m in range(3)])
    delta = np.asarray(jlora.merge(adapted)["w"] - adapted.base["w"])
    np.testing.assert_allclose(delta, 0.5 * (lora_b @ lora_a).reshape(5, 4, 3, 3), atol=1e-12)
    assert np.linalg.matrix_rank(lora_b @ lora_a) == 3 and np.linalg.matrix_rank(delta.reshape(5, -1)) == 5
    # The same numbers in the other layout are the same kernel.
    last = Conv(("NHWC", "HWIO", "NHWC"), (3, 3, 4, 5), (1, 5, 5, 4), (1, 1))
    other = adapt(last, jlora.ConvLoRA(1, alpha=0.5), jnp.zeros(last.kernel))
    a, b = jnp.asarray(p["a"].transpose(2, 1, 0, 3)), jnp.asarray(p["b"].transpose(2, 1, 0, 3))
    other = other.replace(trainable={"w": {"a": a, "b": b}})
    np.testing.assert_allclose(jlora.merge(other)["w"], delta.transpose(2, 3, 1, 0), atol=1e-12)


def test_windows_of_size_one():
    """CPLoRA and ConvLoRA are LoRA there, TuckerLoRA is FLoRA."""
    conv = Conv(("NHWC", "HWIO", "NHWC"), (1, 1, 6, 5), (1, 3, 3, 6), (1, 1))
    matrix = lambda adapted: np.asarray(jlora.merge(adapted)["w"] - adapted.base["w"]).reshape(6, 5)
    cp, tucker = adapt(conv, METHODS["cp"]), adapt(conv, METHODS["tucker"])
    h, w, a = cp.trainable["w"]["a"]
    np.testing.assert_allclose(matrix(cp), 2.0 * (a * h * w) @ cp.trainable["w"]["b"], atol=1e-12)
    t = tucker.trainable["w"]
    h, w, a = t["a"]
    np.testing.assert_allclose(matrix(tucker), 0.7 * h * w * (a @ t["core"][0, 0] @ t["b"]), atol=1e-12)
    flora = jlora.adapt({"w": jnp.zeros((6, 5))}, jlora.FLoRA(3, 0.7, 2), "w", key=jax.random.key(0))
    flora = flora.replace(trainable={"w": {"a": a, "middle": t["core"][0, 0], "b": t["b"]}})
    matrix_of = lambda method: jlora.adapt({"w": jnp.zeros((6, 5))}, method, "w", key=jax.random.key(0))
    linear = matrix_of(METHODS["tucker"]).replace(trainable={"w": {"a": (a,), "core": t["core"][0, 0], "b": t["b"]}})
    np.testing.assert_allclose(matrix(linear), matrix(flora), atol=1e-12)
    conv_lora, lora = matrix_of(METHODS["conv"]), matrix_of(jlora.LoRA(2, 3.0))
    p = conv_lora.trainable["w"]
    b = normal(4, (2, 5))
    conv_lora = conv_lora.replace(trainable={"w": p | {"b": b.reshape(1, 2, 1, 5)}})
    pair = jlora.Factors(p["a"].reshape(6, 2), b, 1.5)
    np.testing.assert_allclose(matrix(conv_lora), matrix(lora.replace(trainable={"w": pair})), atol=1e-12)


def test_start():
    """The products of CPLoRA's factors have the deviation of LoRA's A; the sides of TuckerLoRA FLoRA's."""
    conv = Conv(("NDHWC", "DHWIO", "NDHWC"), (4, 3, 5, 40, 40), (1, 6, 6, 6, 40), (1, 1, 1))
    d, h, w, a = adapt(conv, jlora.CPLoRA(500), moved=False).trainable["w"]["a"]
    columns = np.einsum("dp,hp,wp,ip->dhwip", d, h, w, a)
    assert abs(columns.std() / (3 * 4 * 3 * 5 * 40) ** -0.5 - 1) < 0.05
    sides = adapt(conv, jlora.TuckerLoRA(20), moved=False).trainable["w"]
    assert abs(np.std(sides["a"][3]) / (0.5 / 20) ** 0.5 - 1) < 0.1
    assert abs(np.std(sides["b"]) / (0.5 / 20) ** 0.5 - 1) < 0.1
    assert [side.shape for side in sides["a"]] == [(4, 2), (3, 2), (5, 2), (40, 20)]


def test_only_the_core_has_a_gradient_at_the_start():
    conv = CONVS["three_axes"]
    adapted, x = adapt(conv, METHODS["tucker"], moved=False), normal(1, conv.x)
    lifted = jlora.lift(lambda params, x: jnp.sum(jnp.sin(conv(params["w"], x))), on_materialize="error")
    grads = jax.grad(lambda t: lifted(adapted.bind(t), x))(adapted.trainable)["w"]
    assert np.abs(grads["core"]).min() > 0
    assert all(np.all(leaf == 0) for leaf in jax.tree.leaves((grads["a"], grads["b"])))


@pytest.mark.parametrize("method", ["conv", "cp", "tucker"])
def test_dropout_is_on_the_branch_alone(method):
    conv = CONVS["features_first"]
    adapted = adapt(conv, dataclasses.replace(METHODS[method], dropout=0.5))
    x = normal(1, conv.x)
    lifted = jlora.lift(lambda params, x: conv(params["w"], x), on_materialize="error")
    key = jax.random.key(3)
    one, other, none = (lifted(adapted.bind(context=c), x) for c in ({"key": key}, {"key": jax.random.key(4)}, {}))
    assert np.abs(np.asarray(one - other)).max() > 1e-3
    np.testing.assert_allclose(none, conv(jlora.merge(adapted)["w"], x), atol=1e-10)
    start = adapt(conv, dataclasses.replace(METHODS[method], dropout=0.5), moved=False)
    np.testing.assert_allclose(lifted(start.bind(context={"key": key}), x), conv(start.base["w"], x), atol=1e-12)


def test_axes_that_the_model_merges():
    """A kernel that the code reshapes before the convolution: the pair runs, without stages."""
    method, x = METHODS["cp"], normal(1, (1, 5, 5, 4))
    adapted = jlora.adapt(
        {"w": normal(0, (9, 4, 5))},
        method,
        "w",
        axes={"w": jlora.Axes((0, 1), (2,), kind="conv")},
        key=jax.random.key(0),
    )
    b = normal(2, (3, 5))
    adapted = adapted.replace(trainable={"w": adapted.trainable["w"] | {"b": b}})
    conv = Conv(("NHWC", "HWIO", "NHWC"), (3, 3, 4, 5), x.shape, (1, 1))
    plain = lambda params, x: conv(params["w"].reshape(3, 3, 4, 5), x)
    got = jlora.lift(plain, on_materialize="error")(adapted.bind(), x)
    np.testing.assert_allclose(got, plain(jlora.merge(adapted), x), atol=1e-10)


def test_errors():
    with pytest.raises(ValueError, match="positive integer"):
        jlora.CPLoRA(0)
    with pytest.raises(ValueError, match="rank_window=0"):
        jlora.TuckerLoRA(2, rank_window=0)
    with pytest.raises(ValueError, match="at most 30"):
        adapt(CONVS["dilated"], jlora.CPLoRA(37))
    with pytest.raises(ValueError, match=r"above min\(features, out\) = 4"):
        adapt(CONVS["groups"], jlora.ConvLoRA(5))
    with pytest.raises(ValueError, match="both sides of the features"):
        adapt(CONVS["features_between"], jlora.ConvLoRA(2))
    with pytest.raises(ValueError, match="the input features = 4"):
        adapt(CONVS["groups"], jlora.TuckerLoRA(5))
    with pytest.raises(ValueError, match="rank 7 is above out = 6"):
        adapt(CONVS["groups"], jlora.TuckerLoRA(4, rank_out=7))
