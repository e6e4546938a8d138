"""TinyLoRA and PSOFT against their formulas in numpy."""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

import jlora
from jlora.io import load_peft, save_peft

pytestmark = pytest.mark.usefixtures("x64")
RNG = np.random.default_rng(0)
W = {"wide": RNG.normal(size=(6, 9)), "tall": RNG.normal(size=(8, 5))}


def adapted(method: jlora.TinyLoRA | jlora.PSOFT) -> jlora.Adapted:
    """With parameters away from their start."""
    it = jlora.adapt(jax.tree.map(jnp.asarray, W), method, "*", key=jax.random.key(0))
    noise = lambda leaf: leaf + 0.3 * RNG.normal(size=leaf.shape)
    return it.replace(trainable=jax.tree.map(noise, it.trainable))


def leading(w: np.ndarray, r: int) -> tuple[np.ndarray, ...]:
    """The leading singular triples, with the largest entry of every column of U positive."""
    u, s, vh = np.linalg.svd(w, full_matrices=False)
    u, s, vh = u[:, :r], s[:r], vh[:r]
    sign = np.sign(u[np.abs(u).argmax(0), np.arange(r)])
    return u * sign, s, vh * sign[:, None]


@pytest.mark.parametrize("group", [None, "all"])
def test_tinylora(group) -> None:
    it = adapted(jlora.TinyLoRA(2, 5, group=group))
    merged = jlora.merge(it)
    for name, w in W.items():
        u, s, vh = leading(w, 2)
        (v,) = jax.tree.leaves(it.trainable if group else it.trainable[name])
        middle = sum(number * p for number, p in zip(v, it.frozen[name]["p"], strict=True))
        np.testing.assert_allclose(merged[name], w + u * np.sqrt(s) @ middle @ (np.sqrt(s)[:, None] * vh), atol=1e-12)
    assert sum(leaf.size for leaf in jax.tree.leaves(it.trainable)) == (5 if group else 10)


def test_tinylora_matrices_have_unit_columns_on_average() -> None:
    p = adapted(jlora.TinyLoRA(4, 4000)).frozen["wide"]["p"]
    np.testing.assert_allclose(np.square(p).sum(1).mean(), 1.0, rtol=0.02)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("gains", [(True, True), (False, True), (False, False)])
def test_psoft(gains, symmetric) -> None:
    it = adapted(jlora.PSOFT(3, gain_in=gains[0], gain_out=gains[1], symmetric=symmetric))
    merged = jlora.merge(it)
    for name, w in W.items():
        u, s, vh = leading(w, 3)
        own, q = it.trainable[name], np.zeros((3, 3))
        q[np.triu_indices(3, 1)] = own["q"]
        q, eye = q - q.T, np.eye(3)
        rotation = (eye - q) @ np.linalg.inv(eye + q)
        g, h = (own.get(gain, np.ones(3)) for gain in ("gain_in", "gain_out"))
        left, right = (np.sqrt(s), np.sqrt(s)) if symmetric else (np.ones(3), s)
        middle = np.diag(g) @ rotation @ np.diag(h) - eye
        np.testing.assert_allclose(merged[name], w + u * left @ middle @ (right[:, None] * vh), atol=1e-12)
        if gains == (False, False) and not symmetric:  # the subspace is turned: no singular value changes
            values = lambda w: np.linalg.svd(w, compute_uv=False)
            np.testing.assert_allclose(values(u * s @ vh), values(u @ rotation @ (s[:, None] * vh)), atol=1e-12)


def test_the_polynomial_comes_close() -> None:
    exact, close, bound = jlora.PSOFT(3), jlora.PSOFT(3, neumann=30), jlora.PSOFT(3, neumann=30, bound=0.01)
    q = 0.2 * jnp.arange(3.0)
    np.testing.assert_allclose(close.rotation(q), exact.rotation(q), atol=1e-9)
    norm = jnp.sqrt(2.0) * jnp.linalg.norm(q)
    np.testing.assert_allclose(bound.rotation(q), exact.rotation(q * 0.01 / norm), atol=1e-12)


def test_files_of_psoft_want_torch(tmp_path, monkeypatch) -> None:
    """The signs of the singular vectors are in no file, so both ways say what is wanted and what else there is."""
    monkeypatch.setitem(sys.modules, "torch", None)
    params = {"layer": {"kernel": jnp.asarray(W["tall"])}}
    it = jlora.adapt(params, jlora.PSOFT(3), key=jax.random.key(0))
    with pytest.raises(ValueError, match="'layer/kernel': PSOFT files .* install torch.* --to lora"):
        save_peft(it, tmp_path)
    assert not list(tmp_path.iterdir())
    tensors = {"psoft_R.weight": np.zeros(3), "psoft_R.vector_a": np.ones(3), "psoft_R.vector_b": np.ones(3)}
    tensors = {f"base_model.model.layer.{name}": value for name, value in tensors.items()}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({"peft_type": "PSOFT", "r": 3, "target_modules": ["layer"]})
    )
    with pytest.raises(ValueError, match="install torch.*to read, merge in PEFT"):
        load_peft(tmp_path, params)
