"""Singular values without forming changes, and the ranks that are read off them."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from models import adapt, effective, moved

import jlora

pytestmark = pytest.mark.usefixtures("x64")


@pytest.mark.parametrize("method", [jlora.LoRA(3, alpha=6.0), jlora.AdaLoRA(3), jlora.SoRA(3)])
def test_spectra(method) -> None:
    adapted = moved(adapt(method))
    for path, s in jlora.rank.spectra(adapted).items():
        wanted = np.linalg.svd(effective(adapted)[path] - adapted.base[path], compute_uv=False)
        np.testing.assert_allclose(s, wanted[..., :3], atol=1e-10)
        assert np.all(wanted[..., 3:] < 1e-10)


def test_rank_from_spectrum() -> None:
    s = np.array([3.0, 2.0, 1.0, 0.5, 0.1])
    share = np.cumsum(s**2) / np.sum(s**2)
    for k in range(5):
        assert jlora.rank.rank_from_spectrum(s, share[k] - 1e-6) == k + 1 == jlora.rank.rank_from_spectrum(s, share[k])
    knee = np.array([10.0, 9.0, 0.3, 0.2, 0.1])
    assert jlora.rank.rank_from_spectrum(knee, None, elbow=True) == 2
    assert jlora.rank.rank_from_spectrum(knee, 0.3, elbow=True) == 1
    assert jlora.rank.rank_from_spectrum(np.zeros(3)) == 1
    for bad in ([1.0, 2.0], [1.0, np.nan], [], [1.0, -1.0]):
        with pytest.raises(ValueError, match="descending"):
            jlora.rank.rank_from_spectrum(np.array(bad))
    with pytest.raises(ValueError, match="share"):
        jlora.rank.rank_from_spectrum(s, 1.5)


def test_best_ranks_lose_least() -> None:
    """Against every allocation there is."""
    random = np.random.default_rng(0)
    spectra = {"a": np.sort(random.uniform(size=(2, 3)))[:, ::-1], "b": np.sort(random.uniform(size=3))[::-1]}
    rows = [*spectra["a"], spectra["b"]]
    lost = lambda ranks: sum(np.sum(row[k:] ** 2) for row, k in zip(rows, ranks, strict=True))
    for total in range(3, 10):
        ranks = jlora.rank.best_ranks(spectra, total)
        got = (*ranks["a"], ranks["b"])
        assert sum(got) == total
        every = [r for r in itertools.product((1, 2, 3), repeat=3) if sum(r) == total]
        assert lost(got) <= min(map(lost, every)) + 1e-12
    costs = {"a": 5, "b": 2}
    ranks = jlora.rank.best_ranks(spectra, parameters=24, costs=costs)
    assert 12 < 5 * sum(ranks["a"]) + 2 * ranks["b"] <= 24
    with pytest.raises(ValueError, match="below one rank for each matrix, which takes 3"):
        jlora.rank.best_ranks(spectra, 2)
    with pytest.raises(ValueError, match="below one rank for each matrix, which takes 12"):
        jlora.rank.best_ranks(spectra, parameters=11, costs=costs)
    with pytest.raises(ValueError, match="'b' are not all numbers"):
        jlora.rank.best_ranks({"b": np.array([1.0, np.nan])}, 1)


def test_recommended_rank() -> None:
    spectra = {"a": np.array([[2.0, 1.0], [1.0, 0.0]]), "b": np.array([1.0])}
    assert jlora.rank.recommended_rank(spectra, (4 / 5 + 1 + 1) / 3) == 1
    assert jlora.rank.recommended_rank(spectra, (4 / 5 + 1 + 1) / 3 + 1e-6) == 2


def test_welore() -> None:
    """One threshold: what is below it is dropped, the reduction is met, and what is lost is the tail."""
    random = np.random.default_rng(0)
    weight = lambda decay: random.normal(size=(20, 16)) * decay ** np.arange(16) @ random.normal(size=(16, 18))
    params = {"heavy": jnp.asarray(weight(0.5)), "flat": jnp.asarray(weight(0.99))}
    values = {path: np.linalg.svd(w, compute_uv=False) for path, w in params.items()}
    scaled = {path: (s - s[-1]) / (s[0] - s[-1]) for path, s in values.items()}
    small = jlora.factorize(params, jlora.rank.welore(params, 0.5))
    ranks = {path: small.trainable[path].rank for path in params}
    assert ranks["heavy"] < ranks["flat"]
    threshold = max(scaled[path][ranks[path]] for path in params)  # the largest that was dropped
    assert all(np.sum(scaled[path] > threshold) == ranks[path] for path in params)
    assert 0.5 - 1 / 16 < 1 - sum(ranks.values()) / sum(map(len, values.values())) <= 0.5
    for path, w in jlora.merge(small).items():
        np.testing.assert_allclose(
            np.linalg.norm(w - params[path]), np.linalg.norm(values[path][ranks[path] :]), rtol=1e-8
        )
    assert list(jlora.rank.welore(params, 0.5, least=0.5)) == ["heavy"]
    previous = {path: 99 for path in params}
    for reduction in (0.1, 0.3, 0.6, 0.9):  # ranks fall with it
        rules = jlora.rank.welore(params, reduction, least=-1.0)
        now = {path: rules[path].rank(*params[path].shape) for path in params}
        assert all(now[path] <= previous[path] for path in params)
        previous = now
    with pytest.raises(ValueError, match="share in"):
        jlora.rank.welore(params, 1.0)
    with pytest.raises(ValueError, match="matches no weight"):
        jlora.rank.welore(params, 0.5, "nothing")
