"""RoBERTa (Liu et al. 2019): BERT's encoder whose positions count from `pad_id` + 1 without padding; other heads."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from jlora.train.models import hf
from jlora.train.models.bert import BertConfig, BertModel, read_config
from jlora.train.models.encoders import ACTIVATIONS, dense, layer_norm
from jlora.train.models.layers import dot_general_f32
from jlora.train.models.remat import Remat


def config(source: dict[str, Any]) -> BertConfig:
    """Reads a Hugging Face config.json of `model_type` "roberta"."""
    return read_config({"pad_token_id": 1} | source, "Roberta", offset=True)


class MaskedLMHead(nn.Module):
    """LayerNorm(gelu(x W + b)) E^T + bias, in float32: E is the table of the words."""

    config: BertConfig

    @nn.compact
    def __call__(self, x, words):
        x = ACTIVATIONS["gelu"](dense(self.config, self.config.hidden_size, "dense")(x))  # whatever hidden_act is
        x = layer_norm(self.config, "layer_norm")(x)
        bias = self.param("bias", nn.initializers.zeros, (self.config.vocab_size,), self.config.dtype)
        return dot_general_f32(x, words, (((2,), (1,)), ((), ()))) + bias


class ClassificationHead(nn.Module):
    """tanh(x_0 W + b) W_out + b_out of the first token."""

    config: BertConfig

    @nn.compact
    def __call__(self, x):
        x = jnp.tanh(dense(self.config, self.config.hidden_size, "dense")(x[:, 0]))
        return dense(self.config, self.config.num_labels, "out_proj", dot_general=dot_general_f32)(x)


class RobertaForMaskedLM(nn.Module):
    """Logits [b, t, vocab] in float32; arguments as for `BertModel`."""

    config: BertConfig
    remat: Remat = "none"

    def setup(self):
        self.roberta = BertModel(self.config, self.remat, pooled=False)
        self.lm_head = MaskedLMHead(self.config)

    def __call__(self, ids, positions=None, segment_ids=None, token_type_ids=None) -> Float[Array, "b t v"]:
        x, _ = self.roberta(ids, positions, segment_ids, token_type_ids)
        return self.lm_head(x, self.roberta.embeddings.word_embeddings.embedding)


class RobertaForSequenceClassification(nn.Module):
    """Logits [b, labels] in float32; arguments as for `BertModel`."""

    config: BertConfig
    remat: Remat = "none"

    def setup(self):
        self.roberta = BertModel(self.config, self.remat, pooled=False)
        self.classifier = ClassificationHead(self.config)

    def __call__(self, ids, positions=None, segment_ids=None, token_type_ids=None) -> Float[Array, "b labels"]:
        x, _ = self.roberta(ids, positions, segment_ids, token_type_ids)
        return self.classifier(x)


HEADS = {None: BertModel, "masked_lm": RobertaForMaskedLM, "classification": RobertaForSequenceClassification}


def module(config: BertConfig, remat: Remat = "none") -> nn.Module:
    return HEADS[config.head](config, remat)


LAYOUT = hf.Layout(
    prefix="roberta.",
    new_head=r"^classifier/",
    redundant=r"embeddings\.position_ids$|^lm_head\.|(^|\.)pooler\.|^classifier\.",
)
FAMILY = hf.Family("roberta", config, module, LAYOUT, writes_text=False)
