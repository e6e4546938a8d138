"""FRoD against PEFT's numbers from PEFT's own start, its basis, and its files."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from recorded import arrays, cases

import jlora
from jlora.io import load_peft, save_peft
from jlora.io.frod import kind

pytestmark = pytest.mark.usefixtures("x64")

LAYERS = ("lin0", "lin1")


def random(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def recorded(case: str) -> tuple[dict[str, np.ndarray], dict]:
    """A case's arrays, those that PEFT did not save where it saves them, and its configuration."""
    z = arrays("frod.npz", case)
    z |= {k.replace("frozen/", "adapter/"): v for k, v in z.items() if k.startswith("frozen/base_model.")}
    return z, json.loads(str(z["config_json"]))


@pytest.mark.parametrize("case", cases("frod.npz"))
def test_peft_from_its_own_start(case: str) -> None:
    """The general test of the oracles finds U anew; here it is PEFT's, of float32, and so is the weight that it makes:
    PEFT puts that in the place of the base's, 1e-7 away."""
    z, config = recorded(case)
    here = "base_model.model."
    rules = {f"{layer}/kernel": jlora.FRoD(config["sparse_rate"], group=f"frod.{layer}") for layer in LAYERS}
    of = lambda prefix: {
        f"{layer}/kernel": {
            "diagonal": jnp.asarray(z[f"{prefix}{layer}.frod_lambda_l"]),
            "values": jnp.asarray(z[f"{prefix}{layer}.frod_lambda_s_values"]),
        }
        for layer in LAYERS
    }
    frozen, base = {}, {}
    for layer, own in of(f"init/{here}").items():
        name = layer.removesuffix("/kernel")
        u, v = z[f"frozen/{name}.frod_U"].T, z[f"adapter/base_model.frod_V.{name}"]
        base[name] = {"kernel": jnp.asarray(v @ (own["diagonal"][:, None] * u))}
        np.testing.assert_allclose(base[name]["kernel"], z[f"base/{name}.weight"].T, atol=1e-6)
        frozen[layer] = {"u": jnp.asarray(u), "start": own["diagonal"]}
        places = z[f"adapter/base_model.frod_s_indices.{name}"][::-1].astype(np.int32)
        frozen[f"frod.{name}"] = {str(len(v)): {"v": jnp.asarray(v), "places": jnp.asarray(places)}}
    adapted = jlora.adapt(base, rules, key=jax.random.key(0))
    assert jax.tree.map(jnp.shape, frozen) == jax.tree.map(jnp.shape, adapted.frozen)
    adapted = adapted.replace(frozen=frozen)

    def model(p, x):
        linear = lambda layer, x: x @ p[layer]["kernel"] + z.get(f"base/{layer}.bias", 0.0)
        return linear("lin1", jnp.tanh(linear("lin0", x)))

    apply, x = jlora.lift(model, on_materialize="error"), jnp.asarray(z["x"])
    loss = jax.jit(lambda t, x, y: 0.5 * jnp.sum(jnp.square(apply(adapted.bind(t), x) - y)))
    start = of(f"adapter/{here}")
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-10 * max(1.0, np.abs(b).max()))
    close(apply(adapted.bind(start), x), z["y"])
    for name, leaves in jlora.merge(adapted.replace(trainable=start)).items():
        close(leaves["kernel"], z[f"merged/{name}.weight"].T)
    grads, grad_x = jax.grad(loss, (0, 1))(start, x, 0.0)
    jax.tree.map(close, grads, of("grad/"))
    close(grad_x, z["grad_x"])
    for _ in range(5):
        mean = jax.grad(loss)(start, x, z["train/target"])
        start = jax.tree.map(lambda p, g: p - z["train/lr"] * g / z["train/target"].size, start, mean)
    jax.tree.map(close, start, of("train/final/"))


AXES = {"q/w": jlora.Axes((1,), (2,), (0,))}


def params(layers: int = 3, n_in: int = 6, n_out: int = 4) -> dict:
    return {"q": {"w": random(0, layers, n_in, n_out)}, "o": {"w": random(1, n_in, n_out + 1)}}


@pytest.mark.parametrize("sizes", [(3, 6, 4), (1, 11, 4), (2, 5, 8)])
def test_basis(sizes: tuple[int, int, int]) -> None:
    """W = V diag(l) U^T with U's columns of one length, whether the outputs span the inputs or not, and V makes the
    Gram matrices of all the matrices' shares diagonal on average."""
    base = params(*sizes)
    adapted = jlora.adapt(base, jlora.FRoD(0.2), "**/w", axes=AXES, key=jax.random.key(0))
    n_in = sizes[1]
    v, places = (np.asarray(adapted.frozen["frod"][str(n_in)][name]) for name in ("v", "places"))
    assert places.shape == (2, int(0.2 * n_in * n_in)) and (places[0] != places[1]).all()
    assert len(set(map(tuple, places.T))) == places.shape[1]
    for path, weights in (("q/w", base["q"]["w"]), ("o/w", base["o"]["w"][None])):
        own = {name: leaf.reshape(len(weights), *leaf.shape[-k:]) for name, leaf, k in _leaves(adapted, path)}
        for w, u, length in zip(weights, own["u"], own["start"], strict=True):
            np.testing.assert_allclose(v @ (length[:, None] * u), w, atol=1e-10)
            there = np.linalg.norm(u, axis=1)
            np.testing.assert_allclose(there[there > 0], 1.0, atol=1e-12)
    above = np.concatenate([np.asarray(w).T for w in (*base["q"]["w"], base["o"]["w"])])
    if len(above) < n_in:
        np.testing.assert_allclose(v.T @ v, np.eye(n_in), atol=1e-10)
        return
    z, shares = np.linalg.solve(np.linalg.qr(above)[1].T, v), []
    np.testing.assert_allclose(z.T @ z, np.eye(n_in), atol=1e-8)
    for w in (*base["q"]["w"], base["o"]["w"]):
        q = np.linalg.solve(np.linalg.qr(above)[1].T, np.asarray(w)).T
        shares.append(np.linalg.inv(q.T @ q + 1e-3 * np.eye(n_in)))
    mean = z.T @ np.mean(shares, axis=0) @ z
    np.testing.assert_allclose(mean, np.diag(np.diag(mean)), atol=1e-6 * np.abs(mean).max())


def _leaves(adapted: jlora.Adapted, path: str):
    return (("u", adapted.frozen[path]["u"], 2), ("start", adapted.frozen[path]["start"], 1))


def moved(adapted: jlora.Adapted) -> jlora.Adapted:
    noise = lambda leaf: leaf + 0.3 * random(leaf.size, *leaf.shape)
    return adapted.replace(trainable=jax.tree.map(noise, adapted.trainable))


@pytest.mark.parametrize("rows", [2, 64])
def test_few_rows_and_many(rows: int) -> None:
    """Both ways of the forward pass are the merged weight's, and inputs that nothing uses make no nan."""
    w = random(3, 6, 8).at[2].set(0.0)
    adapted = jlora.adapt({"w": w}, jlora.FRoD(0.3), "w", key=jax.random.key(0))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((adapted.trainable, adapted.frozen)))
    np.testing.assert_array_equal(jlora.merge(adapted)["w"], w)
    adapted, x = moved(adapted), random(4, rows, 6)
    apply = jlora.lift(lambda p, x: jnp.sin(x @ p["w"]), on_materialize="error")
    value = lambda t, merged: jnp.sum(
        jnp.sin(x @ jlora.merge(adapted.replace(trainable=t))["w"]) if merged else apply(adapted.bind(t), x)
    )
    got, wanted = (jax.value_and_grad(value)(adapted.trainable, merged) for merged in (False, True))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-10), got, wanted)


def test_a_quantized_base() -> None:
    base = params()
    stored = jlora.quant.quantize(base, jlora.quant.Int8, targets="**/w", axes=AXES)
    adapted = jlora.adapt(stored, jlora.FRoD(0.2), "**/w", axes=AXES, key=jax.random.key(0))
    plain = jlora.adapt(jlora.quant.dequantize(stored), jlora.FRoD(0.2), "**/w", axes=AXES, key=jax.random.key(0))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), adapted.trainable, plain.trainable)
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), stored)
    planned = jlora.adapt(shapes, jlora.FRoD(0.2), "**/w", axes=AXES, key=jax.random.key(0))
    of = lambda a: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), (a.trainable, a.frozen))
    assert of(planned) == of(adapted)


KINDS = {
    "lin": "lin",
    "h.0.fc": "fc",
    "a.3.self_attn.q_proj": "self_attn_q_proj",
    "layer.1.attention.output.dense": "attention_output",
}


@pytest.mark.parametrize("case", cases("frod.npz"))
def test_a_file(case: str, tmp_path: pathlib.Path) -> None:
    """Layers that are stacked here share what PEFT has once for a kind; a file without it is refused, as is writing."""
    assert {name: kind(name) for name in KINDS} == KINDS
    z, config = recorded(case)
    shape, other = (z[f"base/{layer}.weight"].shape for layer in LAYERS)
    if shape != other:
        pytest.skip("its layers are of two shapes: they make no stack")
    base = {"layers": {"q": {"kernel": random(0, 2, *shape)}}}
    axes = {"**/kernel": jlora.Axes((1,), (2,), (0,))}
    config |= {"target_modules": ["q"]}
    tensors = {
        k.replace("model.lin", "model.layers.").replace(".frod_lambda", ".q.frod_lambda").replace(".lin0", ".q"): v
        for k, v in z.items()
        if k.startswith("adapter/") and not k.endswith(".lin1")
    }
    tensors = {k.removeprefix("adapter/"): np.ascontiguousarray(v) for k, v in tensors.items()}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    safetensors.numpy.save_file(tensors, tmp_path / "adapter_model.safetensors")
    adapted = load_peft(tmp_path, base, axes=axes)
    method = jlora.FRoD(config["sparse_rate"], ridge=config["regularization_alpha"], group="frod.q")
    assert adapted.sites["layers/q/kernel"].method == method
    v, at = z["adapter/base_model.frod_V.lin0"], z["adapter/base_model.frod_s_indices.lin0"]
    for i, merged in enumerate(jlora.merge(adapted)["layers"]["q"]["kernel"]):
        w, s = np.asarray(base["layers"]["q"]["kernel"][i]), np.zeros(v.shape)
        b = np.linalg.solve(v, w).T
        s[tuple(at)] = z[f"adapter/base_model.model.lin{i}.frod_lambda_s_values"]
        s += np.diag(z[f"adapter/base_model.model.lin{i}.frod_lambda_l"])
        np.testing.assert_allclose(merged.T, b / np.linalg.norm(b, axis=0) @ s @ v.T, atol=1e-9)
    with pytest.raises(ValueError, match="'layers/q/kernel' has FRoD, which is not .* the U of another V.* --to lora"):
        save_peft(adapted, tmp_path / "again")
    assert not (tmp_path / "again").exists()
    lora, report = jlora.to_lora(moved(adapted), rank=len(v))  # what the error says to do
    assert report.error < 1e-6
    save_peft(lora, tmp_path / "lora", names=lambda path: "layers.*.q.weight", dtype=jnp.float64)
    own = {k: v for k, v in tensors.items() if ".frod_V." not in k}
    safetensors.numpy.save_file(own, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"lacks base_model.frod_V.q .*save it again"):
        load_peft(tmp_path, base, axes=axes)
