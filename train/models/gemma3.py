"""Gemma 3, the text model: five local layers to a global one, each kind with rotary positions of its own; Gemma 2's
norms, and norms of queries and keys in place of its caps.
"""

from typing import Any

from jlora.train.models import gemma2, hf
from jlora.train.models.decoder import decoder_config, local_layers
from jlora.train.models.layers import CausalLM, DecoderConfig

READS = (*gemma2.READS, "rope_local_base_freq", "sliding_window_pattern")


def config(source: dict[str, Any]) -> DecoderConfig:
    """Reads a Hugging Face config.json of `model_type` "gemma3_text"."""
    period = source.get("sliding_window_pattern", 6)
    local = local_layers(source, ((i + 1) % period != 0 for i in range(hf.needed(source, "num_hidden_layers"))))
    by_kind = source.get("rope_parameters") or {}
    older = {"rope_theta": source.get("rope_theta", 1e6)} | (source.get("rope_scaling") or {})
    inside = {"rope_theta": source.get("rope_local_base_freq", 1e4)} | (by_kind.get("sliding_attention") or {})
    if inside.get("rope_type", "default") != "default":
        raise ValueError(f"rope type {inside['rope_type']!r} of the local layers is not built, only 'default'")
    return decoder_config(
        {"tie_word_embeddings": True} | source,
        reads=READS,
        rope=older | (by_kind.get("full_attention") or {}),
        local_layers=local,
        local_rope_theta=float(inside["rope_theta"]),
        logit_softcap=source.get("final_logit_softcapping"),
        qk_norm=True,
        **gemma2.switches(source),
    )


FAMILY = hf.Family("gemma3_text", config, CausalLM)
