"""Methods with several branches: against plain formulas in float64 NumPy, for every form in which a choice is bound."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora

pytestmark = pytest.mark.usefixtures("x64")

RANDOM = np.random.default_rng(0)
W, X = RANDOM.normal(size=(7, 5)), RANDOM.normal(size=(6, 4, 7))
KEY = jax.random.key(0)
run = jlora.lift(lambda params, x: x @ params["kernel"], on_materialize="error")


def adapt(method, stack=()):
    w = np.broadcast_to(W, (*stack, *W.shape))
    axes = {"kernel": jlora.Axes((1,), (2,), (0,))} if stack else None
    adapted = jlora.adapt({"kernel": jnp.asarray(w)}, method, key=KEY, axes=axes)
    noise = lambda leaf: jnp.asarray(RANDOM.normal(size=leaf.shape))
    return adapted.replace(trainable=jax.tree.map(noise, adapted.trainable))


def output(adapted, context=None, x=X):
    return np.asarray(run(adapted.bind(context=context), x))


def products(adapted) -> dict[str, np.ndarray]:
    """Every branch's X A B, without a scale."""
    pairs = {k: f for k, f in adapted.trainable["kernel"].items() if k != "scales"}
    return {name: X @ np.asarray(f.a) @ np.asarray(f.b) for name, f in pairs.items()}


def close(got, wanted) -> None:
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-11)


def mtlora(mode):
    return jlora.MTLoRA(2, ("depth", "normals"), task_rank=(1, 3), scale=1.5, task_scale=0.5, mode=mode)


@pytest.mark.parametrize("mode", ["matrix", "matrixv2"])
def test_mtlora(mode) -> None:
    adapted = adapt(mtlora(mode))
    parts, base = products(adapted), X @ W
    shared = base + 1.5 * parts["shared"]
    task = {name: base + 0.5 * parts[name] + (mode == "matrixv2") * 1.5 * parts["shared"] for name in parts}
    close(output(adapted), shared)
    for i, name in enumerate(("depth", "normals")):
        for choice in (name, i, np.int64(i), jnp.array(i), np.array(i)):
            close(output(adapted, {"task": choice}), task[name])
        chosen = jlora.rank.choose(adapted, {"task": name})
        assert type(chosen.sites["kernel"].method) is jlora.LoRA
        close(output(chosen), task[name])
        close(X @ jlora.merge(chosen)["kernel"], task[name])
    close(X @ jlora.merge(adapted)["kernel"], shared)
    each = np.array([0, 1, 1, 0, 1, 0])
    wanted = np.where((each == 0)[:, None, None], task["depth"], task["normals"])
    close(output(adapted, {"task": each}), wanted)
    close(jax.jit(lambda each: run(adapted.bind(context={"task": each}), X))(each), wanted)


@pytest.mark.parametrize("mode", ["matrix", "matrixv2"])
def test_mtlora_streams(mode) -> None:
    """Two weights with tasks after each other: the base product of the second is of the shared stream alone."""
    methods = {"**": mtlora(mode)}
    params = {"first": {"kernel": jnp.asarray(W)}, "second": {"kernel": jnp.asarray(W.T)}}
    adapted = jlora.adapt(params, methods, key=KEY)
    noise = lambda leaf: jnp.asarray(RANDOM.normal(size=leaf.shape))
    adapted = adapted.replace(trainable=jax.tree.map(noise, adapted.trainable))
    fn = jlora.lift(lambda p, x: jnp.tanh(x @ p["first"]["kernel"]) @ p["second"]["kernel"], on_materialize="error")
    got = fn(adapted.bind(context={"streams": True}), jnp.tile(X, (3, 1, 1)))

    def layer(name, w, x):
        """The authors' forward pass: x is the list of streams."""
        pairs = adapted.trainable[f"{name}/kernel"]
        product = lambda task, x: x @ np.asarray(pairs[task].a) @ np.asarray(pairs[task].b)
        base, shared = x[0] @ w, 1.5 * product("shared", x[0])
        start = base + shared if mode == "matrixv2" else base
        tasks = enumerate(("depth", "normals"), start=1)
        return [base + shared, *(start + 0.5 * product(task, x[i]) for i, task in tasks)]

    hidden = [np.tanh(h) for h in layer("first", W, [X] * 3)]
    close(got, np.concatenate(layer("second", W.T, hidden)))
    with pytest.raises(ValueError, match=r"\[3 \* batch, ..., features\] is wanted"):
        fn(adapted.bind(context={"streams": True}), X[:4])


def norm_of(y, gain, bias):
    """PyTorch's LayerNorm."""
    mean, variance = y.mean(-1, keepdims=True), y.var(-1, keepdims=True)
    return (y - mean) / np.sqrt(variance + 1e-5) * gain + bias


@pytest.mark.parametrize("train_scales", [False, True])
def test_mtlora_addition(train_scales) -> None:
    """The authors' forward pass without a bias, of two weights after each other; and a task alone is LoRA."""
    method = dataclasses.replace(mtlora("addition"), train_scales=train_scales)
    adapted = jlora.adapt({"first": jnp.asarray(W), "second": jnp.asarray(W.T)}, method, "**", key=KEY)
    noise = lambda leaf: jnp.asarray(RANDOM.normal(size=leaf.shape))
    adapted = adapted.replace(trainable=jax.tree.map(noise, adapted.trainable))
    fn = jlora.lift(lambda p, x: jnp.tanh(x @ p["first"]) @ p["second"], on_materialize="error")

    def layer(name, w, x):
        own = jax.tree.map(np.asarray, adapted.trainable[name])
        scale = lambda task: own["scales"][task] if train_scales else 0.5
        tasks = [x[0] @ w + scale(t) * x[i] @ own[t].a @ own[t].b for i, t in enumerate(("depth", "normals"), 1)]
        return [x[0] @ w + norm_of(sum(tasks), **own["layer_norm"]), *tasks]

    wanted = layer("second", W.T, [np.tanh(h) for h in layer("first", W, [X] * 3)])
    close(fn(adapted.bind(context={"streams": True}), jnp.tile(X, (3, 1, 1))), np.concatenate(wanted))
    first = layer("first", W, [X] * 3)
    once = jlora.lift(lambda p, x: x @ p["first"], on_materialize="error")
    close(once(adapted.bind(), X), first[0])
    for i, task in enumerate(("depth", "normals"), 1):
        close(once(adapted.bind(context={"task": task}), X), first[i])
        close(X @ jlora.merge(jlora.rank.choose(adapted, {"task": task}))["first"], first[i])


def test_mtlora_trained_scales() -> None:
    method = jlora.MTLoRA(2, ("a",), task_rank=1, scale=1.5, task_scale=0.5, train_scales=True)
    fresh = jlora.adapt({"kernel": jnp.asarray(W)}, method, key=KEY).trainable["kernel"]["scales"]
    assert {name: float(scale) for name, scale in fresh.items()} == {"shared": 1.5, "a": 0.5}
    adapted = adapt(method)
    scales, parts = adapted.trainable["kernel"]["scales"], products(adapted)
    close(output(adapted, {"task": "a"}), X @ W + float(scales["a"]) * parts["a"])
    close(output(adapted), X @ W + float(scales["shared"]) * parts["shared"])
    grads = jax.grad(lambda t: run(adapted.bind(t), X).sum())(adapted.trainable)["kernel"]["scales"]
    close(grads["shared"], parts["shared"].sum())
    assert grads["a"] == 0


@pytest.mark.parametrize("strategy", ["global", "specific", "both"])
def test_mtsk(strategy) -> None:
    method = jlora.MTSK(2, scales=("x1", "x4", "x16"), strategy=strategy, alpha=3.0)
    adapted = adapt(method)
    parts = products(adapted)
    everywhere = 1.5 * parts["global"] if strategy != "specific" else 0.0
    at = [X @ W + everywhere + (1.5 * parts[name] if strategy != "global" else 0.0) for name in method.names]
    close(output(adapted), at[0])
    close(X @ jlora.merge(adapted)["kernel"], at[0])
    for i, name in enumerate(method.names):
        for choice in (name, i, jnp.array(i)):
            close(output(adapted, {"scale": choice}), at[i])
        close(X @ jlora.merge(jlora.rank.choose(adapted, {"scale": name}))["kernel"], at[i])
    each = jnp.array([2, 0, 1, 1, 2, 0])
    close(output(adapted, {"scale": each}), np.stack([at[k][i] for i, k in enumerate(each.tolist())]))
    _, n_in, n_out = adapted.sites["kernel"].canonical_shape
    assert method.count(adapted.sites["kernel"]) == {"global": 1, "specific": 3, "both": 4}[strategy] * 2 * (
        n_in + n_out
    )


def test_choices_under_scan_and_jit() -> None:
    """Names reach the layers of a scan, checkpointed too; an array costs one program for all choices."""
    adapted = adapt(jlora.MTSK(2, scales=3, alpha=2.0), stack=(2,))
    layers = lambda params, x: jax.lax.scan(jax.checkpoint(lambda c, w: (c, x @ w)), 0, params["kernel"])[1]
    scan = jlora.lift(layers, on_materialize="error")
    pairs = adapted.trainable["kernel"]
    wanted = lambda k: np.stack(
        [X @ (W + sum(pairs[n].a[i] @ pairs[n].b[i] for n in ("global", str(k)))) for i in range(2)]
    )
    traces = []

    @jax.jit
    def traced(scale):
        traces.append(None)
        return scan(adapted.bind(context={"scale": scale}), X)

    for k in range(3):
        close(scan(adapted.bind(context={"scale": str(k)}), X), wanted(k))
        close(traced(jnp.array(k)), wanted(k))
        close(jlora.lift(layers)(jlora.rank.choose(adapted, {"scale": k}).bind(), X), wanted(k))
    assert len(traces) == 1
    grads = jax.jit(jax.grad(lambda t: scan(adapted.bind(t, {"scale": "1"}), X).sum()))(adapted.trainable)["kernel"]
    assert not grads["0"].b.any() and not grads["2"].b.any() and grads["1"].b.any() and grads["global"].b.any()


def test_choice_in_a_tied_table_and_in_a_formed_weight() -> None:
    adapted = adapt(jlora.MTSK(1, scales=2, alpha=1.0))
    delta = lambda k: sum(np.asarray(adapted.trainable["kernel"][n].product()) for n in ("global", str(k)))
    back = jlora.lift(lambda p, y: y @ p["kernel"].T, on_materialize="error")
    y, each = X @ W, jnp.array([0, 1, 1, 0, 1, 0])
    close(back(adapted.bind(context={"scale": 1}), y), y @ (W + delta(1)).T)
    wanted = np.stack([y[i] @ (W + delta(k)).T for i, k in enumerate(each.tolist())])
    close(back(adapted.bind(context={"scale": each}), y), wanted)
    formed = jlora.lift(lambda p: jnp.sin(p["kernel"]), on_materialize="silent")
    close(formed(adapted.bind(context={"scale": 1})), np.sin(W + delta(1)))
    with pytest.raises(ValueError, match="no one weight to form"):
        formed(adapted.bind(context={"scale": each}))


def test_dropout_of_a_choice_for_each_example() -> None:
    adapted = adapt(jlora.MTSK(2, scales=2, alpha=2.0, dropout=0.3))
    context = {"scale": jnp.array([0, 1, 0, 1, 0, 1])}
    sample = jax.jit(jax.vmap(lambda key: run(adapted.bind(context=context | {"key": key}), X)))
    samples = sample(jax.random.split(jax.random.key(1), 2000))
    error = (samples.mean(0) - output(adapted, context)) / (samples.std(0) / 2000**0.5)
    assert np.abs(error).max() < 5.0


def test_errors() -> None:
    adapted = adapt(mtlora("matrix"))
    for choice, words in (
        ("colour", "one of depth, normals is wanted"),
        (2, "from 0 to 1 is wanted"),
        (0.5, "an integer or an array of integers"),
        (np.array([1, 0]), r"\[2, ..., features\] is wanted"),
        (jnp.zeros((6, 4), int), r"\[\] or \[batch\]"),
    ):
        with pytest.raises(ValueError, match=words):
            output(adapted, {"task": choice})
    with pytest.raises(ValueError, match="no one adapter"):
        jlora.rank.choose(adapted, {"task": jnp.zeros(6, int)})
    with pytest.raises(ValueError, match="a name of its own"):
        jlora.MTLoRA(tasks=("a", "shared"))
    with pytest.raises(ValueError, match="one for each of 2 tasks"):
        jlora.MTLoRA(tasks=("a", "b"), task_rank=(1,))
    with pytest.raises(ValueError, match="'matrix', 'matrixv2' or 'addition'"):
        jlora.MTLoRA(mode="add")
    with pytest.raises(ValueError, match="sums the outputs of tasks, and there are none"):
        jlora.MTLoRA(mode="addition")
    with pytest.raises(ValueError, match="choose a task, context={'task': 'depth'}"):
        jlora.rank.choose(adapt(mtlora("addition")), {})
    with pytest.raises(ValueError, match="the kind 'embedding'; mode='matrix' adapts it"):
        jlora.adapt({"embedding": jnp.zeros((9, 8))}, mtlora("addition"), "embedding", key=KEY)
    with pytest.raises(ValueError, match="'global', 'specific' or 'both'"):
        jlora.MTSK(strategy="all")
    with pytest.raises(ValueError, match="rank 9 is above"):
        jlora.adapt({"kernel": jnp.zeros((8, 8))}, jlora.ViDA(1, high_rank=9), key=KEY)
    with pytest.raises(ValueError, match="nothing to choose"):
        jlora.rank.choose(jlora.adapt({"kernel": jnp.zeros((4, 4))}, jlora.LoRA(2), key=KEY), {})
