"""What the starts of jlora.init claim, in float64 against numpy, and that the base stays what it is."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from jlora import init
from jlora.calibrate import STATISTICS
from jlora.io import load_peft, save_peft
from jlora.linalg import truncated_svd

pytestmark = pytest.mark.usefixtures("x64")

RNG = np.random.default_rng(0)
PARAMS = {
    "first": {"kernel": RNG.normal(size=(10, 12))},
    "layers": {"kernel": RNG.normal(size=(3, 12, 12)) / 3},
    "last": {"kernel": RNG.normal(size=(12, 8))},
}
WEIGHTS = [PARAMS["first"]["kernel"], PARAMS["layers"]["kernel"][1], PARAMS["last"]["kernel"]]
KEY = jax.random.key(0)
BATCHES = [(RNG.normal(size=(6, 10)) * np.linspace(2.0, 0.1, 10) + 0.3, RNG.normal(size=(6, 8))) for _ in range(4)]


AXES = {
    "layers/kernel": jlora.Axes((1,), (2,), (0,)),
    "first/*": jlora.Axes((0,), (1,)),
    "last/*": jlora.Axes((0,), (1,)),
}


def model(p, x):
    h = jnp.tanh(x @ p["first"]["kernel"])
    h, _ = jax.lax.scan(jax.checkpoint(lambda h, w: (jnp.tanh(h @ w), None)), h, p["layers"]["kernel"])
    return h @ p["last"]["kernel"]


def loss(p, batch):
    return jnp.mean((model(p, batch[0]) - batch[1]) ** 2)


@functools.cache
def statistics():
    return jlora.calibrate(loss, PARAMS, BATCHES, jlora.LoRA(1), "**", collect=STATISTICS)


def adapted_with(method, params=PARAMS, targets="**"):
    """The method, calibrated where it starts from data."""
    stats = None
    if method.needs:
        stats = statistics() if params is PARAMS else jlora.calibrate(loss, params, BATCHES, method, targets)
    return jlora.adapt(params, method, targets, axes=AXES, key=jax.random.key(0), stats=stats)


def matrices(adapted, path="layers/kernel"):
    """(W, A, B, s) of each matrix of a leaf, in numpy."""
    w, f = dict(jlora.paths.flatten(adapted.base)[0])[path], adapted.trainable[path]
    scale = adapted.sites[path].method.scale
    if w.ndim == 2:
        return [(w, np.asarray(f.a), np.asarray(f.b), scale)]
    return [(w[i], np.asarray(f.a[i]), np.asarray(f.b[i]), scale) for i in range(len(w))]


def best(m, rank):
    u, s, vh = np.linalg.svd(m, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vh[:rank]


def moved(adapted, by=0.1):
    """The adapters as if they had been trained."""
    rng = np.random.default_rng(1)
    noise = lambda x: x + by * rng.normal(size=x.shape)
    return adapted.replace(trainable=jax.tree.map(noise, adapted.trainable))


STARTS = [
    init.PiSSA(),
    init.OLoRA(),
    init.CorDA(power=0.5),
    init.LoRAGA("random", "unit"),
    init.EVA(),
    init.Orthogonal(),
]
VARIANTS = [
    init.PiSSA(iterations=3),
    init.MiLoRA(),
    init.SingularSlice("middle"),
    init.SingularSlice("random"),
    init.CorDA(),
    init.CorDA("kpm"),
    init.LoRAGA(),
    init.LoRAGA("ArBr", "weight"),
    init.LoRAGA("A2rBr", "gd", clip=True),
    init.EVA(rho=1),
    init.EVA(whiten=True),
]


@pytest.mark.parametrize("start", STARTS + [pytest.param(s, marks=pytest.mark.slow) for s in VARIANTS], ids=str)
def test_the_base_and_the_output_stay(start):
    adapted = adapted_with(jlora.LoRA(2, alpha=6.0, start=start))
    x = BATCHES[0][0]
    run = jax.jit(lambda adapted, x: jlora.lift(model, on_materialize="error")(adapted.bind(), x))
    wanted, start_of = model(PARAMS, x), lambda adapted: jax.tree.leaves(jlora.merge(adapted))
    assert all(a is b for a, b in zip(jax.tree.leaves(adapted.base), jax.tree.leaves(PARAMS), strict=True))
    np.testing.assert_allclose(run(adapted, x), wanted, rtol=1e-12, atol=1e-12)
    if start.subtracts:  # then to the bit: nothing but zeros is added
        for merged, base in zip(start_of(adapted), jax.tree.leaves(PARAMS), strict=True):
            np.testing.assert_array_equal(merged, base)
    for path in adapted.sites:
        assert all(np.abs(a).max() > 1e-3 for _, a, _, _ in matrices(adapted, path))
    trained = moved(adapted)
    np.testing.assert_allclose(run(trained, x), model(jlora.merge(trained), x), rtol=1e-12, atol=1e-12)
    assert np.abs(run(trained, x) - wanted).max() > 1e-3


def test_gradients_are_those_of_the_pair():
    """Of A B alone: the start that is taken away is a constant."""
    adapted = moved(adapted_with(jlora.LoRA(2, alpha=6.0, start=init.PiSSA())))
    got = jax.grad(lambda t: loss(jlora.merge(adapted.replace(trainable=t)), BATCHES[0]))(adapted.trainable)
    lifted = jax.grad(lambda t: jlora.lift(loss)(adapted.bind(t), BATCHES[0]))(adapted.trainable)

    def plainly(t):
        effective = jax.tree.map(lambda w: w, PARAMS)
        for path, f in t.items():
            start = adapted.frozen[path]["start"]
            effective[path.split("/")[0]] = {
                "kernel": PARAMS[path.split("/")[0]]["kernel"] + f.scale * (f.a @ f.b - start.a @ start.b)
            }
        return loss(effective, BATCHES[0])

    wanted = jax.grad(plainly)(adapted.trainable)
    for grads in (got, lifted):
        jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=1e-9, atol=1e-12), grads, wanted)


def test_singular_slices():
    for start, chosen in (
        (init.PiSSA(), lambda k: slice(3)),
        (init.MiLoRA(), lambda k: slice(k - 3, None)),
        (init.SingularSlice("middle"), lambda k: slice((k - 3) // 2, (k - 3) // 2 + 3)),
    ):
        for w in WEIGHTS:
            a, b = map(np.asarray, start.pair(KEY, w, 3, 2.0, None))
            u, s, vh = np.linalg.svd(w, full_matrices=False)
            part = chosen(len(s))
            np.testing.assert_allclose(2.0 * a @ b, (u[:, part] * s[part]) @ vh[part], atol=1e-12)
            np.testing.assert_allclose(a.T @ a, np.diag(s[part] / 2.0), atol=1e-12)
            np.testing.assert_allclose(b @ b.T, np.diag(s[part] / 2.0), atol=1e-12)
            assert (a[np.abs(a).argmax(0), range(3)] > 0).all()
    drawn = adapted_with(jlora.LoRA(3, start=init.SingularSlice("random")), targets="layers/*")
    picks = np.linalg.norm(drawn.trainable["layers/kernel"].a, axis=1)
    for pick, w in zip(picks, PARAMS["layers"]["kernel"], strict=True):
        spectrum = np.sqrt(np.linalg.svd(w)[1] * 3 / 16)
        assert all(np.abs(spectrum - size).min() < 1e-12 for size in pick) and (np.diff(pick) < 0).all()


def test_olora_is_qr():
    for w in WEIGHTS:
        a, b = map(np.asarray, init.OLoRA().pair(KEY, w, 3, 2.0, None))
        q, r = np.linalg.qr(w.T)
        np.testing.assert_allclose(a @ b, (q[:, :3] @ r[:3]).T, atol=1e-12)
        np.testing.assert_allclose(b @ b.T, np.eye(3), atol=1e-12)
        assert all(not a[:j, j].any() and a[j, j] > 0 for j in range(3))


def test_orthogonal_products_are_zero():
    entries = []
    for i, w in enumerate(WEIGHTS):
        a, b = map(np.asarray, init.Orthogonal().pair(jax.random.key(i), w, 4, 2.0, None))
        assert np.abs(a @ b).max() < 1e-14 and np.linalg.matrix_rank(a) == np.linalg.matrix_rank(b) == 2
        entries += [a.ravel(), b.ravel()]
    # An entry is a sum of r / 2 products with entries of O, whose squares sum to 1 over r: variance std^2 / 2.
    assert 0.8 < np.concatenate(entries).std() / (0.1 / 2**0.5) < 1.2


def test_eva_is_the_principal_components():
    adapted = adapted_with(jlora.LoRA(3, start=init.EVA(rho=1)))
    x = np.concatenate([batch[0] for batch in BATCHES])
    (_, a, b, _), *_ = matrices(adapted, "first/kernel")
    vh = np.linalg.svd(x - x.mean(0))[2]
    np.testing.assert_allclose(np.abs(a.T @ vh[:3].T), np.eye(3), atol=1e-10)
    assert not b.any()
    h, values = np.tanh(x @ PARAMS["first"]["kernel"]), []
    for layer, (_, a, _, _) in zip(PARAMS["layers"]["kernel"], matrices(adapted), strict=True):
        s, vh = np.linalg.svd(h - h.mean(0))[1:]
        np.testing.assert_allclose(np.abs(a.T @ vh[:3].T), np.eye(3), atol=1e-8)
        values.append(s[:3])
        h = np.tanh(h @ layer)
    whitened = adapted_with(jlora.LoRA(3, start=init.EVA(rho=1, whiten=True))).trainable["layers/kernel"].a
    np.testing.assert_allclose(np.linalg.norm(whitened, axis=1), np.array(values) ** -0.5, rtol=1e-8)


def test_eva_puts_ranks_where_they_explain_most():
    rank, rho = 2, 2.0
    adapted = adapted_with(jlora.LoRA(rank, alpha=6.0, start=init.EVA(rho)))
    inputs, x = {}, np.concatenate([batch[0] for batch in BATCHES])
    inputs["first/kernel", 0] = x
    x = np.tanh(x @ PARAMS["first"]["kernel"])
    for i, w in enumerate(PARAMS["layers"]["kernel"]):
        inputs["layers/kernel", i] = x
        x = np.tanh(x @ w)
    inputs["last/kernel", 0] = x
    shares = {where: np.linalg.svd(x - x.mean(0))[1] ** 2 for where, x in inputs.items()}
    shares = {where: (s / s.sum())[: int(rho * rank)] for where, s in shares.items()}
    cut = np.sort(np.concatenate(list(shares.values())))[-rank * len(inputs)]
    wanted = {where: int((s >= cut).sum()) for where, s in shares.items()}
    assert sum(wanted.values()) == rank * len(inputs) and len(set(wanted.values())) > 1
    for (path, index), r in wanted.items():
        if path not in adapted.sites:
            assert r == 0
            continue
        method = adapted.sites[path].method
        got, alpha = method.per_index(adapted.sites[path].stack)[index]
        assert got == r and (not r or alpha / r == 3.0)
    count = sum(site.method.count(site) for site in adapted.sites.values())
    sizes = {path: sum(site.canonical_shape[1:]) for path, site in adapted.sites.items()}
    assert count == sum(r * sizes.get(path, 0) for (path, _), r in wanted.items())


def test_corda_reconstructs_and_comes_close_in_the_outputs():
    methods = {p: jlora.LoRA(8, alpha=8.0, start=init.CorDA(power=p)) for p in (1.0, 0.5)}
    for method in methods.values():  # of full rank, the factors are the weight
        for w, a, b, scale in matrices(adapted_with(method, targets="last/*"), "last/kernel"):
            np.testing.assert_allclose(scale * a @ b, w, atol=1e-9)
    # Of lower rank: errors of the outputs under the damped covariance, over the best there can be.
    x = [np.asarray(batch[0]) / np.abs(batch[0].max()) for batch in BATCHES]
    c = sum(part.T @ part for part in x) / len(x)
    c += 0.01 * np.diag(c).mean() * np.eye(len(c))
    root = np.linalg.cholesky(c).T
    errors = {}
    for name, start in (("half", init.CorDA(power=0.5)), ("one", init.CorDA()), ("plain", init.PiSSA())):
        (w, a, b, scale), *_ = matrices(adapted_with(jlora.LoRA(3, start=start), targets="first/*"), "first/kernel")
        errors[name] = np.linalg.norm(root @ (w - scale * a @ b))
    least = np.linalg.norm(np.linalg.svd(root @ PARAMS["first"]["kernel"])[1][3:])
    np.testing.assert_allclose(errors["half"], least, rtol=1e-10)
    assert least < errors["one"] and least < errors["plain"]
    kept = adapted_with(jlora.LoRA(3, start=init.CorDA("kpm")), targets="first/*")
    ((_, a, b, scale),) = matrices(kept, "first/kernel")
    assert np.linalg.norm(root @ (scale * a @ b)) < least


def test_the_first_step_of_lora_ga_is_the_best_of_twice_the_rank():
    g = jax.tree.map(lambda *parts: sum(parts) / len(BATCHES), *(jax.grad(loss)(PARAMS, batch) for batch in BATCHES))
    lifted = jlora.lift(lambda p: sum(loss(p, batch) for batch in BATCHES) / len(BATCHES))
    for direction in ("ArB2r", "A2rBr", "ArBr", "random"):
        adapted = adapted_with(jlora.LoRA(2, alpha=6.0, start=init.LoRAGA(direction, "unit")), targets="layers/*")
        for i, (_, a, b, _) in enumerate(matrices(adapted)):
            full = np.asarray(g["layers"]["kernel"][i])
            np.testing.assert_allclose(a @ a.T @ full + full @ b.T @ b, best(full, 4), atol=1e-12)
        if direction != "ArB2r":
            continue
        # And that is where a step of gradient descent moves the weight, times s^2 and its rate, to the first order.
        grads = jax.grad(lambda t, adapted=adapted: lifted(adapted.bind(t)))(adapted.trainable)
        merged = lambda t, adapted=adapted: jlora.merge(adapted.replace(trainable=t))["layers"]["kernel"]
        moved_by = jax.jvp(merged, (adapted.trainable,), (grads,))[1]
        for i in range(3):
            np.testing.assert_allclose(moved_by[i], 9.0 * best(np.asarray(g["layers"]["kernel"][i]), 4), atol=1e-12)


def test_scales_of_lora_ga():
    w, g = jnp.asarray(WEIGHTS[0]), statistics().leaves["first/kernel"]["g"]
    pair = lambda *args, **kwargs: init.LoRAGA(*args, **kwargs).pair(KEY, w, 2, 3.0, {"g": g})
    s = np.linalg.svd(w)[1]
    third = np.linalg.svd(g)[1][2]  # B takes the second half of four
    stable, weight = 12**0.25 / 4, np.sqrt(s[:2] / 3).mean()
    wanted = {
        ("authors", "stable"): (stable, stable),
        ("authors", "gd"): (1 / 3, 1 / 3),
        ("authors", "unit"): (1, 1),
        ("authors", "weight"): (weight, weight),
        ("peft", "stable"): (1, third * stable),
        ("peft", "gd"): (1 / 3, third / 3),
        ("peft", "unit"): (1, third),
        ("peft", "weight"): (1, s[0]),
    }
    for (variant, scale), norms in wanted.items():
        a, b = pair("ArB2r", scale, variant=variant)
        got = np.linalg.norm(a, axis=0)[0], np.linalg.norm(b, axis=1)[0]
        np.testing.assert_allclose(got, norms, rtol=1e-9, err_msg=f"{variant} {scale}")
    a, b = pair(gamma=1e-4, clip=True)
    np.testing.assert_allclose(np.abs(3.0 * a @ b).max(), np.abs(w).max(), rtol=1e-9)
    np.testing.assert_allclose(np.linalg.norm(a, axis=0)[0], np.linalg.norm(b, axis=1)[0], rtol=1e-9)
    a, b = pair("random", "unit", variant="peft")  # of the same triples: with their signs, a part of G
    u, s, vh = np.linalg.svd(g)
    assert np.abs(u[:, :4].T @ a).round(9).sum() == 2 and np.allclose(
        a.T @ g @ b.T, np.diag(np.linalg.norm(b, axis=1) ** 2)
    )


def test_lora_sb_starts_at_the_first_update():
    eta, method = 0.01, jlora.LoRAXS(3, alpha=6.0, start=init.LoRASB(0.01))
    adapted = adapted_with(method, targets="layers/*")
    grads = sum(np.asarray(jax.grad(loss)(PARAMS, batch)["layers"]["kernel"]) for batch in BATCHES)
    merged = jlora.merge(adapted)["layers"]["kernel"]
    effective = jax.grad(lambda p: loss(p, BATCHES[0]))(jlora.merge(adapted))["layers"]["kernel"]
    lifted = jlora.lift(loss)
    of_middle = jax.grad(lambda t: lifted(adapted.bind(t), BATCHES[0]))(adapted.trainable)["layers/kernel"]["middle"]
    for i, w in enumerate(PARAMS["layers"]["kernel"]):
        np.testing.assert_allclose(merged[i] - w, best(-eta * np.sign(grads[i]), 3), atol=1e-12)
        a, b = (np.asarray(adapted.frozen["layers/kernel"][name][i]) for name in ("a", "b"))
        np.testing.assert_allclose(a.T @ a, np.eye(3), atol=1e-12)
        np.testing.assert_allclose(b @ b.T, np.eye(3), atol=1e-12)
        np.testing.assert_allclose(of_middle[i], 2.0 * a.T @ np.asarray(effective[i]) @ b.T, atol=1e-12)
    assert all(len(jax.tree.leaves(adapted.trainable[path])) == 1 for path in adapted.sites)


def test_randomized_svd_is_within_a_percent():
    """On a spectrum that falls slowly, the error over the smallest there can be."""
    q1, q2 = (np.linalg.qr(RNG.normal(size=(n, 200)))[0] for n in (300, 200))
    s = (1 + np.arange(200.0)) ** -0.5
    w = (q1 * s) @ q2.T
    for iterations in (2, 4):
        u, t, vh = truncated_svd(jnp.asarray(w), 16, iterations=iterations)
        assert np.linalg.norm(w - (u * t) @ vh) < 1.01 * np.linalg.norm(s[16:])
    a, b = init.PiSSA(iterations=2).pair(jax.random.key(0), jnp.asarray(w), 16, 2.0, None)
    assert np.linalg.norm(w - 2.0 * a @ b) < 1.01 * np.linalg.norm(s[16:])


def test_other_methods_that_are_lora():
    dora = adapted_with(jlora.DoRA(2, alpha=6.0, start=init.OLoRA()))
    x = BATCHES[0][0]
    np.testing.assert_allclose(jlora.lift(model)(dora.bind(), x), model(PARAMS, x), rtol=1e-12)
    trained = moved(dora)
    np.testing.assert_allclose(jlora.lift(model)(trained.bind(), x), model(jlora.merge(trained), x), rtol=1e-11)
    given = {"axes": AXES, "key": KEY, "stats": statistics()}
    eva, lora = (
        jlora.adapt(jax.eval_shape(lambda: PARAMS), method(2, alpha=6.0, start=init.EVA()), "**", **given)
        for method in (jlora.DoRA, jlora.LoRA)
    )
    ranks = lambda of: {path: (site.method.rank, site.method.ranks) for path, site in of.sites.items()}
    assert ranks(eva) == ranks(lora) and len(set(ranks(lora).values())) > 1
    assert {type(site.method) for site in eva.sites.values()} == {jlora.DoRA}


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("method", [jlora.LoRA, jlora.DoRA])
def test_files_and_plain_lora_fit_the_original_weights(method, rslora, tmp_path):
    trained = moved(adapted_with(method(2, alpha=6.0, rslora=rslora, start=init.PiSSA())))
    wanted = jlora.merge(trained)
    names = lambda path: f"{path.split('/')[0]}{'.*' * path.startswith('layers')}.weight"
    save_peft(trained, tmp_path, names=names, dtype=jnp.float64)
    axes = {path: site.axes for path, site in trained.sites.items()}
    read = load_peft(tmp_path, PARAMS, names=names, axes=axes)
    assert {site.method.rank for site in read.sites.values()} == {4}
    merged = jlora.merge(read)
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, atol=1e-12), merged, wanted)
    if method is jlora.LoRA:
        lora, report = jlora.to_lora(trained, rank=4)
        assert report.error == 0 and all(leaf.exact for leaf in report.leaves.values())
        merged = jlora.merge(lora)
        jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, atol=1e-12), merged, wanted)
        assert jlora.to_lora(trained, rank=2)[1].error > 0.01  # what starts does not pass for a pair of rank 2


def test_quantized_bases_stay_quantized():
    params = jax.tree.map(lambda w: jnp.asarray(w, jnp.float32), PARAMS)
    stored = jlora.quant.quantize(params, jlora.quant.Int8, "**", fn=loss, args=(BATCHES[0],))
    x = jnp.asarray(BATCHES[0][0], jnp.float32)
    wanted = jlora.lift(model)(stored, x)
    for start in (init.PiSSA(), init.LoRAGA(scale="unit")):
        adapted = adapted_with(jlora.LoRA(2, alpha=2.0, start=start), stored)
        assert adapted.base is stored
        np.testing.assert_allclose(jlora.lift(model)(adapted.bind(), x), wanted, rtol=1e-5, atol=1e-5)
    adapted = adapted_with(jlora.LoRA(2, alpha=2.0, start=init.PiSSA()), stored)
    dense = np.asarray(stored["layers"]["kernel"].dequantize())
    f = adapted.trainable["layers/kernel"]
    for i in range(3):
        np.testing.assert_allclose(f.a[i] @ f.b[i], best(dense[i], 2), atol=1e-5)


def test_shapes_alone():
    method = jlora.LoRA(2, start=init.PiSSA())
    abstract = jax.eval_shape(lambda: PARAMS)
    planned = jlora.adapt(abstract, method, "**", axes=AXES, key=jax.random.key(0))
    made = adapted_with(method)
    assert jax.tree.structure(planned.trainable) == jax.tree.structure(made.trainable)
    assert jax.tree.map(jnp.shape, planned.frozen) == jax.tree.map(jnp.shape, made.frozen)


@pytest.mark.slow
def test_meshes(devices):
    mesh = jax.make_mesh((2, 4), ("data", "model"), devices=devices, axis_types=(jax.sharding.AxisType.Auto,) * 2)
    spec = lambda *axes: jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes))
    layouts = {"first": spec(None, "model"), "layers": spec(None, "model"), "last": spec("model")}
    params = {name: {"kernel": jax.device_put(PARAMS[name]["kernel"], layouts[name])} for name in PARAMS}
    batches = [jax.device_put(batch, spec("data")) for batch in BATCHES]
    for start in (init.PiSSA(), init.EVA(), init.LoRAGA(), init.CorDA()):
        method = jlora.LoRA(2, start=start)
        stats = method.needs and jlora.calibrate(loss, params, batches, method, "**")
        given = {"axes": AXES, "key": jax.random.key(0), "stats": stats or None}
        sharded, plain = jlora.adapt(params, method, "**", **given), adapted_with(method)
        for path, f in sharded.trainable.items():
            np.testing.assert_allclose(f.product(), plain.trainable[path].product(), atol=1e-9)
            np.testing.assert_allclose(f.a, plain.trainable[path].a, atol=1e-7)
        assert sharded.trainable["first/kernel"].b.sharding.spec[-1] == "model"
        assert sharded.trainable["last/kernel"].a.sharding.spec[0] == "model"


def test_bfloat16_weights_keep_the_start_exact():
    params = jax.tree.map(lambda w: jnp.asarray(w, jnp.bfloat16), PARAMS)
    x = jnp.asarray(BATCHES[0][0], jnp.bfloat16)
    adapted = adapted_with(jlora.LoRA(2, start=init.PiSSA()), params)
    assert {leaf.dtype for leaf in jax.tree.leaves(adapted.trainable)} == {jnp.dtype("float32")}
    np.testing.assert_array_equal(jlora.lift(model)(adapted.bind(), x), model(params, x))
    jax.tree.map(np.testing.assert_array_equal, jlora.merge(adapted), params)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: jlora.LoRA(2, start="pissa"), r"LoRA\(start='pissa'\): one of jlora.init is wanted"),
        (lambda: jlora.LoRA(2, start=init.PiSSA(), init_a="gaussian"), "one of the two says where A starts"),
        (lambda: jlora.LoRA(2, start=init.PiSSA(), ranks=(2, 1)), "one rank and one alpha for all matrices"),
        (lambda: jlora.VeLoRA(2, start=init.PiSSA()), "has a start of its own"),
        (lambda: jlora.LoRAXS(2, start=init.PiSSA()), "or jlora.init.LoRASB"),
        (lambda: jlora.NLoRA(2, start=init.LoRASB(0.1)), "a square middle that is trained alone"),
        (lambda: jlora.DoRA(method=jlora.LoRA(2, start=init.EVA())), "starts from data is not taken"),
        (lambda: jlora.quant.loftq(PARAMS, jlora.LoRA(2, start=init.PiSSA()), axes={}), "LoftQ starts LoRA"),
        (lambda: init.SingularSlice("last", 3), "finds the first components"),
        (lambda: init.PiSSA(iterations=0), "a positive number of subspace iterations"),
        (lambda: init.EVA(0.5), "at least 1 is wanted"),
        (lambda: init.CorDA("both"), "'ipm' or 'kpm'"),
        (lambda: init.CorDA(power=2), "1 .* or 0.5"),
        (lambda: init.LoRAGA("ArAr"), "one of ArB2r"),
        (lambda: init.LoRAGA(variant="mine"), "one of authors, peft"),
        (lambda: init.LoRASB(0), "a positive number"),
        (lambda: adapted_with(jlora.LoRA(3, start=init.Orthogonal())), "3 is odd"),
        (lambda: adapted_with(jlora.LoRA(9, start=init.PiSSA())), "rank 9 is above min"),
        (lambda: adapted_with(jlora.LoRA(5, start=init.LoRAGA())), "rank 5 is above 4, half of its size"),
        (lambda: adapted_with(jlora.LoRA(2, start=init.LoRASB(0.1))), "give it to jlora.LoRAXS"),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()
