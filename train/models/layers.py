"""The parts of a decoder-only transformer of the Llama kind, as ordinary Flax linen modules.

For token ids t[b, n], with L blocks:

    x_0     = E[t]
    h       = x_l + Attention(RMSNorm(x_l))
    x_{l+1} = h + W_down (silu(W_gate RMSNorm(h)) * W_up RMSNorm(h))
    logits  = RMSNorm(x_L) W_head        (W_head = E^T when the embedding is tied)

Attention is grouped-query with rotary positions (pairs (i, i + d/2), the half-split form of the Hugging Face models).
The blocks are stacked by `nn.scan`: each parameter of a block has a leading axis of length L, kernels are [L, in, out].
What families add to this (windows, caps, more norms, experts, ...) are the switches of `DecoderConfig`; where layers
differ, each kind of attention is prepared once and a flag that is scanned with the layers chooses.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from jlora.train.models.remat import Remat, rematerialized


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How the rotary frequencies are stretched for contexts longer than those of pre-training.

    `kind` "linear" divides all frequencies by `factor`. "llama3" divides those whose wavelength exceeds
    `original_max_position / low_freq_factor`, keeps those below `original_max_position / high_freq_factor`, and
    interpolates in between. Two depend on the length n of the longest sequence of the batch: "dynamic" raises theta
    with it once it exceeds `original_max_position`; "longrope" divides each frequency by a number of its own, of
    `short` or, beyond `original_max_position`, of `long`, and multiplies what is rotated by `amplitude`. With a cache,
    keys keep the frequencies of the length at which they were written.
    """

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192
    short: tuple[float, ...] = ()
    long: tuple[float, ...] = ()
    amplitude: float = 1.0


@dataclasses.dataclass(frozen=True)
class Experts:
    """The gated MLPs that replace the one of each block.

    Attributes:
      count: of them, and `per_token` is how many each token goes to.
      intermediate_size: of one expert.
      normalize: whether the probabilities of the chosen ones are made to sum to 1.
      shared_size: of one more MLP that all tokens go through, behind a sigmoid gate; 0 for none.
    """

    count: int
    per_token: int
    intermediate_size: int
    normalize: bool = True
    shared_size: int = 0


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
    activation: str = "silu"
    rotary_dim: int | None = None
    """How many entries of a head are rotated, from the first; None for all."""
    window: int | None = None
    """The most tokens that one attends to, itself included, in the layers that are local."""
    local_layers: tuple[bool, ...] | None = None
    """For each layer whether the window holds; None for all of them."""
    local_rope_theta: float | None = None
    """A rotary base of the local layers' own, not scaled."""
    attention_scale: float | None = None
    """What scores are multiplied by; None for head_dim^(-1/2)."""
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    """Scores, or logits, z become cap * tanh(z / cap)."""
    qk_norm: bool = False
    """RMSNorm of each head of the queries and keys, before the rotation."""
    unit_offset: bool = False
    """Norms multiply by 1 + scale."""
    sandwich_norms: bool = False
    """A norm after attention and MLP, too, before the sum with the residual."""
    scale_embeddings: bool = False
    """Embeddings are multiplied by hidden_size^(1/2), the head is not."""
    fused: bool = False
    """One kernel for query, key and value, and one for gate and up."""
    experts: Experts | None = None

    def __post_init__(self):
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"{self.num_heads} attention heads cannot share {self.num_kv_heads} key-value heads")
        if self.head_dim % 2:
            raise ValueError(f"rotary positions need an even head_dim, got {self.head_dim}")
        if (self.rotary_dim or 0) % 2:
            raise ValueError(f"rotary positions need an even number of rotated entries, got {self.rotary_dim}")
        if self.activation not in _ACTIVATIONS:
            raise ValueError(f"the activation {self.activation!r} is not built; known are {sorted(_ACTIVATIONS)}")
        if self.window is not None and self.window < 1:
            raise ValueError(f"a sliding window holds at least 1 token, got {self.window}")
        if self.local_layers is not None and len(self.local_layers) != self.num_layers:
            raise ValueError(f"types are given for {len(self.local_layers)} layers, and there are {self.num_layers}")
        if self.experts is not None and not 0 < self.experts.per_token <= self.experts.count:
            raise ValueError(f"a token cannot go to {self.experts.per_token} of {self.experts.count} experts")

    def is_local(self, layer: int) -> bool:
        return self.window is not None and (self.local_layers is None or self.local_layers[layer])


_ACTIVATIONS = {"silu": nn.silu, "gelu_pytorch_tanh": nn.gelu}


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

    def write(self, layer: Array, k: Array, v: Array) -> tuple["Cache", Array, Array]:
        """The cache with the keys and values of new tokens in one layer, and all that this layer then holds."""
        at = (layer, 0, self.index, 0, 0)
        keys, values = (jax.lax.dynamic_update_slice(a, x[None], at) for a, x in ((self.keys, k), (self.values, v)))
        k, v = (jax.lax.dynamic_index_in_dim(a, layer, keepdims=False) for a in (keys, values))
        return self.replace(keys=keys, values=values), k, v


def causal_mask(ids: Array, segment_ids: Array | None, cache: Cache | None) -> tuple[Array, Array, Cache | None]:
    """(mask [b or 1, t, slots], slots [t] that the tokens take, cache that knows their segments)."""
    length = ids.shape[1]
    slots = jnp.arange(length) + (0 if cache is None else cache.index)
    if cache is None:
        mask = (jnp.arange(length) <= slots[:, None])[None]
        if segment_ids is not None:
            mask &= segment_ids[:, :, None] == segment_ids[:, None, :]
        return mask, slots, None
    own = jnp.ones_like(ids) if segment_ids is None else segment_ids
    cache = cache.replace(segments=jax.lax.dynamic_update_slice(cache.segments, own, (0, cache.index)))
    mask = jnp.arange(cache.segments.shape[1]) <= slots[:, None]
    return mask & (own[:, :, None] == cache.segments[:, None]), slots, cache


def rotary_frequencies(
    config: DecoderConfig, local: bool = False, length: Int[Array, ""] | int = 0
) -> Float[Array, "half"]:
    """theta^(-2i/d) for i = 0 .. d/2 - 1, stretched by `config.rope_scaling` for sequences of `length`."""
    d = config.rotary_dim or config.head_dim
    powers = jnp.arange(0, d, 2, dtype=jnp.float32) / d
    if local and config.local_rope_theta is not None:
        return config.local_rope_theta**-powers
    frequency = config.rope_theta**-powers
    match config.rope_scaling:
        case None:
            return frequency
        case RopeScaling("linear", factor):
            return frequency / factor
        case RopeScaling("dynamic", factor, original_max_position=original):
            longer = factor * jnp.maximum(length, original) / original - (factor - 1)
            return frequency * longer ** (-powers * d / (d - 2))
        case RopeScaling("longrope", original_max_position=original, short=short, long=long):
            return frequency / jnp.where(length > original, jnp.array(long), jnp.array(short))
        case RopeScaling("llama3", factor, low, high, original):
            turns = original * frequency / (2 * math.pi)
            keep = jnp.clip((turns - low) / (high - low), 0.0, 1.0)
            return frequency * (keep + (1 - keep) / factor)
    raise ValueError(f"rope scaling {config.rope_scaling.kind!r} is not built")


def rotate(x: Float[Array, "b t heads d"], cos: Float[Array, "b t h"], sin: Float[Array, "b t h"]) -> Array:
    """Rotates each pair (x[i], x[i + h]) with i < h by its angle; from 2 h on, x stays. Computed in float32."""
    half = cos.shape[-1]
    cos, sin = cos[:, :, None], sin[:, :, None]
    first, second, rest = jnp.split(x.astype(jnp.float32), [half, 2 * half], axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1).astype(x.dtype)


def attend(
    q: Float[Array, "b t heads d"],
    k: Float[Array, "b s kv_heads d"],
    v: Float[Array, "b s kv_heads d"],
    mask: Bool[Array, "b t s"],
    scale: float | None,
    softcap: float | None,
) -> Float[Array, "b t heads d"]:
    """Grouped-query attention where `mask` allows it."""
    if softcap is None:
        return jax.nn.dot_product_attention(q, k, v, mask=mask[:, None], scale=scale)
    batch, length, heads, d = q.shape
    q = q.reshape(batch, length, k.shape[2], heads // k.shape[2], d)
    scores = jnp.einsum("btkgd,bskd->bkgts", q, k, preferred_element_type=jnp.float32)
    scores = softcap * jnp.tanh(scores * ((d**-0.5 if scale is None else scale) / softcap))
    scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("bkgts,bskd->btkgd", weights, v).reshape(batch, length, heads, d)


def _dense(config: DecoderConfig, features: int, bias: bool, name: str) -> nn.Dense:
    init = nn.initializers.normal(config.init_range)
    return nn.Dense(features, bias, config.dtype, config.dtype, kernel_init=init, name=name)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * scale, or (1 + scale) with an offset; computed in float32."""

    eps: float
    dtype: str
    unit_offset: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "... d"]) -> Float[Array, "... d"]:
        init = nn.initializers.zeros_init() if self.unit_offset else nn.initializers.ones_init()
        scale = self.param("scale", init, (x.shape[-1],), self.dtype).astype(jnp.float32)
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.eps)
        return (y * (1 + scale if self.unit_offset else scale)).astype(x.dtype)


def _norm(config: DecoderConfig, name: str | None = None) -> RMSNorm:
    return RMSNorm(config.norm_eps, config.dtype, config.unit_offset, name=name)


class Attention(nn.Module):
    """Grouped-query self-attention; with a cache, layer `layer` of it is written and read."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x, cos, sin, mask, cache, layer):
        c = self.config
        batch, length, _ = x.shape
        sizes = {"q": c.num_heads, "k": c.num_kv_heads, "v": c.num_kv_heads}
        if c.fused:
            ends = [c.num_heads * c.head_dim, (c.num_heads + c.num_kv_heads) * c.head_dim]
            parts = jnp.split(_dense(c, sum(sizes.values()) * c.head_dim, c.qkv_bias, "qkv_proj")(x), ends, axis=-1)
        else:
            parts = [_dense(c, n * c.head_dim, c.qkv_bias, f"{name}_proj")(x) for name, n in sizes.items()]
        q, k, v = (y.reshape(batch, length, n, c.head_dim) for y, n in zip(parts, sizes.values(), strict=True))
        if c.qk_norm:
            q, k = _norm(c, "q_norm")(q), _norm(c, "k_norm")(k)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if cache is not None:
            cache, k, v = cache.write(layer, k, v)
        y = attend(q, k, v, mask, c.attention_scale, c.attention_softcap)
        return _dense(c, c.hidden_size, c.o_bias, "o_proj")(y.reshape(batch, length, c.num_heads * c.head_dim)), cache


class GatedMLP(nn.Module):
    """(act(x W_gate) * (x W_up)) W_down."""

    config: DecoderConfig
    size: int

    @nn.compact
    def __call__(self, x: Float[Array, "... d"]) -> Float[Array, "... d"]:
        c = self.config
        if c.fused:
            gate, up = jnp.split(_dense(c, 2 * self.size, c.mlp_bias, "gate_up_proj")(x), 2, axis=-1)
        else:
            gate, up = (_dense(c, self.size, c.mlp_bias, name)(x) for name in ("gate_proj", "up_proj"))
        return _dense(c, c.hidden_size, c.mlp_bias, "down_proj")(_ACTIVATIONS[c.activation](gate) * up)


class ExpertMLPs(nn.Module):
    """A gated MLP of each expert, kernels [E, in, out] with gate and up side by side, on the tokens that chose it.

    The rows go to their experts by sorting, so that one ragged product serves all of them.
    """

    config: DecoderConfig

    @nn.compact
    def __call__(self, x: Float[Array, "n d"], chosen: Int[Array, "n k"]) -> Float[Array, "n k d"]:
        c, e = self.config, self.config.experts
        init = nn.initializers.normal(c.init_range)
        gate_up = self.param("gate_up_proj", init, (e.count, c.hidden_size, 2 * e.intermediate_size), c.dtype)
        down = self.param("down_proj", init, (e.count, e.intermediate_size, c.hidden_size), c.dtype)
        order = jnp.argsort(chosen.reshape(-1))
        sizes = jnp.bincount(chosen.reshape(-1), length=e.count).astype(jnp.int32)
        gate, up = jnp.split(jax.lax.ragged_dot(x[order // e.per_token], gate_up, sizes), 2, axis=-1)
        y = jax.lax.ragged_dot(_ACTIVATIONS[c.activation](gate) * up, down, sizes)
        return y[jnp.argsort(order)].reshape(*chosen.shape, -1)


class MixtureOfExperts(nn.Module):
    """sum_e p_e MLP_e(x) over the likeliest experts of each token, p = softmax(x W_gate); plus the shared one's."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        c, e = self.config, self.config.experts
        tokens = x.reshape(-1, c.hidden_size)
        scores = _dense(c, e.count, False, "gate")(tokens)
        weights, chosen = jax.lax.top_k(jax.nn.softmax(scores.astype(jnp.float32)), e.per_token)
        if e.normalize:
            weights /= weights.sum(axis=-1, keepdims=True)
        y = jnp.einsum("nkd,nk->nd", ExpertMLPs(c, name="experts")(tokens, chosen), weights.astype(x.dtype))
        if e.shared_size:
            gate = nn.sigmoid(_dense(c, 1, False, "shared_expert_gate")(tokens))
            y += gate * GatedMLP(c, e.shared_size, name="shared_expert")(tokens)
        return y.reshape(x.shape)


class Block(nn.Module):
    """One layer: the carry of the scan over layers is (activations, cache or None).

    Args:
      layer: its number and its kind, by which one of `kinds` is taken: cosines, sines and mask.
    """

    config: DecoderConfig

    @nn.compact
    def __call__(self, carry, layer, kinds):
        x, cache = carry
        number, kind = layer
        c = self.config
        chosen = kinds[0] if len(kinds) == 1 else jax.tree.map(lambda *each: jax.lax.select_n(kind, *each), *kinds)
        mlp = GatedMLP(c, c.intermediate_size, name="mlp") if c.experts is None else MixtureOfExperts(c, name="mlp")
        y, cache = Attention(c, name="self_attn")(_norm(c, "input_layernorm")(x), *chosen, cache, number)
        if c.sandwich_norms:
            x = x + _norm(c, "post_attention_layernorm")(y)
            y = mlp(_norm(c, "pre_feedforward_layernorm")(x))
            return (x + _norm(c, "post_feedforward_layernorm")(y), cache), None
        x = x + y
        return (x + mlp(_norm(c, "post_attention_layernorm")(x)), cache), None


class Decoder(nn.Module):
    """Embedding, the scanned blocks, and the final norm."""

    config: DecoderConfig
    remat: Remat = "none"

    def setup(self):
        c = self.config
        init = nn.initializers.normal(c.init_range)
        self.embed_tokens = nn.Embed(c.vocab_size, c.hidden_size, c.dtype, c.dtype, embedding_init=init)
        # Inside scan nothing can be merged across iterations, so the barriers that prevent it would only cost.
        block = rematerialized(Block, self.remat, prevent_cse=False)
        self.layers = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast),
            length=c.num_layers,
        )(c)
        self.norm = _norm(c)

    def __call__(self, ids, positions=None, segment_ids=None, cache=None):
        c = self.config
        mask, slots, cache = causal_mask(ids, segment_ids, cache)
        if positions is None:
            positions = slots[None]
        local = [c.is_local(i) for i in range(c.num_layers)]
        kinds = [self._kind(kind, positions, slots, mask) for kind in sorted(set(local))]
        layers = jnp.arange(c.num_layers), jnp.array(local, jnp.int32)  # the second is read where there are two kinds
        x = self.embed_tokens(ids)
        if c.scale_embeddings:
            x *= jnp.asarray(math.sqrt(c.hidden_size), x.dtype)
        (x, cache), _ = self.layers((x, cache), layers, kinds)
        if cache is not None:
            cache = cache.replace(index=cache.index + ids.shape[1])
        return self.norm(x), cache

    def _kind(self, local, positions, slots, mask):
        """What one kind of layer attends with: cosines and sines [b, t, half], and the mask."""
        c = self.config
        if local:
            mask = mask & (slots[:, None] - jnp.arange(mask.shape[-1]) < c.window)
        angles = positions[..., None].astype(jnp.float32) * rotary_frequencies(c, local, jnp.max(positions) + 1)
        scaling = None if local and c.local_rope_theta is not None else c.rope_scaling
        amplitude = 1.0 if scaling is None else scaling.amplitude
        return amplitude * jnp.cos(angles), amplitude * jnp.sin(angles), mask


class Head(nn.Module):
    """The kernel [in, vocab] of a head that is not the embedding."""

    features: int
    vocab_size: int
    dtype: str
    init: Callable

    def setup(self):
        self.kernel = self.param("kernel", self.init, (self.features, self.vocab_size), self.dtype)


class LanguageModel(nn.Module):
    """What models of the next token have in common, over `hidden` and `head`.

    `module.apply({"params": params}, ids)` gives logits [b, t, vocab] in float32. Optional arguments:
    `positions` [b, t] (default 0, 1, ...), `segment_ids` [b, t] (a token attends only to earlier tokens of its own
    segment: several sequences packed in a row, or 0 for padding), and `cache`: then the result is (logits, new cache).
    """

    def hidden(self, ids, positions, segment_ids, cache) -> tuple[Float[Array, "b t d"], Cache | None]:
        """The activations that the head reads, and the cache with the new tokens."""
        raise NotImplementedError

    def head(self) -> tuple[Array, int]:
        """The head's matrix, and which of its axes is contracted: of an embedding that is tied to it, the second."""
        raise NotImplementedError

    def __call__(
        self,
        ids: Int[Array, "b t"],
        positions: Int[Array, "b t"] | None = None,
        segment_ids: Int[Array, "b t"] | None = None,
        cache: Cache | None = None,
    ):
        x, updated = self.hidden(ids, positions, segment_ids, cache)
        logits = self.logits(x)
        return logits if cache is None else (logits, updated)

    def logits(self, x: Float[Array, "*n d"]) -> Float[Array, "*n vocab"]:
        w, axis = self.head()
        logits = dot_general_f32(x, w, (((x.ndim - 1,), (axis,)), ((), ())))
        cap = getattr(self.config, "logit_softcap", None)
        return logits if cap is None else cap * jnp.tanh(logits / cap)

    def nll(
        self, ids: Int[Array, "b t"], positions: Any, segment_ids: Any, targets: Int[Array, "b t"], chunk: int
    ) -> Float[Array, "b t"]:
        """-log p(targets), without ever holding all logits: those of `chunk` positions at a time are formed, and again
        in the backward pass."""
        x, _ = self.hidden(ids, positions, segment_ids, None)
        batch, length, _ = x.shape
        pad = -length % chunk

        @jax.checkpoint
        def one(part):
            return optax.softmax_cross_entropy_with_integer_labels(self.logits(part[0]), part[1])

        def parts(a):
            a = jnp.pad(a, ((0, 0), (0, pad), *((0, 0),) * (a.ndim - 2)))
            return jnp.moveaxis(a.reshape(batch, -1, chunk, *a.shape[2:]), 1, 0)

        nll = jax.lax.map(one, (parts(x), parts(targets)))
        return jnp.moveaxis(nll, 0, 1).reshape(batch, -1)[:, :length]


class CausalLM(LanguageModel):
    """A decoder with a language-model head.

    `remat` says what of each block the backward pass computes again.
    """

    config: DecoderConfig
    remat: Remat = "none"

    def setup(self):
        self.model = Decoder(self.config, self.remat)
        if not self.config.tie_embeddings:
            init = nn.initializers.normal(self.config.init_range)
            self.lm_head = Head(self.config.hidden_size, self.config.vocab_size, self.config.dtype, init)

    def hidden(self, ids, positions, segment_ids, cache):
        return self.model(ids, positions, segment_ids, cache)

    def head(self):
        return (self.model.embed_tokens.embedding, 1) if self.config.tie_embeddings else (self.lm_head.kernel, 0)


def dot_general_f32(x, w, dimension_numbers, precision=None):
    """A product whose result is float32, also for bfloat16 inputs: logits lose too much otherwise."""
    return jax.lax.dot_general(x, w, dimension_numbers, precision, preferred_element_type=jnp.float32)
