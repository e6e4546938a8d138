"""Files of single methods: the ranks of HiRA, the tables of TinyLoRA."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jlora
from jlora.io import load_peft, save_peft

RNG = np.random.default_rng(0)


def normal(*shape: int) -> np.ndarray:
    return RNG.normal(size=shape).astype("f")


def write(directory: pathlib.Path, tensors: dict[str, np.ndarray], **config: object) -> pathlib.Path:
    (directory / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, directory / "adapter_model.safetensors")
    return directory


# HiRA. PEFT 0.21.2 gives every module the rank ``r`` and writes a ``rank_pattern`` that it does not follow.


@pytest.mark.parametrize("ranks", [{"lin0": 4, "lin1": 4}, {"lin0": 2, "lin1": 4}])
def test_ranks_of_hira_are_those_of_its_tensors(ranks, tmp_path):
    sizes = {"lin0": (11, 17), "lin1": (17, 7)}
    params = {f"{name}.weight": jnp.asarray(normal(n_out, n_in)) for name, (n_in, n_out) in sizes.items()}
    pairs = {name: (normal(r, sizes[name][0]), normal(sizes[name][1], r)) for name, r in ranks.items()}
    tensors = {
        f"base_model.model.{k}.hira_{side}": t for k, p in pairs.items() for side, t in zip("AB", p, strict=True)
    }
    config = {"peft_type": "HIRA", "r": 4, "rank_pattern": {"lin0": 2}, "target_modules": ["lin0", "lin1"]}
    axes = {"*.weight": jlora.Axes((1,), (0,))}
    adapted = load_peft(write(tmp_path, tensors, **config), params, axes=axes)
    assert {path: site.method.rank for path, site in adapted.sites.items()} == {
        f"{k}.weight": r for k, r in ranks.items()
    }
    for name, (a, b) in pairs.items():
        wanted = np.asarray(params[f"{name}.weight"]) * (1 + b @ a)
        np.testing.assert_allclose(jlora.merge(adapted)[f"{name}.weight"], wanted, rtol=1e-5, atol=1e-5)


def test_unequal_ranks_of_hira_are_not_written(tmp_path):
    """PEFT could not load them."""
    params = {name: {"kernel": jnp.asarray(normal(6, 5))} for name in ("q", "v")}
    adapted = jlora.adapt(params, {"q/*": jlora.HiRA(3), "v/*": jlora.HiRA(2)}, key=jax.random.key(0))
    with pytest.raises(ValueError, match=r"one rank.*2 \(v\), 3 \(q\).*jlora\.merge"):
        save_peft(adapted, tmp_path / "a")
    assert not (tmp_path / "a").exists()


# TinyLoRA.


@pytest.mark.parametrize("leaf", ["embedding", "weight"])
def test_table_of_tinylora(leaf, tmp_path):
    """PEFT takes it as the weight of a linear layer whose outputs are the vocabulary. Lookups are of low rank."""
    a, b, p, v = normal(2, 9), normal(13, 2), normal(3, 2, 2), normal(3)
    tensors = {"A": a, "B": b, "P": p}
    tensors = {f"base_model.model.emb.tinylora_{k}": t for k, t in tensors.items()} | {"base_model.tinylora_v.0": v}
    config = {"peft_type": "TINYLORA", "r": 2, "u": 3, "weight_tying": 0.0, "target_modules": ["emb"]}
    params = {"emb": {leaf: jnp.asarray(normal(13, 9))}, "lm_head": {"kernel": jnp.asarray(normal(9, 13))}}
    ids = jnp.array([[3, 0, 12], [5, 3, 1]])
    apply = lambda params, ids: params["emb"][leaf][ids]
    adapted = load_peft(write(tmp_path, tensors, **config), params, usage=jlora.usage(apply, params, ids))
    site = adapted.sites[f"emb/{leaf}"]
    assert site.axes.kind == "embedding" and site.method == jlora.TinyLoRA(2, 3)
    wanted = np.asarray(params["emb"][leaf]) + b @ np.einsum("u,uij->ij", v, p) @ a
    np.testing.assert_allclose(jlora.merge(adapted)["emb"][leaf], wanted, rtol=1e-5, atol=1e-5)
    looked_up = jlora.lift(apply, on_materialize="error")(adapted.bind(), ids)
    np.testing.assert_allclose(looked_up, wanted[ids], rtol=1e-5, atol=1e-5)
    save_peft(adapted, tmp_path / "again")
    again = load_file(tmp_path / "again" / "adapter_model.safetensors")
    for key, tensor in tensors.items():
        np.testing.assert_array_equal(again[key], tensor, err_msg=key)


def test_table_of_tinylora_that_is_the_head(tmp_path):
    tensors = {"A": normal(2, 9), "B": normal(13, 2), "P": normal(3, 2, 2)}
    tensors = {f"base_model.model.emb.tinylora_{k}": t for k, t in tensors.items()}
    tensors["base_model.tinylora_v.0"] = normal(3)
    write(tmp_path, tensors, peft_type="TINYLORA", r=2, u=3, weight_tying=0.0, target_modules=["emb"])
    with pytest.warns(UserWarning, match="emb seems to be the output head as well"):
        load_peft(tmp_path, {"emb": {"embedding": jnp.ones((13, 9))}})


def test_tinylora_without_its_random_matrices(tmp_path):
    tensors = {"base_model.model.lin.tinylora_A": normal(2, 6), "base_model.model.lin.tinylora_B": normal(5, 2)}
    tensors["base_model.tinylora_v.0"] = normal(3)
    params, config = {"lin.weight": jnp.ones((5, 6))}, {"r": 2, "u": 3, "target_modules": ["lin"]}
    for saved in (True, False):
        write(tmp_path, tensors, peft_type="TINYLORA", save_projection=saved, **config)
        with pytest.raises(ValueError, match="PyTorch's own generator.*save_projection=True"):
            load_peft(tmp_path, params)
