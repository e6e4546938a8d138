"""The next-token loss with the logits of a few positions at a time: the same numbers, and never all logits at once."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import unfreeze

import jlora
from jlora.train.call import Call
from jlora.train.metrics import next_token_loss
from jlora.train.models.gpt2 import GPT2Config, GPT2LMHeadModel
from jlora.train.models.layers import CausalLM, DecoderConfig

VOCAB, LENGTH = 40, 7
MODELS = {
    "tied": CausalLM(DecoderConfig(VOCAB, 8, 12, 2, 2, 1, 4, 16, tie_embeddings=True)),
    "head": CausalLM(DecoderConfig(VOCAB, 8, 12, 2, 2, 1, 4, 16, logit_softcap=3.0)),
    "gpt2": GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCAB, hidden_size=8, intermediate_size=12, num_layers=2, num_heads=2, max_positions=16,
            tie_embeddings=False,
        )
    ),
}  # fmt: skip


def batch_of(rows: int, length: int = LENGTH, vocab: int = VOCAB):
    ids, scored = jax.random.randint(jax.random.key(0), (rows, length), 0, vocab), jax.random.key(1)
    return {
        "ids": ids,
        "mask": (jax.random.uniform(scored, ids.shape) < 0.7).astype(jnp.float32),
        "positions": jnp.broadcast_to(jnp.arange(length), ids.shape),
        "segment_ids": jnp.ones_like(ids),
    }


@functools.cache
def adapted_of(name: str):
    module, ids = MODELS[name], batch_of(2)["ids"]
    params = unfreeze(module.init(jax.random.key(2), ids)["params"])
    table = "**/wte/embedding" if name == "gpt2" else "**/embed_tokens/embedding"
    rules = {table: jlora.LoRA(2), "**/layers/**": jlora.LoRA(2), "**/h/**": jlora.LoRA(2), "lm_head/**": jlora.DoRA(2)}
    fn = lambda params, ids: module.apply({"params": params}, ids)
    adapted = jlora.adapt(params, rules, fn=fn, args=(ids,), key=jax.random.key(3), allow_unmatched=True)
    return adapted.replace(trainable=jax.tree.map(lambda x: x + 0.1, adapted.trainable))


@pytest.mark.parametrize("name", MODELS)
def test_value_and_gradients_are_those_of_all_logits(name):
    adapted, batch = adapted_of(name), batch_of(2)
    apply = jlora.lift(MODELS[name].apply, on_materialize="error")

    @functools.partial(jax.jit, static_argnames="chunk")
    def both(trainable, chunk):
        loss = lambda trainable: next_token_loss(Call(apply, adapted.bind(trainable)), batch, chunk=chunk)
        return jax.value_and_grad(loss, has_aux=True)(trainable)

    (wanted, count), wanted_gradients = both(adapted.trainable, 0)
    for chunk in (3, LENGTH):
        (loss, scored), gradients = both(adapted.trainable, chunk)
        assert scored == count
        np.testing.assert_allclose(loss, wanted, rtol=1e-6)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), gradients, wanted_gradients)


@pytest.mark.optimized
def test_all_logits_are_never_there():
    vocab, length, rows = 4096, 64, 2
    module = CausalLM(DecoderConfig(vocab, 8, 12, 2, 2, 1, 4, 64))
    batch = batch_of(rows, length, vocab)
    params = jax.eval_shape(module.init, jax.random.key(0), batch["ids"])["params"]
    fn = lambda params, ids: module.apply({"params": params}, ids)
    adapted = jlora.adapt(params, jlora.LoRA(2), fn=fn, args=(batch["ids"],), key=jax.random.key(0))
    apply = jlora.lift(module.apply)

    def temporary(chunk):
        def loss(trainable, adapted, batch):
            return next_token_loss(Call(apply, adapted.bind(trainable)), batch, chunk=chunk)[0]

        compiled = jax.jit(jax.grad(loss)).lower(adapted.trainable, adapted, batch).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    logits = rows * length * vocab * 4
    assert temporary(0) > logits
    assert temporary(8) < logits / 2
