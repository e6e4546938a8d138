"""Phi-3 and Phi-4: Llama with fused projections, in some of which a part of each head is not rotated."""

from typing import Any

from jlora.train.models import hf
from jlora.train.models.decoder import decoder_config
from jlora.train.models.layers import CausalLM, DecoderConfig

READS = ("sliding_window", "partial_rotary_factor", "original_max_position_embeddings")
_UNUSED = ("full_attn_mod", "interpolate_factor")  # in Phi-4-mini's file; transformers reads neither


def config(source: dict[str, Any]) -> DecoderConfig:
    """Reads a Hugging Face config.json of `model_type` "phi3"."""
    return decoder_config(source, reads=(*READS, *_UNUSED), fused=True, window=source.get("sliding_window"))


FAMILY = hf.Family("phi3", config, CausalLM)
