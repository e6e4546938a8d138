"""BERT: a post-norm encoder of tokens (Devlin et al. 2019), with a masked-language-model or a classification head."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jlora.train.models import encoders, hf
from jlora.train.models.encoders import ACTIVATIONS, dense, layer_norm, table
from jlora.train.models.layers import dot_general_f32
from jlora.train.models.remat import Remat


@dataclasses.dataclass(frozen=True, kw_only=True)
class BertConfig(encoders.EncoderConfig):
    """Shapes and switches of BERT and RoBERTa."""

    vocab_size: int
    max_positions: int
    """The most tokens of a text."""
    type_vocab_size: int = 2
    pad_id: int = 0
    position_offset: int = 0
    """Row of the first token's position. If not 0, padding (`pad_id`) is not counted and has the row before it."""


def config(source: dict[str, Any]) -> BertConfig:
    """Reads a Hugging Face config.json of `model_type` "bert"."""
    return read_config(source, "Bert", "BertForPreTraining")


_READ = (
    "vocab_size", "max_position_embeddings", "type_vocab_size", "position_embedding_type",
    # Of the first releases, for parts that were never published.
    "directionality", "pooler_fc_size", "pooler_num_attention_heads", "pooler_num_fc_layers", "pooler_size_per_head",
    "pooler_type",
)  # fmt: skip


def read_config(source: dict[str, Any], name: str, *masked_lm: str, offset: bool = False) -> BertConfig:
    """The fields of BERT and its relatives, whose architectures begin with `name`."""
    heads = {
        f"{name}Model": None,
        f"{name}ForMaskedLM": "masked_lm",
        **dict.fromkeys(masked_lm, "masked_lm"),
        f"{name}ForSequenceClassification": "classification",
    }
    fields = encoders.encoder_fields(source, heads, _READ)
    hf.refuse_unless(source, "position_embedding_type", "absolute")
    if fields["head"] == "masked_lm":
        hf.refuse_unless(source, "tie_word_embeddings", True)
    pad_id = source.get("pad_token_id") or 0
    first = pad_id + 1 if offset else 0
    return BertConfig(
        **fields,
        vocab_size=hf.needed(source, "vocab_size"),
        max_positions=hf.needed(source, "max_position_embeddings") - first,
        type_vocab_size=source.get("type_vocab_size", 2),
        pad_id=pad_id,
        position_offset=first,
    )


class Embeddings(nn.Module):
    """LayerNorm(word + position + type)."""

    config: BertConfig

    def setup(self):
        c = self.config
        self.word_embeddings = table(c, c.vocab_size)
        self.position_embeddings = table(c, c.max_positions + c.position_offset)
        self.token_type_embeddings = table(c, c.type_vocab_size)
        self.LayerNorm = layer_norm(c)

    def __call__(self, ids, positions, token_type_ids):
        c = self.config
        if positions is None and c.position_offset:
            real = ids != c.pad_id
            positions = jnp.where(real, jnp.cumsum(real, axis=1), 0) - 1
        elif positions is None:
            positions = jnp.arange(ids.shape[1])[None]
        types = jnp.zeros_like(ids) if token_type_ids is None else token_type_ids
        x = self.word_embeddings(ids) + self.position_embeddings(positions + c.position_offset)
        return self.LayerNorm(x + self.token_type_embeddings(types))


class SelfAttention(nn.Module):
    config: BertConfig

    @nn.compact
    def __call__(self, x, mask):
        q, k, v = (dense(self.config, x.shape[-1], name)(x) for name in ("query", "key", "value"))
        return encoders.attention(q, k, v, self.config.num_heads, mask)


class Output(nn.Module):
    """LayerNorm(residual + y W + b)."""

    config: BertConfig

    @nn.compact
    def __call__(self, y, residual):
        y = dense(self.config, self.config.hidden_size, "dense")(y)
        return layer_norm(self.config, "LayerNorm")(y + residual)


class Attention(nn.Module):
    config: BertConfig

    @nn.compact
    def __call__(self, x, mask):
        return Output(self.config, name="output")(SelfAttention(self.config, name="self")(x, mask), x)


class Intermediate(nn.Module):
    config: BertConfig

    @nn.compact
    def __call__(self, x):
        return ACTIVATIONS[self.config.activation](dense(self.config, self.config.intermediate_size, "dense")(x))


class Layer(nn.Module):
    config: BertConfig

    @nn.compact
    def __call__(self, x, mask):
        x = Attention(self.config, name="attention")(x, mask)
        return Output(self.config, name="output")(Intermediate(self.config, name="intermediate")(x), x), None


class Encoder(nn.Module):
    config: BertConfig
    remat: Remat = "none"

    def setup(self):
        self.layer = encoders.scanned(Layer, self.config, self.remat)

    def __call__(self, x, mask):
        return self.layer(x, mask)[0]


class Pooler(nn.Module):
    """tanh(x_0 W + b) of the first token."""

    config: BertConfig

    @nn.compact
    def __call__(self, x):
        return jnp.tanh(dense(self.config, self.config.hidden_size, "dense")(x[:, 0]))


class BertModel(nn.Module):
    """The encoder alone: gives the last layer [b, t, d] and the pooled first token [b, d] (None without `pooled`).

    All arguments but `ids` [b, t] are optional and of the same shape: `positions` (default 0, 1, ...), `segment_ids` (a
    token sees the tokens of its own segment; an attention mask of 1 and 0 is such) and `token_type_ids` (default 0).
    """

    config: BertConfig
    remat: Remat = "none"
    pooled: bool = True

    def setup(self):
        self.embeddings = Embeddings(self.config)
        self.encoder = Encoder(self.config, self.remat)
        if self.pooled:
            self.pooler = Pooler(self.config)

    def __call__(
        self,
        ids: Int[Array, "b t"],
        positions: Int[Array, "b t"] | None = None,
        segment_ids: Int[Array, "b t"] | None = None,
        token_type_ids: Int[Array, "b t"] | None = None,
    ):
        x = self.embeddings(ids, positions, token_type_ids)
        x = self.encoder(x, encoders.same_segment(segment_ids))
        return x, self.pooler(x) if self.pooled else None


class Transform(nn.Module):
    config: BertConfig

    @nn.compact
    def __call__(self, x):
        x = ACTIVATIONS[self.config.activation](dense(self.config, self.config.hidden_size, "dense")(x))
        return layer_norm(self.config, "LayerNorm")(x)


class Predictions(nn.Module):
    """LayerNorm(act(x W + b)) E^T + bias, in float32: E is the table of the words."""

    config: BertConfig

    @nn.compact
    def __call__(self, x, words):
        x = Transform(self.config, name="transform")(x)
        bias = self.param("bias", nn.initializers.zeros, (self.config.vocab_size,), self.config.dtype)
        return dot_general_f32(x, words, (((2,), (1,)), ((), ()))) + bias


class MaskedLMHead(nn.Module):
    config: BertConfig

    @nn.compact
    def __call__(self, x, words):
        return Predictions(self.config, name="predictions")(x, words)


class BertForMaskedLM(nn.Module):
    """Logits [b, t, vocab] in float32; arguments as for `BertModel`."""

    config: BertConfig
    remat: Remat = "none"

    def setup(self):
        self.bert = BertModel(self.config, self.remat, pooled=False)
        self.cls = MaskedLMHead(self.config)

    def __call__(self, ids, positions=None, segment_ids=None, token_type_ids=None) -> Float[Array, "b t v"]:
        x, _ = self.bert(ids, positions, segment_ids, token_type_ids)
        return self.cls(x, self.bert.embeddings.word_embeddings.embedding)


class BertForSequenceClassification(nn.Module):
    """Logits [b, labels] in float32, from the pooled first token; arguments as for `BertModel`."""

    config: BertConfig
    remat: Remat = "none"

    def setup(self):
        self.bert = BertModel(self.config, self.remat)
        self.classifier = dense(self.config, self.config.num_labels, dot_general=dot_general_f32)

    def __call__(self, ids, positions=None, segment_ids=None, token_type_ids=None) -> Float[Array, "b labels"]:
        _, pooled = self.bert(ids, positions, segment_ids, token_type_ids)
        return self.classifier(pooled)


HEADS = {None: BertModel, "masked_lm": BertForMaskedLM, "classification": BertForSequenceClassification}


def module(config: BertConfig, remat: Remat = "none") -> nn.Module:
    return HEADS[config.head](config, remat)


LAYOUT = hf.Layout(
    spellings=((r"LayerNorm\.gamma$", "LayerNorm.weight"), (r"LayerNorm\.beta$", "LayerNorm.bias")),
    prefix="bert.",
    # Buffers, the other name of a tied head, and what the module of another head leaves over.
    new_head=r"^classifier/|/pooler/",
    redundant=r"embeddings\.position_ids$|^cls\.|(^|\.)pooler\.|^classifier\.",
)
FAMILY = hf.Family("bert", config, module, LAYOUT, writes_text=False)
