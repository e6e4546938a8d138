"""Nested ranks: against sums of truncations in float64 NumPy, and their truncation to plain LoRA."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora

pytestmark = pytest.mark.usefixtures("x64")

RANDOM = np.random.default_rng(0)
W, X = RANDOM.normal(size=(9, 8)), RANDOM.normal(size=(4, 9))
A, B = RANDOM.normal(size=(9, 8)), RANDOM.normal(size=(8, 8))
METHODS = [
    jlora.DyLoRA(8, alpha=6.0),
    jlora.MatryoshkaLoRA(8, scaling="none"),
    jlora.MatryoshkaLoRA(8, scaling="rank"),
    jlora.MatryoshkaLoRA(8),
]
KEY, AXES = jax.random.key(0), jlora.Axes((1,), (2,), (0,))
run = jlora.lift(lambda params, x: x @ params["kernel"], on_materialize="error")


def adapt(method):
    adapted = jlora.adapt({"kernel": jnp.asarray(W)}, method, key=jax.random.key(0))
    return adapted.replace(trainable={"kernel": jlora.Factors(jnp.asarray(A), jnp.asarray(B))})


def output(adapted, context=None):
    return run(adapted.bind(context=context), X)


def at_rank(scale: float, rank: int) -> np.ndarray:
    return X @ (W + scale * A[:, :rank] @ B[:rank])


def test_diagonal() -> None:
    """The example of R = 8 and the ranks 1, 2, 4, 8."""
    wanted = [2.560660171779821, 1.560660171779821] + [0.8535533905932737] * 2 + [0.35355339059327373] * 4
    np.testing.assert_allclose(jlora.MatryoshkaLoRA(8).diagonal(), wanted, atol=1e-15)
    assert jlora.MatryoshkaLoRA(6).sums == (1, 2, 4, 6) and jlora.MatryoshkaLoRA(1).sums == (1,)


@pytest.mark.parametrize("scaling", ["none", "rank", "sqrt"])
def test_matryoshka_is_the_sum_of_its_truncations(scaling) -> None:
    scale = {"none": lambda t: 1.0, "rank": lambda t: 1 / t, "sqrt": lambda t: t**-0.5}[scaling]
    ranks = (1, 3, 7)
    branches = sum(at_rank(scale(t), t) - X @ W for t in ranks)
    adapted = adapt(jlora.MatryoshkaLoRA(8, scaling=scaling, train_ranks=ranks))
    np.testing.assert_allclose(output(adapted), X @ W + branches, atol=1e-12)
    adapted = adapt(jlora.MatryoshkaLoRA(8, scaling=scaling, train_ranks=ranks, normalize=True))
    np.testing.assert_allclose(output(adapted), X @ W + branches / 3, atol=1e-12)


def test_matryoshka_of_one_rank_is_lora() -> None:
    pair = {"kernel": jlora.Factors(jnp.asarray(A), jnp.asarray(B), 1 / 8)}
    lora = jlora.adapt({"kernel": jnp.asarray(W)}, jlora.LoRA(8, alpha=1.0), key=jax.random.key(0))
    wanted = output(lora.replace(trainable=pair))
    got = output(adapt(jlora.MatryoshkaLoRA(8, scaling="rank", train_ranks=(8,))))
    np.testing.assert_allclose(got, wanted, atol=1e-12)


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_truncation(method) -> None:
    """Every rank by a mask, by a traced number, and as a plain LoRA."""
    adapted = adapt(method)
    traces = []

    @jax.jit
    def traced(rank):
        traces.append(None)
        return output(adapted, {"rank": rank})

    for rank in (1, 3, 8):
        scale = float(method.scale_of(rank))
        wanted = at_rank(scale, rank)
        np.testing.assert_allclose(traced(jnp.array(rank)), wanted, atol=1e-12)
        np.testing.assert_allclose(output(adapted, {"rank": rank}), wanted, atol=1e-12)
        lora = jlora.rank.truncate(adapted, rank)
        assert type(lora.sites["kernel"].method) is jlora.LoRA
        assert lora.trainable["kernel"].a.shape == (9, rank)
        np.testing.assert_allclose(output(lora), wanted, atol=1e-12)
        np.testing.assert_allclose(X @ jlora.merge(lora)["kernel"], wanted, atol=1e-12)
        fresh = jlora.adapt(lora.base, lora.sites["kernel"].method, key=jax.random.key(0))
        assert jax.tree.structure(fresh) == jax.tree.structure(lora)
    assert len(traces) == 1


def test_truncation_of_a_stack() -> None:
    w = jnp.asarray(RANDOM.normal(size=(3, 5, 4)))
    method = jlora.DyLoRA(4, alpha=2.0)
    adapted = jlora.adapt(
        {"w": w, "v": {"kernel": w[0]}}, {"w": method, "**": jlora.LoRA(2)}, axes={"w": AXES}, key=KEY
    )
    pair = jlora.Factors(jnp.asarray(RANDOM.normal(size=(3, 5, 4))), jnp.asarray(RANDOM.normal(size=(3, 4, 4))))
    adapted = adapted.replace(trainable=adapted.trainable | {"w": pair})
    cut = jlora.rank.truncate(adapted, 2)
    np.testing.assert_allclose(jlora.merge(cut)["w"], w + 1.0 * pair.a[:, :, :2] @ pair.b[:, :2], atol=1e-12)
    assert cut.trainable["v/kernel"] is adapted.trainable["v/kernel"]


def gradients(adapted, context):
    loss = lambda trainable: jnp.sum(jnp.sin(run(adapted.bind(trainable, context), X)))
    return jax.grad(loss)(adapted.trainable)["kernel"]


def test_dylora_draws_one_rank_from_the_key() -> None:
    method = jlora.DyLoRA(8, alpha=6.0)
    adapted = adapt(method)
    np.testing.assert_allclose(output(adapted), at_rank(6 / 8, 8), atol=1e-12)
    seen = set()
    for seed in range(30):
        key = jax.random.key(seed)
        rank = int(method.draw(key))
        seen.add(rank)
        if seed < 4:
            np.testing.assert_allclose(output(adapted, {"key": key}), at_rank(6 / rank, rank), atol=1e-12)
            # Two other leaves with the same key, one of them stacked: the same rank in the whole model.
            stacked = jlora.adapt({"w": jnp.zeros((2, 9, 8))}, method, "w", axes={"w": AXES}, key=KEY)
            pair = jlora.Factors(jnp.stack([A, A]), jnp.stack([B, B]))
            both = jlora.lift(lambda p: jax.lax.scan(lambda c, w: (c, X @ w), 0, p["w"])[1], on_materialize="error")
            got = both(stacked.replace(trainable={"w": pair}).bind(context={"key": key}))
            np.testing.assert_allclose(got, np.stack([at_rank(6 / rank, rank) - X @ W] * 2), atol=1e-12)
    assert min(seen) == 1 and max(seen) == 8


@pytest.mark.parametrize("train_ranks", [None, (2, 5, 8)])
def test_dylora_trains_what_the_rank_adds(train_ranks) -> None:
    context = {"key": jax.random.key(0), "rank": jnp.array(5)}
    below = 4 if train_ranks is None else 2
    nested = gradients(adapt(jlora.DyLoRA(8, train_ranks=train_ranks)), context)
    whole = gradients(adapt(jlora.DyLoRA(8, train_ranks=train_ranks, nested=False)), context)
    new = np.arange(8) >= below
    np.testing.assert_allclose(nested.a, np.where(new, whole.a, 0), atol=1e-12)
    np.testing.assert_allclose(nested.b, np.where(new[:, None], whole.b, 0), atol=1e-12)
    for grads in (nested, whole):
        assert np.all(grads.a[:, 5:] == 0) and np.all(grads.b[5:] == 0)
    assert np.all(nested.a[:, below:5] != 0) and np.all(whole.a[:, :5] != 0)
    # The whole gradient is that of y_5.
    g = X.T @ np.cos(at_rank(16 / 5, 5))
    np.testing.assert_allclose(whole.a[:, :5], 16 / 5 * g @ B[:5].T, atol=1e-10)
    np.testing.assert_allclose(whole.b[:5], 16 / 5 * A[:, :5].T @ g, atol=1e-10)


def test_dropout_of_a_drawn_rank() -> None:
    """With a key the input of the branch is dropped, too; the mean is the branch of the drawn rank."""
    adapted = adapt(jlora.DyLoRA(8, dropout=0.3))
    sample = jax.jit(jax.vmap(lambda key: output(adapted, {"key": key, "rank": 3})))
    samples = sample(jax.random.split(jax.random.key(1), 4000))
    error = (samples.mean(0) - at_rank(16 / 3, 3)) / (samples.std(0) / 4000**0.5)
    assert np.abs(error).max() < 5.0


def test_errors() -> None:
    with pytest.raises(ValueError, match="ranks from 1 to 8 are wanted"):
        jlora.DyLoRA(8, train_ranks=(4, 2))
    with pytest.raises(ValueError, match="holds the ranks 1 to 8; got 9"):
        jlora.rank.truncate(adapt(jlora.DyLoRA(8)), 9)
    with pytest.raises(ValueError, match="'none', 'rank' or 'sqrt'"):
        jlora.MatryoshkaLoRA(8, scaling="alpha")
    with pytest.raises(ValueError, match="nothing to truncate"):
        jlora.rank.truncate(jlora.adapt({"kernel": jnp.zeros((4, 4))}, jlora.LoRA(2), key=KEY), 1)
