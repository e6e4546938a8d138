"""Conversion to plain LoRA, beyond the law that every method obeys (tests/conformance/test_law_convert.py)."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from recorded import arrays, cases

import jlora
from jlora.io import load_peft
from jlora.linalg import truncated_svd
from jlora.methods.whole import Follow

pytestmark = pytest.mark.usefixtures("x64")


def normal(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def moved(adapted: jlora.Adapted) -> jlora.Adapted:
    leaves, treedef = jax.tree.flatten(adapted.trainable)
    leaves = [leaf + 0.2 * normal(i, *leaf.shape) for i, leaf in enumerate(leaves)]
    return adapted.replace(trainable=jax.tree.unflatten(treedef, leaves))


def adapt(w: jax.Array, method: jlora.methods.Method, axes: jlora.Axes | None = None) -> jlora.Adapted:
    return moved(jlora.adapt({"w": w}, method, "w", axes={"w": axes or jlora.Axes((0,), (1,))}, key=jax.random.key(0)))


def change(adapted: jlora.Adapted) -> np.ndarray:
    return np.asarray(jlora.merge(adapted)["w"] - adapted.base["w"])


# Against PEFT's own conversion. Its decomposition is in float32.

# Of the types that were recorded without their configuration: a tensor whose first axis is the rank, alpha's name.
RANKED = {
    "LORA": ("lora_A.weight", "lora_alpha"),
    "LOHA": ("hada_w1_b", "alpha"),
    "LOKR": ("lokr_w2_b", "alpha"),
    "MISS": ("miss_block", None),
}


@pytest.mark.parametrize("case", cases("convert_to_lora.npz"))
def test_peft_converts_likewise(case, tmp_path):
    z = arrays("convert_to_lora.npz", case)
    part = lambda prefix: {key.removeprefix(prefix): z[key] for key in z if key.startswith(prefix)}
    base, tensors = part("base/"), part("adapter/")
    params: dict[str, dict] = {}
    for name, value in base.items():
        module, leaf = name.split(".")
        params.setdefault(module, {})[leaf] = jnp.asarray(value)
    kind = next(k for k, (suffix, _) in RANKED.items() if any(key.endswith(suffix) for key in tensors))
    suffix, alpha = RANKED[kind]
    r = next(len(value) for key, value in tensors.items() if key.endswith(suffix))

    def read(**options):
        config = {"peft_type": kind, "r": r, "target_modules": list(params), "peft_version": "0.21.2"} | options
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
        safetensors.numpy.save_file(tensors, tmp_path / "adapter_model.safetensors", {"format": "pt"})
        adapted = load_peft(tmp_path, params, axes={"**/weight": jlora.Axes((1,), (0,))})
        merged = jlora.merge(adapted)
        return adapted, {m: np.asarray(merged[m]["weight"] - own["weight"]) for m, own in params.items()}

    adapted, delta = read(**({alpha: r} if alpha else {}))
    if alpha:  # which is not recorded, but the change is
        recorded = part("delta/")
        scale = np.mean([np.vdot(recorded[m], change) / np.vdot(change, change) for m, change in delta.items()])
        adapted, delta = read(**{alpha: round(r * scale, 6)})
        for module, wanted in recorded.items():
            np.testing.assert_allclose(delta[module], wanted, rtol=0, atol=1e-6 * np.abs(wanted).max())
    configs = {key.removesuffix("_config_json"): v for key, v in z.items() if re.fullmatch(r"rank.+_config_json", key)}
    assert configs
    for name, config in configs.items():
        wanted, patterns, asked = part(f"{name}/"), json.loads(str(config)), float(name.removeprefix("rank"))
        # PEFT gives MiSS its own rank, whatever is asked for.
        rank = r if kind == "MISS" else int(asked) if asked >= 1 else asked
        lora, report = jlora.to_lora(adapted, rank)
        for module in params:
            key, path = f"base_model.model.{module}", f"{module}/weight"
            a, b = wanted[f"{key}.lora_A.weight"], wanted[f"{key}.lora_B.weight"]
            pair, leaf = lora.trainable[path], report.leaves[path]
            assert leaf.exact == (kind in ("LORA", "MISS") and r <= rank)
            assert pair.rank == len(a) == patterns["rank_pattern"].get(module, patterns["r"])
            np.testing.assert_allclose(pair.product().T, b @ a, rtol=0, atol=2e-6 * np.abs(b @ a).max())
            lost = np.linalg.norm(b @ a - delta[module]) / np.linalg.norm(delta[module])
            np.testing.assert_allclose(leaf.error, lost, atol=2e-6)


# What the ranks come to.


@pytest.mark.parametrize("method", [jlora.LoRA(6), jlora.DoRA(3), jlora.LoHa(2), jlora.GraLoRA(4)], ids=str)
def test_truncation_is_the_best_there_is_and_its_error_is_told(method):
    adapted = adapt(normal(1, 16, 12), method)
    wanted = change(adapted)
    s = np.linalg.svd(wanted, compute_uv=False)
    lora, report = jlora.to_lora(adapted, 3)
    lost = np.linalg.norm(s[3:]) / np.linalg.norm(s)
    assert lora.sites["w"].method.rank == 3 and not report.leaves["w"].exact
    np.testing.assert_allclose(report.error, lost, rtol=1e-8)
    np.testing.assert_allclose(np.linalg.norm(change(lora) - wanted) / np.linalg.norm(wanted), lost, rtol=1e-8)


@pytest.mark.parametrize("method", [jlora.LoRA(8), jlora.HiRA(8), jlora.FourierFT(40)], ids=str)
def test_share_is_kept_by_the_smallest_rank(method):
    adapted = adapt(normal(2, 90, 84), method)  # large enough for the first 16 not to be all
    energy = np.cumsum(np.linalg.svd(change(adapted), compute_uv=False) ** 2)
    for share in (0.3, 0.9):
        lora, report = jlora.to_lora(adapted, share)
        (rank,) = report.leaves["w"].ranks
        kept = 1 - report.error**2
        assert rank == np.searchsorted(energy, share * energy[-1]) + 1
        assert kept > share or kept == pytest.approx(share, abs=1e-6)


def test_pairs_of_low_rank_are_taken_as_they_are():
    adapted = adapt(normal(3, 12, 10), jlora.LoRA(2, alpha=6.0, dropout=0.1))
    lora, report = jlora.to_lora(adapted, 4)
    assert lora.trainable["w"] is adapted.trainable["w"] and lora.sites == adapted.sites
    assert report.leaves["w"].exact and report.leaves["w"].ranks == (2,)
    adapted = adapt(normal(3, 12, 10), jlora.SoRA(2, alpha=6.0, dropout=0.1))
    lora, report = jlora.to_lora(adapted, 4)
    assert lora.sites["w"].method == jlora.LoRA(2, alpha=2.0, dropout=0.1) and report.error == 0.0
    np.testing.assert_allclose(change(lora), change(adapted), atol=1e-12)


def test_few_rows_are_a_low_rank():
    """Of a table of tokens only the rows that were trained are decomposed."""
    adapted = adapt(normal(4, 300, 6), jlora.TrainableTokens((7, 250)), jlora.Axes((0,), (1,), kind="embedding"))
    lora, report = jlora.to_lora(adapted, 5)
    assert report.leaves["w"].ranks == (2,) and report.error < 1e-12
    a = np.asarray(lora.trainable["w"].a)
    assert np.flatnonzero(a.any(1)).tolist() == [7, 250]


def test_ranks_differ_along_a_stack():
    w = normal(5, 3, 12, 10)
    adapted = adapt(w, jlora.HiRA(6), jlora.Axes((1,), (2,), stack=(0,)))
    pair = dict(adapted.trainable["w"])
    pair["a"] = pair["a"].at[0, :, 2:].set(0.0).at[1].set(0.0)  # of rank 2, of none, of full rank
    base = {"w": w.at[0].set(1.0)}  # a change of ones times the pair has the pair's rank
    adapted = adapted.replace(trainable={"w": pair}, base=base)
    lora, report = jlora.to_lora(adapted, 10)
    ranks = report.leaves["w"].ranks
    assert ranks == lora.sites["w"].method.ranks == (2, 0, 10)
    np.testing.assert_allclose(change(lora), change(adapted), atol=1e-10)
    assert "0..10" in str(report)


@pytest.mark.parametrize(
    ("shape", "axes"),
    [
        ((3, 2, 4, 5), jlora.Axes((0, 1, 2), (3,), kind="conv")),
        ((5, 4, 3, 2), jlora.Axes((1, 2, 3), (0,), kind="conv")),
        ((2, 3, 6, 4), jlora.Axes((2,), (3,), stack=(0, 1))),
        ((6, 2, 4), jlora.Axes((0,), (1, 2))),
        ((9, 4), jlora.Axes((0,), (1,), kind="embedding")),
    ],
    ids=["conv", "conv_torch", "layers_of_experts", "heads", "embedding"],
)
def test_every_kind_of_leaf(shape, axes):
    adapted = adapt(normal(6, *shape), jlora.HiRA(2), axes)
    lora, report = jlora.to_lora(adapted, 100)
    assert report.error < 1e-12 and lora.sites["w"].axes == axes
    np.testing.assert_allclose(change(lora), change(adapted), atol=1e-10)


def test_quantized_base():
    axes = {"w": jlora.Axes((1,), (2,), stack=(0,))}
    base = jlora.quant.quantize({"w": normal(16, 2, 64, 64).astype(jnp.float32)}, jlora.quant.Int8, "w", axes=axes)
    for method in (jlora.IA3(), jlora.LoRA(2)):
        adapted = moved(jlora.adapt(base, method, "w", key=jax.random.key(0)))
        lora, report = jlora.to_lora(adapted, 64)
        assert lora.base["w"] is base["w"] and report.error < 1e-5
        np.testing.assert_allclose(jlora.merge(lora)["w"], jlora.merge(adapted)["w"], atol=1e-4)


def test_what_is_trained_as_it_is_stays():
    params = {"q": {"kernel": normal(7, 8, 6), "bias": normal(8, 6)}, "norm": normal(9, 8), "k": normal(10, 8, 6)}
    road = jlora.RoAd(group_size=2)
    rules = {"q/kernel": road, "q/bias": Follow(group="q/kernel", method=road), "norm": jlora.Offset(2.0), "k": road}
    adapted = moved(jlora.adapt(params, rules, key=jax.random.key(0)))
    lora, report = jlora.to_lora(adapted, 6)
    assert lora.trainable["norm"] is adapted.trainable["norm"]
    assert lora.sites["q/bias"].method == jlora.Full() and report.kept == {"q/bias": "Full", "norm": "Offset"}
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-12), jlora.merge(lora), jlora.merge(adapted))


def test_lookups_only_stay_so():
    adapted = adapt(normal(11, 9, 4), jlora.DoRA(2, lookup_only=True), jlora.Axes((0,), (1,), kind="embedding"))
    lora, _ = jlora.to_lora(adapted, 4)
    assert lora.sites["w"].method.lookup_only
    both = [jlora.merge(tree, allow_tied_change=True)["w"] for tree in (lora, adapted)]
    np.testing.assert_allclose(*both, atol=1e-12)


def test_sharded_as_its_weight(devices):
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "model"))
    adapted = adapt(jax.device_put(normal(12, 8, 16), place), jlora.HiRA(2))
    pair = jlora.to_lora(adapted, 4)[0].trainable["w"]
    assert pair.b.sharding.is_equivalent_to(place, 2) and pair.a.sharding.is_fully_replicated


def test_bfloat16_weights_lose_nothing_of_the_change():
    adapted = adapt(normal(13, 40, 30).astype(jnp.bfloat16), jlora.IA3())
    lora, report = jlora.to_lora(adapted, 30)
    exact = adapted.base["w"].astype(jnp.float64) * (adapted.trainable["w"]["scale"].astype(jnp.float64) - 1)
    assert lora.trainable["w"].a.dtype == jnp.float32 and report.error < 1e-5
    np.testing.assert_allclose(lora.trainable["w"].product(), exact, atol=1e-5)


# What is refused.


@pytest.mark.parametrize("rank", [0, -2, 1.0, 0.0, 1.5, True, "8", None])
def test_rank_that_is_none(rank):
    with pytest.raises(ValueError, match="fraction between 0 and 1"):
        jlora.to_lora(adapt(normal(14, 4, 4), jlora.IA3()), rank)


def test_method_without_a_weight():
    class Bottleneck(jlora.LoRA):
        mergeable = False

    with pytest.raises(ValueError, match=r"'w': Bottleneck is no change of the weight.*bind and lift"):
        jlora.to_lora(adapt(normal(14, 4, 4), Bottleneck(2)), 4)


def test_nothing_to_convert():
    with pytest.raises(ValueError, match="nothing to convert"):
        jlora.to_lora(jlora.adapt({"w": normal(14, 4, 4)}, jlora.Full(), "w"), 4)
    shapes = {"w": jax.ShapeDtypeStruct((4, 4), jnp.float32)}
    with pytest.raises(ValueError, match="'w' is a shape"):
        jlora.to_lora(jlora.adapt(shapes, jlora.LoRA(2), "w", key=jax.random.key(0)), 4)


def test_large_matrices_are_decomposed_by_iteration():
    """What truncated_svd does beyond small sizes, on a spectrum that falls slowly: close to the best."""
    w = normal(15, 120, 100)
    s = np.linalg.svd(w, compute_uv=False)
    u, t, vh = truncated_svd(w, 4)
    assert np.linalg.norm(w - (u * t) @ vh) < 1.02 * np.linalg.norm(s[4:])
