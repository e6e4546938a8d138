"""The compiled training step, on a model small enough to see through: next-token logits from one matrix."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jlora
from jlora.train.loop import make_train_step

VOCAB = 12


def model(variables, ids, positions, segment_ids):
    return jax.nn.one_hot(ids, VOCAB, dtype=variables["params"]["kernel"].dtype) @ variables["params"]["kernel"]


def batch_of(passes: int, rows: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    ids = rng.integers(0, VOCAB, (4, 6)).astype(np.int32)
    mask = (rng.random((4, 6)) < 0.6).astype(np.float32)
    zeros = np.zeros_like(ids)
    batch = {"ids": ids, "mask": mask, "positions": zeros, "segment_ids": zeros + 1}
    return {name: array.reshape(passes, rows, 6) for name, array in batch.items()}


def setting(method=None, dtype=jnp.float32, optimizer=None):
    params = {"kernel": jax.random.normal(jax.random.key(1), (VOCAB, VOCAB), dtype)}
    adapted = jlora.adapt(params, method or jlora.LoRA(3), key=jax.random.key(0))
    # LoRA's b starts at zero, where a has no gradient yet and dropout no effect
    moved = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(2), x.shape, x.dtype), adapted.trainable)
    optimizer = optimizer or optax.sgd(0.5)
    step = make_train_step(jlora.lift(model), optimizer)
    return adapted, moved, optimizer, step


def take(step, adapted, trainable, optimizer, batch, number=1):
    copied = jax.tree.map(jnp.copy, trainable)  # the step donates what it gets
    return step(copied, optimizer.init(trainable), adapted.replace(trainable={}), batch, jax.random.key(5), number)


def test_accumulated_passes_equal_one_large_pass():
    adapted, trainable, optimizer, step = setting()
    large, _, metrics = take(step, adapted, trainable, optimizer, batch_of(1, 4))
    small, _, accumulated = take(step, adapted, trainable, optimizer, batch_of(2, 2))
    # rows score different numbers of tokens: a mean of means would differ
    assert len({row.sum() for row in batch_of(2, 2)["mask"]}) > 1
    np.testing.assert_allclose(metrics["loss"], accumulated["loss"], rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), large, small)


def test_dropout_is_a_function_of_the_step():
    adapted, trainable, optimizer, step = setting(jlora.LoRA(3, dropout=0.5))
    losses = [float(take(step, adapted, trainable, optimizer, batch_of(1, 4), n)[2]["loss"]) for n in (1, 1, 2)]
    assert losses[0] == losses[1] != losses[2]


def test_adapters_and_optimizer_stay_float32_over_a_bfloat16_base():
    adapted, trainable, optimizer, step = setting(dtype=jnp.bfloat16, optimizer=optax.adamw(1e-2))
    updated, opt_state, _ = take(step, adapted, trainable, optimizer, batch_of(1, 4))
    dtypes = {leaf.dtype for leaf in jax.tree.leaves((updated, opt_state)) if jnp.issubdtype(leaf.dtype, jnp.floating)}
    assert dtypes == {jnp.dtype("float32")}


def test_step_is_compiled_once_and_holds_no_base():
    adapted, trainable, optimizer, step = setting()
    for number in range(3):
        take(step, adapted, trainable, optimizer, batch_of(1, 4), np.int32(number))
    assert step._cache_size() == 1
    lowered = step.lower(
        trainable, optimizer.init(trainable), adapted.replace(trainable={}), batch_of(1, 4), jax.random.key(5), 1
    )
    assert 'dense<"0x' not in lowered.as_text()  # a large constant would be the base, closed over


@pytest.mark.parametrize("method", [jlora.LoRA(3), jlora.Full()])
def test_base_is_never_donated(method):
    adapted, trainable, optimizer, step = setting(method)
    before = np.asarray(adapted.base["kernel"]).copy()
    take(step, adapted, trainable, optimizer, batch_of(1, 4))
    np.testing.assert_array_equal(adapted.base["kernel"], before)
