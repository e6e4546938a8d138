"""Trainable tokens: ids beyond the table, and rows beside an adapter in one file."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from jlora import paths
from jlora.io import load_peft, save_peft

pytestmark = pytest.mark.usefixtures("x64")


def model(params, ids, mode="fill"):
    table = params["embed_tokens"]["embedding"]
    x = jnp.tanh(jnp.take(table, ids, axis=0, mode=mode) @ params["lin"]["kernel"])
    return x @ table.T


def adapted(lin: jlora.methods.Method) -> jlora.Adapted:
    rng = np.random.default_rng(0)
    params = {
        "embed_tokens": {"embedding": jnp.asarray(rng.normal(size=(7, 4)))},
        "lin": {"kernel": jnp.asarray(rng.normal(size=(4, 4)))},
    }
    rules = {"embed_tokens/embedding": jlora.TrainableTokens((6, 2)), "lin/kernel": lin}
    made = jlora.adapt(params, rules, key=jax.random.key(0))
    return made.replace(trainable=jax.tree.map(lambda leaf: leaf + rng.normal(size=leaf.shape), made.trainable))


@pytest.mark.parametrize("mode", ["fill", "clip", "wrap"])
def test_ids_beyond_the_table(mode: str) -> None:
    made, ids = adapted(jlora.LoRA(2)), jnp.array([[0, 2, 6], [9, -1, 30]])
    got = jlora.lift(model, on_materialize="error")(made.bind(), ids, mode)
    np.testing.assert_allclose(got, model(jlora.merge(made), ids, mode), atol=1e-12)


def test_rows_beside_an_adapter(tmp_path) -> None:
    made = adapted(jlora.LoRA(2))
    save_peft(made, tmp_path, dtype=np.float64)
    again = load_peft(tmp_path, made.base)
    assert again.sites["embed_tokens/embedding"].method == jlora.TrainableTokens((6, 2))
    for (path, one), (_, other) in zip(*(paths.flatten(a.trainable)[0] for a in (made, again)), strict=True):
        np.testing.assert_array_equal(one, other, err_msg=path)
    with pytest.raises(ValueError, match="no trained rows beside VERA"):
        save_peft(adapted(jlora.VeRA(3)), tmp_path)


def test_bad_rows() -> None:
    with pytest.raises(ValueError, match="named once"):
        jlora.TrainableTokens((1, 1))
    with pytest.raises(ValueError, match="index 9 is beyond the 7 rows"):
        jlora.adapt({"w": jnp.ones((7, 4))}, jlora.TrainableTokens((9,)), "w", key=jax.random.key(0))
