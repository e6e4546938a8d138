"""Qwen3-MoE: many small experts in place of Qwen3's MLP."""

from typing import Any

from jlora.train.models import hf, qwen2_moe
from jlora.train.models.decoder import ALL_BUT_GATES, decoder_config
from jlora.train.models.layers import CausalLM, DecoderConfig


def config(source: dict[str, Any]) -> DecoderConfig:
    """Reads a Hugging Face config.json of `model_type` "qwen3_moe"."""
    bias = source.get("attention_bias", False)
    return decoder_config(
        source,
        reads=(*qwen2_moe.READS, "attention_bias"),
        qk_norm=True,
        qkv_bias=bias,
        o_bias=bias,
        window=source.get("sliding_window", 4096) if source.get("use_sliding_window") else None,
        experts=qwen2_moe.experts(source),
    )


FAMILY = hf.Family("qwen3_moe", config, CausalLM, qwen2_moe.LAYOUT, targets=ALL_BUT_GATES)
