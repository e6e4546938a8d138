"""aLoRA: against PEFT's recorded forward pass, and what its offsets and masks mean wherever they are bound."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from recorded import arrays, cases
from safetensors.numpy import load_file, save_file

import jlora
from jlora.io import load_peft, save_peft
from jlora.methods.alora import invocation_offsets

pytestmark = pytest.mark.usefixtures("x64")

RANDOM = np.random.default_rng(0)
W, X = RANDOM.normal(size=(7, 5)), RANDOM.normal(size=(3, 6, 7))
KEY = jax.random.key(0)
OFFSETS = np.array([5, 3, -1])
fn = lambda params, x: x @ params["kernel"]
run = jlora.lift(fn, on_materialize="error")


@pytest.fixture(scope="module")
def adapted() -> jlora.Adapted:
    with jax.enable_x64(True):
        adapted = jlora.adapt({"kernel": jnp.asarray(W)}, jlora.ALoRA(2, alpha=3.0), key=KEY)
        noise = lambda leaf: jnp.asarray(RANDOM.normal(size=leaf.shape))
        return adapted.replace(trainable=jax.tree.map(noise, adapted.trainable))


def branch(adapted, x=X) -> np.ndarray:
    pair = adapted.trainable["kernel"]
    return 1.5 * x @ np.asarray(pair.a) @ np.asarray(pair.b)


def close(got, wanted) -> None:
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-10)


@pytest.mark.parametrize("case", cases("alora.npz"))
def test_recorded(case, tmp_path) -> None:
    """PEFT's numbers, read from its file, and the file that is written of it."""
    z = arrays("alora.npz", case)
    theirs = json.loads(str(z["config_json"]))
    names = [name for name in z if "lora_" in name]
    tensors = {f"base_model.model.{name.removeprefix('adapter/')}": z[name] for name in names}
    (tmp_path / "adapter_config.json").write_text(str(z["config_json"]))
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    params = {"lin": {name: jnp.asarray(z[f"adapter/lin.{name}"]) for name in ("weight", "bias")}}
    adapted = load_peft(tmp_path, params, axes={"lin/weight": jlora.Axes((1,), (0,))})
    method = adapted.sites["lin/weight"].method
    assert isinstance(method, jlora.ALoRA) and method.invocation_tokens == tuple(theirs["alora_invocation_tokens"])
    offsets = invocation_offsets(z["input_ids"], method.invocation_tokens)
    np.testing.assert_array_equal(offsets, z["offsets"])
    linear = jlora.lift(lambda p, x: x @ p["lin"]["weight"].T + p["lin"]["bias"], on_materialize="error")
    got = linear(adapted.bind(context={"alora_offsets": offsets}), z["h"])
    close(got, z["y"])
    base = np.asarray(linear(params, z["h"]))
    for row, offset in enumerate(z["offsets"]):
        before = z["h"].shape[1] - max(int(offset), 0)
        np.testing.assert_array_equal(got[row, :before], base[row, :before])
        assert np.all(got[row, before:] != base[row, before:])

    save_peft(adapted, tmp_path / "out", dtype=jnp.float64)
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    for field in ("peft_type", "r", "lora_alpha", "alora_invocation_tokens", "use_dora", "use_rslora"):
        assert config[field] == theirs[field]
    written = load_file(tmp_path / "out/adapter_model.safetensors")
    assert written.keys() == tensors.keys() and all(np.array_equal(written[k], tensors[k]) for k in tensors)


def test_offsets_and_masks(adapted) -> None:
    mask = np.arange(6) >= 6 - np.clip(OFFSETS, 0, 6)[:, None]
    wanted = X @ W + mask[..., None] * branch(adapted)
    close(run(adapted.bind(context={"alora_offsets": OFFSETS}), X), wanted)
    close(run(adapted.bind(context={"alora_offsets": [5, 3, None]}), X), wanted)
    close(run(adapted.bind(context={"alora_mask": mask}), X), wanted)
    jitted = jax.jit(lambda offsets: run(adapted.bind(context={"alora_offsets": offsets}), X))
    close(jitted(OFFSETS), wanted)
    close(jitted(np.array([6, 60, 0])), X @ W + np.array([1, 1, 0])[:, None, None] * branch(adapted))
    close(run(adapted.bind(), X), X @ W + branch(adapted))
    # A token at a time, as after a cached prefix.
    last = run(adapted.bind(context={"alora_offsets": OFFSETS}), X[:, -1:])
    close(last, wanted[:, -1:])
    # One example at a time, and heads.
    each = jax.vmap(lambda offset, x: run(adapted.bind(context={"alora_offsets": offset}), x))
    close(each(OFFSETS, X), wanted)
    heads = np.stack([X, 2 * X], axis=2)
    got = run(adapted.bind(context={"alora_offsets": OFFSETS}), heads)
    close(got, np.stack([wanted, 2 * wanted], axis=2))


def test_gradient_and_transposed_use(adapted) -> None:
    """The gradient is that of the active tokens alone; a tied head masks the same tokens."""
    mask = np.arange(6) >= 6 - np.clip(OFFSETS, 0, 6)[:, None]
    context = {"alora_offsets": OFFSETS}
    grads = jax.grad(lambda t: run(adapted.bind(t, context), X).sum())(adapted.trainable)["kernel"]
    pair = adapted.trainable["kernel"]
    close(grads.b, 1.5 * np.einsum("bti,ir,bt->r", X, pair.a, mask)[:, None] * np.ones(5))
    nothing = jax.grad(lambda t: run(adapted.bind(t, {"alora_offsets": -np.ones(3, int)}), X).sum())(adapted.trainable)
    assert not any(leaf.any() for leaf in jax.tree.leaves(nothing))
    back = jlora.lift(lambda p, y: y @ p["kernel"].T, on_materialize="error")
    y = X @ W
    wanted = y @ W.T + mask[..., None] * (1.5 * y @ np.asarray(pair.a @ pair.b).T)
    close(back(adapted.bind(context=context), y), wanted)


def test_dropout_of_the_active_tokens() -> None:
    adapted = jlora.adapt({"kernel": jnp.asarray(W)}, jlora.ALoRA(2, alpha=3.0, dropout=0.5), key=KEY)
    pair = jax.tree.map(lambda leaf: jnp.asarray(RANDOM.normal(size=leaf.shape)), adapted.trainable)
    adapted = adapted.replace(trainable=pair)
    dropped = run(adapted.bind(context={"alora_offsets": OFFSETS, "key": KEY}), X)
    plain = run(adapted.bind(context={"alora_offsets": OFFSETS}), X)
    base = np.asarray(fn({"kernel": jnp.asarray(W)}, X))
    for row, offset in enumerate(OFFSETS):
        before = 6 - max(int(offset), 0)
        np.testing.assert_array_equal(dropped[row, :before], base[row, :before])
        assert np.all(dropped[row, before:] != plain[row, before:])


def test_prefix_of_a_model_is_the_bases() -> None:
    """Two layers of causal mixing: before the invocation every hidden state is the base's, to the last bit."""
    params = {name: {"kernel": jnp.asarray(RANDOM.normal(size=(7, 7)))} for name in ("first", "second")}
    causal = np.tril(np.ones((6, 6))) / 6

    def model(params, x):
        x = jnp.tanh(jnp.einsum("st,bti->bsi", causal, x @ params["first"]["kernel"]))
        return jnp.einsum("st,bti->bsi", causal, x @ params["second"]["kernel"])

    adapted = jlora.adapt(params, jlora.ALoRA(2), key=KEY)
    adapted = adapted.replace(trainable=jax.tree.map(lambda leaf: leaf + 0.3, adapted.trainable))
    got = np.asarray(jlora.lift(model)(adapted.bind(context={"alora_offsets": np.array([2, 4, -1])}), X))
    base = np.asarray(jlora.lift(model)(params, X))
    for row, before in enumerate((4, 2, 6)):
        np.testing.assert_array_equal(got[row, :before], base[row, :before])
        assert np.all(got[row, before:] != base[row, before:])


def test_invocation_offsets() -> None:
    ids = jnp.array(
        [[2, 3, 2, 3, 2, 0], [3, 2, 3, 0, 0, 0], [2, 2, 2, 2, 2, 2], [0, 0, 0, 0, 2, 3], [2, 3, 0, 0, 3, 2]]
    )
    np.testing.assert_array_equal(jax.jit(lambda ids: invocation_offsets(ids, (2, 3)))(ids), [4, 5, -1, 2, 6])
    np.testing.assert_array_equal(invocation_offsets(ids, (2, 2)), [-1, -1, 2, -1, -1])
    np.testing.assert_array_equal(invocation_offsets(ids, range(7)), [-1] * 5)
    assert int(invocation_offsets(ids[0], (2, 3))) == 4
    with pytest.raises(ValueError, match="No invocation tokens"):
        invocation_offsets(ids, ())


def test_errors(adapted, tmp_path) -> None:
    for context, x in (
        ({"alora_offsets": np.array([1, 2])}, X),
        ({"alora_offsets": OFFSETS}, X[:, 0]),
        ({"alora_offsets": OFFSETS}, X.reshape(18, 7)),
        ({"alora_mask": np.ones((3, 5), bool)}, X),
    ):
        with pytest.raises(ValueError, match="features\\]. Bind those of this batch"):
            run(adapted.bind(context=context), x)
    with pytest.raises(ValueError, match="no weight to merge"):
        jlora.merge(adapted)
    table = {"table": jnp.zeros((7, 4))}
    with pytest.raises(ValueError, match="which token"):
        jlora.adapt(table, jlora.ALoRA(2), "table", axes={"table": jlora.Axes((0,), (1,), kind="embedding")}, key=KEY)
    two = {name: {"kernel": jnp.zeros((4, 6))} for name in ("a", "b")}
    mixed = {"a/*": jlora.ALoRA(2, invocation_tokens=(1,)), "b/*": jlora.LoRA(2)}
    with pytest.raises(ValueError, match="the same invocation_tokens"):
        save_peft(jlora.adapt(two, mixed, key=KEY), tmp_path)
    with pytest.raises(ValueError, match="the same invocation_tokens"):
        save_peft(jlora.adapt(two, jlora.ALoRA(2), key=KEY), tmp_path)
    save_peft(jlora.adapt(two, jlora.ALoRA(2, invocation_tokens=(1,)), key=KEY), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"use_dora": True}))
    with pytest.raises(ValueError, match="not read together"):
        load_peft(tmp_path, two)
