"""For every method: what adapt makes is a well-behaved pytree beside an untouched base, and merge gives a plain one."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from registry import (
    AXES,
    EACH_FORM,
    Row,
    adapt_model,
    assert_close,
    inputs,
    model,
    model_params,
    moved,
    over_every_other_row,
    over_mergeable_forms,
    over_most_mergeable,
    over_most_rows,
    over_products,
    over_rows,
)

import jlora
from jlora import paths
from jlora.weight import Params

lifted = jlora.lift(model, on_materialize="error")


def leaves_of(tree):
    return dict(paths.flatten(tree)[0])


@over_rows
def test_count(row: Row) -> None:
    adapted = adapt_model(row)
    own = sum(site.method.count(site) for site in adapted.sites.values())
    assert own + row.method.count_shared(adapted.sites) == row.count
    assert sum(leaf.size for leaf in jax.tree.leaves(adapted.trainable)) == row.count + row.padding


@over_products
def test_dims_name_every_axis(row: Row) -> None:
    """What slicing and sharding of parameters rely on."""
    adapted = adapt_model(row)
    for path, site in adapted.sites.items():
        stack, n_in, n_out = site.canonical_shape
        shared = adapted.frozen.get(site.method.group, {}) | adapted.trainable.get(site.method.group, {})
        own = Params(adapted.trainable[path], adapted.frozen.get(path))
        dims = site.method.dims(own._replace(shared=shared or None))
        sizes = {"in": n_in, "out": n_out}
        named = lambda names, shape, sizes=sizes: tuple(
            sizes.get(name, size) for name, size in zip(names.split(), shape, strict=True)
        )
        wanted = lambda leaf, names, stack=stack, named=named: stack + named(names, leaf.shape[len(stack) :])
        assert jax.tree.map(jnp.shape, own) == jax.tree.map(wanted, own, dims._replace(shared=None))
        for leaf, names in zip(jax.tree.leaves(shared), jax.tree.leaves(dims.shared), strict=True):
            assert all(have >= need for have, need in zip(leaf.shape, named(names, leaf.shape), strict=True))


@over_most_rows
def test_base_is_the_users_own(row: Row) -> None:
    params = model_params()
    before = jax.tree.map(np.asarray, params)
    adapted = adapt_model(row, params)
    for ours, theirs in zip(jax.tree.leaves(adapted.base), jax.tree.leaves(params), strict=True):
        assert ours is theirs
    moving = adapted.replace(trainable=moved(adapted.trainable))
    if row.method.mergeable:
        jlora.merge(moving)
    else:
        with pytest.raises(ValueError, match="no weight to merge"):
            jlora.merge(moving)
    assert_close(adapted.base, before, 0.0)


@over_most_mergeable
def test_merge_keeps_structure_and_dtype(row: Row) -> None:
    for dtype in (jnp.bfloat16, jnp.float32) if row.name in EACH_FORM else (jnp.bfloat16,):
        params = model_params(dtype)
        adapted = adapt_model(row, params)
        if row.starts_as_base:
            assert_close(jlora.merge(adapted), params, float(jnp.finfo(dtype).eps))
        merged = jlora.merge(adapted.replace(trainable=moved(adapted.trainable)))
        assert jax.tree.structure(merged) == jax.tree.structure(params)
        for path, leaf in leaves_of(merged).items():
            original = leaves_of(params)[path]
            assert (leaf.shape, leaf.dtype) == (original.shape, original.dtype)
            assert (leaf is original) == (path not in adapted.sites)
            assert path not in adapted.sites or np.any(np.asarray(leaf != original))


@over_every_other_row
def test_training_compiles_once(row: Row) -> None:
    """Equal configuration, equal treedef: neither a step nor a second model of the same shape traces anew."""
    traces = []
    tx = optax.adam(1e-2)

    @jax.jit
    def step(adapted, state, x):
        traces.append(None)
        loss = lambda trainable: jnp.sum(jnp.square(lifted(adapted.bind(trainable), x)))
        value, grads = jax.value_and_grad(loss)(adapted.trainable)
        updates, state = tx.update(grads, state, adapted.trainable)
        return adapted.replace(trainable=optax.apply_updates(adapted.trainable, updates)), state, value

    losses = []
    for seed in (0, 1):
        adapted = adapt_model(row, key=jax.random.key(seed))
        structure, state = jax.tree.structure(adapted), tx.init(adapted.trainable)
        for _ in range(3):
            adapted, state, loss = step(adapted, state, inputs())
            losses.append(float(loss))
        assert jax.tree.structure(adapted) == structure
    assert len(traces) == 1
    assert losses[2] < losses[1] < losses[0]


@over_most_rows
def test_start_depends_on_the_path_alone(row: Row) -> None:
    more = model_params() | {"aaa": {"kernel": jnp.ones((8, 24))}, "zzz": {"kernel": jnp.ones((24, 8))}}
    narrow = adapt_model(row)
    wide = jlora.adapt(more, row.method, "layers/kernel" if row.stacked else "**", axes=AXES, key=jax.random.key(0))
    for path in narrow.sites if not row.method.needs_weights else ():  # then it depends on the group's weights
        assert_close(wide.trainable[path], narrow.trainable[path], 0.0)
    again, other = adapt_model(row, model_params()), adapt_model(row, key=jax.random.key(1))
    assert_close(again.trainable, narrow.trainable, 0.0)
    assert jax.tree.structure(other) == jax.tree.structure(narrow)


@over_most_rows
def test_abstract_leaves(row: Row) -> None:
    """Shapes can be planned before anything is allocated."""
    shapes = lambda tree: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)
    concrete = adapt_model(row)
    abstract_params = jax.eval_shape(model_params)
    planned = adapt_model(row, abstract_params)
    evaluated = jax.eval_shape(lambda params: adapt_model(row, params), abstract_params)
    for adapted in (planned, evaluated):
        assert jax.tree.structure(adapted) == jax.tree.structure(concrete)
        assert shapes(adapted.trainable) == shapes(concrete.trainable)
        assert shapes(adapted.frozen) == shapes(concrete.frozen)
        out = jax.eval_shape(lambda adapted, x: lifted(adapted.bind(), x), adapted, inputs())
        assert out.shape == (4, 8)
        if row.method.mergeable:
            assert shapes(jax.eval_shape(jlora.merge, adapted)) == shapes(model_params())


@over_rows
def test_is_an_ordinary_pytree(row: Row) -> None:
    adapted = adapt_model(row)
    leaves, treedef = jax.tree.flatten(adapted)
    again = jax.tree.unflatten(treedef, leaves)
    assert again.sites == adapted.sites and hash(treedef) == hash(jax.tree.structure(again))
    assert all(isinstance(leaf, jax.Array) for leaf in leaves)
    assert hash(row.method) == hash(type(row.method)(**vars(row.method)))
    names = [path for path, _ in paths.flatten(adapted.trainable)[0]]
    assert len(set(names)) == len(names)
    for path in adapted.sites:
        assert path in jlora.summary(adapted)


@over_mergeable_forms
def test_merged_then_adapted_again_starts_there(row: Row) -> None:
    adapted = adapt_model(row)
    merged = jlora.merge(adapted.replace(trainable=moved(adapted.trainable)))
    again = adapt_model(row, merged)
    start = merged if row.starts_as_base else jlora.merge(again)
    assert_close(lifted(again.bind(), inputs()), model(start, inputs()))


def test_padding_of_ranks_stays_zero() -> None:
    """Ranks that differ along a stack are padded; what is beyond an index's own rank neither acts nor trains."""
    for cls in (jlora.LoRA, jlora.DoRA):
        adapted = jlora.adapt(
            model_params(),
            cls(4, ranks=(4, 1, 0), alphas=(8.0, 3.0, 1.0)),
            "layers/kernel",
            axes=AXES,
            key=jax.random.key(0),
        )
        loss = lambda t, adapted=adapted: jnp.sum(jnp.sin(lifted(adapted.bind(t), inputs())))
        trainable = adapted.trainable
        for _ in range(2):
            trainable = jax.tree.map(lambda p, g: p - 0.1 * g, trainable, jax.jit(jax.grad(loss))(trainable))
        parameters = trainable["layers/kernel"]
        pair = parameters if cls is jlora.LoRA else parameters["factors"]
        for index, rank in enumerate((4, 1, 0)):
            assert np.all(pair.a[index, :, rank:] == 0) and np.all(pair.b[index, rank:] == 0)
            assert np.all(pair.a[index, :, :rank] != 0) and np.all(pair.b[index, :rank] != 0)
        # Index 1 is LoRA of rank 1 and alpha 3 on that layer alone.
        merged = jlora.merge(adapted.replace(trainable=trainable))["layers"]["kernel"]
        if cls is jlora.LoRA:
            w = model_params()["layers"]["kernel"]
            assert_close(merged[0], w[0] + 8 / 4 * pair.a[0] @ pair.b[0])
            assert_close(merged[1], w[1] + 3.0 * jnp.outer(pair.a[1, :, 0], pair.b[1, 0]))
            assert_close(merged[2], w[2])


def test_lookup_only_leaves_the_head_alone() -> None:
    params = {"embedding": moved(jnp.zeros((7, 4)))}
    fn = lambda params, ids: jnp.tanh(params["embedding"][ids]) @ params["embedding"].T
    ids = jnp.array([[1, 2, 5]])
    adapted = jlora.adapt(params, jlora.LoRA(2, lookup_only=True), "embedding", key=jax.random.key(0))
    adapted = adapted.replace(trainable=moved(adapted.trainable))
    changed = jlora.merge(adapted, allow_tied_change=True)["embedding"]
    got = jlora.lift(fn, on_materialize="error")(adapted.bind(), ids)
    assert_close(got, jnp.tanh(changed[ids]) @ params["embedding"].T)
    with pytest.raises(ValueError, match="Untie them first"):
        jlora.merge(adapted)
