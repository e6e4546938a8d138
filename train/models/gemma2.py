"""Gemma 2: every second layer local, scores and logits capped, norms around attention and MLP, scaled embeddings."""

from typing import Any

from jlora.train.models import hf
from jlora.train.models.decoder import activation, decoder_config, local_layers
from jlora.train.models.layers import CausalLM, DecoderConfig

READS = (
    "attention_bias", "query_pre_attn_scalar", "hidden_activation", "sliding_window", "layer_types",
    "final_logit_softcapping", "sliding_window_size",
)  # fmt: skip


def config(source: dict[str, Any]) -> DecoderConfig:
    """Reads a Hugging Face config.json of `model_type` "gemma2"."""
    local = local_layers(source, (i % 2 == 0 for i in range(hf.needed(source, "num_hidden_layers"))))
    caps = {"attention_softcap": source.get("attn_logit_softcapping", 50.0)}
    caps |= {"logit_softcap": source.get("final_logit_softcapping", 30.0)}
    source = {"tie_word_embeddings": True} | source
    return decoder_config(
        source, reads=(*READS, "attn_logit_softcapping"), local_layers=local, **switches(source), **caps
    )


def switches(source: dict[str, Any]) -> dict[str, Any]:
    """What all Gemma models have."""
    bias = source.get("attention_bias", False)
    return {
        "activation": activation(source, "hidden_activation", "gelu_pytorch_tanh"),
        "attention_scale": source.get("query_pre_attn_scalar", 256) ** -0.5,
        "window": source.get("sliding_window", 4096),
        "head_dim": source.get("head_dim", 256),
        "qkv_bias": bias,
        "o_bias": bias,
        "unit_offset": True,
        "sandwich_norms": True,
        "scale_embeddings": True,
    }


FAMILY = hf.Family("gemma2", config, CausalLM)
