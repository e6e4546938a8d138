"""Mistral: Llama whose tokens attend to the last `sliding_window` ones only, in the first version."""

from typing import Any

from jlora.train.models import hf
from jlora.train.models.decoder import decoder_config
from jlora.train.models.layers import CausalLM, DecoderConfig


def config(source: dict[str, Any]) -> DecoderConfig:
    """Reads a Hugging Face config.json of `model_type` "mistral"."""
    return decoder_config(source, reads=("sliding_window",), window=source.get("sliding_window", 4096))


FAMILY = hf.Family("mistral", config, CausalLM)
