"""Repacked adapters compute and learn what the masked ones do, whatever optimizer's state goes along."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from models import AXES, adapt, data, effective, lifted, moved, params, train

import jlora
from jlora.io import load_peft, save_peft

pytestmark = pytest.mark.usefixtures("x64")

LIVE = {  # of the matrices, which terms of 4 are in use
    "layers": np.array([[1, 0, 0, 1], [0, 0, 1, 0], [0, 0, 0, 0]]),
    "first": np.array([0, 1, 1, 1]),
    "last": np.array([0, 0, 0, 0]),
}
RANKS = {"layers": (2, 1, 0), "first": (3,)}


def taken(name: str) -> jlora.Adapted:
    """Adapters of which ranks were taken in the way of their method."""
    method = {"lora": jlora.LoRA(4), "adalora": jlora.AdaLoRA(4), "sora": jlora.SoRA(4)}[name]
    adapted = moved(adapt(method))
    trainable, frozen = dict(adapted.trainable), dict(adapted.frozen)
    for path, live in LIVE.items():
        own, live = trainable[path], jnp.asarray(live, jnp.float64)
        match name:
            case "lora":
                trainable[path] = jlora.Factors(own.a * live[..., None, :], own.b * live[..., None], own.scale)
            case "adalora":
                frozen[path] = {"mask": live}
            case "sora":
                trainable[path] = own | {"gate": own["gate"] * live}
    return adapted.replace(trainable=trainable, frozen=frozen)


def hold(live: dict, adapted: jlora.Adapted, grads, step) -> tuple[dict, jlora.Adapted]:
    """As an allocator would: SoRA's gates that were zero, at zero still."""
    own = {path: p | {"gate": p["gate"] * live[path]} for path, p in adapted.trainable.items()}
    return live, adapted.replace(trainable=own)


def same(masked: jlora.Adapted, repacked: jlora.Adapted) -> None:
    both = effective(masked), effective(repacked)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), *both)


@pytest.mark.parametrize("name", ["lora", "adalora", "sora"])
def test_shapes_and_function(name) -> None:
    masked = taken(name)
    repacked = jlora.repack(masked)
    assert list(repacked.sites) == ["first", "layers"]
    assert repacked.sites["layers"].method.rank == 2 and repacked.sites["first"].method.rank == 3
    leaves = jax.tree.leaves(repacked.trainable["layers"])
    assert {leaf.shape for leaf in leaves} <= {(3, 6, 2), (3, 2, 6), (3, 2)}
    same(masked, repacked)
    if name == "adalora":
        x, _ = data()
        np.testing.assert_allclose(lifted(masked, x), lifted(repacked, x), atol=1e-12)
    if name == "lora":
        assert repacked.sites["layers"].method.ranks == RANKS["layers"]
    rules = {path: site.method for path, site in repacked.sites.items()}
    fresh = jlora.adapt(repacked.base, rules, axes={path: AXES[path] for path in rules}, key=jax.random.key(0))
    assert jax.tree.structure(fresh) == jax.tree.structure(repacked)  # nothing of it is special
    assert jax.tree.map(jnp.shape, fresh) == jax.tree.map(jnp.shape, repacked)


def labels(params):
    return jax.tree_util.tree_map_with_path(
        lambda path, _: "b" if "b" in jax.tree_util.keystr(path[1:]) else "rest", params
    )


OPTIMIZERS = {
    "adam": lambda: optax.adam(0.1),
    "momentum": lambda: optax.chain(optax.trace(0.9), optax.scale_by_schedule(lambda n: -0.1 / (n + 1))),
    "masked": lambda: optax.masked(optax.adam(0.1), lambda p: jax.tree.map(lambda leaf: leaf.ndim > 1, p)),
    "partition": lambda: optax.partition({"b": optax.adam(0.1), "rest": optax.sgd(0.1, momentum=0.9)}, labels),
    "accumulated": lambda: optax.MultiSteps(optax.adam(0.1), 2).gradient_transformation(),
    "injected": lambda: optax.inject_hyperparams(optax.adamw)(learning_rate=0.1),
}


FEW = [("lora", "adam"), ("sora", "adam"), ("adalora", "partition"), ("adalora", "accumulated")]
MORE = [("adalora", optimizer) for optimizer in OPTIMIZERS if ("adalora", optimizer) not in FEW]  # each compiles anew


@pytest.mark.parametrize("name, optimizer", FEW + [pytest.param(*case, marks=pytest.mark.slow) for case in MORE])
def test_next_steps(name, optimizer) -> None:
    """With moments that were there before ranks were taken."""
    tx, masked, random = OPTIMIZERS[optimizer](), taken(name), np.random.default_rng(3)
    filled = lambda leaf: jnp.asarray(random.uniform(0.5, 1.0, leaf.shape), leaf.dtype) if leaf.ndim else leaf
    opt_state = jax.tree.map(filled, tx.init(masked.trainable))
    if name == "lora":  # what was taken is kept at zero by whoever took it: then its moments are of no effect
        zeros = jax.tree.map(lambda p: np.asarray(p) != 0, masked.trainable)
        opt_state = optax.tree.map_params(tx, lambda leaf, live: leaf * live, opt_state, zeros)
    repacked, smaller = jlora.repack(masked, opt_state)
    like = jax.eval_shape(tx.init, repacked.trainable)
    assert jax.tree.structure(smaller) == jax.tree.structure(like)
    assert jax.tree.map(jnp.shape, smaller) == jax.tree.map(jnp.shape, like)
    keep = jlora.rank.Allocator(None, hold) if name == "sora" else None
    masked, *_ = train(masked, tx, opt_state, keep, {path: jnp.asarray(live) for path, live in LIVE.items()}, range(2))
    repacked, *_ = train(repacked, tx, smaller, steps=range(2))
    same(masked, repacked)


def test_states_of_pairs_follow() -> None:
    """They hold nodes of pairs, masked or not, whose scale is static: that of LoRA with ranks of its own is another."""
    masked = taken("lora")
    for tx in (optax.masked(optax.adam(0.1), jlora.optim.outside_pairs), jlora.optim.lora_pro(optax.adam(0.1))):
        repacked, state = jlora.repack(masked, tx.init(masked.trainable))
        like = jax.eval_shape(tx.init, repacked.trainable)
        assert jax.tree.structure(state) == jax.tree.structure(like)
        assert jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, like)


def test_everything_in_use_stays() -> None:
    adapted = moved(adapt(jlora.AdaLoRA(3)))
    tx = optax.adam(0.1)
    repacked, state = jlora.repack(adapted, tx.init(adapted.trainable))
    assert jax.tree.map(jnp.shape, repacked) == jax.tree.map(jnp.shape, adapted)
    same(adapted, repacked)
    again = jlora.repack(jlora.repack(taken("adalora")))
    same(again, jlora.repack(taken("adalora")))


def test_shardings_stay(devices) -> None:
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,), devices=devices[:2])
    adapted, spec = taken("adalora"), jax.sharding.PartitionSpec(None, "x")
    own = adapted.trainable["layers"]
    a = jax.device_put(own["a"], jax.sharding.NamedSharding(mesh, spec))
    repacked = jlora.repack(adapted.replace(trainable=adapted.trainable | {"layers": own | {"a": a}}))
    assert repacked.trainable["layers"]["a"].sharding.spec == spec
    np.testing.assert_array_equal(repacked.trainable["layers"]["a"], jlora.repack(adapted).trainable["layers"]["a"])


def test_other_methods_stay() -> None:
    rules = {"layers": jlora.AdaLoRA(2), "first": jlora.DoRA(2), "last": jlora.Full()}
    adapted = jlora.adapt(params(), rules, axes=AXES, key=jax.random.key(0))
    repacked = jlora.repack(adapted)
    assert repacked.trainable["first"] is adapted.trainable["first"]
    with pytest.raises(ValueError, match="nothing to repack: .* got \\['DoRA'\\]"):
        jlora.repack(adapt(jlora.DoRA(2)))


def test_refusals() -> None:
    masked = taken("adalora")
    with pytest.raises(ValueError, match="'first'.*the mask is not finite.*diverged"):
        jlora.repack(masked.replace(frozen=masked.frozen | {"first": {"mask": jnp.full(4, jnp.nan)}}))
    with pytest.raises(ValueError, match="repack outside of jit"):
        jax.jit(jlora.repack)(masked)
    with pytest.raises(ValueError, match="repack outside of jit"):
        jlora.repack(jax.eval_shape(lambda: masked))
    big = jlora.adapt({"w": jnp.ones((130, 129))}, jlora.AdaLoRA(128), "w", key=jax.random.key(0))
    with pytest.raises(ValueError, match=r"belongs to a parameter of shape \(.*tx.init\(adapted.trainable\)"):
        jlora.repack(big, optax.adafactor(0.1).init(big.trainable))
    with pytest.raises(ValueError, match="belongs to no parameter"):
        jlora.repack(masked, optax.flatten(optax.adam(0.1)).init(masked.trainable))


def test_saved_as_lora_of_many_ranks(tmp_path) -> None:
    """Masked or repacked, as PEFT's LoRA with a rank for every module, and back."""
    adapted = taken("adalora")
    names = {"layers": "layers/q/kernel", "first": "first/kernel", "last": "last/kernel"}
    tree = lambda leaves: {
        name: {"q": {"kernel": leaf}} if name == "layers" else {"kernel": leaf} for name, leaf in leaves.items()
    }
    rename = lambda leaves: {names[path]: leaf for path, leaf in leaves.items()}
    named = jlora.Adapted(
        tree(adapted.base), rename(adapted.trainable), rename(adapted.frozen), tuple(rename(adapted.sites).items())
    )
    for i, each in enumerate((named, jlora.repack(named))):
        lora, _ = jlora.to_lora(each, 4)
        assert lora.sites["layers/q/kernel"].method.ranks == RANKS["layers"]
        save_peft(lora, tmp_path / str(i), dtype=np.float64)
        again = load_peft(tmp_path / str(i), named.base, axes={"layers/**": AXES["layers"]})
        assert again.sites["layers/q/kernel"].method.ranks == RANKS["layers"]
        jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-10), jlora.merge(again), jlora.merge(named))
    config = json.loads((tmp_path / "0" / "adapter_config.json").read_text())
    assert set(config["rank_pattern"].values()) | {config["r"]} == {1, 2, 3}
