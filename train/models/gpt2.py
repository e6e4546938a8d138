"""GPT-2: a pre-norm decoder with learned positions, one product for Q, K and V, and a tied head (Radford et al. 2019).

Its files store the weights of the blocks as [in, out].
"""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jlora.train.models import hf
from jlora.train.models.encoders import ACTIVATIONS, dense, layer_norm, table
from jlora.train.models.layers import Head, LanguageModel, causal_mask
from jlora.train.models.remat import Remat, rematerialized


@dataclasses.dataclass(frozen=True, kw_only=True)
class GPT2Config:
    """Shapes and switches of GPT-2; hashable, so that equal ones share compiled functions."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    max_positions: int
    activation: str = "gelu_new"
    norm_eps: float = 1e-5
    scale_scores: bool = True
    """Whether scores are divided by sqrt(head_dim)."""
    scale_by_layer: bool = False
    """Whether the scores of the n-th layer are divided by n, too."""
    tie_embeddings: bool = True
    init_range: float = 0.02
    dtype: str = "float32"
    """Of parameters and activations. Norms, softmax and logits are float32 whatever it says."""

    def __post_init__(self):
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation_function is {self.activation!r}; built are {', '.join(ACTIVATIONS)}")
        if self.hidden_size % self.num_heads:
            raise ValueError(f"n_embd {self.hidden_size} is not a multiple of {self.num_heads} attention heads")

    @property
    def num_kv_heads(self) -> int:
        return self.num_heads

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads


_READ = (
    "vocab_size", "n_embd", "n_inner", "n_layer", "n_head", "n_positions", "activation_function", "layer_norm_epsilon",
    "scale_attn_weights", "scale_attn_by_inverse_layer_idx", "tie_word_embeddings", "initializer_range",
    "add_cross_attention",
    # What is always float32 here, the window of the first release, and heads that are not built.
    "reorder_and_upcast_attn", "n_ctx", "summary_type", "summary_use_proj", "summary_activation",
    "summary_proj_to_labels",
)  # fmt: skip


def config(source: dict[str, Any]) -> GPT2Config:
    """Reads a Hugging Face config.json of `model_type` "gpt2"."""
    need = functools.partial(hf.needed, source)
    architectures = source.get("architectures") or ["GPT2LMHeadModel"]
    if architectures[0] not in ("GPT2LMHeadModel", "GPT2Model"):
        raise ValueError(f"the architecture is {architectures[0]!r}; built is GPT2LMHeadModel")
    hf.refuse_unknown(source, _READ)
    hf.refuse_unless(source, "add_cross_attention", False)
    return GPT2Config(
        vocab_size=need("vocab_size"),
        hidden_size=need("n_embd"),
        intermediate_size=source.get("n_inner") or 4 * need("n_embd"),
        num_layers=need("n_layer"),
        num_heads=need("n_head"),
        max_positions=need("n_positions"),
        activation=source.get("activation_function", "gelu_new"),
        norm_eps=source.get("layer_norm_epsilon", 1e-5),
        scale_scores=source.get("scale_attn_weights", True),
        scale_by_layer=source.get("scale_attn_by_inverse_layer_idx", False),
        tie_embeddings=source.get("tie_word_embeddings", True),
        init_range=source.get("initializer_range", 0.02),
    )


class Attention(nn.Module):
    """Causal self-attention; with a cache, layer `layer` of it is written and read."""

    config: GPT2Config

    @nn.compact
    def __call__(self, x, mask, cache, layer):
        c = self.config
        heads = (*x.shape[:2], c.num_heads, c.head_dim)
        q, k, v = (y.reshape(heads) for y in jnp.split(dense(c, 3 * c.hidden_size, "c_attn")(x), 3, axis=-1))
        if c.scale_by_layer:
            q = q / (layer + 1).astype(q.dtype)
        if cache is not None:
            cache, k, v = cache.write(layer, k, v)
        scale = None if c.scale_scores else 1.0
        y = jax.nn.dot_product_attention(q, k, v, mask=mask[:, None], scale=scale).reshape(x.shape)
        return dense(c, c.hidden_size, "c_proj")(y), cache


class MLP(nn.Module):
    config: GPT2Config

    @nn.compact
    def __call__(self, x):
        c = self.config
        return dense(c, c.hidden_size, "c_proj")(ACTIVATIONS[c.activation](dense(c, c.intermediate_size, "c_fc")(x)))


class Block(nn.Module):
    """One layer: the carry of the scan over layers is (activations, cache or None)."""

    config: GPT2Config

    @nn.compact
    def __call__(self, carry, layer, mask):
        x, cache = carry
        y, cache = Attention(self.config, name="attn")(layer_norm(self.config, "ln_1")(x), mask, cache, layer)
        x = x + y
        return (x + MLP(self.config, name="mlp")(layer_norm(self.config, "ln_2")(x)), cache), None


class Transformer(nn.Module):
    """Embeddings, the scanned blocks, and the final norm."""

    config: GPT2Config
    remat: Remat = "none"

    def setup(self):
        c = self.config
        self.wte = table(c, c.vocab_size)
        self.wpe = table(c, c.max_positions)
        block = rematerialized(Block, self.remat, prevent_cse=False)
        self.h = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast),
            length=c.num_layers,
        )(c)
        self.ln_f = layer_norm(c)

    def __call__(self, ids, positions, segment_ids, cache):
        mask, slots, cache = causal_mask(ids, segment_ids, cache)
        x = self.wte(ids) + self.wpe(slots[None] if positions is None else positions)
        (x, cache), _ = self.h((x, cache), jnp.arange(self.config.num_layers), mask)
        if cache is not None:
            cache = cache.replace(index=cache.index + ids.shape[1])
        return self.ln_f(x), cache


class GPT2LMHeadModel(LanguageModel):
    """GPT-2 with a language-model head."""

    config: GPT2Config
    remat: Remat = "none"

    def setup(self):
        self.transformer = Transformer(self.config, self.remat)
        if not self.config.tie_embeddings:
            init = nn.initializers.normal(self.config.init_range)
            self.lm_head = Head(self.config.hidden_size, self.config.vocab_size, self.config.dtype, init)

    def hidden(self, ids, positions, segment_ids, cache):
        return self.transformer(ids, positions, segment_ids, cache)

    def head(self):
        return (self.transformer.wte.embedding, 1) if self.config.tie_embeddings else (self.lm_head.kernel, 0)


# The blocks of old files hold their causal masks, too.
LAYOUT = hf.Layout(prefix="transformer.", in_out="/h/", redundant=r"\.attn\.(masked_)?bias$")
FAMILY = hf.Family("gpt2", config, GPT2LMHeadModel, LAYOUT)
