"""Qwen2 and Qwen2.5: Llama with biases on the query, key and value projections."""

from typing import Any

from jlora.train.models import hf
from jlora.train.models.layers import CausalLM, DecoderConfig


def config(source: dict[str, Any]) -> DecoderConfig:
    """Reads a Hugging Face config.json of `model_type` "qwen2"."""
    if source.get("use_sliding_window", False):
        raise ValueError("config.json asks for use_sliding_window=true; only full attention is built")
    return hf.decoder_config(source, qkv_bias=True)


FAMILY = hf.Family("qwen2", config, CausalLM)
