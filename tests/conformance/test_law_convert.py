"""For every method that merges: as a plain LoRA of full rank it is the same model, and PEFT's files hold it."""

import jax
import jax.numpy as jnp
import numpy as np
from registry import AXES, PRODUCTS, Row, adapt_model, assert_close, is_whole_row, model_params, moved, over

import jlora
from jlora.io import load_peft, save_peft


def plain_sum(lora: jlora.Adapted) -> dict:
    """Weights and products of the pairs, added up in numpy."""
    params = jax.tree.map(np.asarray, lora.base)
    for path, f in lora.trainable.items():
        assert type(lora.sites[path].method) is jlora.LoRA
        scale = np.asarray(lora.frozen[path]["scale"])[:, None, None] if path in lora.frozen else f.scale
        module, name = path.split("/")
        params[module][name] = params[module][name] + scale * (np.asarray(f.a) @ np.asarray(f.b))
    return params


def module_name(path: str) -> str:
    module, _, name = path.rpartition("/")
    return module + (".*" if module == "layers" else "") + (".weight" if name == "kernel" else ".bias")


@over(tuple(row for row in PRODUCTS if row.method.mergeable), is_whole_row)
def test_lora_of_full_rank_is_merged(row: Row, tmp_path) -> None:
    adapted = adapt_model(row)
    trainable = moved(adapted.trainable)
    if row.stacked:  # what is beyond a true rank is no part of a file
        trainable = jax.tree.map(row.method.mask_ranks, trainable, is_leaf=lambda x: isinstance(x, jlora.Factors))
    adapted = adapted.replace(trainable=trainable)
    wanted = jlora.merge(adapted)
    lora, report = jlora.to_lora(adapted, rank=16)
    assert lora.sites.keys() == adapted.sites.keys() and report.error < 1e-10
    assert_close(plain_sum(lora), wanted)
    save_peft(lora, tmp_path, names=module_name, dtype=jnp.float64)
    assert_close(plain_sum(load_peft(tmp_path, model_params(), names=module_name, axes=AXES)), wanted)
