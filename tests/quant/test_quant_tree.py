"""Quantizing and dequantizing trees, what their leaves are to the rest of the library, merging."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from jlora import paths
from jlora.io import load_peft, save_peft
from jlora.quant import NF4, Int8, dequantize, quantize

KEY = jax.random.key(0)
AXES = {"layers/kernel": jlora.Axes((1,), (2,), stack=(0,))}
X = jnp.ones((3, 64)) / 8


def make_params():
    keys = jax.random.split(KEY, 3)
    return {
        "layers": {"kernel": jax.random.normal(keys[0], (2, 64, 64)) / 8, "bias": jnp.zeros((2, 64))},
        "proj": {"kernel": jax.random.normal(keys[1], (64, 32)) / 8, "bias": jnp.ones(32)},
        "lm_head": {"kernel": jax.random.normal(keys[2], (32, 40))},
    }


def model(params, x):
    x, _ = jax.lax.scan(lambda x, p: (jnp.tanh(x @ p["kernel"] + p["bias"]), None), x, params["layers"])
    return (x @ params["proj"]["kernel"] + params["proj"]["bias"]) @ params["lm_head"]["kernel"]


def make_small(to=NF4, **options):
    return quantize(make_params(), to, axes=AXES, **options)


def make_adapted(small, method=None):
    adapted = jlora.adapt(small, method or jlora.LoRA(2), key=KEY)
    return adapted.replace(trainable=jax.tree.map(lambda leaf: leaf + 0.05, adapted.trainable))


@pytest.mark.parametrize("to", [NF4, Int8])
def test_targets_become_quantized_and_the_rest_stays(to):
    params = make_params()
    small = quantize(params, to, axes=AXES)
    assert isinstance(small["layers"]["kernel"], to) and isinstance(small["proj"]["kernel"], to)
    assert small["lm_head"]["kernel"] is params["lm_head"]["kernel"]  # all-linear leaves the head
    assert small["proj"]["bias"] is params["proj"]["bias"]
    assert [path for path, _ in paths.flatten(small)[0]] == [path for path, _ in paths.flatten(params)[0]]
    back = dequantize(small)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), back) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), params
    )
    traced = quantize(make_params(), to, fn=model, args=(X,), exclude="lm_head/**")
    assert jax.tree.structure(traced) == jax.tree.structure(small)


def test_under_jit_and_without_numbers():
    small = jax.jit(lambda params: quantize(params, axes=AXES, double=False))(make_params())
    for a, b in zip(jax.tree.leaves(small), jax.tree.leaves(make_small(double=False)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)
    shapes = quantize(jax.eval_shape(make_params), axes=AXES)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), shapes) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), make_small()
    )
    planned = jlora.adapt(shapes, jlora.DoRA(2), key=KEY)
    made = jlora.adapt(make_small(), jlora.DoRA(2), key=KEY)
    assert jax.tree.map(lambda leaf: leaf.shape, planned.trainable) == jax.tree.map(
        lambda leaf: leaf.shape, made.trainable
    )


def test_one_format_here_and_another_there():
    small = quantize(make_params(), Int8, "lm_head/kernel")
    small = quantize(small, NF4, axes=AXES, block_size=32)
    kinds = [type(small[name]["kernel"]) for name in ("layers", "proj", "lm_head")]
    assert kinds == [NF4, NF4, Int8] and small["proj"]["kernel"].block_size == 32
    lifted = jlora.lift(model, on_materialize="error")
    np.testing.assert_allclose(lifted(small, X), model(dequantize(small), X), rtol=1e-5, atol=1e-5)


def test_bad_input():
    params = make_params()
    with pytest.raises(ValueError, match=r"quantize to NF4 matches no leaf. Nearest: \['proj/kernel'"):
        quantize(params, NF4, "**/projj/kernel", axes=AXES)
    assert quantize(params, NF4, "nothing", allow_unmatched=True) is not None
    with pytest.raises(ValueError, match="Which axes of 'layers/kernel'.*is not known"):
        quantize(params, NF4)
    with pytest.raises(ValueError, match="matches only leaves that are no weight of a product"):
        quantize(params, NF4, "**/bias")
    with pytest.raises(ValueError, match="'proj/kernel' is quantized already: NF4.*exclude="):
        quantize(make_small(), Int8, "proj/kernel")
    with pytest.raises(ValueError, match="NF4 has no option 'blocksize'; it has block_size, double"):
        quantize(params, NF4, axes=AXES, blocksize=64)
    with pytest.raises(ValueError, match="Int8 has no option 'double'; it has none"):
        quantize(params, Int8, axes=AXES, double=True)
    with pytest.raises(TypeError, match="a format is wanted"):
        quantize(params, "nf4", axes=AXES)
    with pytest.raises(ValueError, match="'proj/kernel' was quantized with.*not"):
        jlora.adapt(make_small(), jlora.LoRA(2), "proj/kernel", axes={"proj/kernel": jlora.Axes((1,), (0,))}, key=KEY)


def test_a_quantized_leaf_is_one_leaf():
    adapted = make_adapted(make_small())
    text = jlora.summary(adapted)
    assert "layers/kernel" in text and "2x64x64" in text and "codes" not in text
    assert adapted.sites["layers/kernel"].axes == AXES["layers/kernel"]
    assert "of the base (" in text and f"{2 * 64 * 64 + 2 * 64 + 64 * 32 + 32 + 32 * 40:,}" in text
    rows = {"**/kernel": jlora.LoRA(2), "**/bias": jlora.Full()}
    assert set(jlora.adapt(make_small(), rows, key=KEY).sites) == {
        "layers/kernel", "layers/bias", "proj/kernel", "proj/bias", "lm_head/kernel",
    }  # fmt: skip


def test_nothing_flows_to_what_is_stored():
    adapted = make_adapted(make_small())
    grads = jax.grad(lambda base: jlora.lift(model)(adapted.replace(base=base).bind(), X).sum(), allow_int=True)(
        adapted.base
    )
    quantized = [grads["layers"]["kernel"], grads["proj"]["kernel"]]
    for leaf in jax.tree.leaves(quantized):
        assert leaf.dtype == jax.dtypes.float0 or not leaf.any()
    assert grads["lm_head"]["kernel"].any()


@pytest.mark.parametrize("method", [jlora.Full(), jlora.Offset()])
def test_a_quantized_leaf_trained_as_a_whole(method):
    small = make_small()
    adapted = jlora.adapt(small, method, "proj/kernel", key=KEY)
    lifted = jlora.lift(model)
    np.testing.assert_allclose(lifted(adapted.bind(), X), model(dequantize(small), X), rtol=1e-5, atol=1e-5)
    merged = jlora.merge(adapted)
    np.testing.assert_allclose(merged["proj"]["kernel"], small["proj"]["kernel"].dequantize(), rtol=1e-6, atol=1e-7)
    again = jlora.merge(adapted, requantize=True)["proj"]["kernel"]
    assert isinstance(again, NF4)


@pytest.mark.parametrize("to", [NF4, Int8])
@pytest.mark.parametrize("method", [jlora.LoRA(2), jlora.VeRA(4), jlora.OFT(8)])
def test_merging(to, method):
    adapted = make_adapted(make_small(to), method)
    lifted = jlora.lift(model)(adapted.bind(), X)
    merged = jlora.merge(adapted)
    assert jax.tree.structure(merged) == jax.tree.structure(make_params())
    np.testing.assert_allclose(model(merged, X), lifted, rtol=1e-4, atol=1e-5)
    plain = jax.jit(jlora.merge)(adapted)
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(merged), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)

    again = jlora.merge(adapted, requantize=True)
    assert jax.tree.structure(again) == jax.tree.structure(adapted.base)
    for name in ("layers", "proj"):
        wanted = adapted.base[name]["kernel"].like(merged[name]["kernel"])
        np.testing.assert_allclose(again[name]["kernel"].dequantize(), wanted.dequantize(), rtol=1e-4, atol=1e-3)
    error = np.abs(dequantize(again)["proj"]["kernel"] - merged["proj"]["kernel"]).max()
    assert 1e-4 < error < (0.2 if to is NF4 else 0.01) * np.abs(merged["proj"]["kernel"]).max()


def test_merging_leaves_nothing_quantized_unless_asked_to():
    adapted = jlora.adapt(make_small(), jlora.LoRA(2), "proj/kernel", key=KEY)
    assert all(isinstance(leaf, jax.Array) for _, leaf in paths.flatten(jlora.merge(adapted))[0])
    assert jlora.merge(adapted, requantize=True)["layers"]["kernel"] is adapted.base["layers"]["kernel"]


def test_files_and_conversion(tmp_path):
    small = make_small()
    adapted = make_adapted(small)
    names = lambda path: path.replace("layers/", "layers.*.").rpartition("kernel")[0].strip("./") or None
    save_peft(adapted, tmp_path, names=names)
    loaded = load_peft(tmp_path, small, names=names)
    lifted = jlora.lift(model)
    np.testing.assert_allclose(lifted(loaded.bind(), X), lifted(adapted.bind(), X), rtol=1e-5, atol=1e-6)
    over_floats = load_peft(tmp_path, dequantize(small), axes=AXES, names=names)
    np.testing.assert_allclose(lifted(over_floats.bind(), X), lifted(adapted.bind(), X), rtol=1e-5, atol=1e-5)


def test_the_command_line_loads_a_quantized_base():
    loading = pytest.importorskip("jlora.train.loading")
    from jlora.train.checkpoint import fingerprint

    plain, small = (loading.load_model("stories260k", quantize=to) for to in ("none", "nf4"))
    kinds = {path: type(leaf) for path, leaf in paths.flatten(small.params)[0]}
    assert NF4 in kinds.values()
    stored = lambda model: sum(leaf.nbytes for leaf in jax.tree.leaves(model.params))
    assert stored(small) < 0.4 * stored(plain)  # its table is a fifth of it, and stays
    assert fingerprint(small.params) != fingerprint(plain.params)
