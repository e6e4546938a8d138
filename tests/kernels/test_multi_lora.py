"""Many adapters on one linear: every form and implementation is the loop over adapters, and no swap compiles again."""

import dataclasses
import math
import re
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jlora.kernels import Slots, group_rows, multi_lora, multi_lora_tpu
from jlora.kernels.multi_lora import EntryPieces, _with_gradient

WRITTEN = ("custom_vjp", "pallas_interpret")
ALL = ("plain", *WRITTEN)
SLOTS, N_IN, N_OUT = 5, 24, 40


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Blocks small enough that the shapes below need several, and hang over the edge."""
    for name, size in dict(_TOKENS=8, _FEATURES=16, _WIDE=32, _WIDEST=32, _FEW=4, _FUSED=8).items():
        monkeypatch.setattr(multi_lora_tpu, name, size)
    monkeypatch.setattr(sys.modules[EntryPieces.__module__], "_CACHE_BYTES", 512)


def rows_of(shape, seed=0, dtype="float32"):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def weight(dtype="float32"):
    return jnp.asarray(np.random.default_rng(7).normal(size=(N_IN, N_OUT)) / math.sqrt(N_IN), dtype)


def adapters(r, dtype="float32", seed=1):
    """Slot 1 has about half the rank, slot 3 is empty; what lies beyond the true ranks is NaN."""
    rng = np.random.default_rng(seed)
    rank = np.array([r, (r + 1) // 2, r, 0, r])
    hidden = np.arange(r)[:, None] >= rank[:, None, None]
    return Slots(
        a=jnp.asarray(np.where(hidden, np.nan, rng.normal(size=(SLOTS, r, N_IN)) / math.sqrt(N_IN)), dtype),
        b=jnp.asarray(np.where(hidden, np.nan, rng.normal(size=(SLOTS, r, N_OUT)) / math.sqrt(r)), dtype),
        scale=jnp.asarray(rng.uniform(0.5, 1.5, SLOTS), jnp.promote_types(dtype, jnp.float32)),
        rank=jnp.asarray(rank, jnp.int32),
    )


def by_the_loop(x, w, slots, assignment, dy):
    """y and all gradients, one adapter after the other, in float64."""
    x, w, a, b, s, dy = (np.asarray(v, np.float64) for v in (x, w, slots.a, slots.b, slots.scale, dy))
    y, dx, dw = x @ w, dy @ w.T, np.tensordot(x, dy, (range(x.ndim - 1),) * 2)
    da, db, ds = np.zeros_like(a), np.zeros_like(b), np.zeros_like(s)
    for i, r in enumerate(np.asarray(slots.rank)):
        mine, a_i, b_i = np.asarray(assignment) == i, a[i, :r].T, b[i, :r]
        x_i, dy_i = x[mine].reshape(-1, x.shape[-1]), dy[mine].reshape(-1, dy.shape[-1])
        y[mine] += s[i] * (x[mine] @ a_i) @ b_i
        dx[mine] += s[i] * (dy[mine] @ b_i.T) @ a_i.T
        da[i, :r], db[i, :r] = s[i] * (dy_i @ b_i.T).T @ x_i, s[i] * (x_i @ a_i).T @ dy_i
        ds[i] = np.sum((x_i @ a_i) * (dy_i @ b_i.T))
    return dict(y=y, dx=dx, dw=dw, da=da, db=db, ds=ds)


def computed(x, w, slots, assignment, dy, **kwargs):
    """The same by JAX, in one program."""

    @jax.jit
    def f(x, w, slots, assignment, dy):
        def apply(x, w, a, b, scale):
            return multi_lora(x, w, dataclasses.replace(slots, a=a, b=b, scale=scale), assignment, **kwargs)

        y, vjp = jax.vjp(apply, x, w, slots.a, slots.b, slots.scale)
        return dict(zip(("y", "dx", "dw", "da", "db", "ds"), (y, *vjp(dy)), strict=True))

    return f(x, w, slots, assignment, dy)


def assert_close(got, want, tolerance=1e-5):
    """The error is relative to the largest element, as that of a sum is."""
    for path, g in jax.tree.leaves_with_path(got):
        w = np.asarray(dict(jax.tree.leaves_with_path(want))[path], np.float64)
        g = np.asarray(g, np.float64)
        np.testing.assert_allclose(g, w, rtol=0, atol=tolerance * max(1.0, np.abs(w).max(initial=0)), err_msg=str(path))


# ---- One meaning ----

CASES = {  # entries, rows of each, largest rank
    "a row each": ((7,), (), 3),
    "a row each, rank one": ((11,), (), 1),
    "a row each in two axes": ((2, 3), (1,), 8),
    "short entries": ((6,), (5,), 16),
    "entries of several blocks": ((3, 2), (9,), 3),
    "rank above all sizes": ((4,), (3, 4), 64),
    "one slot for all": ((), (10,), 2),
}


def case(entries, rows, r, dtype="float32", factors=None, seed=0):
    assignment = np.random.default_rng(seed).integers(-1, SLOTS - 1, entries)  # slot 4 is not asked for
    if assignment.ndim:
        assignment.flat[:3] = [-1, 0, 1]
    x, dy = (rows_of((*entries, *rows, n), seed, dtype) for n in (N_IN, N_OUT))
    return x, weight(dtype), adapters(r, factors or dtype), jnp.asarray(assignment, jnp.int32), dy


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("implementation", ALL)
def test_is_the_loop_over_adapters(implementation, name):
    args = case(*CASES[name])
    got = computed(*args, frozen_w=False, implementation=implementation)
    assert_close(got, by_the_loop(*args))
    hidden = np.arange(args[2].a.shape[1])[:, None] >= np.asarray(args[2].rank)[:, None, None]
    for grad in (got["da"], got["db"]):
        assert np.all(np.where(hidden, grad, 0) == 0), "beyond the true rank there is no gradient"
        assert np.all(grad[4] == 0), "nor where no row asks for the slot"


@pytest.mark.parametrize("implementation", ALL)
@pytest.mark.parametrize("name", ["a row each", "entries of several blocks"])
def test_in_float64(implementation, name):
    """To the last digits: nothing on the way is computed in float32."""
    with jax.enable_x64(True):
        args = case(*CASES[name], dtype="float64")
        got = computed(*args, frozen_w=False, implementation=implementation)
        assert {v.dtype for v in got.values()} == {np.dtype("float64")}
        assert_close(got, by_the_loop(*args), 1e-13)


@pytest.mark.parametrize("implementation", ALL)
@pytest.mark.parametrize("name", ["a row each", "a row each, rank one", "short entries", "entries of several blocks"])
def test_bfloat16_activations_with_float32_factors(implementation, name):
    args = case(*CASES[name], dtype="bfloat16", factors="float32")
    got = computed(*args, frozen_w=False, implementation=implementation)
    of = dict(y="bfloat16", dx="bfloat16", dw="bfloat16", da="float32", db="float32", ds="float32")
    assert {name: str(v.dtype) for name, v in got.items()} == of
    assert_close(got, by_the_loop(*args), 1e-2)
    assert np.any(got["db"] != got["db"].astype("bfloat16").astype("float32")), "straight from the accumulator"


@pytest.mark.parametrize("implementation", ALL)
def test_without_a_weight_it_is_the_adapters_part(implementation):
    x, w, slots, assignment, _ = case(*CASES["short entries"])

    def loss(x, w, factors):
        part = multi_lora(x, w, dataclasses.replace(slots, **factors), assignment, implementation=implementation)
        return jnp.sum(jnp.sin(part if w is None else part - x @ w))

    grad = jax.jit(jax.value_and_grad(loss, (0, 2)), static_argnums=1)
    factors = dict(a=slots.a, b=slots.b)
    want = jax.jit(jax.value_and_grad(loss, (0, 2)))(x, w, factors)
    assert_close(grad(x, None, factors), want)


@pytest.mark.parametrize("implementation", ALL)
def test_rows_of_the_base_alone_are_the_base_alone(implementation):
    """To the last bit, also where a slot does not exist, which only a traced one may be."""
    x, w, slots, *_ = case(*CASES["a row each"])
    f = jax.jit(partial(multi_lora, implementation=implementation))
    want = f(x, w, Slots.zeros(SLOTS, 3, N_IN, N_OUT), jnp.zeros(7, int))
    for slot in (-1, -2, SLOTS, 2**30):
        np.testing.assert_array_equal(f(x, w, slots, jnp.full(7, slot)), want)


@pytest.mark.parametrize("implementation", ALL)
@pytest.mark.parametrize("name", ["a row each", "entries of several blocks"])
def test_nan_stays_in_its_adapter(implementation, name):
    entries, rows, r = CASES[name]
    x, w, slots, assignment, dy = case(entries, rows, r)
    slots = dataclasses.replace(
        slots, a=slots.a.at[0].set(jnp.nan), b=slots.b.at[0].set(jnp.nan), scale=slots.scale.at[0].set(jnp.nan)
    )
    got = computed(x, w, slots, assignment, dy, implementation=implementation)
    broken = np.asarray(assignment) == 0
    for rows_out in (got["y"], got["dx"]):
        assert np.all(np.isnan(rows_out[broken])) and np.all(np.isfinite(rows_out[~broken]))
    for grad in (got["da"], got["db"], got["ds"]):
        assert np.all(np.isnan(grad[0])) and np.all(np.isfinite(grad[1:]))


@pytest.mark.parametrize("implementation", ALL)
@pytest.mark.parametrize("shape", [(2, 0, N_IN), (0, N_IN)])
def test_no_rows(implementation, shape):
    slots, f = adapters(2), partial(multi_lora, implementation=implementation)
    loss = lambda a, x: jnp.sum(f(x, weight(), dataclasses.replace(slots, a=a), jnp.zeros(shape[0], int)))
    value, grads = jax.value_and_grad(loss, (0, 1))(slots.a, jnp.zeros(shape))
    assert value == 0 and np.all(grads[0] == 0) and grads[1].shape == shape


def test_preferred_element_type():
    x, w, slots, assignment, _ = case(*CASES["a row each"], dtype="bfloat16")
    for implementation in ALL:
        f = partial(multi_lora, implementation=implementation, preferred_element_type="float32")
        assert f(x, w, slots, assignment).dtype == "float32"


# ---- Rows in any order, by tiles ----


@pytest.mark.parametrize("tile", [1, 4, 64])
@pytest.mark.parametrize("kind", ["mixed", "one adapter", "the base alone", "all different"])
def test_group_rows(kind, tile):
    rows = 23
    assignment = {
        "mixed": np.random.default_rng(3).integers(-1, SLOTS, rows),
        "one adapter": np.full(rows, 2),
        "the base alone": np.full(rows, -1),
        "all different": np.arange(rows) - 1,
    }[kind]
    slots = max(SLOTS, assignment.max() + 1)
    groups = jax.jit(partial(group_rows, tile=tile, slots=slots))(assignment)
    tiles = (rows + min(rows, slots + 1) * (tile - 1)) // tile
    assert groups.assignment.shape == (tiles,) and groups.source.shape == (tiles, tile)
    source = np.asarray(groups.source)
    assert sorted(source[source < rows]) == list(range(rows)), "every row has one place"
    owners = np.broadcast_to(np.asarray(groups.assignment)[:, None], source.shape)
    np.testing.assert_array_equal(owners[source < rows], assignment[source[source < rows]])

    x = rows_of((rows, 2, 3))
    grouped, back = jax.vjp(groups.group, x)
    np.testing.assert_array_equal(grouped, np.concatenate([x, np.zeros((1, 2, 3))])[source])
    ungrouped, ahead = jax.vjp(groups.ungroup, grouped)
    np.testing.assert_array_equal(ungrouped, x)
    np.testing.assert_array_equal(back(grouped)[0], x)
    np.testing.assert_array_equal(ahead(x)[0], grouped)


@pytest.mark.parametrize("implementation", ALL)
def test_tiles_are_the_rows_they_hold(implementation):
    x, w, slots, assignment, dy = case((21,), (), 4)

    @jax.jit
    def in_tiles(x, factors, assignment):
        groups = group_rows(assignment, 4, SLOTS)
        adapted = dataclasses.replace(slots, **factors)
        return groups.ungroup(multi_lora(groups.group(x), w, adapted, groups.assignment, implementation=implementation))

    y, vjp = jax.vjp(lambda x, factors: in_tiles(x, factors, assignment), x, dict(a=slots.a, b=slots.b))
    dx, factors = vjp(dy)
    want = by_the_loop(x, w, slots, assignment, dy)
    assert_close(dict(y=y, dx=dx, da=factors["a"], db=factors["b"]), want)


# ---- Slots ----


def test_put_and_remove():
    slots, empty = adapters(3), Slots.zeros(SLOTS, 3, N_IN, N_OUT)
    for i, r in enumerate(np.asarray(slots.rank)):
        empty = empty.put(i, slots.a[i, :r].T, slots.b[i, :r], slots.scale[i])
    x, w, _, assignment, dy = case(*CASES["a row each"])
    assert_close(multi_lora(x, w, empty, assignment), by_the_loop(x, w, slots, assignment, dy)["y"])
    np.testing.assert_array_equal(empty.rank, slots.rank)
    for leaf, kept in zip(jax.tree.leaves(empty.remove(1)), jax.tree.leaves(empty), strict=True):
        assert np.all(leaf[1] == 0)
        np.testing.assert_array_equal(np.delete(leaf, 1, 0), np.delete(kept, 1, 0))


@pytest.mark.parametrize("dtype", ["int8", "uint8", "uint32"])
def test_assignments_of_other_integers(dtype):
    """The number of slots need not fit."""
    slots, x, w = Slots.zeros(200, 2, N_IN, N_OUT), rows_of((3, N_IN)), weight()
    slots = slots.put(100, rows_of((N_IN, 2)), rows_of((2, N_OUT)))
    want = multi_lora(x, w, slots, jnp.array([100, 0, 100]))
    assignment = jnp.array([100, 0, 100], dtype)
    assert_close(multi_lora(x, w, slots, assignment), want)
    groups = group_rows(assignment, 2, 200)
    assert_close(groups.ungroup(multi_lora(groups.group(x), w, slots, groups.assignment)), want)


def test_put_with_factors_that_are_padded():
    a, b = rows_of((N_IN, 3)), rows_of((3, N_OUT))
    padded, cut = (Slots.zeros(2, 3, N_IN, N_OUT).put(1, *f) for f in ((a, b), (a[:, :2], b[:2])))
    padded = padded.put(1, a, b, rank=2)
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, padded, cut)))


def test_a_swap_compiles_nothing():
    """Neither do another assignment, another rank of padded factors, and an adapter that goes."""
    traces = []

    @jax.jit
    def f(x, w, slots, assignment):
        traces.append(1)
        groups = group_rows(assignment, 4, SLOTS)
        decoded = multi_lora(x, w, slots, assignment)
        return decoded, groups.ungroup(multi_lora(groups.group(x), w, slots, groups.assignment))

    put, remove = jax.jit(Slots.put, donate_argnums=0), jax.jit(Slots.remove, donate_argnums=0)
    slots = Slots.zeros(SLOTS, 3, N_IN, N_OUT)
    for seed in range(4):
        x, w, _, assignment, dy = case(*CASES["a row each"], seed=seed)
        old = slots.a
        slots = put(slots, seed, rows_of((N_IN, 3), seed), rows_of((3, N_OUT), seed), 0.1 * seed, rank=seed % 3 + 1)
        slots = remove(slots, (seed + 2) % SLOTS)
        assert old.is_deleted(), "the slots are written where they are"
        want = by_the_loop(x, w, slots, assignment, dy)["y"]
        assert_close(f(x, w, slots, assignment), (want, want))
    assert (len(traces), f._cache_size(), put._cache_size(), remove._cache_size()) == (1, 1, 1, 1)


def test_a_traced_slot_that_does_not_exist_changes_nothing():
    slots = Slots.zeros(3, 2, N_IN, N_OUT).put(2, rows_of((N_IN, 2)), rows_of((2, N_OUT)))
    for slot in (-1, 3):
        for changed in (jax.jit(Slots.remove)(slots, slot), jax.jit(Slots.put)(slots, slot, slots.a[2].T, slots.b[2])):
            assert all(jax.tree.leaves(jax.tree.map(np.array_equal, changed, slots)))


# ---- Transformations ----


def layers(n=3, r=3):
    """Square layers, stacked: (weights, slots)."""
    empty = Slots.zeros(2, r, N_IN, N_IN)
    stack = jax.tree.map(lambda v: jnp.stack([v] * n), empty)
    put = jax.vmap(Slots.put, (0, None, 0, 0, None))
    for slot in range(2):
        stack = put(stack, slot, rows_of((n, N_IN, r), slot) / 5, rows_of((n, r, N_IN), slot + 2) / 2, 0.5)
    return rows_of((n, N_IN, N_IN), 4) / 5, stack


def loss_of_layers(implementation, remat, policy=None):
    def layer(x, params, assignment):
        return jnp.tanh(multi_lora(x, *params, assignment, implementation=implementation)), None

    def loss(factors, w, slots, x, assignment):
        step = partial(layer, assignment=assignment)
        step = jax.checkpoint(step, policy=policy) if remat else step
        return jnp.sum(jax.lax.scan(step, x, (w, dataclasses.replace(slots, **factors)))[0] ** 2)

    return loss


def of_layers(lead=(4, 6)):
    w, slots = layers()
    return dict(a=slots.a, b=slots.b), w, slots, rows_of((*lead, N_IN)), jnp.asarray([1, -1, 0, 1])


@pytest.mark.parametrize("implementation", WRITTEN)
@pytest.mark.parametrize("remat", [False, True])
def test_scan_and_remat(implementation, remat):
    args = of_layers()
    got = jax.jit(jax.value_and_grad(loss_of_layers(implementation, remat)))(*args)
    assert_close(got, jax.jit(jax.value_and_grad(loss_of_layers("plain", remat)))(*args))


@pytest.mark.parametrize("implementation", ALL)
def test_vmap_over_layers(implementation):
    (w, slots), x = layers(2), rows_of((2, 5, N_IN))
    assignment = jnp.asarray([1, 0, -1, 1, 0])
    f = partial(multi_lora, implementation=implementation)
    got = jax.jit(jax.vmap(f, (0, 0, 0, None)))(x, w, slots, assignment)
    each = [f(x[i], w[i], jax.tree.map(lambda v, i=i: v[i], slots), assignment) for i in range(2)]
    assert_close(got, jnp.stack(each))


def test_plain_has_forward_mode():
    x, w, slots, assignment, _ = case(*CASES["a row each"])
    f = lambda scale: multi_lora(x, w, dataclasses.replace(slots, scale=scale), assignment, implementation="plain")
    y, tangent = jax.jvp(f, (slots.scale,), (slots.scale,))
    assert_close(tangent, y - x @ w)


def test_remat_can_keep_h():
    args = of_layers()
    for policy, kept in ((jax.checkpoint_policies.save_only_these_names("lora_h"), True), (None, False)):
        jaxpr = str(jax.make_jaxpr(jax.grad(loss_of_layers("custom_vjp", True, policy)))(*args))
        assert ("f32[3,4,6,3]" in jaxpr) == kept


# ---- Several devices ----

SPECS = {  # of x, w, a, b
    "data and columns": (P("d"), P(None, "m"), P(), P(None, None, "m")),
    "data and rows": (P("d", None, "m"), P("m"), P(None, None, "m"), P()),
}


def sharded_case(entries=(4,), rows=(8,)):
    x, w, slots, assignment, dy = case(entries, rows, 3)
    slots = jax.tree.map(lambda v: jnp.nan_to_num(v), slots)
    return (x, w, slots, assignment, dy), by_the_loop(x, w, slots, assignment, dy)


@pytest.mark.parametrize("implementation", ["plain", "custom_vjp"])
@pytest.mark.parametrize("rows", [(8,), (1,)])
@pytest.mark.parametrize("specs", SPECS)
def test_partitioned_by_the_compiler(devices, specs, rows, implementation):
    (x, w, slots, assignment, dy), want = sharded_case((8,), rows)
    mesh = jax.make_mesh((2, 4), ("d", "m"), axis_types=(AxisType.Auto, AxisType.Auto))
    put = lambda v, spec: jax.device_put(v, NamedSharding(mesh, spec))
    x, w, a, b = map(put, (x, w, slots.a, slots.b), SPECS[specs])
    slots = Slots(a=a, b=b, scale=put(slots.scale, P()), rank=put(slots.rank, P()))
    got = computed(x, w, slots, put(assignment, P("d")), dy, frozen_w=False, implementation=implementation)
    assert_close(got, want)


@pytest.mark.optimized
def test_partitioning_gathers_no_activations(devices):
    (x, w, slots, assignment, _), _ = sharded_case()
    mesh = jax.make_mesh((2, 4), ("d", "m"), axis_types=(AxisType.Auto, AxisType.Auto))
    put = lambda v, spec: jax.device_put(v, NamedSharding(mesh, spec))
    x, w, a, b = map(put, (x, w, slots.a, slots.b), SPECS["data and columns"])
    slots = Slots(a=a, b=b, scale=put(slots.scale, P()), rank=put(slots.rank, P()))
    program = jax.jit(multi_lora).lower(x, w, slots, put(assignment, P("d"))).compile()
    assert not re.search("all-gather|all-to-all|all-reduce", program.as_text())


@pytest.mark.parametrize("implementation", ALL)
def test_shard_map(devices, implementation):
    """The gradients of slots that devices share are summed over them."""
    (x, w, slots, assignment, dy), want = sharded_case()
    mesh = jax.make_mesh((4, 2), ("d", "m"), axis_types=(AxisType.Auto, AxisType.Auto))

    def f(x, w, a, b, scale, rank, assignment):
        slots = Slots(a=a, b=b, scale=scale, rank=rank)
        return multi_lora(x, w, slots, assignment, frozen_w=False, implementation=implementation)

    f = jax.shard_map(
        f,
        mesh=mesh,
        in_specs=(P("d"), P(None, "m"), P(), P(None, None, "m"), P(), P(), P("d")),
        out_specs=P("d", None, "m"),
        check_vma=implementation != "pallas_interpret",  # the interpreter does not know of varying axes
    )

    @jax.jit
    def step(x, w, a, b, scale, dy):
        y, vjp = jax.vjp(lambda *args: f(*args, slots.rank, assignment), x, w, a, b, scale)
        return dict(zip(("y", "dx", "dw", "da", "db", "ds"), (y, *vjp(dy)), strict=True))

    assert_close(step(x, w, slots.a, slots.b, slots.scale, dy), want)


def test_group_rows_in_shard_map(devices):
    x, w, slots, assignment, dy = case((32,), (), 3)
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))

    def f(x, w, slots, assignment):
        groups = group_rows(assignment, 4, SLOTS)
        return groups.ungroup(multi_lora(groups.group(x), w, slots, groups.assignment))

    f = jax.jit(jax.shard_map(f, mesh=mesh, in_specs=(P("d"), P(), P(), P("d")), out_specs=P("d")))
    assert_close(f(x, w, slots, assignment), by_the_loop(x, w, slots, assignment, dy)["y"])


# ---- What it costs ----


@pytest.mark.optimized
def test_flops_do_not_depend_on_the_number_of_adapters():
    """Within 2 % of the count for one adapter, in `lora_linear`, forward and backward."""
    tiles, tile, n_in, n_out, r = 8, 32, 128, 344, 8
    x, dy, w = jnp.ones((tiles, tile, n_in)), jnp.ones((tiles, tile, n_out)), jnp.ones((n_in, n_out))

    def flops(slots):
        def step(x, w, factors, dy, assignment):
            f = lambda x, factors: multi_lora(x, w, dataclasses.replace(slots, **factors), assignment)
            y, vjp = jax.vjp(f, x, factors)
            return y, vjp(dy)

        factors = dict(a=slots.a, b=slots.b)
        return jax.jit(step).lower(x, w, factors, dy, jnp.zeros(tiles, int)).compile().cost_analysis()["flops"]

    tokens = tiles * tile
    products = 4 * tokens * n_in * n_out + 6 * tokens * r * (n_in + n_out)
    # Tables, the select on what each tile reads, and sums of parts: of the size of the factors, not of a product.
    few, many = (flops(Slots.zeros(slots, r, n_in, n_out)) for slots in (2, 64))
    assert products <= few <= 1.02 * products
    assert many - few <= 4 * 64 * r * (n_in + n_out)


@pytest.mark.optimized
@pytest.mark.skipif(
    jax.default_backend() != "cpu", reason="elsewhere they are gathered, or the kernels are right there"
)
def test_decoding_makes_no_copy_of_all_adapters():
    x, w, slots, assignment, _ = case((64,), (), 8)
    temporary = lambda implementation: (
        jax.jit(partial(multi_lora, implementation=implementation))
        .lower(x, w, slots, assignment)
        .compile()
        .memory_analysis()
        .temp_size_in_bytes
    )
    copy = 64 * 8 * N_OUT * 4
    assert temporary("plain") >= copy and temporary("custom_vjp") <= copy / 2


@pytest.mark.parametrize("implementation", ALL)
def test_a_frozen_weight_has_no_gradient(implementation):
    """Even when the caller differentiates it, and no product has its shape."""
    x, w, slots, assignment, _ = case(*CASES["short entries"])
    grad = jax.grad(lambda w: jnp.sum(multi_lora(x, w, slots, assignment, implementation=implementation)))
    assert np.all(grad(w) == 0)
    assert f"f32[{N_IN},{N_OUT}] = dot_general" not in str(jax.make_jaxpr(grad)(w))


def test_what_is_kept_for_the_backward_pass():
    x, w, slots, assignment, _ = case(*CASES["short entries"])
    kept = lambda f, *args: {v.shape for v in jax.tree.leaves(jax.vjp(f, *args)[1]) if v.ndim}
    f = lambda x, a, b: multi_lora(x, w, dataclasses.replace(slots, a=a, b=b), assignment)
    everything = kept(f, x, slots.a, slots.b)
    assert everything == {x.shape, w.shape, slots.a.shape, slots.b.shape, assignment.shape, (6, 5, 16)}
    assert x.shape not in kept(lambda b: f(x, slots.a, b), slots.b), "with A frozen, x is not needed"


# ---- The kernels ----


def test_each_form_has_its_kernels():
    def kernels(rows):
        x, w, slots, assignment, dy = case((3,), rows, 3)
        f = lambda x, b: multi_lora(
            x, w, dataclasses.replace(slots, b=b), assignment, implementation="pallas_interpret"
        )
        step = lambda x, b, dy: jax.vjp(f, x, b)[1](dy)
        return set(re.findall(r"name=multi_lora_(\w+)", str(jax.make_jaxpr(step)(x, slots.b, dy))))

    assert kernels(()) == {"shrink", "expand"}
    assert kernels((5,)) == {"shrink", "expand", "read_dy"}
    assert kernels((9,)) == {"shrink", "fused", "read_dy"}


def test_the_kernels_on_a_simulated_tpu():
    """With its memories, copies and a detector of races between them; fresh memory is NaN."""
    args = case((2,), (9,), 3)
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(uninitialized_memory="nan", detect_races=True)):
        got = computed(*args, implementation="pallas_interpret", frozen_w=False)
        assert_close(got, by_the_loop(*args))


@pytest.mark.parametrize("rows", [(), (20,), (300,)])
def test_the_kernels_lower_for_tpu(rows, monkeypatch):
    """Mosaic accepts them, at the blocks they have in earnest. Needs no TPU."""
    monkeypatch.undo()
    pieces = multi_lora_tpu.PallasPieces(
        compute=jnp.dtype("bfloat16"), accumulate=jnp.dtype("float32"), out=jnp.dtype("bfloat16"), precision=None
    )

    def step(x, a, b, scale, slot, rank, w, dy):
        f = lambda x, a, b, s: _with_gradient(pieces, True, jax.typeof(x), x, a, b, s, slot, rank, w)
        y, vjp = jax.vjp(f, x, a, b, scale)
        return y, vjp(dy)

    like = jax.ShapeDtypeStruct
    x, dy, w = (like(shape, "bfloat16") for shape in ((4, *rows, 520), (4, *rows, 700), (520, 700)))
    a, b, scale = (like(shape, "float32") for shape in ((3, 4, 520), (3, 4, 700), (4,)))
    entries = like((4,), "int32")
    exported = jax.export.export(jax.jit(step), platforms=["tpu"])(x, a, b, scale, entries, entries, w, dy)
    assert exported.mlir_module().count("tpu_custom_call") == 4


# ---- Bad input ----


@pytest.mark.parametrize(
    "broken, message",
    [
        (dict(x=(7, 23)), r"x \(7, 23\).*do not fit together; want x \[\.\.\., in\]"),
        (dict(w=(N_OUT, N_IN)), r"w \(40, 24\).*passed as w\.T"),
        (dict(w=(2, N_IN, N_OUT)), r"w \(2, 24, 40\).*jax\.vmap"),
        (dict(x=()), r"got x \(\)"),
    ],
)
def test_shapes_that_do_not_fit(broken, message):
    x, w, slots, assignment, _ = case(*CASES["a row each"])
    args = dict(x=x, w=w) | {name: jnp.zeros(shape) for name, shape in broken.items()}
    with pytest.raises(ValueError, match=message):
        multi_lora(args["x"], args["w"], slots, assignment)


def test_slots_that_do_not_fit():
    x, w, slots, assignment, _ = case(*CASES["a row each"])
    with pytest.raises(ValueError, match=r"slots\.b \(5, 2, 40\), which do not fit"):
        multi_lora(x, w, dataclasses.replace(slots, b=slots.b[:, :2]), assignment)
    with pytest.raises(ValueError, match=r"slots\.a \(1, 5, 3, 24\).*scanned over"):
        multi_lora(x, w, dataclasses.replace(slots, a=slots.a[None]), assignment)


@pytest.mark.parametrize(
    "assignment, message",
    [
        (np.zeros(6, int), r"assignment \(6,\) of int32 with x \(7, 24\); want integers, one for each entry"),
        (np.zeros(7), r"assignment \(7,\) of float32"),
        (np.zeros((7, 24), int), r"assignment \(7, 24\)"),
        ([0, 1, 2, 3, 4, 5, 0], "slots from 0 to 5 in assignment; want 0 to 4, or -1 for the base alone"),
        ([0, 1, 2, 3, 4, -2, 0], "slots from -2 to 4"),
    ],
)
def test_assignments_that_do_not_fit(assignment, message):
    x, w, slots, *_ = case(*CASES["a row each"])
    with pytest.raises(ValueError, match=message):
        multi_lora(x, w, slots, assignment)


def test_adapters_that_do_not_fit():
    slots, a, b = Slots.zeros(2, 3, N_IN, N_OUT), rows_of((N_IN, 4)), rows_of((4, N_OUT))
    with pytest.raises(ValueError, match=r"rank 4 for slots of rank 3 at most; .*rank=4.*to_lora\(adapted, rank=3\)"):
        slots.put(0, a, b)
    for slot in (-1, 2):
        with pytest.raises(ValueError, match=f"got slot {slot} of 2; want 0 to 1"):
            slots.put(slot, a[:, :3], b[:3])
        with pytest.raises(ValueError, match=f"got slot {slot} of 2; want 0 to 1"):
            slots.remove(slot)
    with pytest.raises(ValueError, match=r"got a \(3, 24\), b \(3, 40\), scale \(\); want a \[24, r\], b \[r, 40\]"):
        slots.put(0, a[:, :3].T, b[:3])
    with pytest.raises(ValueError, match=r"scale \(2,\)"):
        slots.put(0, a[:, :3], b[:3], jnp.ones(2))
    with pytest.raises(ValueError, match="rank=3 with factors of rank 2"):
        slots.put(0, a[:, :2], b[:2], rank=3)


def test_groups_that_do_not_fit():
    with pytest.raises(ValueError, match=r"assignment \(2, 3\) of int32; want integers \[rows\]"):
        group_rows(jnp.zeros((2, 3), int), 4, SLOTS)
    with pytest.raises(ValueError, match="tile=0 and slots=5; want at least 1"):
        group_rows(jnp.zeros(3, int), 0, SLOTS)


def test_implementations_that_are_not_there():
    x, w, slots, assignment, _ = case(*CASES["a row each"])
    with pytest.raises(ValueError, match="'fast'; want None or one of plain, custom_vjp, pallas, pallas_interpret"):
        multi_lora(x, w, slots, assignment, implementation="fast")
    with pytest.raises(ValueError, match="int32; one of the two must be floating point"):
        multi_lora(x.astype(int), w.astype(int), slots, assignment)
    if jax.default_backend() != "tpu":
        with pytest.raises(ValueError, match="written for TPU.*'pallas_interpret' to emulate"):
            multi_lora(x, w, slots, assignment, implementation="pallas")
