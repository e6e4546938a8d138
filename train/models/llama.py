"""Llama 2 and 3, and the models that share their checkpoint layout."""

from typing import Any

from jlora.train.models import hf
from jlora.train.models.decoder import decoder_config
from jlora.train.models.layers import CausalLM, DecoderConfig


def config(source: dict[str, Any]) -> DecoderConfig:
    """Reads a Hugging Face config.json of `model_type` "llama"."""
    bias, mlp_bias = (source.get(key, False) for key in ("attention_bias", "mlp_bias"))
    reads = ("attention_bias", "mlp_bias")
    return decoder_config(source, reads=reads, qkv_bias=bias, o_bias=bias, mlp_bias=mlp_bias)


FAMILY = hf.Family("llama", config, CausalLM)
