"""Qwen2-MoE, which Qwen1.5-MoE is, too: many small experts in place of Qwen2's MLP, and one that all tokens use."""

from typing import Any

from jlora.train.models import hf, qwen2
from jlora.train.models.decoder import ALL_BUT_GATES, decoder_config
from jlora.train.models.layers import CausalLM, DecoderConfig, Experts

READS = (
    "num_experts", "num_local_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob",
    "decoder_sparse_step", "mlp_only_layers", *qwen2.WINDOW,
)  # fmt: skip


def config(source: dict[str, Any]) -> DecoderConfig:
    """Reads a Hugging Face config.json of `model_type` "qwen2_moe"."""
    if source.get("use_sliding_window") and source.get("layer_types") is None:
        raise ValueError("use_sliding_window without layer_types: which layers it means differs between writers")
    return decoder_config(
        source,
        reads=(*READS, "shared_expert_intermediate_size", "qkv_bias"),
        qkv_bias=source.get("qkv_bias", True),
        experts=experts(source, hf.needed(source, "shared_expert_intermediate_size")),
        **qwen2.upper_windows(source),
    )


def experts(source: dict[str, Any], shared_size: int = 0) -> Experts:
    """The experts of Qwen's models, in every layer."""
    if source.get("decoder_sparse_step", 1) != 1 or source.get("mlp_only_layers"):
        raise ValueError(
            f"decoder_sparse_step={source.get('decoder_sparse_step', 1)} and mlp_only_layers="
            f"{source.get('mlp_only_layers')} leave layers without experts; only experts in every layer are built"
        )
    count = "num_local_experts" if "num_local_experts" in source else "num_experts"
    sizes = (hf.needed(source, key) for key in (count, "num_experts_per_tok", "moe_intermediate_size"))
    return Experts(*sizes, source.get("norm_topk_prob", False), shared_size)


LAYOUT = hf.Layout(experts=(("gate_up_proj", ("gate_proj", "up_proj")), ("down_proj", ("down_proj",))))
TARGETS = (*ALL_BUT_GATES, "**/shared_expert/*_proj/kernel")
FAMILY = hf.Family("qwen2_moe", config, CausalLM, LAYOUT, targets=TARGETS)
