"""Qwen3: Llama with a norm on each head of queries and keys."""

from typing import Any

from jlora.train.models import hf, qwen2
from jlora.train.models.decoder import decoder_config
from jlora.train.models.layers import CausalLM, DecoderConfig


def config(source: dict[str, Any]) -> DecoderConfig:
    """Reads a Hugging Face config.json of `model_type` "qwen3"."""
    source = {"head_dim": 128} | source
    bias = source.get("attention_bias", False)
    reads = (*qwen2.WINDOW, "attention_bias")
    return decoder_config(source, reads=reads, qk_norm=True, qkv_bias=bias, o_bias=bias, **qwen2.upper_windows(source))


FAMILY = hf.Family("qwen3", config, CausalLM)
