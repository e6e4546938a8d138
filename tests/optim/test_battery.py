"""What every transformation of jlora.optim has to do, whatever it is: one battery over the table of battery.py."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from battery import ROWS, Row
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import jlora
from jlora.optim.pairs import is_pair


@pytest.fixture(params=ROWS)
def row(request: pytest.FixtureRequest) -> Row:
    return ROWS[request.param]


def tree(row: Row, seed: int = 0):
    random = np.random.default_rng(seed)
    fresh = lambda *shape: jnp.asarray(random.normal(size=shape), jnp.float32)
    if row.plain:
        return {"kernel": fresh(8, 6), "stack": {"w": fresh(2, 4, 8)}, "bias": fresh(6)}
    base = {"one": {"kernel": fresh(8, 6)}, "two": {"kernel": fresh(6, 8)}, "stack": {"kernel": fresh(2, 8, 6)}}
    methods = {"two/*": jlora.DoRA(2, alpha=4), "**": jlora.LoRA(2, alpha=4)}
    axes = {"stack/kernel": jlora.Axes((1,), (2,), (0,))}
    adapted = jlora.adapt(base, methods, axes=axes, key=jax.random.key(seed))
    return jax.tree.map(lambda leaf: fresh(*leaf.shape), adapted.trainable)


def gradients(params, seed: int = 7):
    random = np.random.default_rng(seed)
    return jax.tree.map(lambda p: jnp.asarray(random.normal(size=p.shape), p.dtype), params)


def close(a, b, atol: float = 1e-5) -> None:
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=atol, rtol=1e-5), a, b)


def types(x):
    return jax.tree.map(jax.typeof, x)


def run(tx, params, grads: list, state=None):
    state = tx.init(params) if state is None else state
    update = jax.jit(tx.update)
    for g in grads:
        updates, state = update(g, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def test_converges(row: Row) -> None:
    """Least squares, of products where there are pairs, the rate falling to nothing; the state's types do not change on
    the way. (Targets have the A of the start: some optimizers leave it.)"""
    params, target = tree(row), tree(row, 1)
    leaves = lambda p: jax.tree.leaves(p, is_leaf=is_pair)
    products = lambda p: [leaf.product() if is_pair(leaf) else leaf for leaf in leaves(p)]
    reachable = lambda p, t: jlora.Factors(p.a, t.b, t.scale) if is_pair(t) else t
    target = products(jax.tree.map(reachable, params, target, is_leaf=is_pair))
    loss = lambda p: sum(jnp.mean((a - b) ** 2) for a, b in zip(products(p), target, strict=True))
    tx = row.make(optax.cosine_decay_schedule(row.rate, 300))

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    carry = params, tx.init(params)
    (last, state), _ = jax.jit(lambda carry: jax.lax.scan(step, carry, None, length=300))(carry)
    assert types(state) == types(carry[1])
    assert float(loss(last)) < 0.05 * float(loss(params))


def test_compiles_once_and_takes_extra_arguments(row: Row) -> None:
    params = tree(row)
    tx = optax.with_extra_args_support(row.make(row.rate))
    update = jax.jit(lambda g, s, p, value: tx.update(g, s, p, value=value))
    state = jax.jit(tx.init)(params)
    for seed in range(7):
        _, state = update(gradients(params, seed), state, params, 1.0 * seed)
    assert update._cache_size() == 1


def test_may_be_donated(row: Row) -> None:
    """Neither the first state nor one made outside of jit has a buffer twice, or one of the parameters'."""
    params = tree(row)
    tx = row.make(row.rate)
    state = tx.init(params)
    _, later = tx.update(gradients(params), state, params)
    leaves = jax.tree.leaves((params, state, later))
    assert len({leaf.unsafe_buffer_pointer() for leaf in leaves}) == len(leaves)


def test_around_it(row: Row) -> None:
    """Accumulation gives the step of the mean; injected rates and schedules the same steps; a chain clips before."""
    params = tree(row)
    grads = [gradients(params, seed) for seed in range(4)]
    mean = lambda a, b: jax.tree.map(lambda x, y: (x + y) / 2, a, b)
    wanted, _ = run(row.make(row.rate), params, [mean(*grads[:2]), mean(*grads[2:])])
    accumulated, _ = run(optax.MultiSteps(row.make(row.rate), 2), params, grads)
    close(accumulated, wanted, 1e-4)
    plain, _ = run(row.make(row.rate), params, grads)
    injected, state = run(optax.inject_hyperparams(row.make)(rate=row.rate), params, grads)
    close(injected, plain)
    assert float(state.hyperparams["rate"]) == pytest.approx(row.rate)
    close(run(optax.chain(optax.clip_by_global_norm(1e9), row.make(lambda step: row.rate)), params, grads)[0], plain)


def test_gradients_that_are_not_finite(row: Row) -> None:
    params = tree(row)
    tx = optax.apply_if_finite(row.make(row.rate), 3)
    _, state = run(tx, params, [gradients(params)])
    bad = jax.tree.map(lambda g: g * jnp.nan, gradients(params))
    after, later = run(tx, params, [bad], state)
    close((after, later.inner_state), (params, state.inner_state), 0)


def test_parts_of_a_tree(row: Row) -> None:
    """Masked and partitioned: what is not its own passes through, and what is, gets the same step."""
    params = {"mine": tree(row), "other": {"w": jnp.ones((4, 4))}}
    grads = gradients(params)
    alone, _ = run(row.make(row.rate), {"mine": params["mine"]}, [{"mine": grads["mine"]}])
    masked, _ = run(optax.masked(row.make(row.rate), {"mine": True, "other": False}), params, [grads])
    close(masked["mine"], alone["mine"])
    close(masked["other"], jax.tree.map(jnp.add, params["other"], grads["other"]))
    tx = optax.partition({"a": row.make(row.rate), "b": optax.set_to_zero()}, {"mine": "a", "other": "b"})
    parted, _ = run(tx, params, [grads])
    close(parted, {"mine": alone["mine"], "other": params["other"]})


def test_placeholders(row: Row) -> None:
    """Trees without leaves, and optax's walk over the state."""
    params = tree(row)
    tx = row.make(row.rate)
    doubled = optax.tree_map_params(tx, lambda leaf: 2 * leaf, tx.init(params))
    assert types(doubled) == types(tx.init(params))
    assert jax.tree.leaves(tx.update({}, tx.init({}), {})[0]) == []


def test_shapes_alone_give_the_state(row: Row) -> None:
    params = tree(row)
    tx = row.make(row.rate)
    abstract = jax.eval_shape(tx.init, params)
    shape = lambda x: (x.shape, x.dtype)
    assert jax.tree.map(shape, abstract) == jax.tree.map(shape, tx.init(params))


def test_adapted_tree() -> None:
    """The trainable parameters of an adapted tree are a tree like any other."""
    for row in ROWS.values():
        if row.plain and row.adapted:
            params = tree(Row(row.make, plain=False))
            moved, _ = run(row.make(row.rate), params, [gradients(params)])
            assert jax.tree.structure(moved) == jax.tree.structure(params)
            assert all(np.any(a != b) for a, b in zip(*map(jax.tree.leaves, (moved, params)), strict=True))


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_sharded(row: Row, kind: str, devices: list) -> None:
    """The steps of one device; and under an explicit mesh, state whose types, sharding included, stay what they are."""
    axis = getattr(AxisType, kind)
    mesh = Mesh(np.array(devices[:4]).reshape(2, 2), ("x", "y"), axis_types=(axis, axis))
    params = tree(row)
    grads = [gradients(params, seed) for seed in range(2)]
    wanted, _ = run(row.make(row.rate), params, grads)
    specs = {1: ("y",), 2: ("x", "y"), 3: (None, "x", "y")}

    def put(x):
        fits = lambda leaf: [a if n % 2 == 0 else None for a, n in zip(specs[leaf.ndim], leaf.shape, strict=True)]
        return jax.tree.map(lambda leaf: jax.device_put(leaf, NamedSharding(mesh, PartitionSpec(*fits(leaf)))), x)

    with jax.set_mesh(mesh):
        tx = row.make(row.rate)
        params = put(params)
        state = tx.init(params)
        got, after = run(tx, params, [put(g) for g in grads], state)
        assert types(got) == types(params)
        assert types(after) == types(state)
    close(jax.device_get(got), wanted, 1e-4)
