"""The bundled language model: stories260K, 260,032 parameters, trained on TinyStories (MIT; see the notice in assets).

The file is that of llama2.c: seven int32, then float32 arrays. Its rotary pairs are interleaved, (2i, 2i+1); putting
the rows of each head of W_q and W_k in the order (0, 2, .., 1, 3, ..) gives the half-split pairs of `layers`, with the
same scores.
"""

from typing import Any

import numpy as np

from jlora.train import assets

_HEADER = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
           "vocab_size", "max_position_embeddings")  # fmt: skip


def read() -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The model as if it came from a Hugging Face directory: the content of config.json, and tensors by name."""
    data = assets.read("stories260K.bin")
    source = dict(zip(_HEADER, np.frombuffer(data, "<i4", 7).tolist(), strict=True))
    d, ffn, layers = (source[k] for k in _HEADER[:3])
    size = d // source["num_attention_heads"]
    kv = size * source["num_key_value_heads"]
    values = np.frombuffer(data, "<f4", offset=28)
    cursor = 0

    def take(*shape: int) -> np.ndarray:
        nonlocal cursor
        cursor += int(np.prod(shape))
        return values[cursor - int(np.prod(shape)) : cursor].reshape(shape)

    def half_split(w: np.ndarray) -> np.ndarray:
        return w.reshape(layers, -1, size // 2, 2, d).swapaxes(2, 3).reshape(w.shape)

    tensors = {"model.embed_tokens.weight": take(source["vocab_size"], d)}
    stacked = {
        "input_layernorm": take(layers, d),
        "self_attn.q_proj": half_split(take(layers, d, d)),
        "self_attn.k_proj": half_split(take(layers, kv, d)),
        "self_attn.v_proj": take(layers, kv, d),
        "self_attn.o_proj": take(layers, d, d),
        "post_attention_layernorm": take(layers, d),
        "mlp.gate_proj": take(layers, ffn, d),
        "mlp.down_proj": take(layers, d, ffn),
        "mlp.up_proj": take(layers, ffn, d),
    }
    tensors |= {f"model.layers.{i}.{name}.weight": w[i] for name, w in stacked.items() for i in range(layers)}
    tensors["model.norm.weight"] = take(d)
    take(2, source["max_position_embeddings"], size // 2)  # rotary tables, which the module computes itself
    if cursor != values.size:
        raise ValueError(f"stories260K.bin holds {values.size} numbers, its header describes {cursor}")
    fixed = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "rms_norm_eps": 1e-5,
             "rope_theta": 10000.0, "tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": 1,
             "pad_token_id": 0}  # fmt: skip
    return fixed | source, tensors
