"""MarkBoard: signatures of a small classifier, all of them, and what a swap changes."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jlora
from jlora.methods import markboard

BITS, KEY = 3, jax.random.key(0)
run = jlora.lift(lambda params, x: x @ params["kernel"], on_materialize="error")


@pytest.mark.parametrize("states", [1, 2])
def test_signatures_choose_branches(states) -> None:
    with jax.enable_x64(True):
        random = np.random.default_rng(0)
        w, x = random.normal(size=(9, 8)), random.normal(size=(5, 9))
        method = jlora.MarkBoard(2, BITS, alpha=3.0, states=states)
        adapted = jlora.adapt({"kernel": jnp.asarray(w)}, method, key=KEY)
        pairs = jax.tree.map(lambda leaf: jnp.asarray(random.normal(size=leaf.shape)), adapted.trainable["kernel"])
        adapted = adapted.replace(trainable={"kernel": pairs})

        def wanted(signature, x=x):
            names = [f"bit{i}_{v}" for i, v in enumerate(signature) if f"bit{i}_{v}" in pairs]
            return x @ (w + sum(1.5 * np.asarray(pairs[name].a @ pairs[name].b) for name in names))

        for signature in itertools.product((0, 1), repeat=BITS):
            for given in (signature, np.array(signature), jnp.array(signature)):
                got = run(adapted.bind(context={"signature": given}), x)
                np.testing.assert_allclose(got, wanted(signature), atol=1e-12)
            copy = jlora.rank.choose(adapted, {"signature": signature})
            np.testing.assert_allclose(x @ jlora.merge(copy)["kernel"], wanted(signature), atol=1e-12)
            assert bool(copy.sites) == (states == 2 or any(signature))
        np.testing.assert_allclose(run(adapted.bind(), x), wanted((1,) * BITS), atol=1e-12)
        each = jnp.array([[0, 0, 0], [0, 1, 0], [1, 1, 1], [1, 0, 0], [0, 1, 1]])
        got = run(adapted.bind(context={"signature": each}), x)
        np.testing.assert_allclose(got, [wanted(s, x[i]) for i, s in enumerate(each.tolist())], atol=1e-12)
        if states == 2:  # a swap changes the columns of its bit and no others
            one, other = (
                jlora.rank.choose(adapted, {"signature": s}).trainable["kernel"] for s in ((0, 1, 1), (0, 0, 1))
            )
            same = (one.a == other.a).all(axis=0)
            assert same.tolist() == [True, True, False, False, True, True]


def test_watermarked_classifier() -> None:
    """Every branch is trained alone on its trigger set; then all signatures are read from answers, and the accuracy on
    clean inputs stays."""
    random = np.random.default_rng(0)
    centers = 3.0 * random.normal(size=(4, 48))
    labels = np.arange(200) % 4
    clean = centers[labels] + random.normal(size=(200, 48))
    params = {"first": {"kernel": jnp.asarray(random.normal(size=(48, 64)) / 7, jnp.float32)}}
    hidden = np.tanh(clean @ np.asarray(params["first"]["kernel"]))
    head = np.linalg.lstsq(hidden, np.eye(4)[labels], rcond=None)[0]
    params["head"] = {"kernel": jnp.asarray(head, jnp.float32)}
    triggers = random.normal(size=(BITS, 6, 48)) * 3.0
    model = lambda params, x: jnp.tanh(x @ params["first"]["kernel"]) @ params["head"]["kernel"]
    lifted = jlora.lift(model, on_materialize="error")
    order = np.argsort(np.asarray(model(params, triggers)), axis=-1)
    marks = {0: order[..., -1], 1: order[..., -2]}  # a 0 keeps the answer, a 1 gives the next best
    adapted = jlora.adapt(params, jlora.MarkBoard(2, BITS, alpha=2.0), "first/kernel", key=KEY)
    before = np.asarray(model(params, clean)).argmax(-1)
    tx = optax.adam(2e-2)

    @jax.jit
    def train(trainable, inputs, targets, branch):
        def step(carry, _):
            def loss(trainable):
                logits = 4 * lifted(adapted.bind(trainable, {"branch": branch}), inputs)
                return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()

            trainable, state = carry
            updates, state = tx.update(jax.grad(loss)(trainable), state)
            return (optax.apply_updates(trainable, updates), state), None

        return jax.lax.scan(step, (trainable, tx.init(trainable)), length=250)[0][0]

    names = list(adapted.sites["first/kernel"].method.ranks)
    for i, v in itertools.product(range(BITS), (0, 1)):
        inputs, targets = np.concatenate([*[triggers[i]] * 8, clean]), np.concatenate([*[marks[v][i]] * 8, before])
        after = train(adapted.trainable, inputs, targets, jnp.array(names.index(f"bit{i}_{v}")))["first/kernel"]
        moved = [k for k, f in after.items() if np.any(f.b != adapted.trainable["first/kernel"][k].b)]
        assert moved == [f"bit{i}_{v}"]
        adapted = adapted.replace(trainable={"first/kernel": after})
    for signature in itertools.product((0, 1), repeat=BITS):
        copy = jlora.merge(jlora.rank.choose(adapted, {"signature": signature}))
        predict = lambda x, copy=copy: np.asarray(model(copy, x)).argmax(-1)
        bits, shares = markboard.verify(predict, triggers, marks[1])
        assert tuple(bits) == signature, shares
        assert (predict(clean) == labels).mean() > (before == labels).mean() - 0.01
    copy = markboard.obfuscate(jlora.rank.choose(adapted, {"signature": (1, 0, 1)}), jax.random.key(1))
    predict = lambda tree: lambda x: np.asarray(lifted(tree, x)).argmax(-1)
    assert markboard.verify(predict(copy.bind()), triggers, marks[1])[0].tolist() == [1, 0, 1]
    accuracy = lambda tree: (predict(tree)(clean) == labels).mean()
    assert accuracy(copy.bind()) > (before == labels).mean() - 0.01
    assert accuracy(copy.base) < 0.6


@pytest.mark.parametrize("stack", [(), (3,)])
def test_obfuscation_keeps_the_function(stack) -> None:
    with jax.enable_x64(True):
        random = np.random.default_rng(0)
        axes = {"w": jlora.Axes((1,), (2,), (0,))} if stack else None
        params = {"w": jnp.asarray(random.normal(size=(*stack, 12, 10))), "b": jnp.zeros(10)}
        adapted = jlora.adapt(params, jlora.MarkBoard(1, 4, alpha=2.0), "w", axes=axes, key=KEY)
        adapted = adapted.replace(
            trainable=jax.tree.map(lambda x: jnp.asarray(random.normal(size=x.shape)), adapted.trainable)
        )
        copy = jlora.rank.choose(adapted, {"signature": (1, 0, 0, 1)})
        tied = markboard.obfuscate(copy, jax.random.key(1), strength=0.3)
        np.testing.assert_allclose(jlora.merge(tied)["w"], jlora.merge(copy)["w"], atol=1e-12)
        taken = np.asarray(params["w"] - tied.base["w"])
        norm = lambda x: np.linalg.norm(x, axis=(-2, -1))
        np.testing.assert_allclose(norm(taken), 0.3 * norm(params["w"]), rtol=1e-10)
        old, new = (np.asarray(it.trainable["w"].product()) for it in (copy, tied))
        for both in zip(old.reshape(-1, 12, 10), new.reshape(-1, 12, 10), strict=True):  # one row and one column space
            assert np.linalg.matrix_rank(np.concatenate(both)) == np.linalg.matrix_rank(np.hstack(both)) == 4
        np.testing.assert_array_equal(tied.base["b"], params["b"])
        assert jax.tree.structure(tied) == jax.tree.structure(copy)
        with pytest.raises(ValueError, match="plain LoRA is obfuscated"):
            markboard.obfuscate(adapted, KEY)
        fresh = jlora.adapt(params, jlora.LoRA(2), "w", axes=axes, key=KEY)
        with pytest.raises(ValueError, match="Train the branches first"):
            markboard.obfuscate(fresh, KEY)
        with pytest.raises(ValueError, match="a positive number"):
            markboard.obfuscate(copy, KEY, strength=0)


def test_verify() -> None:
    answers = {0: [1, 1, 2, 2], 1: [3, 3, 3, 3]}
    bits, shares = markboard.verify(lambda i: answers[i], [0, 1], [[1, 1, 1, 1], [1, 1, 1, 3]])
    assert bits.tolist() == [1, 0] and shares.tolist() == [0.5, 0.25]
    bits, shares = markboard.verify(lambda x: x, [[[1, 2], [3, 4]]], [[[1, 2], [3, 5]]])  # rows of token ids
    assert shares.tolist() == [0.5]
    with pytest.raises(ValueError, match="labels, not logits"):
        markboard.verify(lambda x: np.zeros((2, 3)), [0], [[1, 1]])


def test_errors() -> None:
    for signature in ((1, 0), (1, 0, 2), (1, 0, 1, 1)):
        with pytest.raises(ValueError, match="3 zeros and ones"):
            jlora.MarkBoard(2, 3, signature=signature)
    with pytest.raises(ValueError, match=r"\[3\] or \[batch, 3\]"):
        jlora.MarkBoard(2, 3).strengths({"signature": jnp.array([1, 0])})
    with pytest.raises(ValueError, match="one of bit0_0, bit0_1"):
        jlora.MarkBoard(2, 1).strengths({"branch": "bit1_0"})
