"""Ranks, subspaces and intruders of arrays against NumPy's decomposition of the product."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora import Factors
from jlora import diagnostics as d

pytestmark = pytest.mark.usefixtures("x64")


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


def pair(seed: int, *stack: int, n_in: int = 20, rank: int = 5, n_out: int = 14, scale: float = 0.5) -> Factors:
    return Factors(
        jnp.asarray(normal(seed, *stack, n_in, rank)), jnp.asarray(normal(seed + 1, *stack, rank, n_out)), scale
    )


@pytest.mark.parametrize(
    ("stack", "options"), [((), {"scale": -2.0}), ((2, 2), {}), ((3,), {"rank": 17}), ((), {"rank": 30})], ids=str
)
def test_singular_values_of_a_pair_are_those_of_its_product(stack, options):
    f = pair(0, *stack, **options)
    s = d.singular_values(f)
    wanted = np.linalg.svd(np.asarray(f.scale * f.a) @ np.asarray(f.b), compute_uv=False)
    np.testing.assert_allclose(s, wanted[..., : s.shape[-1]], rtol=1e-10, atol=1e-12)
    assert s.shape[-1] == min(f.rank, 20, 14)
    np.testing.assert_allclose(d.singular_values(f.product()), wanted, atol=1e-10)


def test_the_product_is_not_formed():
    f = pair(0, n_in=100, n_out=90)
    assert "100,90]" not in str(jax.make_jaxpr(d.singular_values)(f))
    assert "100,90]" not in str(jax.make_jaxpr(lambda f: d.directions(f, "out"))(f))


def test_ranks_by_their_formulas():
    s = np.sort(np.abs(normal(0, 3, 6)))[:, ::-1]
    for power in (1, 2):
        q = s**power / (s**power).sum(-1, keepdims=True)
        np.testing.assert_allclose(d.effective_rank(s, power), np.prod(q**-q, axis=-1), rtol=1e-12)
    np.testing.assert_allclose(d.stable_rank(s), (s**2).sum(-1) / s[:, 0] ** 2, rtol=1e-12)
    np.testing.assert_allclose(d.nuclear_rank(s), s.sum(-1) ** 2 / (s**2).sum(-1), rtol=1e-12)
    for share in (0.3, 0.9, 0.99, 1.0):
        for row, got in zip(s, d.energy_rank(s, share), strict=True):
            shares = [(row[:k] ** 2).sum() / (row**2).sum() for k in range(7)]
            assert got == next(k for k, each in enumerate(shares) if each >= share - 1e-14)
    assert np.all(1 <= d.stable_rank(s)) and np.all(d.stable_rank(s) <= d.effective_rank(s, 2))
    assert np.all(d.effective_rank(s, 2) <= d.effective_rank(s)) and np.all(d.effective_rank(s) <= 6)


@pytest.mark.parametrize("rank", [d.effective_rank, d.stable_rank, d.nuclear_rank, lambda s: d.energy_rank(s, 0.999)])
def test_ranks_of_plain_cases(rank):
    assert rank(jnp.array([3.0, 0.0, 0.0])) == pytest.approx(1)
    assert rank(jnp.array([2.0, 2.0, 2.0, 0.0])) == pytest.approx(3)
    assert rank(jnp.zeros(4)) == 0
    s = jnp.array([4.0, 2.0, 1.0])
    assert rank(1e-3 * s) == pytest.approx(float(rank(s)))


def test_under_jit():
    s, before = jnp.array([4.0, 2.0, 1.0]), jnp.asarray(normal(0, 12, 9))
    every = lambda s, w: (d.effective_rank(s), d.stable_rank(s), d.energy_rank(s), d.intruders(w, 2 * w, k=3))
    jax.tree.map(np.testing.assert_allclose, jax.jit(every)(s, before), every(s, before))


def test_bad_spectra():
    for bad in ([1.0, np.nan], [np.inf, 1.0], [1.0, -0.5]):
        with pytest.raises(ValueError, match="1 of 2 singular values are negative or not finite"):
            d.effective_rank(jnp.array(bad))
    with pytest.raises(ValueError, match="last axis"):
        d.stable_rank(jnp.zeros((3, 0)))
    with pytest.raises(ValueError, match=r"share=1\.5"):
        d.energy_rank(jnp.ones(3), 1.5)


def test_aurac():
    assert d.aurac([0.7, 0.7, 0.7], [1, 4, 9]) == pytest.approx(0.7)
    assert d.aurac([0.4], [8]) == 0.4
    assert d.aurac([0.2, 0.6, 0.8], [1, 2, 8]) == pytest.approx((0.4 * 1 + 0.7 * 2) / 3)
    assert d.aurac([0.2, 0.6, 0.8], [1, 2, 8], log=False) == pytest.approx((0.4 * 1 + 0.7 * 6) / 7)
    for accuracies, ranks in (([0.1], [1, 2]), ([0.1, 0.2], [2, 1]), ([0.1, 0.2], [0, 1]), ([0.1, np.nan], [1, 2])):
        with pytest.raises(ValueError, match="aurac"):
            d.aurac(accuracies, ranks)


# Subspaces.


@pytest.mark.parametrize("of", ["in", "out", "a", "b"])
def test_directions_and_phi_by_projectors(of):
    f, g = pair(0, 2), pair(10, 2, rank=3)
    got = d.subspace_similarity(d.directions(f, of), d.directions(g, of))
    assert got.shape == (2, 5, 3)
    for at in range(2):
        bases = []
        for each in (f, g):
            a, b = np.asarray(each.a[at]), np.asarray(each.b[at])
            u, _, vh = np.linalg.svd({"a": a, "b": b}.get(of, a @ b), full_matrices=False)
            bases.append(u[:, : each.rank] if of in ("in", "a") else vh[: each.rank].T)
        for i in range(1, 6):
            for j in range(1, 4):
                # The squared norm of the product of two projectors, each formed from the basis.
                p, q = (basis[:, :k] @ basis[:, :k].T for basis, k in zip(bases, (i, j), strict=True))
                assert got[at, i - 1, j - 1] == pytest.approx(np.trace(p @ q) / min(i, j), abs=1e-10)


def test_phi_of_plain_cases():
    q = np.linalg.qr(normal(0, 12, 8))[0]
    assert d.subspace_similarity(q[:, :4], q[:, :6])[3, 5] == pytest.approx(1)
    assert np.abs(d.subspace_similarity(q[:, :4], q[:, 4:])).max() < 1e-12
    f = pair(0)
    turned = Factors(f.a @ normal(5, 5, 5), f.b)  # other factors' product: the same inputs are read
    assert d.subspace_similarity(d.directions(f), d.directions(turned))[-1, -1] == pytest.approx(1)
    random = [np.linalg.qr(normal(s, 40, 5))[0] for s in range(40)]
    mean = np.mean([d.subspace_similarity(u, v)[4, 4] for u, v in zip(random[::2], random[1::2], strict=True)])
    assert mean == pytest.approx(5 / 40, abs=0.03)


def test_bad_subspaces():
    with pytest.raises(ValueError, match="no orthonormal directions"):
        d.subspace_similarity(normal(0, 6, 2), np.eye(6)[:, :2])
    with pytest.raises(ValueError, match="same leaf"):
        d.subspace_similarity(np.eye(6)[:, :2], np.eye(5)[:, :2])
    with pytest.raises(ValueError, match="one of 'in', 'out', 'a', 'b'"):
        d.directions(pair(0), "left")
    with pytest.raises(ValueError, match="those of a factor"):
        d.directions(jnp.eye(3), "a")


# Intruders.


def plainly(before: np.ndarray, after: np.ndarray, k: int, side: str) -> np.ndarray:
    """c_j, one cosine at a time."""
    (u0, _, vh0), (u1, _, vh1) = np.linalg.svd(before, full_matrices=False), np.linalg.svd(after, full_matrices=False)
    old, new = (vh0, vh1) if side == "out" else (u0.T, u1.T)
    return np.array([max(abs(new[j] @ each) for each in old) for j in range(k)])


@pytest.mark.parametrize(("shape", "side"), [((70, 64), "in"), ((70, 64), "out"), ((64, 70), "out")])
def test_intruders_by_their_definition(shape, side):
    before, change = normal(0, *shape), 6 * normal(1, shape[0], 2) @ normal(2, 2, shape[1])
    found = d.intruders(before, before + change, side=side, threshold=0.6)
    c = plainly(before, before + change, 10, side)
    np.testing.assert_allclose(found.similarity, c, atol=1e-10)
    assert found.count == (c < 0.6).sum() and list(np.flatnonzero(found.found)) == list(np.flatnonzero(c < 0.6))
    assert np.all(found.found[:2])  # the two directions of the change
    s0, s1 = (np.linalg.svd(w, compute_uv=False) for w in (before, before + change))
    np.testing.assert_allclose(found.growth, s1[:10] / s0[:10], rtol=1e-10)


def test_intruders_of_plain_cases():
    u, vh = np.linalg.qr(normal(0, 96, 81))[0], np.linalg.qr(normal(1, 80, 80))[0]
    u, outside = u[:, :80], u[:, 80]
    s = np.linspace(10, 1, 80)
    before = u * s @ vh
    same = d.intruders(before, before)
    assert same.count == 0 and np.all(np.asarray(same.similarity) > 1 - 1e-9)
    assert list(same.nearest) == list(range(10)) and np.allclose(same.growth, 1)
    # Only the order changes: nothing is new.
    risen = d.intruders(before, before + 50 * np.outer(u[:, 20], vh[20]))
    assert risen.count == 0 and risen.nearest[0] == 20
    # One planted direction, an even mixture of all old ones.
    new = vh.T @ np.ones(80) / 80**0.5
    planted = d.intruders(before, before + 50 * np.outer(outside, new))
    assert planted.found[0] and planted.similarity[0] == pytest.approx(80**-0.5, abs=0.03)
    assert d.intruders(before[:, :6], before[:, :6]).similarity.shape == (6,)


def test_bad_intruders():
    with pytest.raises(ValueError, match="before and after"):
        d.intruders(np.eye(3), np.eye(4))
    for options in ({"k": 0}, {"threshold": 1.5}, {"side": "left"}):
        with pytest.raises(ValueError, match="a positive number of vectors"):
            d.intruders(np.eye(3), np.eye(3), **options)


# Norms.


def test_entry_norms():
    x, w, f = normal(0, 2, 7, 20), normal(1, 20, 14), pair(3)
    got = d.entry_norms(x, w, f, head_dim=16)
    delta = np.asarray(f.product())
    for name, each in (("base", w), ("change", delta), ("adapted", w + delta)):
        wanted = max(abs(row @ column) for batch in x for row in batch for column in each.T) / 2
        assert getattr(got, name) == pytest.approx(wanted)
    assert got.ratio == pytest.approx(float(got.adapted) / np.log(7) ** 0.5)
    np.testing.assert_allclose(d.entry_norms(x, w, delta).change, 2 * got.change)
    with pytest.raises(ValueError, match="at least 2"):
        d.entry_threshold(1)
    with pytest.raises(ValueError, match="length, in"):
        d.entry_norms(x, w.T, f)
