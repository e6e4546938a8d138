"""calibrate collects what is computed by hand, however the model is written."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from jlora import init
from jlora.calibrate import STATISTICS

RNG = np.random.default_rng(0)
pytestmark = pytest.mark.usefixtures("x64")
SHAPES = {"table": (9, 6), "layers": (3, 6, 6), "heads": (6, 2, 4), "back": (2, 4, 6), "experts": (2, 6, 6)}
PARAMS = {name: RNG.normal(size=shape) / 2 for name, shape in SHAPES.items()}
BATCHES = [{"ids": RNG.integers(0, 9, size=(2, 4)), "y": RNG.normal(size=(2, 4, 9))} for _ in range(3)]
RULE = jlora.LoRA(2, start=init.LoRAGA())


def scanned(p, x):
    return jax.lax.scan(jax.checkpoint(lambda x, w: (jnp.tanh(x @ w), None)), x, p["layers"])[0]


def unrolled(p, x):
    for i in reversed(range(3)):  # the order of use is not that of the stack
        x = jnp.tanh(x @ p["layers"][2 - i])
    return x


def model(p, batch, layers=scanned):
    x = layers(p, jnp.take(p["table"], batch["ids"], axis=0))
    x = x + jnp.einsum("bthk,hkd->btd", jnp.einsum("btd,dhk->bthk", x, p["heads"]), p["back"])
    x = x + jnp.einsum("ebtd,edf->ebtf", jnp.stack([x, 2 * x]), p["experts"]).sum(0)
    return x @ p["table"].T


def loss(p, batch, layers=scanned):
    return jnp.mean((model(p, batch, layers) - batch["y"]) ** 2)


def unrolled_loss(p, batch):
    return loss(p, batch, unrolled)


def collect(fn=loss, targets="**", names=tuple(STATISTICS), params=PARAMS, batches=BATCHES, **kwargs):
    return jlora.calibrate(fn, params, batches, jlora.LoRA(2), targets, collect=names, **kwargs)


def inputs():
    """The inputs of the scanned layers, [batches][layer] -> [tokens, in]."""
    out = []
    for batch in BATCHES:
        x, of = PARAMS["table"][batch["ids"]].reshape(-1, 6), []
        for w in PARAMS["layers"]:
            of.append(x)
            x = np.tanh(x @ w)
        out.append(of)
    return out


_SLOW = pytest.param(jax.jit(loss), marks=pytest.mark.slow, id="jitted")


@pytest.mark.parametrize("fn", [pytest.param(loss, id="scanned"), pytest.param(unrolled_loss, id="unrolled"), _SLOW])
def test_by_hand(fn):
    stats = collect(fn)
    assert stats.batches == 3
    grads = [jax.grad(loss)(PARAMS, batch) for batch in BATCHES]
    for path, own in stats.leaves.items():
        wanted = sum(np.asarray(g[path]) for g in grads) / 3
        np.testing.assert_allclose(own["g"].reshape(wanted.shape), wanted, rtol=1e-9, atol=1e-12, err_msg=path)
    own = stats.leaves["layers"]
    for layer in range(3):
        of = [parts[layer] for parts in inputs()]
        x = np.concatenate(of)
        np.testing.assert_allclose(own["xx"][layer], x.T @ x, rtol=1e-9)
        np.testing.assert_allclose(own["x"][layer], x.sum(0), rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(own["absx"][layer], np.abs(x).sum(0), rtol=1e-9)
        scaled = sum(part.T @ part / part.max() ** 2 for part in of) / 3
        np.testing.assert_allclose(own["scaled_xx"][layer], scaled, rtol=1e-9)
        assert own["n"][layer] == 24
    # The experts' inputs are x and 2 x, those of `heads` x: [2, in, in].
    experts, heads = stats.leaves["experts"], stats.leaves["heads"]
    np.testing.assert_allclose(experts["xx"][1], 4 * experts["xx"][0], rtol=1e-9)
    assert heads["xx"].shape == (6, 6) and stats.leaves["back"]["xx"].shape == (8, 8)
    assert set(stats.leaves["table"]) == {"g"}  # a lookup has no inputs to speak of, and a gradient


def test_inputs_alone_take_any_function_and_no_backward_pass():
    def forward_only(p, batch):
        y = model(p, batch)
        return {"y": jax.pure_callback(np.asarray, y, y)}  # it has no derivative

    stats, wanted = collect(forward_only, "{layers,back}", ("n", "xx")), collect().leaves
    assert set(stats.leaves) == {"layers", "back"}
    for path, own in stats.leaves.items():
        assert set(own) == {"n", "xx"}
        np.testing.assert_allclose(own["xx"], wanted[path]["xx"], rtol=1e-12)


def test_what_is_collected_is_what_the_methods_ask_for():
    rules = {"layers": jlora.LoRA(2, start=init.EVA()), "heads": jlora.DoRA(2, start=init.CorDA()), "**": jlora.LoRA(1)}
    stats = jlora.calibrate(model, PARAMS, BATCHES, rules)
    assert {path: set(own) for path, own in stats.leaves.items()} == {
        "layers": {"n", "x", "xx"},
        "heads": {"n", "scaled_xx"},
    }
    adapted = jlora.adapt(PARAMS, rules, fn=model, args=(BATCHES[0],), stats=stats, key=jax.random.key(0))
    np.testing.assert_allclose(jlora.lift(model)(adapted.bind(), BATCHES[0]), model(PARAMS, BATCHES[0]), rtol=1e-12)


def test_token_weights():
    mask = lambda batch: (batch["ids"] % 2).astype(float)
    own = collect(targets="layers", names=("n", "x", "xx"), token_weights=mask).leaves["layers"]
    keep = np.concatenate([np.asarray(mask(batch)).reshape(-1, 1) for batch in BATCHES])
    for layer in range(3):
        x = np.concatenate([parts[layer] for parts in inputs()])
        np.testing.assert_allclose(own["xx"][layer], (keep * x).T @ x, rtol=1e-9)
        np.testing.assert_allclose(own["x"][layer], (keep * x).sum(0), rtol=1e-9, atol=1e-12)
        assert own["n"][layer] == keep.sum()
    flat = collect(targets="layers", names=("n", "x"), token_weights=lambda batch: mask(batch).reshape(-1))
    np.testing.assert_array_equal(flat.leaves["layers"]["x"], own["x"])


def test_one_input_for_several_tokens():
    """A pooler's counts where a token of its row does."""
    x, mask = jnp.arange(24.0).reshape(3, 2, 4), jnp.array([[1.0, 1.0], [0.0, 0.0], [1.0, 0.0]])
    pooled = lambda params, x: jnp.sum((x @ params["each"]).mean(1) @ params["pooler"])
    params = {"each": jnp.eye(4), "pooler": jnp.ones((4, 2))}
    stats = jlora.calibrate(pooled, params, [x], jlora.LoRA(1), "**", collect=("n", "x"), token_weights=lambda x: mask)
    assert stats.leaves["each"]["n"] == 3 and stats.leaves["pooler"]["n"] == 2
    np.testing.assert_allclose(stats.leaves["pooler"]["x"], x[jnp.array([0, 2])].mean(1).sum(0))


def test_in_parts_and_from_a_file(tmp_path):
    whole = collect()
    passes = []
    groups = collect(leaves_at_a_time=2, progress=lambda batches: passes.append(1) or batches)
    assert len(passes) == 3 and isinstance(groups.leaves["heads"]["g"], np.ndarray)
    collect(batches=BATCHES[:2]).save(tmp_path / "stats.npz")
    first = jlora.Calibration.load(tmp_path / "stats.npz")
    assert [file.name for file in tmp_path.iterdir()] == ["stats.npz"] and first.batches == 2
    joined = collect(batches=BATCHES[2:], start=first)
    for other in (groups, joined):
        assert other.batches == 3
        close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-14)
        jax.tree.map(close, other.leaves, whole.leaves)
    with pytest.raises(ValueError, match="the same rules"):
        collect(names=("g",), start=first)
    np.savez(tmp_path / "other.npz", a=1)
    with pytest.raises(ValueError, match="no file of Calibration.save"):
        jlora.Calibration.load(tmp_path / "other.npz")


def test_sums_are_float32_in_bfloat16():
    """The inputs are bfloat16, their sums and the gradient are not: nothing is lost that was there."""
    w = jnp.asarray(RNG.normal(size=(4, 3)), jnp.bfloat16)
    x = jnp.asarray(RNG.normal(size=(1000, 4)), jnp.bfloat16)

    def fn(p, x):
        return jnp.sum((x @ p["w"]).astype(jnp.float32) ** 2) / 1000

    own = collect(fn, "w", params={"w": w}, batches=[x]).leaves["w"]
    assert {value.dtype for value in own.values()} == {jnp.dtype("float32")}
    wide = np.asarray(x, np.float64)
    np.testing.assert_allclose(own["xx"], wide.T @ wide, rtol=1e-5)
    dy = np.asarray(((x @ w).astype(jnp.float32) / 500).astype(jnp.bfloat16), np.float64)
    np.testing.assert_allclose(own["g"], wide.T @ dy, rtol=1e-4, atol=1e-6)


def test_on_a_mesh(devices):
    mesh = jax.make_mesh((2, 4), ("data", "model"), devices=devices, axis_types=(jax.sharding.AxisType.Auto,) * 2)
    spec = lambda *axes: jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes))
    params = jax.tree.map(lambda w: jax.device_put(w, spec()), PARAMS)
    params["back"] = jax.device_put(PARAMS["back"], spec(None, "model"))
    batches = [jax.tree.map(lambda x: jax.device_put(x, spec("data")), batch) for batch in BATCHES]
    got, wanted = collect(params=params, batches=batches), collect()
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)
    jax.tree.map(close, got.leaves, wanted.leaves)


def test_one_compilation_for_all_batches():
    traces = []

    def fn(p, batch):
        traces.append(1)
        return loss(p, batch)

    collect(fn, batches=BATCHES[:1])
    of_one = len(traces)
    collect(fn, batches=BATCHES * 3)
    assert len(traces) <= 2 * of_one


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"batches": []}, "no batch"),
        ({"batches": iter(BATCHES), "leaves_at_a_time": 1}, "give a list"),
        ({"leaves_at_a_time": 0}, "at least 1"),
        ({"names": ("xy",)}, r"\['xy'\] are not known"),
        ({"names": None}, "None of the methods starts from data"),
        ({"fn": model}, "is the loss, one number"),
        ({"targets": "layer"}, "Nearest"),
        ({"token_weights": lambda batch: jnp.ones(3), "targets": "layers"}, "one number for each token"),
        ({"token_weights": lambda batch: jnp.zeros((2, 4)), "targets": "layers"}, "No token was counted at 'layers'"),
        (
            {"batches": [BATCHES[0], {**BATCHES[0], "y": np.full((2, 4, 9), np.nan)}]},
            "batch 1 .* not finite",
        ),
    ],
)
def test_errors(kwargs, message):
    with pytest.raises(ValueError, match=message):
        collect(**kwargs)


def test_errors_of_what_starts_from_it():
    adapt = lambda method, stats=None: jlora.adapt(
        PARAMS, method, "layers", fn=loss, args=(BATCHES[0],), stats=stats, key=jax.random.key(0)
    )
    with pytest.raises(ValueError, match="starts from data. Collect it first"):
        adapt(RULE)
    with pytest.raises(ValueError, match=r"starts from g, and the statistics have \['n', 'xx'\]"):
        adapt(RULE, collect(targets="layers", names=("n", "xx")))
    with pytest.raises(ValueError, match="have nothing of this leaf"):
        adapt(RULE, collect(targets="heads"))
    lookup = lambda p, batch: jnp.take(p["table"], batch["ids"], axis=0)
    with pytest.raises(ValueError, match="this weight has .*'lookup'"):
        jlora.calibrate(lookup, PARAMS, BATCHES, jlora.LoRA(2, start=init.EVA()), "table")
    few = {"layers": {"n": np.full(3, 1.0), "x": np.zeros((3, 6)), "xx": np.zeros((3, 6, 6)), "g": np.ones((3, 6, 6))}}
    few["layers"]["scaled_xx"] = few["layers"]["xx"]
    stats = jlora.Calibration(few, 1)
    with pytest.raises(ValueError, match="4 directions are wanted of 1 tokens"):
        adapt(jlora.LoRA(2, start=init.EVA()), stats)
    with pytest.raises(ValueError, match="rank 2 is wanted of a covariance of 1 tokens"):
        adapt(jlora.LoRA(2, start=init.CorDA()), stats)
    with pytest.raises(ValueError, match="4 directions are wanted of the gradient of 1 tokens"):
        adapt(RULE, stats)
    few["layers"]["g"] = np.zeros((3, 6, 6))
    with pytest.raises(ValueError, match="the gradient of 3 of its 3 matrices is zero"):
        adapt(RULE, stats)
    few["layers"]["g"] = np.ones((3, 6, 5))
    with pytest.raises(ValueError, match=r"'g' have the shape \(3, 6, 5\), and this leaf wants \(3, 6, 6\)"):
        adapt(RULE, stats)


def test_where_types_say_how_arrays_are_sharded(devices):
    mesh = jax.make_mesh((2, 4), ("data", "model"), devices=devices, axis_types=(jax.sharding.AxisType.Explicit,) * 2)
    weights = {"up": RNG.normal(size=(6, 8)), "down": RNG.normal(size=(8, 6))}
    batches = [RNG.normal(size=(4, 3, 6)) for _ in range(2)]

    def fn(p, x):
        h = jnp.tanh(x @ p["up"])
        sharded = jax.typeof(h).sharding.spec[-1] is not None
        spec = jax.sharding.PartitionSpec("data") if sharded else None
        return jnp.mean(jnp.matmul(h, p["down"], out_sharding=spec) ** 2)

    wanted = collect(fn, params=weights, batches=batches)
    with jax.set_mesh(mesh):
        put = lambda x, *axes: jax.device_put(x, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes)))
        params = {"up": put(weights["up"], None, "model"), "down": put(weights["down"], "model")}
        got = collect(fn, params=params, batches=[put(x, "data") for x in batches])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), got.leaves, wanted.leaves)
