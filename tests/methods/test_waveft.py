"""WaveFT against a transform written out, and what defines the filters."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

import jlora
from jlora.io import load_peft
from jlora.torch_random import randperm
from jlora.wavelets import NAMES, highpass, lowpass
from jlora.weight import Params


@pytest.mark.parametrize("name", NAMES)
def test_filters(name):
    low = lowpass(name)
    high, n = highpass(low), len(low) // 2
    assert len(low) == 2 * int(name[2 if name.startswith("db") else 3 :])
    for m in range(n):
        shifted = np.concatenate([np.zeros(2 * m), low])[: 2 * n]
        np.testing.assert_allclose([low @ shifted, high @ shifted], [m == 0, 0], atol=1e-13)
    np.testing.assert_allclose(low.sum(), 2**0.5, atol=1e-13)
    moments = [high @ (np.arange(2 * n) / n) ** order for order in range(n)]
    np.testing.assert_allclose(moments, 0, atol=1e-13)


def test_known_filters():
    root = 3**0.5
    wanted = np.array([1 + root, 3 + root, 3 - root, 1 - root]) / (4 * 2**0.5)
    np.testing.assert_allclose(lowpass("db1"), [0.5**0.5] * 2, atol=1e-15)
    np.testing.assert_allclose(lowpass("db2"), wanted, atol=1e-15)
    np.testing.assert_allclose(lowpass("sym2"), wanted, atol=1e-15)
    assert abs(lowpass("sym4") - lowpass("sym4")[::-1]).max() < abs(lowpass("db4") - lowpass("db4")[::-1]).max()


@pytest.mark.parametrize("wavelet", [None, "db1", "db3", "sym4"])
@pytest.mark.parametrize("shape", [(9, 6), (8, 11)])
def test_is_the_transform(shape, wavelet, x64):
    """The coefficient matrix, laid out as PyTorch's weight [out, in], through an inverse transform of one level."""
    rng, n = np.random.default_rng(0), 20
    w, c = rng.normal(size=shape), rng.normal(size=n)
    n_in, n_out = shape
    rows, columns = np.divmod(randperm(n_in * n_out, n, 5), n_in)
    if wavelet is None:
        change = np.zeros((n_out, n_in))
        change[rows, columns] = c
    else:
        low = lowpass(wavelet)
        high, length = highpass(low), len(low)
        height, width = (2 * ((size + length - 1) // 2) for size in (n_out, n_in))
        coefficients = np.zeros((height, width))
        coefficients[rows + (height - n_out) // 2, columns + (width - n_in) // 2] = c
        upper, lower = np.split(coefficients, 2)
        change = np.zeros((height + length - 2, width + length - 2))
        parts = zip(np.split(upper, 2, 1) + np.split(lower, 2, 1), [low, high] * 2, [low] * 2 + [high] * 2, strict=True)
        for part, of_out, of_in in parts:
            for q, p in np.ndindex(*part.shape):
                change[2 * q : 2 * q + length, 2 * p : 2 * p + length] += part[q, p] * np.outer(of_out, of_in)
        change = change[length - 2 :, length - 2 :][:n_out, :n_in]
    method = jlora.WaveFT(n, scaling=3.0, seed=5, wavelet=wavelet)
    got = method.weight(jnp.asarray(w), Params({"spectrum": jnp.asarray(c)}))
    np.testing.assert_allclose(got, w + 3.0 * change.T, atol=1e-12)


def test_unknown_wavelet():
    with pytest.raises(ValueError, match="db1, db2"):
        jlora.WaveFT(wavelet="coif1")


def test_sizes_in_proportion_are_read_off_the_tensors(tmp_path):
    sizes, params = {"q": 3, "v": 7}, {name: {"kernel": jnp.ones((6, 4))} for name in "qv"}
    config = {"peft_type": "WAVEFT", "target_modules": ["q", "v"], "proportional_parameters": True, "n_frequency": 5}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    tensors = {f"base_model.model.{name}.waveft_spectrum": np.ones(n, "f") for name, n in sizes.items()}
    save_file(tensors, tmp_path / "adapter_model.safetensors", {"format": "pt"})
    adapted = load_peft(tmp_path, params)
    assert {path[0]: site.method.n for path, site in adapted.sites.items()} == sizes
