"""DoRA over other methods than LoRA: the column norms in numpy, groups, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from jlora.io import save_peft

KEY = jax.random.key(0)
METHODS = {
    "lora": jlora.LoRA(2),
    "vera": jlora.VeRA(5),
    "lora_xs": jlora.LoRAXS(3),
    "nola": jlora.NOLA(2, terms=4),
    "adalora": jlora.AdaLoRA(2),
    "mos": jlora.MoS(2, budget=2, shards=2),
    "flora": jlora.FLoRA(2),
    "vblora": jlora.VBLoRA(2, num_vectors=5, vector_length=2),
    "sora": jlora.SoRA(3),
}


def params():
    rng = np.random.default_rng(0)
    return {name: {"kernel": jnp.asarray(rng.normal(size=(6, 8)))} for name in ("a", "b")}


def moved(tree):
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda leaf: leaf + 0.3 * rng.normal(size=leaf.shape), tree)


@pytest.mark.parametrize("name", METHODS)
def test_is_the_methods_weight_with_columns_of_length_m(name, x64):
    method = METHODS[name]
    plain = jlora.adapt(params(), method, "**", key=KEY)
    dora = jlora.adapt(params(), jlora.DoRA(method=method), "**", key=KEY)
    columns = lambda path: np.linalg.norm(params()[path[0]]["kernel"], axis=0)
    for path in plain.sites:
        np.testing.assert_allclose(dora.trainable[path]["magnitude"], columns(path), rtol=1e-12)
    trainable = moved(dora.trainable)
    of_plain = {path: leaf["factors"] if path in plain.sites else leaf for path, leaf in trainable.items()}
    assert jax.tree.structure(of_plain) == jax.tree.structure(plain.trainable)
    assert jax.tree.structure(dora.frozen) == jax.tree.structure(plain.frozen)
    inner = jlora.merge(plain.replace(trainable=of_plain))
    got = jlora.merge(dora.replace(trainable=trainable))
    for path in plain.sites:
        w = np.asarray(inner[path[0]]["kernel"])
        wanted = w / np.linalg.norm(w, axis=0) * trainable[path]["magnitude"]
        np.testing.assert_allclose(got[path[0]]["kernel"], wanted, rtol=1e-10, atol=1e-12)


def test_over_lora_is_dora(x64):
    plain = jlora.adapt(params(), jlora.DoRA(2, alpha=3.0, dropout=0.2), "**", key=KEY)
    over = jlora.adapt(params(), jlora.DoRA(method=jlora.LoRA(2, alpha=3.0, dropout=0.2)), "**", key=KEY)
    assert jax.tree.structure(over.trainable) == jax.tree.structure(plain.trainable)
    jax.tree.map(np.testing.assert_array_equal, over.trainable, plain.trainable)
    assert over.sites["a/kernel"].method.dropout == 0.2
    assert jlora.DoRA(method=jlora.LoRA(2), dropout=0.2).inner == jlora.LoRA(2, dropout=0.2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": jlora.IA3()}, "adds a pair of factors"),
        ({"method": jlora.DoRA(2)}, "adds a pair of factors"),
        ({"method": jlora.DyLoRA(2)}, "draws what it adds"),
        ({"method": jlora.VeRA(2), "rank": 4}, "no rank of its own: give it to VeRA"),
        ({"method": "vera"}, "a method like jlora.VeRA"),
    ],
)
def test_refused(options, message):
    with pytest.raises(ValueError, match=message):
        jlora.DoRA(**options)


def test_a_change_that_is_formed_has_no_pair():
    adapted = jlora.adapt(params(), jlora.DoRA(method=jlora.LoHa(2)), "**", key=KEY)
    with pytest.raises(ValueError, match="LoHa forms its change"):
        jlora.merge(adapted)


def test_two_names_for_two_methods_of_a_group():
    rules = {"a/*": jlora.VeRA(4), "b/*": jlora.DoRA(method=jlora.VeRA(4))}
    with pytest.raises(ValueError, match="give them two names"):
        jlora.adapt(params(), rules, key=KEY)


def test_files_hold_dora_over_lora_only(tmp_path):
    adapted = jlora.adapt(params(), jlora.DoRA(method=jlora.VeRA(4)), "**", key=KEY)
    with pytest.raises(ValueError, match="DoRA over LoRA only"):
        save_peft(adapted, tmp_path)
