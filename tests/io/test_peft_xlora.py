"""X-LoRA directories that PEFT wrote: its logits, from its scalings and from the classifier's."""

import dataclasses
import functools
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from recorded import DIRECTORY
from safetensors.numpy import load_file, save_file

import jlora
from jlora.io import load_peft, load_xlora, save_peft, save_xlora
from jlora.methods import xlora
from jlora.train import models

ROOT = DIRECTORY / "peft_dirs"
NAMES = sorted(path.parent.name for path in ROOT.glob("*xlora*/adapter_config.json"))
pytestmark = pytest.mark.skipif(not NAMES, reason=f"no X-LoRA under {ROOT}: set JLORA_ORACLES")


@functools.cache
def recorded(name: str) -> dict[str, np.ndarray]:
    with np.load(ROOT / name / "io.npz") as z:
        return dict(z)


@pytest.fixture(params=NAMES)
def name(request) -> str:
    return request.param


@pytest.fixture
def directory(name, tmp_path) -> pathlib.Path:
    """As PEFT saves it: the recordings hold the classifier's tensors beside its inputs and outputs."""
    for adapter in ("llama_lora", "llama_lora_b"):
        shutil.copytree(ROOT / adapter, tmp_path / adapter)
    (tmp_path / name).mkdir()
    shutil.copy(ROOT / name / "adapter_config.json", tmp_path / name)
    tensors = {key: value for key, value in recorded(name).items() if "classifier" in key}
    save_file(tensors, tmp_path / name / "adapter_model.safetensors")
    return tmp_path / name


@functools.cache
def llama() -> models.LoadedModel:
    return models.load(ROOT / "base_llama")


def hidden_states(params, ids):
    return llama().module.apply({"params": params}, ids, method=lambda module, ids: module.model(ids)[0])


apply = jlora.lift(lambda params, ids: llama().module.apply({"params": params}, ids), on_materialize="error")


def test_logits_are_pefts(name, directory):
    adapted, classifier, weights = load_xlora(directory, llama().params)
    io, real = recorded(name), recorded(name)["attention_mask"] == 1
    ids = jnp.asarray(io["input_ids"], jnp.int32)

    def close(context) -> None:
        logits = np.asarray(apply(adapted.bind(context=context), ids))
        np.testing.assert_allclose(logits[real], io["logits_adapter"][real], atol=1e-4, rtol=0)

    # PEFT counts q and v of the first layer, then of the second; here it is q of both, then v.
    theirs = io["scalings"][:, :, [0, 2, 1, 3]]
    assert list(adapted.sites) == [f"model/layers/self_attn/{m}_proj/kernel" for m in "qv"]
    close({"scalings": xlora.spread(adapted, classifier.select(theirs))})

    found = classifier.predict(weights, hidden_states(llama().params, ids))
    if classifier.layers is None:
        np.testing.assert_allclose(found[real], theirs[real][:, 0], atol=1e-6)
        close({"scalings": classifier(weights, hidden_states(llama().params, ids))})
        found = jnp.broadcast_to(found[:, :, None], theirs.shape)
    np.testing.assert_allclose(found[real], theirs[real], atol=1e-6)
    close({"scalings": xlora.spread(adapted, classifier.select(found))})
    swapped = xlora.spread(adapted, classifier.select(theirs[..., ::-1]))
    other = np.asarray(apply(adapted.bind(context={"scalings": swapped}), ids))
    assert np.abs(other - io["logits_adapter"])[real].max() > 1e-2


def test_one_adapter_alone_is_that_adapter(directory):
    adapted, *_ = load_xlora(directory, llama().params)
    ids = jnp.arange(12).reshape(2, 6)
    one_hot = jnp.zeros((2, 6, 4, 2)).at[..., 1].set(1.0)
    got = apply(adapted.bind(context={"scalings": xlora.spread(adapted, one_hot)}), ids)
    alone = load_peft(directory.parent / "llama_lora_b", llama().params)
    np.testing.assert_allclose(got, apply(alone.bind(), ids), atol=1e-5)
    chosen = jlora.rank.choose(adapted, {"scalings": (0.0, 1.0)})
    np.testing.assert_allclose(apply(jlora.merge(chosen), ids), apply(alone.bind(), ids), atol=1e-5)


def test_saved_is_what_was_loaded(name, directory, tmp_path):
    """Logits to the bit through our own reader, and PEFT's names, shapes and config."""
    ids = jnp.asarray(recorded(name)["input_ids"], jnp.int32)
    hidden = hidden_states(llama().params, ids)

    def logits(adapted, classifier, weights):
        given = classifier(weights, hidden)
        given = given if classifier.layers is None else xlora.spread(adapted, given)
        return apply(adapted.bind(context={"scalings": given}), ids)

    loaded = load_xlora(directory, llama().params)
    save_xlora(*loaded, tmp_path / "saved", base_model_name_or_path="base_llama", task_type="CAUSAL_LM")
    again = load_xlora(tmp_path / "saved", llama().params)
    np.testing.assert_array_equal(logits(*again), logits(*loaded))
    assert again[1] == loaded[1]
    (tmp_path / "saved").rename(tmp_path / "moved")  # the adapters are found inside
    np.testing.assert_array_equal(logits(*load_xlora(tmp_path / "moved", llama().params)), logits(*loaded))

    tensors = load_file(tmp_path / "moved" / "adapter_model.safetensors")
    wanted = load_file(directory / "adapter_model.safetensors")
    assert tensors.keys() == wanted.keys()
    for key in wanted:
        np.testing.assert_array_equal(tensors[key], wanted[key])
    read = lambda path: json.loads((path / "adapter_config.json").read_text())
    theirs, ours = read(directory), read(tmp_path / "moved")
    assert ours["adapters"] == {str(e): str(tmp_path / "saved" / str(e)) for e in range(2)}
    kept = theirs.keys() - {"adapters", "auto_mapping", "peft_version", "revision"}
    assert {key: ours[key] for key in kept} == {key: theirs[key] for key in kept} and ours.keys() <= theirs.keys()
    for e, adapter in enumerate(("llama_lora", "llama_lora_b")):
        written = load_file(tmp_path / "moved" / str(e) / "adapter_model.safetensors")
        original = load_file(directory.parent / adapter / "adapter_model.safetensors")
        assert written.keys() == original.keys()
        assert all(np.array_equal(written[key], original[key]) for key in original)


def test_what_is_not_saved(directory, tmp_path):
    adapted, classifier, weights = load_xlora(directory, llama().params)
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="jlora.io.save_xlora writes them"):
        save_peft(adapted, out)
    with pytest.raises(ValueError, match="does not go with 2 adapters of 4 matrices"):
        save_xlora(adapted, dataclasses.replace(classifier, layers=3), weights, out)
    with pytest.raises(ValueError, match="kernels and biases have the shapes"):
        save_xlora(adapted, dataclasses.replace(classifier, features=31), weights, out)
    lora = load_peft(directory.parent / "llama_lora", llama().params)
    with pytest.raises(ValueError, match="is not adapted by XLoRA"):
        save_xlora(lora, classifier, weights, out)
    assert not out.exists()


def test_split_is_the_inverse_of_combine(directory):
    """Also where an adapter leaves leaves and layers alone."""
    one = load_peft(directory.parent / "llama_lora", llama().params)
    other = jlora.adapt(llama().params, jlora.LoRA(3, alpha=7.0), "model/layers/mlp/up_proj/kernel", usage=None,
                        axes={"**": jlora.Axes((1,), (2,), (0,))}, key=jax.random.key(0))  # fmt: skip
    for each, back in zip((one, other), xlora.split(xlora.combine(one, other)), strict=True):
        assert back.sites.keys() == each.sites.keys()
        for path, site in each.sites.items():
            assert back.sites[path].method.rank == site.method.rank
            np.testing.assert_allclose(back.trainable[path].product(), each.trainable[path].product(), rtol=1e-6)


def test_what_does_not_fit(directory):
    read = functools.partial(load_xlora, params=llama().params)
    config = json.loads((directory / "adapter_config.json").read_text())

    def change(**fields) -> None:
        (directory / "adapter_config.json").write_text(json.dumps(config | fields))

    for fields, message in (
        ({"peft_type": "LORA"}, "peft_type 'LORA'"),
        ({"scaling_pass_value": 0.5}, "first pass"),
        ({"hidden_size": 31}, "layers of the classifier"),
        ({"layerwise_scalings": not config["layerwise_scalings"]}, "classifier"),
    ):
        change(**fields)
        with pytest.raises(ValueError, match=message):
            read(directory)
    change(adapters={"0": "elsewhere", "1": "llama_lora_b"})
    with pytest.raises(FileNotFoundError, match="'elsewhere', which is not there"):
        read(directory)
    change(adapters={"0": "elsewhere"})
    with pytest.raises(ValueError, match="mixes 1 adapters"):
        read(directory, adapters=["a", "b"])
    change()
    with pytest.raises(ValueError, match="peft_type 'XLORA' are not read"):
        load_peft(directory, llama().params)
    path = directory / "adapter_model.safetensors"
    save_file(load_file(path) | {"base_model.model.other": np.zeros(3)}, path)
    with pytest.raises(ValueError, match="is not of a classifier"):
        read(directory)


def test_order_of_other_models(directory):
    """A model whose modules have other names: their order has to be given."""
    config = json.loads((directory / "adapter_config.json").read_text())
    if not config["layerwise_scalings"]:
        return
    for adapter in ("llama_lora", "llama_lora_b"):
        path = directory.parent / adapter / "adapter_model.safetensors"
        save_file({key.replace("q_proj", "query"): value for key, value in load_file(path).items()}, path)
        path = path.with_name("adapter_config.json")
        path.write_text(path.read_text().replace("q_proj", "query"))
    params = llama().params
    names = lambda path: path.rpartition("/")[0].replace("/", ".").replace("q_proj", "query")
    with pytest.raises(ValueError, match="named_modules"):
        load_xlora(directory, params, names=names)
    order = [f"model.layers.{i}.self_attn.{m}" for i in range(2) for m in ("query", "k_proj", "v_proj")]
    *_, weights = load_xlora(directory, params, names=names, order=order)
    *_, turned = load_xlora(directory, params, names=names, order=order[3:] + order[:3])
    last = recorded(directory.name)["base_model.internal_xlora_classifier.layers.3.bias"].reshape(4, 2)
    np.testing.assert_array_equal(weights[-1]["bias"].reshape(4, 2), last[[0, 2, 1, 3]])
    np.testing.assert_array_equal(turned[-1]["bias"].reshape(4, 2), last[[2, 0, 3, 1]])
    with pytest.raises(ValueError, match="which is adapted"):
        load_xlora(directory, params, names=names, order=order[:2])
