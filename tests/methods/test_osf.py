"""OSF against PEFT's numbers from PEFT's own start, and what its constraint promises."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from recorded import DIRECTORY

import jlora
from jlora.io import load_peft, save_peft

pytestmark = pytest.mark.usefixtures("x64")

DISK = {"a": "V_low", "s": "S_low", "b": "U_low"}
LAYERS = ("lin0", "lin1")


def random(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


@pytest.mark.skipif(not DIRECTORY.is_dir(), reason=f"no directory {DIRECTORY}: set JLORA_ORACLES")
@pytest.mark.parametrize("case", ["mlp", "mlp_nobias"])
def test_peft_from_its_own_start(case: str) -> None:
    """The general test of the oracles decomposes the base anew; here the decomposition is PEFT's, of float32."""
    with np.load(DIRECTORY / "osf.npz") as file:
        z = {k.removeprefix(f"{case}/"): file[k] for k in file.files if k.startswith(f"{case}/")}
    base = {name: {"kernel": jnp.asarray(z[f"base/{name}.weight"].T)} for name in LAYERS}
    method = jlora.OSF(json.loads(str(z["config_json"]))["effective_rank"], constrained=False)
    adapted = jlora.adapt(base, method, "**/kernel", key=jax.random.key(0))
    named = lambda prefix: {
        f"{layer}/kernel": {
            ours: jnp.asarray(z[f"{prefix}{layer}.osf_svd_params.{theirs}"].T) for ours, theirs in DISK.items()
        }
        for layer in LAYERS
    }
    frozen = {}
    for layer in LAYERS:
        start = {f"{ours}0": z[f"frozen/{layer}._osf_{theirs}_init"].T for ours, theirs in DISK.items()}
        high = [z[k].T for k in (f"frozen/{layer}._osf_U_high", f"frozen/{layer}._osf_V_high") if k in z]
        frozen[f"{layer}/kernel"] = {
            k: jnp.asarray(v) for k, v in (start | dict(zip(["high"], high, strict=False))).items()
        }
    assert jax.tree.map(jnp.shape, frozen) == jax.tree.map(jnp.shape, adapted.frozen)
    adapted = adapted.replace(frozen=frozen)

    def model(p, x):
        bias = lambda name: z.get(f"base/{name}.bias", 0.0)
        return jnp.tanh(x @ p["lin0"]["kernel"] + bias("lin0")) @ p["lin1"]["kernel"] + bias("lin1")

    apply, x = jlora.lift(model, on_materialize="error"), jnp.asarray(z["x"])
    loss = lambda t, x, y: 0.5 * jnp.sum(jnp.square(apply(adapted.bind(t), x) - y))
    start = named("adapter/base_model.model.")
    np.testing.assert_allclose(apply(adapted.bind(start), x), z["y"], atol=1e-10)
    grads, grad_x = jax.grad(loss, (0, 1))(start, x, 0.0)
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, atol=1e-9), grads, named("grad/"))
    np.testing.assert_allclose(grad_x, z["grad_x"], atol=1e-9)
    for _ in range(5):
        mean = jax.grad(loss)(start, x, z["train/target"])
        start = jax.tree.map(lambda p, g: p - z["train/lr"] * g / z["train/target"].size, start, mean)
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, atol=1e-10), start, named("train/final/"))


@pytest.mark.parametrize("shape", [(9, 6), (6, 9), (7, 7)])
@pytest.mark.parametrize("constrained", [True, False])
def test_what_is_kept_is_kept(shape: tuple[int, int], constrained: bool) -> None:
    """Under Adam, which leaves a subspace that only gradients are held to."""
    w = random(0, *shape)
    adapted = jlora.adapt({"kernel": w}, jlora.OSF(2, constrained=constrained), "kernel", key=jax.random.key(0))
    np.testing.assert_allclose(jlora.merge(adapted)["kernel"], w, atol=1e-12)
    apply = jlora.lift(lambda p, x: x @ p["kernel"], on_materialize="error")
    tx = optax.adam(0.1)
    trainable, state = adapted.trainable, tx.init(adapted.trainable)
    for seed in range(4):
        x, y = random(2 * seed + 1, 5, shape[0]), random(2 * seed + 2, 5, shape[1])
        grads = jax.grad(lambda t, x=x, y=y: jnp.sum(jnp.square(apply(adapted.bind(t), x) - y)))(trainable)
        updates, state = tx.update(grads, state, trainable)
        trainable = optax.apply_updates(trainable, updates)
    merged = jlora.merge(adapted.replace(trainable=trainable))["kernel"]
    u, s, vh = np.linalg.svd(np.asarray(w))
    kept = u[:, :2].T @ merged @ vh[:2].T
    assert np.abs(merged - w).max() > 0.1
    assert (np.abs(kept - np.diag(s[:2])).max() < 1e-10) == constrained
    if constrained:
        moved = adapted.sites["kernel"].method.project(
            jlora.weight.Params(trainable["kernel"], adapted.frozen["kernel"])
        )
        again = jlora.merge(adapted.replace(trainable={"kernel": moved}))["kernel"]
        np.testing.assert_allclose(again, merged, atol=1e-12)


def test_a_file(tmp_path: pathlib.Path) -> None:
    """Layers that keep different numbers; the constraint is written into the parameters."""
    params = {name: {"kernel": random(i, 8, 6)} for i, name in enumerate(("q", "v", "o"))}
    rules = {"{q,v}/kernel": jlora.OSF(2), "o/kernel": jlora.OSF(0.5)}
    adapted = jlora.adapt(params, rules, key=jax.random.key(0))
    noise = jax.tree.map(lambda leaf: leaf + 0.3 * random(leaf.size, *leaf.shape), adapted.trainable)
    adapted = adapted.replace(trainable=noise)
    save_peft(adapted, tmp_path, dtype=jnp.float64)
    again = load_peft(tmp_path, params)
    assert again.sites["o/kernel"].method == jlora.OSF(0.5, constrained=False)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-10), jlora.merge(again), jlora.merge(adapted))
