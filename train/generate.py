"""Text generation with a key-value cache: greedy, or sampled by temperature and nucleus."""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, PyTree

from jlora.train import distributed
from jlora.train.models.layers import Cache, DecoderConfig


def generate(
    apply: Callable[..., Any],
    params: PyTree,
    prompts: Sequence[Sequence[int]],
    *,
    config: DecoderConfig,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    key: Key[Array, ""] | None = None,
    eos_id: int | Iterable[int] | None = None,
    batch_size: int = 128,
) -> list[list[int]]:
    """Continues each prompt until an end token or `max_new_tokens`.

    Args:
      apply: `module.apply`, or `jlora.lift(module.apply)` for adapted parameters. Pass the same object again to reuse
        what was compiled: once for each bucket of (batch, prompt length), both rounded up to powers of two.
      params: the module's parameters, or `adapted.bind()`.
      prompts: token ids, with whatever the model wants at the beginning (BOS). Of any lengths and number.
      config: the module's, for the shape of the cache.
      max_new_tokens: the most that is generated for one prompt.
      temperature: 0 takes the likeliest token; above, logits are divided by it and a token is drawn.
      top_p: draws from the smallest set of tokens whose probability reaches `top_p`.
      key: for drawing. Each prompt has a stream of its own, so that its text does not depend on the batching.
      eos_id: token or tokens that end a text.
      batch_size: the most prompts processed together.

    Returns:
      For each prompt the new ids, without the end token.
    """
    if temperature < 0 or not 0 < top_p <= 1:
        raise ValueError(f"wanted temperature >= 0 and 0 < top_p <= 1, got {temperature} and {top_p}")
    if temperature > 0 and key is None:
        raise ValueError("drawing at a temperature needs a key: pass key=jax.random.key(seed), or temperature=0")
    if max_new_tokens < 1 or batch_size < 1:
        raise ValueError(f"wanted max_new_tokens >= 1 and batch_size >= 1, got {max_new_tokens} and {batch_size}")
    for i, prompt in enumerate(prompts):
        if not 0 < len(prompt) <= config.max_positions - max_new_tokens:
            raise ValueError(
                f"prompt {i} has {len(prompt)} tokens; with max_new_tokens={max_new_tokens} this model of "
                f"{config.max_positions} positions takes 1 to {config.max_positions - max_new_tokens}"
            )
    ends = () if eos_id is None else (eos_id,) if isinstance(eos_id, int) else tuple(eos_id)
    key = jax.random.key(0) if key is None else key
    outputs: list[list[int]] = [[] for _ in prompts]
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for start in range(0, len(prompts), batch_size):
        chosen = by_length[start : start + batch_size]
        ids, segment_ids = _left_padded([prompts[i] for i in chosen], min(batch_size, _power_of_two(len(chosen))))
        rows = np.zeros(len(ids), np.int32)
        rows[: len(chosen)] = chosen
        keys = jax.vmap(functools.partial(jax.random.fold_in, key))(rows)
        new, counts = _decode(
            params, ids, segment_ids, keys, temperature, top_p, apply=apply, config=config,
            max_new_tokens=max_new_tokens, ends=ends, greedy=temperature == 0,
        )  # fmt: skip
        for i, tokens, count in zip(chosen, *distributed.to_host((new, counts)), strict=False):
            outputs[i] = tokens[:count].tolist()
    return outputs


def _power_of_two(n: int, least: int = 1) -> int:
    return max(least, 1 << (n - 1).bit_length())


def _left_padded(prompts: Sequence[Sequence[int]], rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids and segments [rows, P], P a power of two above the longest prompt; rows in excess are padding only."""
    # At least one column more than the longest prompt, so that all but the last token is never an empty array.
    width = _power_of_two(max(map(len, prompts)) + 1, least=32)
    ids, segment_ids = np.zeros((2, rows, width), np.int32)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = prompt
        segment_ids[row, width - len(prompt) :] = 1
    return ids, segment_ids


@functools.partial(jax.jit, static_argnames=("apply", "config", "max_new_tokens", "ends", "greedy"))
def _decode(
    params: PyTree,
    ids: Int[Array, "b p"],
    segment_ids: Int[Array, "b p"],
    keys: Key[Array, "b"],
    temperature: Float[Array, ""],
    top_p: Float[Array, ""],
    *,
    apply: Callable[..., Any],
    config: DecoderConfig,
    max_new_tokens: int,
    ends: tuple[int, ...],
    greedy: bool,
) -> tuple[Int[Array, "b new"], Int[Array, "b"]]:
    """New tokens of each row, and how many of them there are before its end token."""
    batch, width = ids.shape
    variables = {"params": params}
    positions = jnp.maximum(jnp.cumsum(segment_ids, axis=1) - 1, 0)
    cache = Cache.empty(config, batch, width + max_new_tokens)
    # All but the last token fill the cache. Their logits are not used, so the product with the head is not compiled.
    _, cache = apply(variables, ids[:, :-1], positions[:, :-1], segment_ids[:, :-1], cache)

    def running(state):
        step, *_, done = state
        return (step < max_new_tokens) & ~jnp.all(done)

    def advance(state):
        step, token, cache, new, counts, done = state
        logits, cache = apply(variables, token, positions[:, -1:] + step, None, cache)
        if greedy:
            token = jnp.argmax(logits[:, 0], axis=-1)
        else:
            step_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, step)
            token = jax.vmap(_draw, (0, 0, None, None))(step_keys, logits[:, 0], temperature, top_p)
        done |= jnp.isin(token, jnp.array(ends, token.dtype))
        new = jax.lax.dynamic_update_slice(new, token[:, None], (0, step))
        return step + 1, token[:, None], cache, new, counts + ~done, done

    new = jnp.zeros((batch, max_new_tokens), jnp.int32)
    done = segment_ids[:, -1] == 0
    state = (0, ids[:, -1:], cache, new, jnp.zeros(batch, jnp.int32), done)
    *_, new, counts, _ = jax.lax.while_loop(running, advance, state)
    return new, counts


def _draw(key: Key[Array, ""], logits: Float[Array, "v"], temperature: Array, top_p: Array) -> Int[Array, ""]:
    """One token from softmax(logits / temperature), cut to the likeliest tokens that together reach `top_p`."""
    scaled = logits / temperature
    order = jnp.argsort(-scaled)
    probabilities = jax.nn.softmax(scaled[order])
    # A token stays if those before it do not reach top_p yet: the likeliest always does.
    stays = jnp.cumsum(probabilities) - probabilities < top_p
    return order[jax.random.categorical(key, jnp.where(stays, scaled[order], -jnp.inf))].astype(jnp.int32)
