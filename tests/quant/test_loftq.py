"""LoftQ against the recorded start, and what it is for."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from recorded import arrays, cases

import jlora
from jlora.quant import NF4, Int8, dequantize, loftq, quantize

# What was recorded, where it is not what the formats are. The 4-bit path that made it picks every entry of the table by
# its own block's magnitude, and multiplies all blocks of some matrices by that of the first (shown below); the 8-bit
# path rounds the weight to half precision first.


class FirstMagnitude(NF4):
    def _magnitudes(self):
        return jnp.broadcast_to(super()._magnitudes()[:1, :1], self.magnitudes.shape)


class HalfPrecision(Int8):
    def encode(self, w):
        return super().encode(w.astype(jnp.float16))


for cls, data in ((FirstMagnitude, ("codes", "magnitudes", "norms", "mean")), (HalfPrecision, ("codes", "scale"))):
    fields = [field.name for field in dataclasses.fields(cls) if field.name not in data]
    jax.tree_util.register_dataclass(cls, data, fields)


# By its bits, what a matrix may have been recorded with.
RECORDED = {4: ((FirstMagnitude, {"double": False}), (NF4, {"double": False})), 8: ((HalfPrecision, {}),)}


def matrices(case):
    """LoftQ's options, and of each layer (weight, base after the start, product of A and B), all [in, out]."""
    z, key = arrays("loftq.npz", case), "init/base_model.model.{}.lora_{}.weight"
    layers = sorted(name.split("/")[1].removesuffix(".weight") for name in z if name.startswith("base_after_init/"))
    bases = [[z[f"{part}/{layer}.weight"].T for layer in layers] for part in ("base", "base_after_init")]
    pairs = [(z[key.format(layer, "A")].T, z[key.format(layer, "B")].T) for layer in layers]
    return json.loads(str(z["config_json"]))["loftq_config"], list(zip(*bases, pairs, strict=True))


@pytest.mark.parametrize("case", cases("loftq.npz"))
def test_the_recorded_start(case):
    options, layers = matrices(case)
    if options["loftq_bits"] not in RECORDED:
        pytest.skip(f"no format here has {options['loftq_bits']} bits")
    for w, wanted, (a, b) in layers:
        params, method = {"kernel": jnp.asarray(w)}, jlora.LoRA(a.shape[1])
        found = [
            loftq(params, method, to, iterations=options["loftq_iter"], **own)
            for to, own in RECORDED[options["loftq_bits"]]
        ]
        off = lambda adapted, wanted=wanted: np.abs(adapted.base["kernel"].dequantize() - wanted)
        adapted = min(found, key=lambda adapted, off=off: off(adapted).sum())
        # A tie between two codes of 8 bits may be rounded up in one place and down in the other. There are few.
        allowed, step = 1e-6 + 1e-5 * np.abs(wanted), getattr(adapted.base["kernel"], "scale", 0.0)
        assert (off(adapted) <= allowed + step).all() and np.mean(off(adapted) > allowed) < 1 / 500
        # Of what the base has lost, both pairs are the best that there is of their rank.
        pair = adapted.trainable["kernel"]
        for base, product in ((adapted.base["kernel"].dequantize(), pair.product()), (wanted, a @ b)):
            u, s, vh = np.linalg.svd(w - base, full_matrices=False)
            best = (u * s)[:, : pair.rank] @ vh[: pair.rank]
            np.testing.assert_allclose(product, best, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", cases("loftq.npz"))
def test_the_recorded_base_is_ours_or_off_by_its_magnitudes(case):
    """Exactly: our codes of the same weight, with their blocks' magnitudes or all times that of the first block. With
    their own, the error is about half as large."""
    options, layers = matrices(case)
    if (options["loftq_bits"], options["loftq_iter"]) != (4, 1):
        pytest.skip("its base is of another format, or of another weight than the recorded one")
    for w, got, _ in layers:
        stored = NF4.of(jnp.asarray(w), jlora.Axes((0,), (1,)), double=False)
        if not np.array_equal(stored.dequantize(), got):
            once = dataclasses.replace(
                stored, magnitudes=jnp.broadcast_to(stored.magnitudes[:1, :1], stored.magnitudes.shape)
            )
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
