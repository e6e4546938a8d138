"""LoftQ against the recorded start, and what it is for."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from jlora.quant import NF4, Int8, dequantize, loftq, quantize

# What was recorded, where it is not what the formats are. The 4-bit path that made it picks every entry of the table by
# its own block's magnitude, and multiplies all blocks by that of the first (shown below); the 8-bit path rounds the
# weight to half precision first.


class FirstMagnitude(NF4):
    def _magnitudes(self):
        return jnp.broadcast_to(super()._magnitudes()[:1, :1], self.magnitudes.shape)


class HalfPrecision(Int8):
    def encode(self, w):
        return super().encode(w.astype(jnp.float16))


for cls, data in ((FirstMagnitude, ("codes", "magnitudes", "norms", "mean")), (HalfPrecision, ("codes", "scale"))):
    fields = [field.name for field in dataclasses.fields(cls) if field.name not in data]
    jax.tree_util.register_dataclass(cls, data, fields)


@functools.cache
def recorded(oracles, case):
    with np.load(oracles / "loftq.npz") as file:
        return {key.removeprefix(f"{case}/"): file[key] for key in file.files if key.startswith(f"{case}/")}


def start(case, to, **options):
    config = json.loads(str(case["config_json"]))
    params = {name: {"kernel": jnp.asarray(case[f"base/{name}.weight"].T)} for name in ("lin0", "lin1")}
    method = jlora.LoRA(config["r"], alpha=float(config["lora_alpha"]))
    return params, loftq(params, method, to, iterations=config["loftq_config"]["loftq_iter"], **options)


@pytest.mark.parametrize(
    ("name", "to", "options"),
    [
        ("bits4_iter1", FirstMagnitude, {"double": False}),
        ("bits4_iter3", FirstMagnitude, {"double": False}),
        ("bits8_iter1", HalfPrecision, {}),
    ],
)
def test_the_recorded_start(oracles, name, to, options):
    case = recorded(oracles, name)
    _, adapted = start(case, to, **options)
    for layer in ("lin0", "lin1"):
        base = adapted.base[layer]["kernel"].dequantize()
        np.testing.assert_allclose(base, case[f"base_after_init/{layer}.weight"].T, rtol=1e-5, atol=1e-6)
        key = f"init/base_model.model.{layer}.lora_"
        product = (case[f"{key}B.weight"] @ case[f"{key}A.weight"]).T  # which PEFT then scales by alpha / r
        pair = adapted.trainable[f"{layer}/kernel"]
        np.testing.assert_allclose(pair.scale * pair.a @ pair.b, product, rtol=1e-4, atol=1e-5)


def test_the_recorded_base_is_off_by_its_magnitudes(oracles):
    """Exactly: our codes of the same weight, all times the magnitude of the first block. With their own, the error is
    half as large."""
    case = recorded(oracles, "bits4_iter1")
    for layer in ("lin0", "lin1"):
        w, got = (case[f"{part}/{layer}.weight"].T for part in ("base", "base_after_init"))
        stored = NF4.of(jnp.asarray(w), jlora.Axes((0,), (1,)), double=False)
        once = NF4.of(jnp.asarray(w), jlora.Axes((0,), (1,)), double=False)
        object.__setattr__(once, "magnitudes", jnp.broadcast_to(once.magnitudes[:1, :1], once.magnitudes.shape))
        np.testing.assert_array_equal(once.dequantize(), got)
        ours, theirs = (np.linalg.norm(base - w) for base in (stored.dequantize(), got))
        assert ours < 0.65 * theirs


@pytest.mark.parametrize("alpha", [4.0, 32.0])
@pytest.mark.parametrize("to", [NF4, Int8])
def test_the_start_is_closer_to_the_weight_whatever_alpha(to, alpha):
    params = {"layers": jax.random.normal(jax.random.key(0), (3, 64, 32)), "kernel": jnp.ones((8, 8)) / 3}
    axes = {"layers": jlora.Axes((1,), (2,), stack=(0,))}
    error = lambda tree: np.linalg.norm(tree["layers"] - params["layers"])
    plain = error(dequantize(quantize(params, to, "layers", axes=axes)))
    once, often = (
        error(jlora.merge(loftq(params, jlora.LoRA(8, alpha), to, "layers", axes=axes, iterations=n))) for n in (1, 4)
    )
    assert once < 0.85 * plain
    assert often < 0.97 * once or to is Int8


def test_it_is_an_adapted_like_any_other():
    params = {"kernel": jax.random.normal(jax.random.key(0), (64, 32))}
    adapted = loftq(params, jlora.LoRA(4))
    like = jlora.adapt(quantize(params), jlora.LoRA(4), key=jax.random.key(0))
    assert jax.tree.structure(adapted) == jax.tree.structure(like)
    x = jax.random.normal(jax.random.key(1), (3, 64))
    fn = lambda p, x: x @ p["kernel"]
    np.testing.assert_allclose(jlora.lift(fn)(adapted.bind(), x), fn(jlora.merge(adapted), x), rtol=1e-4, atol=1e-4)
    planned = loftq(jax.eval_shape(lambda: params), jlora.LoRA(4))
    assert jax.tree.map(jnp.shape, planned.trainable) == jax.tree.map(jnp.shape, adapted.trainable)


def test_bad_input():
    params = {"kernel": jnp.ones((8, 8))}
    with pytest.raises(ValueError, match="LoftQ starts LoRA"):
        loftq(params, jlora.DoRA(2))
    with pytest.raises(ValueError, match="at least one"):
        loftq(params, jlora.LoRA(2), iterations=0)
    with pytest.raises(ValueError, match="'kernel' is quantized already"):
        loftq(quantize(params), jlora.LoRA(2))
    with pytest.raises(ValueError, match="rank 9 is above"):
        loftq(params, jlora.LoRA(9))
