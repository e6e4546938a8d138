"""Llama 2 and 3, and the models that share their checkpoint layout."""

from typing import Any

from jlora.train.models import hf
from jlora.train.models.layers import CausalLM, DecoderConfig


def config(source: dict[str, Any]) -> DecoderConfig:
    """Reads a Hugging Face config.json of `model_type` "llama"."""
    bias = source.get("attention_bias", False)
    return hf.decoder_config(source, qkv_bias=bias, o_bias=bias, mlp_bias=source.get("mlp_bias", False))


FAMILY = hf.Family("llama", config, CausalLM)
