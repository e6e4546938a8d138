"""Reading and writing adapter files: what is accepted, what is refused and in which words, and what writing leaves."""

import doctest
import json
import pathlib
import re
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jlora
from jlora.io import files, load_peft, matching, save_peft

RNG = np.random.default_rng(0)
LAYERS, IN, OUT = 3, 6, 4


def normal(*shape: int) -> np.ndarray:
    return RNG.normal(size=shape).astype("f")


@pytest.fixture(scope="module")
def nested() -> dict[str, Any]:
    """Three layers with two linear modules each, a norm, and a head."""
    layer = lambda: {
        "q": {"kernel": jnp.asarray(normal(IN, OUT)), "bias": jnp.asarray(normal(OUT))},
        "v": {"kernel": jnp.asarray(normal(IN, OUT))},
        "norm": {"scale": jnp.asarray(normal(IN))},
    }
    return {"layers": {str(i): layer() for i in range(LAYERS)}, "lm_head": {"kernel": jnp.asarray(normal(IN, 8))}}


@pytest.fixture(scope="module")
def stacked(nested) -> dict[str, Any]:
    """The same, stacked."""
    layers = [nested["layers"][str(i)] for i in range(LAYERS)]
    return nested | {"layers": jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)}


def pair(module: str, rank: int = 2) -> dict[str, np.ndarray]:
    return {f"{module}.lora_A.weight": normal(rank, IN), f"{module}.lora_B.weight": normal(OUT, rank)}


def lora_tensors(*modules: str, prefix: str = "base_model.model.") -> dict[str, np.ndarray]:
    return {prefix + key: value for module in modules for key, value in pair(module).items()}


QS = tuple(f"layers.{i}.q" for i in range(LAYERS))


def write(directory: pathlib.Path, tensors: dict, **config: Any) -> pathlib.Path:
    directory.mkdir(exist_ok=True)
    lora = {"peft_type": "LORA", "lora_alpha": 4} if "peft_type" not in config else {}
    config = {"r": 2, "target_modules": ["q"]} | lora | config
    (directory / "adapter_config.json").write_text(json.dumps(config))
    save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, directory / "adapter_model.safetensors")
    return directory


def saved(directory: pathlib.Path) -> tuple[dict, dict]:
    config = json.loads((directory / "adapter_config.json").read_text())
    return config, load_file(directory / "adapter_model.safetensors")


def merged(adapted: jlora.Adapted) -> dict[str, np.ndarray]:
    with jax.disable_jit():
        tree = jlora.merge(adapted)
    return {jax.tree_util.keystr(k, simple=True, separator="/"): v for k, v in jax.tree.leaves_with_path(tree)}


def assert_same(x: Any, y: Any) -> None:
    assert jax.tree.structure(x) == jax.tree.structure(y)
    jax.tree.map(np.testing.assert_array_equal, x, y)


# Keys.


def test_prefix_and_adapter_name_in_the_keys(nested, tmp_path):
    tensors = lora_tensors(*QS)
    plain = load_peft(write(tmp_path / "a", tensors), nested)
    bare = {key.removeprefix("base_model.model."): value for key, value in tensors.items()}
    named = {key.replace(".weight", ".default.weight"): value for key, value in tensors.items()}
    for i, other in enumerate((bare, named)):
        assert_same(load_peft(write(tmp_path / str(i), other), nested).trainable, plain.trainable)


def test_two_adapters_in_one_file(nested, tmp_path):
    tensors = lora_tensors(*QS)
    both = tensors | {key.replace(".weight", ".other.weight"): value for key, value in tensors.items()}
    with pytest.raises(ValueError, match="two adapters"):
        load_peft(write(tmp_path / "a", both), nested)


def test_modules_to_save_infix(nested, tmp_path):
    head = normal(8, IN)
    tensors = lora_tensors(*QS) | {"base_model.model.lm_head.modules_to_save.default.weight": head}
    adapted = load_peft(write(tmp_path / "a", tensors, modules_to_save=["lm_head"]), nested)
    np.testing.assert_array_equal(adapted.bind()["lm_head"]["kernel"], head.T)


@pytest.mark.parametrize("where", ["params", "numbered"])
def test_flax_spellings_of_a_tree(nested, tmp_path, where):
    directory = write(tmp_path / "a", lora_tensors(*QS))
    if where == "params":
        tree, path = {"params": nested}, "params/layers/0/q/kernel"
    else:
        tree = {f"layers_{i}": layer for i, layer in nested["layers"].items()}
        path = "layers_0/q/kernel"
    adapted = load_peft(directory, tree)
    wanted = load_peft(directory, nested).trainable["layers/0/q/kernel"]
    assert_same(adapted.trainable[path], wanted)


def test_names(stacked, tmp_path):
    tree = {"decoder": {"attention": stacked["layers"]["q"]}}
    names = {"decoder/attention/kernel": "layers.*.q", "decoder/attention/bias": None}.get
    directory = write(tmp_path / "a", lora_tensors(*QS))
    adapted = load_peft(directory, tree, names=names)
    assert adapted.sites["decoder/attention/kernel"].shape == (LAYERS, IN, OUT)
    save_peft(adapted, tmp_path / "b", names=names)
    assert_same(saved(tmp_path / "b")[1], saved(directory)[1])
    with pytest.raises(ValueError, match="names="):
        load_peft(directory, tree)
    with pytest.raises(ValueError, match=r"needs the name of a module"):
        save_peft(adapted, tmp_path / "c", names=lambda path: None)


def test_a_weight_at_the_root_needs_a_name(tmp_path):
    adapted = jlora.adapt({"w": jnp.ones((8, 4))}, jlora.LoRA(2), "w", key=jax.random.key(0))
    with pytest.raises(ValueError, match=r"'w' lies at the root.*names="):
        save_peft(adapted, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
    save_peft(adapted, tmp_path / "adapter", names=lambda path: "model.linear.weight")


# Layouts.


def test_several_heads(tmp_path):
    kernel = jnp.asarray(normal(IN, 2, 2))
    tensors = lora_tensors("q")
    adapted = load_peft(write(tmp_path / "a", tensors), {"q": {"kernel": kernel}})
    assert adapted.sites["q/kernel"].axes == jlora.Axes((0,), (1, 2))
    delta = merged(adapted)["q/kernel"] - kernel
    a, b = (tensors[f"base_model.model.q.lora_{x}.weight"] for x in "AB")
    np.testing.assert_allclose(delta, 2.0 * (b @ a).T.reshape(IN, 2, 2), atol=1e-5)


def test_a_square_weight_wants_axes(tmp_path):
    tensors = {"q.lora_A.weight": normal(2, IN), "q.lora_B.weight": normal(IN, 2)}
    directory, params = write(tmp_path / "a", tensors), {"q.weight": jnp.asarray(normal(IN, IN))}
    with pytest.raises(ValueError, match=r"'q\.weight'.*axes="):
        load_peft(directory, params)
    adapted = load_peft(directory, params, axes={"*.weight": jlora.Axes((1,), (0,))})
    delta = merged(adapted)["q.weight"] - params["q.weight"]
    np.testing.assert_allclose(delta, 2.0 * tensors["q.lora_B.weight"] @ tensors["q.lora_A.weight"], atol=1e-5)


def test_usage_instead_of_names(tmp_path):
    """What a function does with its leaves tells the axes too, and whether a table is a tied head."""
    params = {"embed": {"weight": jnp.asarray(normal(8, IN))}, "q": {"weight": jnp.asarray(normal(IN, IN))}}

    def apply(params, ids):
        x = params["embed"]["weight"][ids] @ params["q"]["weight"].T
        return x @ params["embed"]["weight"].T

    from jlora.lift.usage import usage

    used = usage(apply, params, jnp.zeros(3, jnp.int32))
    tensors = {
        "embed.lora_embedding_A": normal(2, 8),
        "embed.lora_embedding_B": normal(IN, 2),
        "q.lora_A.weight": normal(2, IN),
        "q.lora_B.weight": normal(IN, 2),
    }
    adapted = load_peft(write(tmp_path / "a", tensors, target_modules=["q", "embed"]), params, usage=used)
    assert adapted.sites["q/weight"].axes == jlora.Axes((1,), (0,))
    assert adapted.sites["embed/weight"].method.lookup_only


def test_convolution_in_both_layouts(tmp_path):
    """Three features under a window of three: only the leaf's name tells which axis is which."""
    tensors = {"c.lora_A.weight": normal(2, 3, 3, 3), "c.lora_B.weight": normal(OUT, 2, 1, 1)}
    directory = write(tmp_path / "a", tensors, target_modules=["c"])
    torch = normal(OUT, 3, 3, 3)
    flax = jnp.asarray(torch.transpose(2, 3, 1, 0))
    one = merged(load_peft(directory, {"c.weight": jnp.asarray(torch)}))["c.weight"]
    two = merged(load_peft(directory, {"c": {"kernel": flax}}))["c/kernel"]
    wanted = torch + 2.0 * np.einsum("orxy,rihw->oihw", tensors["c.lora_B.weight"], tensors["c.lora_A.weight"])
    np.testing.assert_allclose(one, wanted, atol=1e-5)
    np.testing.assert_allclose(two.transpose(3, 2, 0, 1), wanted, atol=1e-5)


def test_experts_of_equal_shape_keep_the_order_of_the_config(tmp_path):
    """Nothing but the config's order tells two parameters of one shape apart."""
    experts = {"experts": {name: jnp.asarray(normal(3, IN, OUT)) for name in ("up_proj", "gate_proj")}}
    tensors = {
        f"experts.{level}lora_{x}.weight": normal(*shape)
        for level in ("", "base_layer.")
        for x, shape in (("A", (6, IN)), ("B", (OUT, 6)))
    }
    targets = ["experts.gate_proj", "experts.up_proj"]
    directory = write(tmp_path / "a", tensors, target_modules=[], target_parameters=targets)
    adapted = load_peft(directory, experts)
    inner = tensors["experts.base_layer.lora_A.weight"].reshape(3, 2, IN).transpose(0, 2, 1)
    np.testing.assert_array_equal(adapted.trainable["experts/gate_proj"].a, inner)
    save_peft(adapted, tmp_path / "b")
    config, again = saved(tmp_path / "b")
    assert [name.rpartition(".")[2] for name in config["target_parameters"]] == ["gate_proj", "up_proj"]
    assert_same({k.removeprefix("base_model.model."): v for k, v in again.items()}, tensors)


def test_experts_under_a_scan(tmp_path):
    layers = {"layers": {"experts": {"up_proj": jnp.asarray(normal(2, 3, IN, OUT))}}}
    tensors = {
        f"base_model.model.layers.{i}.experts.lora_{x}.weight": normal(*shape)
        for i in range(2)
        for x, shape in (("A", (6, IN)), ("B", (OUT, 6)))
    }
    directory = write(tmp_path / "a", tensors, target_modules=[], target_parameters=["experts.up_proj"])
    adapted = load_peft(directory, layers)
    assert adapted.trainable["layers/experts/up_proj"].a.shape == (2, 3, IN, 2)
    save_peft(adapted, tmp_path / "b")
    assert_same(saved(tmp_path / "b")[1], tensors)


def test_half_precision_is_read_into_float32(nested, tmp_path):
    tensors = {key: value.astype(jnp.bfloat16) for key, value in lora_tensors(*QS).items()}
    adapted = load_peft(write(tmp_path / "a", tensors), nested)
    assert {leaf.dtype for leaf in jax.tree.leaves(adapted.trainable)} == {jnp.dtype("float32")}
    save_peft(adapted, tmp_path / "b", dtype=jnp.bfloat16)
    assert_same(saved(tmp_path / "b")[1], tensors)


# Layers that differ, on a stacked tree.


def test_missing_layers_and_ranks_of_their_own(stacked, tmp_path):
    tensors = {f"base_model.model.{k}": v for k, v in (pair("layers.0.q", 3) | pair("layers.2.q", 1)).items()}
    config = {"layers_to_transform": [0, 2], "rank_pattern": {"layers.0.q": 3}, "alpha_pattern": {"2.q": 5}, "r": 1}
    adapted = load_peft(write(tmp_path / "a", tensors, **config), stacked)
    method = adapted.sites["layers/q/kernel"].method
    assert (method.ranks, method.alphas[0], method.alphas[2]) == ((3, 0, 1), 4, 5)
    delta = merged(adapted)["layers/q/kernel"] - stacked["layers"]["q"]["kernel"]
    for layer, scale in ((0, 4 / 3), (2, 5.0)):
        a, b = (tensors[f"base_model.model.layers.{layer}.q.lora_{x}.weight"] for x in "AB")
        np.testing.assert_allclose(delta[layer], scale * (b @ a).T, atol=1e-5)
    assert not delta[1].any()
    save_peft(adapted, tmp_path / "b")
    config, again = saved(tmp_path / "b")
    assert_same(again, tensors)
    assert matching.targeted(config, QS) == {"layers.0.q", "layers.2.q"}


def dora_file(directory: pathlib.Path, layer: int) -> pathlib.Path:
    tensors = lora_tensors(f"layers.{layer}.q")
    tensors[f"base_model.model.layers.{layer}.q.lora_magnitude_vector"] = np.abs(normal(OUT))
    return write(directory, tensors, use_dora=True, layers_to_transform=layer)


def test_dora_on_some_layers(stacked, tmp_path):
    adapted = load_peft(dora_file(tmp_path / "a", 1), stacked)
    change = merged(adapted)["layers/q/kernel"] - stacked["layers"]["q"]["kernel"]
    np.testing.assert_allclose(change[jnp.array([0, 2])], 0, atol=1e-6)
    save_peft(adapted, tmp_path / "b")
    assert_same(saved(tmp_path / "b")[1], saved(tmp_path / "a")[1])
    # A magnitude that was trained goes into the file, beside a pair of zeros.
    leaf = adapted.trainable["layers/q/kernel"]
    leaf = leaf | {"magnitude": leaf["magnitude"].at[0].multiply(2.0)}
    trained = adapted.replace(trainable={"layers/q/kernel": leaf})
    save_peft(trained, tmp_path / "c")
    again = load_peft(tmp_path / "c", stacked)
    np.testing.assert_allclose(merged(again)["layers/q/kernel"], merged(trained)["layers/q/kernel"], atol=1e-6)


def test_vera_on_some_layers(stacked, tmp_path):
    tensors = {
        "base_model.vera_A": normal(5, IN),
        "base_model.vera_B": normal(OUT + 3, 5),
        "base_model.model.layers.1.q.vera_lambda_d": normal(5),
        "base_model.model.layers.1.q.vera_lambda_b": normal(OUT),
    }
    config = {"peft_type": "VERA", "r": 5, "layers_to_transform": [1]}
    adapted = load_peft(write(tmp_path / "a", tensors, **config), stacked)
    change = merged(adapted)["layers/q/kernel"] - stacked["layers"]["q"]["kernel"]
    assert change[1].any() and not change[jnp.array([0, 2])].any()
    save_peft(adapted, tmp_path / "b")
    assert_same(saved(tmp_path / "b")[1], tensors)
    small = tensors | {"base_model.vera_A": normal(5, IN - 1)}
    with pytest.raises(ValueError, match="too small"):
        load_peft(write(tmp_path / "c", small, **config), stacked)


def test_a_full_copy_of_some_layers_cannot_be_stacked(stacked, nested, tmp_path):
    tensors = lora_tensors(*QS) | {"base_model.model.layers.1.norm.weight": normal(IN)}
    directory = write(tmp_path / "a", tensors, modules_to_save=["layers.1.norm"])
    with pytest.raises(ValueError, match=r"'layers/norm/scale'.*1 of 3 layers; layers\.0\.norm\.weight is not there"):
        load_peft(directory, stacked)
    assert "layers/1/norm/scale" in load_peft(directory, nested).sites


def test_lora_bias_of_layers_with_other_scales(stacked, tmp_path):
    tensors = lora_tensors(*QS) | {f"base_model.model.{q}.lora_B.bias": normal(OUT) for q in QS}
    directory = write(tmp_path / "a", tensors, lora_bias=True, alpha_pattern={"layers.1.q": 6})
    adapted = load_peft(directory, stacked)
    delta = merged(adapted)["layers/q/bias"] - stacked["layers"]["q"]["bias"]
    for i, scale in enumerate((2.0, 3.0, 2.0)):
        np.testing.assert_allclose(delta[i], scale * tensors[f"base_model.model.layers.{i}.q.lora_B.bias"], atol=1e-5)
    save_peft(adapted, tmp_path / "b")
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), saved(tmp_path / "b")[1], tensors)


# Refusals.


def refusal(directory: pathlib.Path, params: Any) -> str:
    with pytest.raises(ValueError) as error:
        load_peft(directory, params)
    return str(error.value)


@pytest.mark.parametrize("tree", ["nested", "stacked"])
def test_table_of_what_does_not_fit(nested, stacked, tree, tmp_path):
    tensors = lora_tensors(*QS, "layers.7.q")
    del tensors["base_model.model.layers.0.q.lora_B.weight"]
    del tensors["base_model.model.layers.2.q.lora_A.weight"], tensors["base_model.model.layers.2.q.lora_B.weight"]
    tensors["base_model.model.layers.1.q.lora_A.weight"] = normal(2, IN + 1)
    tensors["base_model.model.strange.thing"] = normal(3)
    text = refusal(write(tmp_path / "a", tensors), nested if tree == "nested" else stacked)
    rows = {row[0]: row[1:] for row in (re.split(r"  +", line.strip()) for line in text.splitlines()[2:-1])}
    leaf = lambda i: f"layers/{i}/q/kernel" if tree == "nested" else "layers/q/kernel"
    assert rows["base_model.model.layers.0.q.lora_B.weight"] == [leaf(0), f"({OUT}, 2)", "missing"]
    assert rows["base_model.model.layers.1.q.lora_A.weight"] == [leaf(1), f"(2, {IN})", f"(2, {IN + 1})"]
    assert rows["base_model.model.layers.2.q.lora_A.weight"][0] == leaf(2)
    assert rows["base_model.model.layers.7.q.lora_A.weight"] == ["-", "no such leaf", f"(2, {IN})"]
    assert rows["base_model.model.strange.thing"] == ["-", "no such leaf", "(3,)"]
    assert str(tmp_path / "a") in text and "names=" in text


def test_rank_of_the_config_against_the_tensors(nested, tmp_path):
    text = refusal(write(tmp_path / "a", lora_tensors(*QS), r=3), nested)
    assert f"(3, {IN})" in text and f"(2, {IN})" in text


@pytest.mark.parametrize("config", [{"bias": "lora_only"}, {"bias": "all"}, {"modules_to_save": ["norm"]}])
def test_promised_copies_that_are_missing(nested, config, tmp_path):
    text = refusal(write(tmp_path / "a", lora_tensors(*QS), **config), nested)
    assert ("layers.1.norm.weight" if "modules_to_save" in config else "layers.1.q.base_layer.bias") in text


def test_offset_without_a_bias(nested, tmp_path):
    tensors = lora_tensors("layers.0.v") | {"base_model.model.layers.0.v.lora_B.bias": normal(OUT)}
    config = {"target_modules": ["layers.0.v"], "lora_bias": True}
    assert "layers.0.v has no bias" in refusal(write(tmp_path / "a", tensors, **config), nested)
    tensors["base_model.model.layers.0.v.lora_B.bias"] *= 0
    load_peft(write(tmp_path / "b", tensors, **config), nested)


def test_unknown_fields(nested, tmp_path):
    tensors = lora_tensors(*QS)
    load_peft(write(tmp_path / "a", tensors, brand_new=None, other=[], third=False, fourth={}, fifth=""), nested)
    assert "brand_new=0.5" in refusal(write(tmp_path / "b", tensors, brand_new=0.5), nested)
    assert "layer_replication=[[0, 2]]" in refusal(write(tmp_path / "c", tensors, layer_replication=[[0, 2]]), nested)


@pytest.mark.parametrize(
    "config",
    [
        {"init_lora_weights": "pissa_niter_4"},
        {"init_lora_weights": "olora"},
        {"bias": "lora"},
        {"peft_type": "NEW"},
        {"peft_type": "BONE"},
    ],
)
def test_values_that_are_refused(nested, config, tmp_path):
    (value,) = config.values()
    assert repr(value) in refusal(write(tmp_path / "a", lora_tensors(*QS), **config), nested)


@pytest.mark.parametrize(
    ("field", "value", "got", "wanted"),
    [
        ("lora_alpha", "x", "'x', a str", "a number"),
        ("lora_alpha", None, "None, a NoneType", "a number"),
        ("r", "2", "'2', a str", "an integer"),
        ("r", 2.5, "2.5, a float", "an integer"),
        ("r", None, "None, a NoneType", "an integer"),
        ("r", True, "True, a bool", "an integer"),
        ("lora_dropout", [0.1], "[0.1], a list", "a number"),
        ("rank_pattern", [3], "[3], a list", "an object of names and numbers"),
        ("alpha_pattern", {"q": "x"}, "'x', a str", "a number"),
    ],
)
def test_fields_of_another_type(nested, field, value, got, wanted, tmp_path):
    text = refusal(write(tmp_path / "a", lora_tensors(*QS), **{field: value}), nested)
    name = f"{field}['q']" if isinstance(value, dict) else field
    assert f"{tmp_path / 'a' / 'adapter_config.json'}: {name} is {got}, where {wanted} is wanted" in text


def test_fields_that_may_be_null(nested, tmp_path):
    tensors = lora_tensors(*QS)
    load_peft(write(tmp_path / "a", tensors, rank_pattern=None, alpha_pattern=None, lora_alpha=4.5), nested)


@pytest.mark.parametrize("bias", ["lora_only", "vera_only", "my_only"])
def test_every_kind_of_only_means_the_biases_of_the_adapted_modules(nested, bias, tmp_path):
    """PEFT takes any; FourierFT's documentation has "fourier_only", say."""
    tensors = lora_tensors(*QS)
    trained = {f"base_model.model.{q}.base_layer.bias": normal(OUT) for q in QS}
    adapted = load_peft(write(tmp_path / "a", tensors | trained, bias=bias), nested)
    for i, value in enumerate(trained.values()):
        np.testing.assert_array_equal(merged(adapted)[f"layers/{i}/q/bias"], value)
    assert "layers.2.q.base_layer.bias" in refusal(
        write(tmp_path / "b", tensors | dict(list(trained.items())[:2]), bias=bias), nested
    )


def test_names_that_are_part_of_the_prefix(tmp_path):
    """The letter a is in "base_model", too."""
    tensors, params = lora_tensors("a", "b"), {name: {"kernel": jnp.ones((IN, OUT))} for name in "ab"}
    text = refusal(write(tmp_path / "a", tensors, use_dora=True, target_modules=["a", "b"]), params)
    rows = [line.split()[0] for line in text.splitlines()[2:-1]]
    assert rows == [f"base_model.model.{name}.lora_magnitude_vector" for name in "ab"]


def test_trees_with_and_without_adapters(nested, tmp_path):
    adapted = adapt(nested, {"**/q/kernel": jlora.LoRA(2)})
    save_peft(adapted, tmp_path / "a")
    with pytest.raises(TypeError, match=r"got an Adapted.*adapted\.base, or jlora\.merge"):
        load_peft(tmp_path / "a", adapted)
    for wrong in (nested, adapted.trainable, None):
        with pytest.raises(TypeError, match=rf"save_peft\({type(wrong).__name__}, .*jlora\.adapt.*is wanted"):
            save_peft(wrong, tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_damaged_files(nested, tmp_path):
    directory = write(tmp_path / "a", lora_tensors(*QS))
    weights = directory / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:4])
    assert refusal(directory, nested).endswith("fetch it again.")
    assert not refusal(directory, nested).endswith("..")
    weights.write_bytes(whole[:-5])
    assert str(weights) in refusal(directory, nested)
    weights.rename(directory / "adapter_model.bin")
    with pytest.raises(FileNotFoundError, match="adapter_model.bin, a pickle"):
        load_peft(directory, nested)
    (directory / "adapter_config.json").write_text("{")
    assert "adapter_config.json is not valid JSON" in refusal(directory, nested)
    (directory / "adapter_config.json").write_text("[]")
    assert "wanted" in refusal(directory, nested)
    with pytest.raises(FileNotFoundError, match=r"\['a'\]"):
        load_peft(tmp_path, nested)
    with pytest.raises(FileNotFoundError, match="no such directory"):
        load_peft(tmp_path / "nowhere", nested)


# Writing.


def adapt(params: Any, rules: dict) -> jlora.Adapted:
    """An adapter with every trainable array random."""
    adapted = jlora.adapt(params, rules, key=jax.random.key(0))
    noise = lambda leaf: jnp.asarray(normal(*leaf.shape))
    return adapted.replace(trainable=jax.tree.map(noise, adapted.trainable))


def test_own_adapter_round_trip(nested, tmp_path):
    rules = {"**/q/kernel": jlora.LoRA(2, alpha=3.5), "**/v/kernel": jlora.LoRA(3, alpha=8, rslora=True)}
    adapted = adapt(nested, rules | {"**/norm/**": jlora.Full(), "**/bias": jlora.Full(), "lm_head/*": jlora.Full()})
    save_peft(adapted, tmp_path / "a", base_model_name_or_path="somebody/model", task_type="CAUSAL_LM")
    config, tensors = saved(tmp_path / "a")
    text = (tmp_path / "a" / "adapter_config.json").read_text()
    assert text == json.dumps(config, indent=2, sort_keys=True) + "\n"
    assert config["target_modules"] == ["q", "v"] and config["modules_to_save"] == ["lm_head", "norm"]
    assert config["bias"] == "lora_only" and config["inference_mode"] is True
    assert config["base_model_name_or_path"] == "somebody/model" and config["task_type"] == "CAUSAL_LM"
    assert {tensor.dtype for tensor in tensors.values()} == {np.dtype("float32")}
    again = load_peft(tmp_path / "a", nested)
    old, new = merged(adapted), merged(again)
    for path in old:
        np.testing.assert_allclose(new[path], old[path], rtol=1e-5, atol=1e-5, err_msg=path)


def test_part_of_a_module_is_written_as_the_whole(nested, tmp_path):
    """PEFT's wrapper of a saved module wants all of its parameters, and ``bias`` all biases of its kind."""
    params = nested | {"head": {"kernel": jnp.asarray(normal(IN, 2)), "bias": jnp.asarray(normal(2))}}
    rules = {"layers/0/q/bias": jlora.Full(), "head/kernel": jlora.Full(), "**/q/kernel": jlora.LoRA(2)}
    adapted = adapt(params, rules)
    save_peft(adapted, tmp_path / "a")
    _, tensors = saved(tmp_path / "a")
    np.testing.assert_array_equal(tensors["base_model.model.head.bias"], params["head"]["bias"])
    key = "base_model.model.layers.1.q.base_layer.bias"
    np.testing.assert_array_equal(tensors[key], params["layers"]["1"]["q"]["bias"])
    old, new = merged(adapted), merged(load_peft(tmp_path / "a", params))
    for path in old:
        np.testing.assert_allclose(new[path], old[path], rtol=1e-5, atol=1e-5, err_msg=path)


@pytest.mark.parametrize("full", [False, True])
def test_offsets(nested, tmp_path, full):
    """As lora_bias where PEFT has it; where something else is trained in a bias as well, as what they come to."""
    rules = {"layers/0/q/bias": jlora.Offset(scale=0.5), "**/q/kernel": jlora.LoRA(2, alpha=4)}
    adapted = adapt(nested, rules | ({"layers/1/q/bias": jlora.Full()} if full else {}))
    save_peft(adapted, tmp_path / "a")
    config, tensors = saved(tmp_path / "a")
    assert config.get("lora_bias", False) is not full and config["bias"] == ("lora_only" if full else "none")
    if not full:
        assert not tensors["base_model.model.layers.1.q.lora_B.bias"].any()
    old, new = merged(adapted), merged(load_peft(tmp_path / "a", nested))
    for path in old:
        np.testing.assert_allclose(new[path], old[path], rtol=1e-5, atol=1e-5, err_msg=path)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"**/q/kernel": jlora.LoRA(2), "**/v/kernel": jlora.DoRA(2)}, "use_dora"),
        ({"**/q/kernel": jlora.LoRA(2), "**/v/kernel": jlora.VeRA(2)}, "one kind of adapter"),
        ({"**/norm/scale": jlora.Full()}, "jlora.merge"),
    ],
)
def test_what_a_file_cannot_say(nested, rules, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        save_peft(adapt(nested, rules), tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_dropout_that_differs(nested, tmp_path):
    rules = {"**/q/kernel": jlora.LoRA(2, dropout=0.1), "**/v/kernel": jlora.LoRA(2, dropout=0.2)}
    with pytest.warns(UserWarning, match="dropout"):
        save_peft(adapt(nested, rules), tmp_path / "a")
    assert saved(tmp_path / "a")[0]["lora_dropout"] == 0.2


@pytest.mark.parametrize("lookup_only", [False, True])
def test_tied_head(nested, lookup_only, tmp_path, recwarn):
    params = {"embed_tokens": {"embedding": jnp.asarray(normal(8, IN))}, "layers": nested["layers"]}
    adapted = adapt(params, {"embed_tokens/*": jlora.LoRA(2, lookup_only=lookup_only)})
    save_peft(adapted, tmp_path / "a")
    assert ["lookup_only" in str(w.message) for w in recwarn] == [] if lookup_only else [True]
    assert load_peft(tmp_path / "a", params).sites["embed_tokens/embedding"].method.lookup_only
    other = {**params, "embed_tokens": {"embedding": params["embed_tokens"]["embedding"] + 1}}
    restored = load_peft(tmp_path / "a", other)  # the file brings its own table
    np.testing.assert_array_equal(restored.base["embed_tokens"]["embedding"], params["embed_tokens"]["embedding"])


def test_a_stacked_leaf_whose_name_has_no_place_for_the_number(stacked, tmp_path):
    params = {"decoder": {"q": {"kernel": stacked["layers"]["q"]["kernel"]}}}
    axes = {"**": jlora.Axes((1,), (2,), (0,))}
    adapted = jlora.adapt(params, jlora.LoRA(2), axes=axes, key=jax.random.key(0))
    with pytest.raises(ValueError, match=r"names= with a \*"):
        save_peft(adapted, tmp_path / "a")


def test_a_failed_write_leaves_the_last_one(nested, tmp_path, monkeypatch):
    adapted = adapt(nested, {"**/q/kernel": jlora.LoRA(2)})
    save_peft(adapted, tmp_path / "a")
    before = {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()}
    assert set(before) == {"adapter_config.json", "adapter_model.safetensors"}

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    changed = adapted.replace(trainable=jax.tree.map(lambda leaf: leaf + 1, adapted.trainable))
    with pytest.raises(OSError, match="No space"):
        save_peft(changed, tmp_path / "a")
    assert {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()} == before


# Names.


def test_examples_in_the_documentation():
    assert doctest.testmod(matching).failed == 0


def test_target_lists_are_small_and_exact():
    names = [f"model.layers.{i}.{m}" for i in range(12) for m in ("attn.q", "attn.k", "mlp.up", "norm")]
    every = {name for name in names if name.endswith(".q")}
    assert matching.shortest(every, names) == ["q"]
    some = {"model.layers.1.attn.q", "model.layers.11.attn.q"}
    assert matching.shortest(some, names) == ["layers.1.attn.q", "layers.11.attn.q"]
    norms = {name for name in names if name.endswith("norm")}
    assert matching.shortest(norms, [*names, "enorm"], boundary=False) != ["norm"]
    assert matching.shortest({"head"}, ["head", "lm_head"], boundary=False) == ["head"]
    assert matching.targeted({"target_modules": sorted(some)}, names) == some


def test_import_stays_light():
    code = "import sys, jlora.io; sys.exit(int('flax' in sys.modules or 'torch' in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
