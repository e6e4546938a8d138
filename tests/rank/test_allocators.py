"""The laws of every allocator: one compilation between repacks, the budget, and repacked equal to masked."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from models import adapt, effective, moved, train

import jlora
from jlora.rank.allocator import Sensitivity

pytestmark = pytest.mark.usefixtures("x64")

MATRICES = 5
EACH = {  # method, allocator, steps, total rank at the end
    "adalora": (jlora.AdaLoRA(4), lambda: jlora.rank.adalora(2, total_steps=8, warmup_steps=1, final_steps=2), 8, 10),
    "adalora of parameters": (
        jlora.AdaLoRA(4),
        lambda: jlora.rank.adalora(None, parameters=120, total_steps=6, final_steps=2),
        6,
        None,
    ),
    "increlora": (jlora.AdaLoRA(4), lambda: jlora.rank.increlora(2, top_h=2), 8, 10),
    "triadapt": (jlora.TriAdaptLoRA(3), lambda: jlora.rank.triadapt(2, steps=6, threshold=(0.9, 0.0)), 10, 10),
}


def ranks_of(adapted) -> int:
    return sum(int((own["mask"] != 0).sum()) for own in adapted.frozen.values())


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if "of" in name.split() else []) for name in EACH]
)
def test_trains_and_repacks(name) -> None:
    method, make, steps, total = EACH[name]
    allocator, tx = make(), optax.adam(0.03)
    state, adapted = allocator.init(adapt(method))
    masked, opt_state, state, traces = train(adapted, tx, tx.init(adapted.trainable), allocator, state, range(steps))
    assert traces == 1
    assert jax.tree.structure(masked) == jax.tree.structure(adapted)
    if total is None:
        assert count_in_use(masked) <= 120
    else:
        assert ranks_of(masked) == total
    repacked, (smaller, follows) = jlora.repack(masked, (opt_state, state))
    close = functools.partial(np.testing.assert_allclose, atol=1e-12)
    jax.tree.map(close, effective(masked), effective(repacked))
    masked, *_ = train(masked, tx, opt_state, allocator, state, [steps, steps + 1])
    repacked, *_, traces = train(repacked, tx, smaller, allocator, follows, [steps, steps + 1])
    assert traces == 1
    jax.tree.map(close, effective(masked), effective(repacked))


def count_in_use(adapted) -> int:
    """Trainable numbers of the terms in use, by hand."""
    sizes = {"first": 5 + 6 + 1, "layers": 6 + 6 + 1, "last": 6 + 4 + 1}
    return sum(sizes[path] * int((own["mask"] != 0).sum()) for path, own in adapted.frozen.items())


def test_top() -> None:
    scores = {"a": jnp.array([[0.5, 0.1], [0.9, 0.5]]), "b": jnp.array([0.5, 0.7])}
    kept = jax.jit(jlora.rank.top)(scores, 3)
    np.testing.assert_array_equal(kept["a"], [[1, 0], [1, 0]])  # of equal ones, what comes first
    np.testing.assert_array_equal(kept["b"], [0, 1])
    for budget in range(7):
        assert sum(float(k.sum()) for k in jlora.rank.top(scores, budget).values()) == budget
    paid = jlora.rank.top(scores, 5, {"a": 2, "b": 3})
    np.testing.assert_array_equal(paid["a"], [[0, 0], [1, 0]])
    np.testing.assert_array_equal(paid["b"], [0, 1])


def test_scores_that_are_no_numbers() -> None:
    scores = {"a": jnp.array([0.5, jnp.nan]), "b": jnp.array([0.5])}
    with pytest.raises(ValueError, match=r"scores of \['a'\] are not numbers"):
        jlora.rank.top(scores, 1)
    assert all(bool(jnp.isnan(k).all()) for k in jax.jit(jlora.rank.top)(scores, 1).values())
    allocator, adapted = jlora.rank.adalora(1, total_steps=1), adapt(jlora.AdaLoRA(2))
    state, adapted = allocator.init(adapted)
    grads = jax.tree.map(lambda p: jnp.full(p.shape, jnp.nan), adapted.trainable)
    _, diverged = jax.jit(allocator.update)(state, moved(adapted), grads, 0)
    _, diverged = jax.jit(allocator.update)(Sensitivity(grads, grads), diverged, grads, 1)
    with pytest.raises(ValueError, match="mask is not finite"):
        jlora.repack(diverged)


def test_budgets_that_cannot_be() -> None:
    rank = jlora.rank
    for allocator, method, message in (
        (rank.adalora(0.5, total_steps=9), jlora.AdaLoRA(4), "below one rank for each matrix, 5"),
        (rank.adalora(5, total_steps=9), jlora.AdaLoRA(4), "above what there is to begin with, 20"),
        (rank.adalora(None, parameters=9, total_steps=9), jlora.AdaLoRA(4), "9 parameters, is below one .* 62"),
        (rank.adalora(2, total_steps=9), jlora.LoRA(4), r"adalora allocates the ranks of AdaLoRA.*got \['LoRA'\]"),
        (rank.increlora(0.5), jlora.AdaLoRA(4), "below what they start with, 1 each"),
        (rank.increlora(4), jlora.AdaLoRA(4), "hold 15 ranks beside a reserve of 1 .* and 20 are wanted"),
        (rank.triadapt(0.5, steps=3), jlora.TriAdaptLoRA(3), "at least what they start with, 1 each"),
        (rank.triadapt(4, steps=3), jlora.TriAdaptLoRA(3), "at most what the adapters hold, 15 together"),
    ):
        with pytest.raises(ValueError, match=message):
            allocator.init(adapt(method))
    for call in (
        lambda: rank.adalora(4, total_steps=9, warmup_steps=5, final_steps=5),
        lambda: rank.adalora(4, total_steps=9, parameters=100),
        lambda: rank.adalora(4, total_steps=9, lottery=0.1),
        lambda: rank.increlora(4, every=0),
        lambda: rank.triadapt(4, steps=0),
    ):
        with pytest.raises(ValueError, match="wanted|at least 1|key="):
            call()
