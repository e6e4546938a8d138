"""What the config.json files of the decoders have in common, and what is refused in them.

A family says which entries it reads beside the common ones. An entry that nobody reads may change what the model
computes, so it is an error unless it is empty, or is known to concern something else (see `hf.refuse_unknown`).
"""

import math
from collections.abc import Iterable
from typing import Any

from jlora.train.models.hf import needed, refuse_unknown
from jlora.train.models.layers import DecoderConfig, RopeScaling

_COMMON = {
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "max_position_embeddings", "rms_norm_eps", "hidden_act", "rope_theta", "rope_scaling",
    "rope_parameters", "tie_word_embeddings", "initializer_range",
}  # fmt: skip
# Every linear layer of a model with experts, except the gates that choose among them.
ALL_BUT_GATES = ("**/self_attn/*_proj/kernel", "**/experts/*_proj")
_TYPES = {"full_attention": False, "sliding_attention": True}


def decoder_config(
    source: dict[str, Any],
    *,
    reads: Iterable[str] = (),
    rope: dict[str, Any] | None = None,
    **switches: Any,
) -> DecoderConfig:
    """The configuration of a decoder of the Llama kind.

    Args:
      source: the content of config.json, with the family's own defaults for entries that may be absent.
      reads: the entries that the family reads itself, or that do not concern it.
      rope: what config.json says about rotary positions, if it is not where it usually is.
      switches: the fields of `DecoderConfig` that config.json does not name, or names otherwise.
    """
    refuse_unknown(source, _COMMON | set(reads))
    heads = needed(source, "num_attention_heads")
    head_dim = source.get("head_dim") or needed(source, "hidden_size") // heads
    if rope is None:
        rope = source.get("rope_parameters") or source.get("rope_scaling") or {}
    fields = {
        "vocab_size": needed(source, "vocab_size"),
        "hidden_size": needed(source, "hidden_size"),
        "intermediate_size": needed(source, "intermediate_size"),
        "num_layers": needed(source, "num_hidden_layers"),
        "num_heads": heads,
        "num_kv_heads": source.get("num_key_value_heads") or heads,
        "head_dim": head_dim,
        "max_positions": source.get("max_position_embeddings", 2048),
        "norm_eps": source.get("rms_norm_eps", 1e-6),
        "rope_theta": float(rope.get("rope_theta") or source.get("rope_theta", 10000.0)),
        "rope_scaling": _rope_scaling(rope, source),
        "tie_embeddings": source.get("tie_word_embeddings", False),
        "init_range": source.get("initializer_range", 0.02),
    }
    part = rope.get("partial_rotary_factor") or source.get("partial_rotary_factor") or 1.0
    if part != 1:
        if "partial_rotary_factor" not in reads:
            raise ValueError(f"partial_rotary_factor is {part}; for this model_type only whole heads are rotated")
        fields["rotary_dim"] = int(head_dim * part)
    if "activation" not in switches:
        fields["activation"] = activation(source, "hidden_act")
    return DecoderConfig(**fields | switches)


def activation(source: dict[str, Any], key: str, default: str = "silu") -> str:
    """The activation of the MLP, by the name that config.json gives it."""
    found = source.get(key) or default
    known = ("silu", "gelu_pytorch_tanh")
    if found not in known:
        raise ValueError(f"{key} is {found!r}; only {' and '.join(map(repr, known))} are built")
    return found


def local_layers(source: dict[str, Any], otherwise: Iterable[bool]) -> tuple[bool, ...]:
    """For each layer whether its attention has a window: by `layer_types`, or where that is absent, `otherwise`."""
    types = source.get("layer_types")
    if types is None:
        return tuple(otherwise)
    unknown = sorted(set(types) - _TYPES.keys())
    if unknown:
        raise ValueError(f"layer_types has {unknown}; only {sorted(_TYPES)} are built")
    return tuple(_TYPES[name] for name in types)


_SCALINGS = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "longrope": ("short_factor", "long_factor"),
}


def _rope_scaling(rope: dict[str, Any], source: dict[str, Any]) -> RopeScaling | None:
    kind = rope.get("rope_type") or rope.get("type") or "default"
    kind = {"su": "longrope"}.get(kind, kind)
    if kind not in _SCALINGS:
        raise ValueError(f"rope type {kind!r} is not built; known are {sorted(_SCALINGS)}")
    values = [needed(rope, key) for key in _SCALINGS[kind]]
    if kind == "default":
        return None
    if kind == "dynamic":
        return RopeScaling(kind, *values, original_max_position=needed(source, "max_position_embeddings"))
    if kind == "longrope":
        return _longrope(rope, source, *values)
    return RopeScaling(kind, *values)


def _longrope(rope: dict[str, Any], source: dict[str, Any], short: list[float], long: list[float]) -> RopeScaling:
    length = needed(source, "max_position_embeddings")
    original = source.get("original_max_position_embeddings") or rope.get("original_max_position_embeddings", length)
    factor = rope.get("factor") or length / original
    amplitude = rope.get("attention_factor")
    if amplitude is None:
        amplitude = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    fixed = {"short": tuple(short), "long": tuple(long), "amplitude": amplitude}
    return RopeScaling("longrope", factor, original_max_position=original, **fixed)
