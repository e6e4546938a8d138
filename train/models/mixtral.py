"""Mixtral: Mistral with eight gated MLPs to a layer, of which each token uses two."""

from typing import Any

from jlora.train.models import hf
from jlora.train.models.decoder import ALL_BUT_GATES, decoder_config
from jlora.train.models.layers import CausalLM, DecoderConfig, Experts

READS = ("sliding_window", "num_local_experts", "num_experts_per_tok")


def config(source: dict[str, Any]) -> DecoderConfig:
    """Reads a Hugging Face config.json of `model_type` "mixtral"."""
    source = {"rms_norm_eps": 1e-5, "rope_theta": 1e6} | source
    experts = Experts(
        source.get("num_local_experts", 8), source.get("num_experts_per_tok", 2), hf.needed(source, "intermediate_size")
    )
    return decoder_config(source, reads=READS, window=source.get("sliding_window"), experts=experts)


LAYOUT = hf.Layout(
    renames=((r"\.mlp\.", ".block_sparse_moe."),),
    experts=(("gate_up_proj", ("w1", "w3")), ("down_proj", ("w2",))),
)
FAMILY = hf.Family("mixtral", config, CausalLM, LAYOUT, targets=ALL_BUT_GATES)
