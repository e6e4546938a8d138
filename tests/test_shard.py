"""Adapters on a mesh: where they go, that a step computes the same there, and that nothing large is gathered."""

import collections
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jlora
from jlora import shard

L, D, F, E, TOKENS, RANK = 3, 64, 128, 4, 64, 2
DATA = ("data", "fsdp", "expert")
# Of the model below, by the kind of parallelism. Tokens are sharded over all axes of the mesh that are no "model".
LAYOUTS = {
    "data": ({"data": 8}, {}),
    "fsdp": ({"fsdp": 8}, {"**/{up,mid}": P(None, "fsdp", None), "**/down": P(None, None, "fsdp")}),
    "tensor": (
        {"data": 2, "model": 4},
        {"**/{up,mid}": P(None, None, "model"), "**/down": P(None, "model", None)},
    ),
    "fsdp and tensor": (
        {"data": 2, "fsdp": 2, "model": 2},
        {"**/{up,mid}": P(None, "fsdp", "model"), "**/down": P(None, "model", "fsdp")},
    ),
    "expert": ({"data": 2, "expert": 4}, {"**/experts": P(None, "expert", None, None)}),
}
METHODS = {
    "lora": jlora.LoRA(RANK),
    "dora": jlora.DoRA(RANK),
    "vera": jlora.VeRA(8),
}


def forward(params, x):
    """Layers of a gated MLP and of dense experts, scanned: weights whose outputs are sharded, then their inputs."""

    def layer(x, w):
        x = x + (jnp.tanh(x @ w["up"]) * (x @ w["mid"])) @ w["down"]
        each = jnp.einsum("etd,edf->etf", jnp.broadcast_to(x, (E, *x.shape)), w["experts"])
        return x + jnp.mean(jnp.tanh(each), axis=0), None

    return jax.lax.scan(layer, x, params["layers"])[0]


@functools.cache
def params():
    shapes = {"up": (L, D, F), "mid": (L, D, F), "down": (L, F, D), "experts": (L, E, D, D)}
    draw = lambda i, shape: jax.random.normal(jax.random.key(i), shape) * shape[-2] ** -0.5
    return {"layers": {name: draw(i, shape) for i, (name, shape) in enumerate(shapes.items())}}


def tokens():
    return jax.random.normal(jax.random.key(9), (TOKENS, D))


def mesh_of(devices, sizes, kind=AxisType.Auto):
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(kind,) * len(sizes), devices=devices)


def adapt(method, base):
    adapted = jlora.adapt(base, method, "**", fn=forward, args=(tokens(),), key=jax.random.key(1))
    leaves, treedef = jax.tree.flatten(adapted.trainable)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    noise = [leaf + 0.1 * jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves, strict=True)]
    return adapted.replace(trainable=jax.tree.unflatten(treedef, noise))


lifted = jlora.lift(forward, on_materialize="error")


@jax.jit
def step(adapted, x):
    return jax.value_and_grad(lambda trainable: jnp.mean(lifted(adapted.bind(trainable), x) ** 2))(adapted.trainable)


@jax.jit
def frozen_step(base, x):
    """Forward and backward through the same products, to the activations only."""
    return jax.value_and_grad(lambda x: jnp.mean(lifted(base, x) ** 2))(x)


def collected(compiled) -> collections.Counter:
    """(all-gather or all-to-all, entries of its result) -> how many of them the program has."""
    found = re.findall(r"= (\(?\w+\[.*?) (all-gather|all-to-all)(?:-start)?\(", compiled.as_text())
    entries = lambda dims: int(np.prod([int(n) for n in dims.split(",") if n]))
    return collections.Counter(
        (kind, max(entries(dims) for dims in re.findall(r"\w+\[([\d,]*)\]", result))) for result, kind in found
    )


def cases() -> list:
    """All methods under the layout with most axes, LoRA under each of the others; the rest in the slow suite."""
    out = [(layout, method, False) for layout in LAYOUTS for method in METHODS]
    out += [(layout, "lora", True) for layout in ("data", "tensor", "expert")]  # what is quantized is sharded by stacks
    often = lambda layout, method, quantized: method == "lora" and layout != "data" or layout == "fsdp and tensor"
    return [
        pytest.param(*case, id=f"{case[0]}-{case[1]}{'-nf4' * case[2]}", marks=() if often(*case) else pytest.mark.slow)
        for case in out
    ]


@pytest.mark.parametrize(("layout", "method", "quantized"), cases())
def test_a_step_is_the_single_devices_and_gathers_what_the_base_does(layout, method, quantized, devices):
    sizes, base_specs = LAYOUTS[layout]
    base = params()
    if quantized:
        base = jlora.quant.quantize(base, jlora.quant.NF4, "**", fn=forward, args=(tokens(),))
    adapted = adapt(METHODS[method], base)
    wanted = step(adapted, tokens())

    mesh = mesh_of(devices, sizes)
    placed = jax.device_put(adapted, shard.specs(adapted, mesh, base_specs))
    rows = P(tuple(name for name in sizes if name in DATA))
    x = jax.device_put(tokens(), NamedSharding(mesh, rows))
    compiled = step.lower(placed, x).compile()
    for got, want in zip(jax.tree.leaves(compiled(placed, x)), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(got, want, atol=2e-5 * float(jnp.abs(want).max()) + 1e-7, rtol=0)

    rank = METHODS[method].rank
    small = rank * max(TOKENS * E, L * F, L * E * D)  # [tokens, r] of every expert, or a factor of every layer
    extra = collected(compiled) - collected(frozen_step.lower(placed.base, x).compile())
    assert all(entries <= small < D * F for _, entries in extra), extra


def spec_of(sharding):
    return tuple(sharding.spec) + (None,) * 4


def test_factors_have_the_shardings_of_their_axes(devices):
    mesh = mesh_of(devices, {"fsdp": 2, "model": 2, "expert": 2})
    base_specs = {
        "**/up": P(None, "fsdp", "model"),
        "**/down": P(None, "model", "fsdp"),
        "**/experts": P(None, "expert", None, "model"),
    }
    adapted = adapt(jlora.LoRA(RANK), params())
    places = shard.specs(adapted, mesh, base_specs)
    assert jax.tree.structure(places) == jax.tree.structure(adapted)
    own = {path.split("/")[-1]: pair for path, pair in places.trainable.items()}
    assert spec_of(own["up"].a)[:3] == (None, "fsdp", None) and spec_of(own["up"].b)[:3] == (None, None, "model")
    assert spec_of(own["down"].a)[:3] == (None, "model", None) and spec_of(own["down"].b)[:3] == (None, None, "fsdp")
    assert spec_of(own["experts"].a)[:4] == (None, "expert", None, None)
    assert spec_of(own["experts"].b)[:4] == (None, "expert", None, "model")
    assert not any(spec_of(own["mid"].a))

    # Of shapes alone, and of a tree that lies there, the same; and that is where adapt puts what it makes.
    abstract = jax.eval_shape(lambda base: adapt(jlora.LoRA(RANK), base), params())
    assert jax.tree.leaves(shard.specs(abstract, mesh, base_specs)) == jax.tree.leaves(places)
    there = jax.device_put(adapted, places)
    same = lambda leaf, place: leaf.sharding.is_equivalent_to(place, leaf.ndim)
    assert jax.tree.all(jax.tree.map(same, there, shard.specs(there)))
    made = jlora.adapt(there.base, jlora.LoRA(RANK), "**", fn=forward, args=(tokens(),), key=jax.random.key(1))
    assert jax.tree.all(jax.tree.map(same, made.trainable, places.trainable))


def test_other_methods_have_theirs(devices):
    mesh = mesh_of(devices, {"data": 2, "model": 4})
    base_specs = {"**/{up,mid}": P(None, None, "model")}
    rules = {"**/up": jlora.DoRA(RANK), "**/mid": jlora.Full(), "**/down": jlora.VeRA(8)}
    adapted = jlora.adapt(params(), rules, fn=forward, args=(tokens(),), key=jax.random.key(0))
    places = shard.specs(adapted, mesh, base_specs)
    assert places.trainable["layers/mid"] == NamedSharding(mesh, P(None, None, "model"))
    assert any("model" in place.spec for place in jax.tree.leaves(places.trainable["layers/up"]))
    group = adapted.sites["layers/down"].method.group
    assert all(not any(place.spec) for place in jax.tree.leaves(places.frozen[group]))
    explicit = shard.specs(adapted, mesh_of(devices, {"data": 2, "model": 4}, AxisType.Explicit), base_specs)
    assert not any(any(place.spec) for place in jax.tree.leaves(explicit.trainable["layers/up"]))


@pytest.mark.parametrize("optimizer", ["adamw", "galore", "lora_pro"])
def test_the_optimizers_state_goes_with_its_parameters(optimizer, devices):
    mesh = mesh_of(devices, {"data": 2, "model": 4})
    adapted = adapt(jlora.LoRA(RANK), params())
    tree, places = adapted.trainable, shard.specs(adapted, mesh, {"**/up": P(None, None, "model")}).trainable
    if optimizer == "galore":  # of whole matrices
        tree = adapted.base["layers"]
        places = shard.of_params(tree, mesh, {"up": P(None, None, "model")})
    inner = optax.adamw(1e-3)
    tx = {"adamw": inner, "galore": jlora.optim.galore(inner, 8), "lora_pro": jlora.optim.lora_pro(inner)}[optimizer]
    of_state = shard.of_state(tx, tree, places)
    state = jax.jit(tx.init, out_shardings=of_state)(jax.device_put(tree, places))
    assert jax.tree.structure(of_state) == jax.tree.structure(state)
    if optimizer == "adamw":
        moments = optax.tree.get(of_state, "mu")
        assert moments["layers/up"].b == places["layers/up"].b and "model" in moments["layers/up"].b.spec


def test_what_does_not_fit_is_refused(devices):
    mesh = mesh_of(devices, {"data": 2, "model": 4})
    adapted = adapt(jlora.LoRA(RANK), params())
    with pytest.raises(ValueError, match=r"'layers/up' \(3, 64, 128\): axis 0 of 3 entries .* 4 devices of 'model'"):
        shard.specs(adapted, mesh, {"**/up": P("model")})
    with pytest.raises(ValueError, match=r"names \['tensor'\], and the mesh has the axes \{'data': 2, 'model': 4\}"):
        shard.specs(adapted, mesh, {"**/up": P(None, "tensor")})
    with pytest.raises(ValueError, match="is for 4 axes, and it has 3"):
        shard.specs(adapted, mesh, {"**/up": P(None, None, None, "model")})
    with pytest.raises(ValueError, match=r"'\*\*/upp' decides for no leaf. Nearest: .*layers/up"):
        shard.specs(adapted, mesh, {"**/upp": P()})
    with pytest.raises(ValueError, match="pass mesh="):
        shard.specs(adapted, None, {"**/up": P()})
    with pytest.raises(ValueError, match="lies on no mesh"):
        shard.specs(adapted)
