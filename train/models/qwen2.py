"""Qwen2 and Qwen2.5: Llama with biases on the query, key and value projections."""

from typing import Any

from jlora.train.models import hf
from jlora.train.models.decoder import decoder_config, local_layers
from jlora.train.models.layers import CausalLM, DecoderConfig

WINDOW = ("use_sliding_window", "sliding_window", "max_window_layers", "layer_types")


def config(source: dict[str, Any]) -> DecoderConfig:
    """Reads a Hugging Face config.json of `model_type` "qwen2"."""
    return decoder_config(source, reads=WINDOW, qkv_bias=True, **upper_windows(source))


def upper_windows(source: dict[str, Any]) -> dict[str, Any]:
    """The window that Qwen's models may have in the layers from `max_window_layers` on; most have none."""
    if not source.get("use_sliding_window", False):
        return {}
    first = source.get("max_window_layers", 28)
    local = local_layers(source, (i >= first for i in range(hf.needed(source, "num_hidden_layers"))))
    return {"window": source.get("sliding_window", 4096), "local_layers": local}


FAMILY = hf.Family("qwen2", config, CausalLM)
