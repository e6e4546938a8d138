"""IncreLoRA and TriAdaptLoRA: what they score, what grows, and the scale."""

import jax
import numpy as np
import pytest
from models import adapt, effective, loss_of, moved

import jlora

pytestmark = pytest.mark.usefixtures("x64")


def test_increlora_in_use_reserve_and_scale() -> None:
    """The first n terms, at alpha / n; the next `add` are held at 1e-5; nothing else acts."""
    ranks = jlora.rank.increlora(3, alpha=6.0, initial_rank=2, add=1)
    state, adapted = ranks.init(moved(adapt(jlora.AdaLoRA(4, alpha=3.0))))
    own = jax.tree.map(np.asarray, adapted.trainable["first"])
    np.testing.assert_array_equal(own["e"][2:], [1e-5, 0.0])
    wanted = (
        np.asarray(adapted.base["first"]) + 6.0 / (2 + 1e-5) * own["a"][:, :3] @ np.diag(own["e"][:3]) @ own["b"][:3]
    )
    np.testing.assert_allclose(effective(adapted)["first"], wanted, rtol=1e-12)
    a = np.asarray(jax.jit(jax.grad(loss_of))(adapted.trainable, adapted)["layers"]["a"])
    assert np.all(np.any(a[..., :3] != 0, axis=-2)) and not np.any(a[..., 3])


def test_increlora_grows_where_it_matters() -> None:
    """By hand: the matrix with the largest score gets its reserve; the budget is kept; then the reserve goes."""
    ranks = jlora.rank.increlora(2, top_h=2, every=2, warmup_steps=1)
    state, adapted = ranks.init(moved(adapt(jlora.AdaLoRA(4))))
    update, grad = jax.jit(ranks.update), jax.jit(jax.grad(loss_of))
    for step in range(8):
        before = {path: np.array(n) for path, n in state.ranks.items()}
        state, adapted = update(state, adapted, grad(adapted.trainable, adapted), step)
        grew = np.concatenate([np.ravel(state.ranks[path] - before[path]) for path in before])
        scores = np.concatenate([np.ravel(s) for s in state.sensitivity.scores().values()])
        room = np.concatenate([np.ravel(n) < 3 for n in before.values()])  # of 4, one is the reserve's
        scores[~room] = -np.inf
        free = 10 - sum(n.sum() for n in before.values())
        number = min(2, free) if step > 1 and step % 2 == 0 else 0
        assert set(np.flatnonzero(grew)) == set(np.argsort(-scores)[:number]) and grew.max() <= 1
    assert sum(int(n.sum()) for n in state.ranks.values()) == 10
    for path, n in state.ranks.items():
        assert np.array_equal((adapted.frozen[path]["mask"] != 0).sum(-1), n)
        assert np.array_equal((adapted.trainable[path]["e"] != 0).sum(-1), n)


def changes(adapted) -> dict[str, np.ndarray]:
    return {path: np.asarray(w) - np.asarray(adapted.base[path]) for path, w in effective(adapted).items()}


def test_increlora_of_the_whole_gradient() -> None:
    """The authors' importance, by hand; and what stands for it, with one term the same up to signs within."""
    ranks = jlora.rank.increlora(1, alpha=3.0, b1=0.0, b2=0.0)
    state, adapted = ranks.init(moved(adapt(jlora.AdaLoRA(2))))
    change, e = changes(adapted), {path: own["e"].at[..., 1].set(0) for path, own in adapted.trainable.items()}
    single = changes(adapted.replace(trainable={p: own | {"e": e[p]} for p, own in adapted.trainable.items()}))
    whole = {path: np.cos(adapted.base[path] + d + i) for i, (path, d) in enumerate(change.items())}
    grads = jax.jit(jax.grad(loss_of))(adapted.trainable, adapted)
    update = jax.jit(ranks.update)
    own, _ = update(state, adapted, grads, 0, weight_grads=whole)
    cheap, _ = update(state, adapted, grads, 0)
    for path, d in change.items():
        root = np.sqrt(np.prod(d.shape[-2:]))
        wanted = np.abs(d * whole[path]).sum((-1, -2)) / root
        np.testing.assert_allclose(own.sensitivity.mean[path], wanted, rtol=1e-10)
        reserve = np.abs(((d - single[path]) * whole[path]).sum((-1, -2)))
        within = np.abs((single[path] * whole[path]).sum((-1, -2))) + reserve
        np.testing.assert_allclose(cheap.sensitivity.mean[path], within / root, rtol=1e-6)


def test_triadapt_importance() -> None:
    """The norm of the change, never formed."""
    ranks = jlora.rank.triadapt(3, steps=4, initial_rank=2, decay=0.0)
    state, adapted = ranks.init(moved(adapt(jlora.TriAdaptLoRA(4, alpha=8.0))))
    state, _ = jax.jit(ranks.update)(state, adapted, None, 0)
    for path, change in changes(adapted).items():
        wanted = np.linalg.norm(change, axis=(-1, -2)) / np.sqrt(np.prod(change.shape[-2:]))
        np.testing.assert_allclose(state.mean[path], wanted, rtol=1e-10)


def test_triadapt_threshold() -> None:
    """A high threshold lets the largest grow alone, one of zero all; never beyond the budget."""
    adapted = moved(adapt(jlora.TriAdaptLoRA(4)))
    for threshold, number in ((1.0, 1), (0.0, 5)):
        ranks = jlora.rank.triadapt(3, steps=4, threshold=(threshold, threshold))
        state, now = ranks.init(adapted)
        update = jax.jit(ranks.update)
        state, now = update(state, now, None, 1)
        grew = {path: np.array(n) - 1 for path, n in state.ranks.items()}
        assert sum(g.sum() for g in grew.values()) == number
        for _ in range(6):
            state, now = update(state, now, None, 1)
        assert sum(int(n.sum()) for n in state.ranks.values()) <= 15
        for path, n in state.ranks.items():
            np.testing.assert_array_equal(now.frozen[path]["mask"], np.arange(4) < np.asarray(n)[..., None])
