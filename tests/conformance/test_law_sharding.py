"""For every method, on a mesh of 2 x 4 devices, with automatic and with explicit sharding: the numbers, the gradients
and the types are those of the unsharded model, nothing larger is gathered than the plain model gathers, and merging
gives every weight back its sharding."""

import functools
import itertools
import re
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from registry import EACH_FORM, FORMS, ROWS, Row, adapt_model, assert_close, inputs, model, model_params, moved

import jlora

SPECS = {
    "in": {
        "first": {"kernel": P("model", None), "bias": P()},
        "layers": {"kernel": P(None, "model", None)},
        "last": {"kernel": P("model", None)},
    },
    "out": {
        "first": {"kernel": P(None, "model"), "bias": P("model")},
        "layers": {"kernel": P(None, None, "model")},
        "last": {"kernel": P(None, "model")},
    },
}
lifted = jlora.lift(model, on_materialize="error")


@pytest.fixture
def mesh(request: pytest.FixtureRequest, devices: list) -> Mesh:
    kind = getattr(AxisType, request.param)
    return Mesh(np.array(devices).reshape(2, 4), ("data", "model"), axis_types=(kind, kind))


@jax.jit
def run(adapted, trainable, x):
    def loss(trainable):
        y = lifted(adapted.bind(trainable), x)
        return jnp.sum(jnp.sin(y)), y

    (_, y), grads = jax.value_and_grad(loss, has_aux=True)(trainable)
    return y, grads


@functools.cache
def unsharded(name: str):
    adapted = adapt_model(next(row for row in ROWS if row.name == name))
    trainable = moved(adapted.trainable)
    return adapted.trainable, trainable, run(adapted, trainable, inputs())


def put(tree, specs, mesh: Mesh):
    return jax.tree.map(lambda leaf, spec: jax.device_put(leaf, NamedSharding(mesh, spec)), tree, specs)


def largest_gather(compiled) -> int:
    """Entries of the largest array that the program brings together from several devices."""
    shapes = re.findall(r"= \w+\[([\d,]*)\]\S* all-gather", compiled.as_text())
    return max((int(np.prod([int(n) for n in shape.split(",") if n])) for shape in shapes), default=0)


@functools.cache
def largest_gather_without_adapters(mesh: Mesh, side: str) -> int:
    """Of the plain model, backward pass to the activations included."""

    def loss(bias, params, x):
        return jnp.sum(jnp.sin(model(params | {"first": params["first"] | {"bias": bias}}, x)))

    params, x = put(model_params(), SPECS[side], mesh), put(inputs(), P("data", None), mesh)
    return largest_gather(jax.jit(jax.grad(loss)).lower(params["first"]["bias"], params, x).compile())


def settings() -> list:
    """Both kinds of mesh and both sides of the weights for one method of each form; one of the four, drawn by the name,
    for each of the others, and the rest of them in the slow suite."""
    out = []
    for row in FORMS:
        for i, (kind, side) in enumerate(itertools.product(("Auto", "Explicit"), SPECS)):
            drawn = zlib.crc32(row.name.encode()) % 4 == i or row.name in EACH_FORM
            marks = [] if drawn else [pytest.mark.slow]
            out.append(pytest.param(row, kind, side, id=f"{row.name}-{kind}-{side}", marks=marks))
    return out


@pytest.mark.parametrize(("row", "mesh", "side"), settings(), indirect=["mesh"])
def test_sharded_is_unsharded(row: Row, mesh: Mesh, side: str) -> None:
    start, trainable, wanted = unsharded(row.name)
    with jax.set_mesh(mesh):
        params, x = put(model_params(), SPECS[side], mesh), put(inputs(), P("data", None), mesh)
        adapted = adapt_model(row, params)
        assert_close(adapted.trainable, start)  # the same numbers, wherever they lie
        for leaf in jax.tree.leaves(adapted.trainable):
            assert leaf.sharding.device_set == set(mesh.devices.flat)
        trainable = jax.tree.map(lambda new, old: jax.device_put(new, old.sharding), trainable, adapted.trainable)
        compiled = run.lower(adapted, trainable, x).compile()
        y, grads = compiled(adapted, trainable, x)
        assert jax.eval_shape(run, adapted, trainable, x)[0] == jax.eval_shape(model, params, x)
        merged = jlora.merge(adapted.replace(trainable=trainable)) if row.method.mergeable else params
        allowed = max(largest_gather_without_adapters(mesh, side), row.gathers)
    assert_close((y, grads), wanted)
    for new, old in zip(jax.tree.leaves(merged), jax.tree.leaves(params), strict=True):
        assert new.sharding == old.sharding
    if not row.method.whole_leaf:
        assert largest_gather(compiled) <= allowed
