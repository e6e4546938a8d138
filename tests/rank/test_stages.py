"""LoRA-Squeeze's stages, SoRA's and CoDyRA's thresholds, and CoDyRA's tasks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from models import adapt, effective, moved, train

import jlora
from jlora.io import load_peft, save_peft
from jlora.rank.squeeze import balanced

pytestmark = pytest.mark.usefixtures("x64")
close = functools.partial(np.testing.assert_allclose, atol=1e-10)


def test_balanced() -> None:
    """Nothing changes but the factors, which are those of the singular value decomposition; Eckart and Young."""
    random = np.random.default_rng(0)
    for n_in, n_out in ((7, 6), (3, 6), (6, 3)):  # of rank 4 or, where that is more than there is, 3
        f = jlora.Factors(
            jnp.asarray(random.normal(size=(2, n_in, 4))), jnp.asarray(random.normal(size=(2, 4, n_out))), 0.5
        )
        g = jax.jit(balanced)(f)
        close(g.product(), f.product())
        s = np.linalg.svd(f.a @ f.b, compute_uv=False)[:, :4]
        want = np.zeros((2, 4, 4))
        want[:, range(s.shape[1]), range(s.shape[1])] = s
        close(g.a.swapaxes(1, 2) @ g.a, want)
        close(g.b @ g.b.swapaxes(1, 2), want)
        lost = np.linalg.norm(f.product() - 0.5 * g.a[..., :2] @ g.b[:, :2], axis=(1, 2))
        close(lost, 0.5 * np.linalg.norm(s[:, 2:], axis=1))


def test_squeeze() -> None:
    """Three ranks, one compilation; the rest is held at zero against the optimizer's momentum; repacked, it goes on."""
    ranks, tx = jlora.rank.squeeze([(2, 3), (4, 1)]), optax.adam(0.05)
    state, adapted = ranks.init(moved(adapt(jlora.LoRA(4))))
    opt_state, in_use = tx.init(adapted.trainable), []
    masked, opt_state, state, traces = train(adapted, tx, opt_state, ranks, state, range(6))
    assert traces == 1 and int(state) == 1
    for own in masked.trainable.values():
        in_use.append(np.any(np.asarray(own.a) != 0, axis=-2).sum(-1))
    assert all(np.all(n == 1) for n in in_use)
    repacked, (smaller, state_) = jlora.repack(masked, (opt_state, state))
    jax.tree.map(close, effective(masked), effective(repacked))
    masked, *_ = train(masked, tx, opt_state, ranks, state, [6, 7])
    repacked, *_ = train(repacked, tx, smaller, None, None, [6, 7])
    jax.tree.map(close, effective(masked), effective(repacked))


def test_squeeze_is_the_best_approximation() -> None:
    ranks = jlora.rank.squeeze([(5, 2)])
    state, adapted = ranks.init(moved(adapt(jlora.LoRA(4))))
    _, now = jax.jit(ranks.update)(state, adapted, None, 5)
    best, _ = jlora.to_lora(adapted, 2)
    jax.tree.map(close, effective(now), effective(best))
    _, before = jax.jit(ranks.update)(state, adapted, None, 4)
    jax.tree.map(close, before, adapted)


def test_squeeze_refuses() -> None:
    with pytest.raises(ValueError, match="rising steps and falling ranks"):
        jlora.rank.squeeze([(1, 2), (2, 3)])
    with pytest.raises(ValueError, match="first stage has rank 4, and the adapter 4"):
        jlora.rank.squeeze([(1, 4)]).init(adapt(jlora.LoRA(4)))
    with pytest.raises(ValueError, match="to_lora"):
        jlora.rank.squeeze([(1, 1)]).init(adapt(jlora.DoRA(2)))


def test_repacked_is_saved(tmp_path) -> None:
    """As PEFT's LoRA with its own rank for every layer of a stack, and back."""
    ranks = jlora.rank.squeeze([(0, 3)])
    state, adapted = ranks.init(moved(adapt(jlora.LoRA(4))))
    _, adapted = ranks.update(state, adapted, None, 0)
    own = adapted.trainable["layers"]
    fewer = jlora.Factors(own.a.at[1, :, 1:].set(0), own.b.at[1, 1:].set(0), own.scale)
    repacked = jlora.repack(adapted.replace(trainable=adapted.trainable | {"layers": fewer}))
    assert repacked.sites["layers"].method.ranks == (3, 1, 3)
    tree = lambda params: {"layers": {"q": {"kernel": params["layers"]}}, "out": {"kernel": params["last"]}}
    names = {"layers": "layers/q/kernel", "last": "out/kernel"}
    renamed = jlora.Adapted(
        tree(repacked.base), {names[p]: repacked.trainable[p] for p in names},
        {names[p]: repacked.frozen[p] for p in names if p in repacked.frozen},
        tuple((names[p], repacked.sites[p]) for p in names),
    )  # fmt: skip
    save_peft(renamed, tmp_path, dtype=np.float64)
    again = load_peft(tmp_path, renamed.base, axes={"layers/**": jlora.Axes((1,), (2,), stack=(0,))})
    assert again.sites["layers/q/kernel"].method.ranks == (3, 1, 3)
    jax.tree.map(close, jlora.merge(again), jlora.merge(renamed))


def test_stages() -> None:
    linear = jlora.rank.stages(0.0, 0.9, number=4, every=5, begin=10)
    np.testing.assert_allclose(
        [linear(t) for t in (0, 9, 10, 14, 15, 20, 25, 99)], [0, 0, 0, 0, 0.3, 0.6, 0.9, 0.9], atol=1e-9
    )
    geometric = jlora.rank.stages(1e-3, 10.0, number=5, every=1, kind="geometric")
    np.testing.assert_allclose([geometric(t) for t in range(5)], 10.0 ** np.arange(-3, 2), rtol=1e-6)
    log = jlora.rank.stages(1.0, 3.0, number=3, every=1, kind="log")
    np.testing.assert_allclose([log(t) for t in range(3)], np.log(np.linspace(np.e, np.e**3, 3)), rtol=1e-6)
    for options in ({"kind": "geometric"}, {"kind": "other"}, {"number": 1}, {"every": 0}):
        with pytest.raises(ValueError, match="stages"):
            jlora.rank.stages(**{"start": 0.0, "stop": 1.0, "every": 1, "number": 3} | options)


def test_tasks_in_a_row() -> None:
    """CoDyRA: gates fall to zero in training; the next task starts where the last one ended, and with its history the
    model is what it was."""
    adapted = moved(adapt(jlora.SoRA(4, alpha=4.0)))
    kappa = jlora.rank.stages(0.0, 0.1, number=3, every=2, begin=2)
    tx = optax.chain(optax.adam(0.05), jlora.optim.soft_threshold(kappa, reference=True))
    adapted, *_, traces = train(adapted, tx, tx.init(adapted.trainable), steps=range(12))
    gone = [int((np.asarray(own["gate"]) == 0).sum()) for own in adapted.trainable.values()]
    assert traces == 1 and 0 < sum(gone) < 20
    fresh, learned = jlora.rank.next_task(adapted, key=jax.random.key(1))
    jax.tree.map(close, effective(fresh), effective(adapted))
    jax.tree.map(close, effective(learned), effective(adapted))
    assert jax.tree.structure(fresh) == jax.tree.structure(adapted)
    assert all(isinstance(site.method, jlora.LoRA) for site in learned.sites.values())
    assert learned.base is adapted.base and np.all(np.asarray(fresh.trainable["first"]["gate"]) != 0)
    with pytest.raises(ValueError, match="next_task allocates the ranks of SoRA"):
        jlora.rank.next_task(adapt(jlora.LoRA(2)), key=jax.random.key(0))
