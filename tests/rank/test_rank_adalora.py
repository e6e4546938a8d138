"""The allocator of AdaLoRA against recorded runs of PEFT's, its penalty, Lingo's lottery, and what it refuses."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jlora

pytestmark = pytest.mark.usefixtures("x64")
NAMES = {"a": "lora_A", "e": "lora_E", "b": "lora_B"}


class Trace:
    """A recorded run."""

    def __init__(self, file, name: str):
        with np.load(file) as arrays:
            self.arrays = {k.removeprefix(f"{name}/"): arrays[k] for k in arrays.files if k.startswith(f"{name}/")}
        config = json.loads(str(self.arrays["config_json"]))
        self.steps = config["total_step"]
        method = jlora.AdaLoRA(config["init_r"], config["lora_alpha"])
        base = {m: {"kernel": jnp.asarray(self.arrays[f"base/{m}.weight"].T)} for m in ("lin0", "lin1")}
        adapted = jlora.adapt(base, method, key=jax.random.key(0))
        self.adapted = adapted.replace(trainable=self.read("adapter"))
        self.allocator = jlora.rank.adalora(
            config["target_r"], total_steps=self.steps, warmup_steps=config["tinit"], final_steps=config["tfinal"],
            every=config["deltaT"], b1=config["beta1"], b2=config["beta2"],
        )  # fmt: skip

    def read(self, where: str) -> dict:
        tensor = lambda m, name: self.arrays[f"{where}/{m}.{NAMES[name]}"]
        own = lambda m: {"a": tensor(m, "a").T, "e": tensor(m, "e")[:, 0], "b": tensor(m, "b").T}
        return {f"{m}/kernel": jax.tree.map(jnp.asarray, own(m)) for m in ("lin0", "lin1")}

    def loss(self, trainable, adapted):
        bias = [self.arrays[f"base/lin{i}.bias"] for i in (0, 1)]

        def model(params, x):
            hidden = jnp.tanh(x @ params["lin0"]["kernel"] + bias[0])
            return hidden @ params["lin1"]["kernel"] + bias[1]

        y = jlora.lift(model)(adapted.bind(trainable), jnp.asarray(self.arrays["x"]))
        return 0.5 * jnp.mean(jnp.square(y - self.arrays["target"]))


@pytest.mark.parametrize("name", ["trace0", "trace1"])
def test_recorded_run(oracles, name) -> None:
    trace = Trace(oracles / "adalora.npz", name)
    tx, traces = optax.sgd(float(trace.arrays["lr"])), []

    @jax.jit
    def step(adapted, opt_state, state, i):
        traces.append(None)
        loss, grads = jax.value_and_grad(trace.loss)(adapted.trainable, adapted)
        updates, opt_state = tx.update(grads, opt_state)
        adapted = adapted.replace(trainable=optax.apply_updates(adapted.trainable, updates))
        state, adapted = trace.allocator.update(state, adapted, grads, i)
        return adapted, opt_state, state, loss

    state, adapted = trace.allocator.init(trace.adapted)
    opt_state, budgets = tx.init(adapted.trainable), trace.arrays["budgets"]
    close = functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-14)
    for i in range(trace.steps):
        adapted, opt_state, state, loss = step(adapted, opt_state, state, i)
        close(loss, trace.arrays["losses"][i])
        jax.tree.map(close, adapted.trainable, trace.read(f"step{i:02}/params"))
        if f"step{i:02}/ipt_ema/lin0.lora_A" in trace.arrays:
            jax.tree.map(close, state.mean, trace.read(f"step{i:02}/ipt_ema"))
            jax.tree.map(close, state.deviation, trace.read(f"step{i:02}/unc_ema"))
        else:
            assert not any(leaf.any() for leaf in jax.tree.leaves(state))
    kept = json.loads(str(trace.arrays["rank_pattern_json"]))
    for m in ("lin0", "lin1"):
        np.testing.assert_array_equal(adapted.frozen[f"{m}/kernel"]["mask"] != 0, kept[f"{m}.lora_E"])
    assert len(traces) == 1
    assert sum(map(sum, kept.values())) == budgets[-1]


def test_orthogonality() -> None:
    """The mean over matrices of the norms, of a stack too; without terms that are out."""
    random = np.random.default_rng(0)
    axes = {"w": jlora.Axes((1,), (2,), stack=(0,))}
    adapted = jlora.adapt({"w": jnp.ones((2, 6, 5)), "v": jnp.ones((6, 5))}, jlora.AdaLoRA(3), "**", axes=axes,
                          key=jax.random.key(0))  # fmt: skip
    adapted = adapted.replace(trainable=jax.tree.map(lambda p: random.normal(size=p.shape), adapted.trainable))
    own = [adapted.trainable["w"], adapted.trainable["v"]]
    pairs = [(own[0]["a"][i], own[0]["b"][i]) for i in (0, 1)] + [(own[1]["a"], own[1]["b"])]
    off = lambda gram: np.linalg.norm(gram - np.eye(len(gram)))
    wanted = np.mean([f(x) for a, b in pairs for f, x in ((off, a.T @ a), (off, b @ b.T))])
    penalty = jax.jit(jlora.rank.orthogonality)
    np.testing.assert_allclose(penalty(adapted), wanted, rtol=1e-12)
    kept = [np.array([1, 0, 1]), np.array([0, 0, 0]), np.array([1, 1, 1])]
    masked = adapted.replace(frozen={"w": {"mask": jnp.asarray(np.stack(kept[:2]), float)}, "v": {"mask": jnp.ones(3)}})
    np.testing.assert_allclose(penalty(masked), penalty(jlora.repack(masked)), rtol=1e-12)
    orthonormal = {"a": jnp.eye(6, 3), "e": jnp.ones(3), "b": jnp.eye(3, 5)}
    both = adapted.replace(trainable={"v": orthonormal, "w": adapted.trainable["w"]})
    grads = jax.jit(jax.grad(lambda trainable: jlora.rank.orthogonality(both.replace(trainable=trainable))))(
        both.trainable
    )
    assert not any(leaf.any() for leaf in jax.tree.leaves(grads["v"]))  # at the root of zero


def test_lottery() -> None:
    """Lingo's: the rank kept is binomial, no chance is AdaLoRA, and what is spared has a zero to grow from."""
    n, chance = 40, 0.2
    adapted = jlora.adapt({"w": jnp.ones((n, n)), "v": jnp.ones((n, n))}, jlora.AdaLoRA(n), "**", key=jax.random.key(0))
    random = np.random.default_rng(0)
    trainable = jax.tree.map(lambda p: jnp.asarray(random.normal(size=p.shape)), adapted.trainable)
    adapted, grads = adapted.replace(trainable=trainable), jax.tree.map(jnp.ones_like, trainable)
    after = {}
    for p in (0.0, chance):
        ranks = jlora.rank.adalora(n // 4, total_steps=2, every=1, lottery=p, key=jax.random.key(1))
        state, now = ranks.init(adapted)
        update = jax.jit(ranks.update)
        for step in range(3):
            state, now = update(state, now, grads, step)
        after[p] = now
    plain, drawn = (
        {path: np.asarray(own["mask"]) != 0 for path, own in after[p].frozen.items()} for p in (0.0, chance)
    )
    kept, spared = ([np.sum(drawn[w] & (plain[w] == was)) for w in plain] for was in (True, False))
    budget = 2 * n // 4
    for count, mean, total in (
        (sum(kept), (1 - chance) * budget, budget),
        (sum(spared), chance * (2 * n - budget), 2 * n - budget),
    ):
        assert abs(count - mean) < 4 * np.sqrt(chance * (1 - chance) * total) and 0 < count < total
    for w in plain:
        assert not np.any(np.asarray(after[chance].trainable[w]["e"])[drawn[w] & ~plain[w]])
