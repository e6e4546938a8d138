"""Several LoRA linears of one x: what the layers are one by one, in value and in every gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from jaxprs import equations

from jlora.kernels import lora_linear, lora_linears


def operands(lead=(3, 5), n_in=24, outs=(40, 8, 9), ranks=(3, 3, 3), dtype="float32", factors=None, seed=0):
    rng = np.random.default_rng(seed)
    array = lambda *shape, dtype=dtype: jnp.asarray(rng.normal(size=shape) / np.sqrt(shape[0] or 1), dtype)
    factors = factors or dtype
    ws = [array(n_in, out) for out in outs]
    as_ = [array(n_in, r, dtype=factors) for r in ranks]
    bs = [array(r, out, dtype=factors) for r, out in zip(ranks, outs, strict=True)]
    scales = [jnp.asarray(0.5 + i, factors) for i in range(len(outs))]
    return array(*lead, n_in), ws, as_, bs, scales


def one_by_one(x, ws, as_, bs, scales, **options):
    layers = zip(ws, as_, bs, scales, strict=True)
    return tuple(lora_linear(x, *layer, implementation="plain", **options) for layer in layers)


def value_and_grads(f):
    """A scalar loss of all results, with the gradient of all operands."""
    loss = lambda *args: sum(jnp.sum(jnp.sin(y.astype(jnp.float32))) for y in f(*args))
    return jax.value_and_grad(loss, argnums=(0, 1, 2, 3, 4))


def assert_close(got, want, tolerance=1e-5):
    """The error is relative to the largest element, as that of a sum is."""
    jax.tree.map(
        lambda g, w: np.testing.assert_allclose(
            g, w, rtol=0, atol=tolerance * max(1.0, np.abs(np.asarray(w, np.float64)).max(initial=0))
        ),
        got,
        want,
    )


SHAPES = {
    "queries, keys and values": {},
    "gate and up": dict(outs=(40, 40), ranks=(8, 8)),
    "ranks of their own": dict(ranks=(1, 4, 2)),
    "a single token without leading axes": dict(lead=()),
    "one layer": dict(outs=(7,), ranks=(2,)),
    "no tokens": dict(lead=(0,)),
    "wider than their x": dict(n_in=6, ranks=(5, 5, 5)),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("frozen_w", [True, False])
def test_are_the_layers_one_by_one(shape, frozen_w):
    args = operands(**shape)
    options = dict(frozen_w=frozen_w)
    assert_close(lora_linears(*args, **options), one_by_one(*args, **options))
    got = value_and_grads(functools.partial(lora_linears, **options))(*args)
    assert_close(got, value_and_grads(functools.partial(one_by_one, **options))(*args))


def test_float64():
    with jax.enable_x64(True):
        args = operands(dtype="float64")
        loss = lambda f: jax.value_and_grad(lambda *args: sum(jnp.sum(jnp.sin(y)) for y in f(*args)), (0, 2, 3, 4))
        assert_close(loss(lora_linears)(*args), loss(one_by_one)(*args), 1e-13)


@pytest.mark.parametrize("factors", ["bfloat16", "float32"])
def test_bfloat16_sums_wide_and_returns_gradients_in_the_factors_dtype(factors):
    args = operands(dtype="bfloat16", factors=factors)
    (_, got), (_, want) = (value_and_grads(f)(*args) for f in (lora_linears, one_by_one))
    assert_close(got, want, 2e-2)
    assert jax.tree.map(lambda g: g.dtype, got) == jax.tree.map(lambda arg: arg.dtype, args)


def test_a_result_that_is_not_used_has_no_gradient_and_no_products():
    x, ws, as_, bs, scales = operands()

    def loss(as_, bs):
        _, y, _ = lora_linears(x, ws, as_, bs, scales)
        return jnp.sum(jnp.sin(y))

    grads = jax.grad(loss, (0, 1))(as_, bs)
    want = jax.grad(lambda a, b: jnp.sum(jnp.sin(lora_linear(x, ws[1], a, b, scales[1]))), (0, 1))(as_[1], bs[1])
    assert_close((grads[0][1], grads[1][1]), want)
    assert all(not np.any(grad[i]) for grad in grads for i in (0, 2))
    program = str(jax.make_jaxpr(jax.grad(loss, (0, 1)))(as_, bs))
    assert program.count("dot_general") == 1 + 6 + 5  # h, the layers, and the backward pass of one of them


def test_products_with_x_are_shared_and_its_weights_have_no_gradient():
    x, ws, as_, bs, scales = operands(n_in=48)
    grad = jax.grad(lambda x, as_, bs: sum(map(jnp.sum, lora_linears(x, ws, as_, bs, scales))), (0, 1, 2))
    closed = jax.make_jaxpr(grad)(x, as_, bs)
    shapes = [eqn.outvars[0].aval.shape for eqn, _ in equations(closed.jaxpr) if eqn.primitive.name == "dot_general"]
    assert sorted(shapes) == sorted(
        [(3, 5, 9)]  # h of all
        + [shape for out in (40, 8, 9) for shape in ((3, 5, out), (3, 5, out))]  # x W and h B
        + [shape for out in (40, 8, 9) for shape in ((3, 5, 3), (3, out), (3, 5, 48))]  # dy B^T, h^T dy, dy W^T
        + [(9, 48), (3, 5, 48)]  # x^T ds and ds A^T of all
    )


def test_x_is_not_kept_where_no_a_is_trained():
    x, ws, as_, bs, scales = operands(lead=(7, 11))
    residuals = lambda *trained: jax.tree.leaves(
        jax.vjp(lambda *t: lora_linears(x * 2, ws, *(t if len(t) == 2 else (as_, *t)), scales), *trained)[1]
    )
    shapes = lambda *trained: [leaf.shape for leaf in residuals(*trained)]
    assert (7, 11, 24) in shapes(as_, bs)
    assert (7, 11, 24) not in shapes(bs)


@pytest.mark.parametrize("wrap", [jax.jit, jax.checkpoint], ids=["jit", "remat"])
def test_transformed(wrap):
    args = operands()
    assert_close(value_and_grads(wrap(lora_linears))(*args), value_and_grads(one_by_one)(*args))


def test_vmapped_and_scanned():
    layers = [operands(seed=i) for i in range(3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
    want = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(value_and_grads(one_by_one)(*args) for args in layers))
    assert_close(jax.vmap(value_and_grads(lora_linears))(*stacked), want)
    scanned = jax.lax.scan(lambda _, args: (None, value_and_grads(lora_linears)(*args)), None, stacked)[1]
    assert_close(scanned, want)


def test_x_and_weights_of_mixed_dtypes_run_one_by_one():
    x, ws, as_, bs, scales = operands()
    ws[1] = ws[1].astype(jnp.bfloat16)
    assert_close(lora_linears(x, ws, as_, bs, scales), one_by_one(x, ws, as_, bs, scales))


@pytest.mark.parametrize("implementation", ["plain", "pallas_interpret"])
def test_other_implementations(implementation):
    args = operands(outs=(16, 8), ranks=(2, 2))
    got = value_and_grads(functools.partial(lora_linears, implementation=implementation))(*args)
    assert_close(got, value_and_grads(one_by_one)(*args))


def test_inside_shard_map():
    args = operands(lead=(8,))
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    specs = (P("data"), *(P() for _ in range(4)))

    def loss(*args):
        ys = jax.shard_map(lora_linears, mesh=mesh, in_specs=specs, out_specs=P("data"))(*args)
        return sum(jnp.sum(jnp.sin(y)) for y in ys)

    got = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3, 4)))(*args)
    assert_close(got, value_and_grads(one_by_one)(*args))


def test_explicit_sharding():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))
    x, *rest = operands(lead=(8,))
    with jax.set_mesh(mesh):
        args = jax.device_put((x, *rest), (jax.NamedSharding(mesh, P("data")), *[jax.NamedSharding(mesh, P())] * 4))
        got = jax.jit(value_and_grads(lora_linears))(*args)
    assert_close(jax.device_get(got), value_and_grads(one_by_one)(x, *rest))


def test_what_does_not_fit_is_refused():
    x, ws, as_, bs, scales = operands()
    with pytest.raises(ValueError, match="do not fit together"):
        lora_linears(x, ws, as_[::-1], [b[:2] for b in bs], scales)
    with pytest.raises(ValueError, match="shorter|longer"):
        lora_linears(x, ws, as_[:2], bs, scales)
    with pytest.raises(ValueError, match="implementation='fast'"):
        lora_linears(x, ws, as_, bs, scales, implementation="fast")
