"""Calibration errors against loops over the examples."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora import diagnostics as d

pytestmark = pytest.mark.usefixtures("x64")


def data(seed: int, n: int = 200, classes: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities, and labels drawn from them: calibrated but for chance."""
    rng = np.random.default_rng(seed)
    p = rng.dirichlet(np.ones(classes), n)
    return p, np.array([rng.choice(classes, p=row) for row in p])


def by_width(confidence, correct, bins=10):
    """Gaps and counts of the bins, one example at a time."""
    members = [[] for _ in range(bins)]
    for c, y in zip(confidence, correct, strict=True):
        b = next(b for b in range(bins) if c <= (b + 1) / bins)
        members[b].append((c, y))
    return [(len(m), abs(np.mean([c for c, _ in m]) - np.mean([y for _, y in m]))) for m in members if m]


def by_count(confidence, correct, bins=10):
    order = np.argsort(confidence, kind="stable")
    each = len(order) // bins
    cuts = [order[b * each : (b + 1) * each if b < bins - 1 else None] for b in range(bins)]
    return [(len(m), abs(confidence[m].mean() - correct[m].mean())) for m in cuts if len(m)]


def mean(gaps):
    return sum(n * gap for n, gap in gaps) / sum(n for n, _ in gaps)


@pytest.mark.parametrize("n", [203, 7])
def test_errors_by_loops(n):
    p, y = data(n, n)
    confidence, correct = p.max(1), (p.argmax(1) == y).astype(float)
    hits = np.eye(3)[y]
    assert d.ece(p, y) == pytest.approx(mean(by_width(confidence, correct)))
    assert d.mce(p, y) == pytest.approx(max(gap for _, gap in by_width(confidence, correct)))
    assert d.ace(p, y, top_label=True) == pytest.approx(mean(by_count(confidence, correct)))
    assert d.ace(p, y) == pytest.approx(np.mean([mean(by_count(p[:, c], hits[:, c])) for c in range(3)]))
    assert d.cece(p, y) == pytest.approx(np.mean([mean(by_width(p[:, c], hits[:, c])) for c in range(3)]))
    live = p.ravel() > 0.01
    assert d.tace(p, y) == pytest.approx(mean(by_count(p.ravel()[live], hits.ravel()[live])))


def test_labels_stand_beside_their_probabilities():
    """Calibrated data of 20,000 examples have errors near zero; pairs from different classes would not."""
    p, y = data(0, 20000)
    for fn in (d.ece, d.ace, d.tace):
        assert fn(p, y) < 0.02
    misaligned = mean(by_count(p.ravel(), np.eye(3)[y].T.ravel()))
    assert misaligned > 0.15


def test_plain_cases():
    sure = np.eye(2)[np.zeros(50, int)]
    y = np.array([0] * 40 + [1] * 10)
    assert d.ece(sure, y) == pytest.approx(0.2) and d.mce(sure, y) == pytest.approx(0.2)
    p, y = data(1)
    order = np.random.default_rng(0).permutation(len(y))
    for fn in (d.ece, d.ace):
        assert fn(p[order], y[order]) == pytest.approx(float(fn(p, y)))
    edges = d.reliability(np.array([0.0, 0.1, 0.1000001, 0.5, 1.0]), np.ones(5))
    assert list(edges.count) == [2, 1, 0, 0, 1, 0, 0, 0, 0, 1]


def test_padding_does_not_count():
    p, y = data(2, 60)
    padded = np.concatenate([p, np.full((40, 3), np.nan)])
    labels, live = np.concatenate([y, np.full(40, -100)]), np.arange(100) < 60
    for fn in (d.ece, d.mce, d.ace, d.tace):
        assert fn(padded, labels, where=live) == pytest.approx(float(fn(p, y)))
        assert jax.jit(fn)(padded, labels, where=live) == pytest.approx(float(fn(p, y)))


def test_bad_input():
    p, y = data(3, 10)
    with pytest.raises(ValueError, match=r"Labels are from 0 to 2 .* got 0 to 3"):
        d.ece(p, np.arange(10) % 4)
    with pytest.raises(ValueError, match="where=labels >= 0"):
        d.ace(p, y - 5)
    with pytest.raises(ValueError, match="integers; got float64"):
        d.ece(p, y.astype(float))
    with pytest.raises(ValueError, match="use softmax"):
        d.ece(p / 2, y)
    with pytest.raises(ValueError, match="not from 0 to 1: nan"):
        d.ece(np.where(p > 0.9, np.nan, p), y) if (p > 0.9).any() else d.ece(np.full_like(p, np.nan), y)
    with pytest.raises(ValueError, match=r"\[n, classes\]"):
        d.mce(p.ravel(), y)
    with pytest.raises(ValueError, match="no examples"):
        d.ece(p[:0], y[:0])
    with pytest.raises(ValueError, match="bins=0"):
        d.reliability(jnp.ones(3), jnp.ones(3), 0)
