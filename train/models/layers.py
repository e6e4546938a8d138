"""The parts of a decoder-only transformer of the Llama kind, as ordinary Flax linen modules.

For token ids t[b, n], with L blocks:

    x_0     = E[t]
    h       = x_l + Attention(RMSNorm(x_l))
    x_{l+1} = h + W_down (silu(W_gate RMSNorm(h)) * W_up RMSNorm(h))
    logits  = RMSNorm(x_L) W_head        (W_head = E^T when the embedding is tied)

Attention is grouped-query with rotary positions (pairs (i, i + d/2), the half-split form of the Hugging Face models).
The blocks are stacked by `nn.scan`: each parameter of a block has a leading axis of length L, kernels are [L, in, out].
"""

import dataclasses
import math

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How the rotary frequencies are stretched for contexts longer than those of pre-training.

    `kind` "linear" divides all frequencies by `factor`. "llama3" divides those whose wavelength exceeds
    `original_max_position / low_freq_factor`, keeps those below `original_max_position / high_freq_factor`, and
    interpolates in between.
    """

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Shapes and switches of a decoder; hashable, so that equal configurations share compiled functions."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    tie_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    init_range: float = 0.02
    dtype: str = "float32"
    """Of parameters and activations. Norms, softmax, rotary angles and logits are float32 whatever it says."""

    def __post_init__(self):
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"{self.num_heads} attention heads cannot share {self.num_kv_heads} key-value heads")
        if self.head_dim % 2:
            raise ValueError(f"rotary positions need an even head_dim, got {self.head_dim}")


@flax.struct.dataclass
class Cache:
    """Keys and values of the tokens seen so far, in slots 0 .. index-1 of S.

    `segments` says what each slot holds: -1 nothing yet, 0 padding, 1 the sequence. All rows write to the same slots,
    so prompts of different lengths are padded on the left.
    """

    keys: Float[Array, "layers batch slots kv_heads head_dim"]
    values: Float[Array, "layers batch slots kv_heads head_dim"]
    segments: Int[Array, "batch slots"]
    index: Int[Array, ""]

    @classmethod
    def empty(cls, config: DecoderConfig, batch: int, slots: int) -> "Cache":
        shape = (config.num_layers, batch, slots, config.num_kv_heads, config.head_dim)
        zeros = jnp.zeros(shape, config.dtype)
        return cls(zeros, zeros, jnp.full((batch, slots), -1, jnp.int32), jnp.zeros((), jnp.int32))


def rotary_frequencies(config: DecoderConfig) -> Float[Array, "half"]:
    """theta^(-2i/d) for i = 0 .. d/2 - 1, stretched by `config.rope_scaling`."""
    frequency = config.rope_theta ** (-jnp.arange(0, config.head_dim, 2, dtype=jnp.float32) / config.head_dim)
    scaling = config.rope_scaling
    if scaling is None:
        return frequency
    if scaling.kind == "linear":
        return frequency / scaling.factor
    turns = scaling.original_max_position * frequency / (2 * math.pi)
    keep = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    keep = jnp.clip(keep, 0.0, 1.0)
    return frequency * (keep + (1 - keep) / scaling.factor)


def rotate(x: Float[Array, "b t heads d"], cos: Float[Array, "b t h"], sin: Float[Array, "b t h"]) -> Array:
    """Rotates each pair (x[i], x[i + d/2]) by its angle; `h` = d/2. Computed in float32."""
    cos, sin = cos[:, :, None], sin[:, :, None]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def _dense(config: DecoderConfig, features: int, bias: bool, name: str) -> nn.Dense:
    init = nn.initializers.normal(config.init_range)
    return nn.Dense(features, bias, config.dtype, config.dtype, kernel_init=init, name=name)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * scale, computed in float32."""

    eps: float
    dtype: str

    @nn.compact
    def __call__(self, x: Float[Array, "... d"]) -> Float[Array, "... d"]:
        scale = self.param("scale", nn.initializers.ones_init(), (x.shape[-1],), self.dtype)
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.eps)
        return (y * scale.astype(jnp.float32)).astype(x.dtype)


class Attention(nn.Module):
    """Grouped-query self-attention; with a cache, layer `layer` of it is written and read."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x, cos, sin, mask, cache, layer):
        c = self.config
        batch, length, _ = x.shape
        q = _dense(c, c.num_heads * c.head_dim, c.qkv_bias, "q_proj")(x)
        k = _dense(c, c.num_kv_heads * c.head_dim, c.qkv_bias, "k_proj")(x)
        v = _dense(c, c.num_kv_heads * c.head_dim, c.qkv_bias, "v_proj")(x)
        q = rotate(q.reshape(batch, length, c.num_heads, c.head_dim), cos, sin)
        k = rotate(k.reshape(batch, length, c.num_kv_heads, c.head_dim), cos, sin)
        v = v.reshape(batch, length, c.num_kv_heads, c.head_dim)
        if cache is not None:
            at = (layer, 0, cache.index, 0, 0)
            cache = cache.replace(
                keys=jax.lax.dynamic_update_slice(cache.keys, k[None], at),
                values=jax.lax.dynamic_update_slice(cache.values, v[None], at),
            )
            k, v = (jax.lax.dynamic_index_in_dim(a, layer, keepdims=False) for a in (cache.keys, cache.values))
        y = jax.nn.dot_product_attention(q, k, v, mask=mask[:, None]).reshape(batch, length, c.num_heads * c.head_dim)
        return _dense(c, c.hidden_size, c.o_bias, "o_proj")(y), cache


class GatedMLP(nn.Module):
    """(silu(x W_gate) * (x W_up)) W_down."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        c = self.config
        gate = _dense(c, c.intermediate_size, c.mlp_bias, "gate_proj")(x)
        up = _dense(c, c.intermediate_size, c.mlp_bias, "up_proj")(x)
        return _dense(c, c.hidden_size, c.mlp_bias, "down_proj")(nn.silu(gate) * up)


class Block(nn.Module):
    """One layer: the carry of the scan over layers is (activations, cache or None)."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, carry, layer, cos, sin, mask):
        x, cache = carry
        c = self.config
        h = RMSNorm(c.norm_eps, c.dtype, name="input_layernorm")(x)
        y, cache = Attention(c, name="self_attn")(h, cos, sin, mask, cache, layer)
        x = x + y
        h = RMSNorm(c.norm_eps, c.dtype, name="post_attention_layernorm")(x)
        return (x + GatedMLP(c, name="mlp")(h), cache), None


class Decoder(nn.Module):
    """Embedding, the scanned blocks, and the final norm."""

    config: DecoderConfig
    remat: bool = False

    def setup(self):
        c = self.config
        init = nn.initializers.normal(c.init_range)
        self.embed_tokens = nn.Embed(c.vocab_size, c.hidden_size, c.dtype, c.dtype, embedding_init=init)
        # Inside scan nothing can be merged across iterations, so the barriers that prevent it would only cost.
        block = nn.remat(Block, prevent_cse=False) if self.remat else Block
        self.layers = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast),
            length=c.num_layers,
        )(c)
        self.norm = RMSNorm(c.norm_eps, c.dtype)

    def __call__(self, ids, positions=None, segment_ids=None, cache=None):
        length = ids.shape[1]
        start = 0 if cache is None else cache.index
        slots = jnp.arange(length) + start
        if positions is None:
            positions = slots[None]
        if cache is None:
            mask = (jnp.arange(length) <= slots[:, None])[None]
            if segment_ids is not None:
                mask &= segment_ids[:, :, None] == segment_ids[:, None, :]
        else:
            own = jnp.ones_like(ids) if segment_ids is None else segment_ids
            cache = cache.replace(segments=jax.lax.dynamic_update_slice(cache.segments, own, (0, start)))
            mask = jnp.arange(cache.segments.shape[1]) <= slots[:, None]
            mask = mask & (own[:, :, None] == cache.segments[:, None])
        angles = positions[..., None].astype(jnp.float32) * rotary_frequencies(self.config)
        layers = jnp.arange(self.config.num_layers)
        carry = (self.embed_tokens(ids), cache)
        (x, cache), _ = self.layers(carry, layers, jnp.cos(angles), jnp.sin(angles), mask)
        if cache is not None:
            cache = cache.replace(index=cache.index + length)
        return self.norm(x), cache


class CausalLM(nn.Module):
    """A decoder with a language-model head.

    `module.apply({"params": params}, ids)` gives logits [b, t, vocab] in float32. Optional arguments:
    `positions` [b, t] (default 0, 1, ...), `segment_ids` [b, t] (a token attends only to earlier tokens of its own
    segment: several sequences packed in a row, or 0 for padding), and `cache`: then the result is (logits, new cache).
    With `remat`, the backward pass recomputes the inside of each block instead of storing it.
    """

    config: DecoderConfig
    remat: bool = False

    def setup(self):
        self.model = Decoder(self.config, self.remat)
        if not self.config.tie_embeddings:
            init = nn.initializers.normal(self.config.init_range)
            self.lm_head = nn.Dense(
                self.config.vocab_size, False, self.config.dtype, self.config.dtype, kernel_init=init,
                dot_general=_dot_general_f32,
            )  # fmt: skip

    def __call__(
        self,
        ids: Int[Array, "b t"],
        positions: Int[Array, "b t"] | None = None,
        segment_ids: Int[Array, "b t"] | None = None,
        cache: Cache | None = None,
    ):
        x, updated = self.model(ids, positions, segment_ids, cache)
        if self.config.tie_embeddings:
            embedding = self.model.embed_tokens.embedding
            logits = _dot_general_f32(x, embedding, (((2,), (1,)), ((), ())))
        else:
            logits = self.lm_head(x)
        return logits if cache is None else (logits, updated)


def _dot_general_f32(x, w, dimension_numbers, precision=None):
    """A product whose result is float32, also for bfloat16 inputs: logits lose too much otherwise."""
    return jax.lax.dot_general(x, w, dimension_numbers, precision, preferred_element_type=jnp.float32)
