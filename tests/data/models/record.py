"""Tiny random decoders of transformers, with what they compute: python record.py [FAMILY ...]

For each: config.json and model.safetensors as `save_pretrained` leaves them, and io.npz with

    input_ids, attention_mask, position_ids [3, 24]   the second row padded on the right, the third on the left
    logits [3, 24, 64]                                float32, eager attention; meaningful where the mask is 1
    prompt [12], generated [10]                       greedy continuation

Weights are large enough, and caps and windows small enough, for every option to show in the logits.
"""

import pathlib
import sys

import numpy as np
import torch
import transformers

HERE = pathlib.Path(__file__).parent
SHAPE = dict(
    vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=48, bos_token_id=1, eos_token_id=2, pad_token_id=0,
)  # fmt: skip
GPT2 = dict(
    vocab_size=64, n_embd=16, n_inner=24, n_layer=3, n_head=4, n_positions=48, bos_token_id=1, eos_token_id=2,
    activation_function="gelu", scale_attn_weights=False, scale_attn_by_inverse_layer_idx=True,
)  # fmt: skip
LLAMA3 = dict(
    rope_type="llama3", rope_theta=10000.0, factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=12,
)  # fmt: skip
THREE = SHAPE | dict(num_hidden_layers=3)
GEMMA = dict(num_hidden_layers=4, head_dim=8, query_pre_attn_scalar=6, sliding_window=6)
LONG = dict(rope_type="longrope", rope_theta=10000.0, short_factor=[1.0, 1.5], long_factor=[2.0, 4.0])
LONG |= dict(original_max_position_embeddings=16)
MOE = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8, decoder_sparse_step=1)

t = transformers
MODELS = {
    "gpt2": t.GPT2Config(**GPT2, tie_word_embeddings=False),
    "llama3": t.LlamaConfig(**SHAPE, rope_parameters=LLAMA3, tie_word_embeddings=True),
    "llama_linear": t.LlamaConfig(
        **SHAPE,
        rope_parameters=dict(rope_type="linear", rope_theta=500.0, factor=2.0),
        attention_bias=True,
        mlp_bias=True,
    ),
    "llama_dynamic": t.LlamaConfig(
        **SHAPE | dict(max_position_embeddings=16),
        rope_parameters=dict(rope_type="dynamic", rope_theta=10000.0, factor=2.0),
    ),
    "mistral": t.MistralConfig(**SHAPE, sliding_window=5, head_dim=8),
    "qwen2_window": t.Qwen2Config(**THREE, use_sliding_window=True, sliding_window=5, max_window_layers=1),
    "qwen3": t.Qwen3Config(**SHAPE, head_dim=8, tie_word_embeddings=True),
    "gemma2": t.Gemma2Config(**SHAPE | GEMMA, attn_logit_softcapping=2.0, final_logit_softcapping=3.0),
    "gemma3": t.Gemma3TextConfig(
        **SHAPE | GEMMA,
        layer_types=["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
        rope_parameters=dict(
            full_attention=dict(rope_type="linear", rope_theta=1e6, factor=4.0),
            sliding_attention=dict(rope_type="default", rope_theta=1e3),
        ),
    ),
    "mixtral": t.MixtralConfig(**SHAPE, num_local_experts=4, num_experts_per_tok=2, sliding_window=7),
    "phi3": t.Phi3Config(
        **SHAPE | dict(num_attention_heads=2, num_key_value_heads=1),
        sliding_window=9,
        rope_parameters=dict(rope_type="default", rope_theta=10000.0, partial_rotary_factor=0.5),
    ),
    "phi3_longrope": t.Phi3Config(**SHAPE, rope_parameters=LONG, original_max_position_embeddings=16),
    "qwen2_moe": t.Qwen2MoeConfig(**SHAPE, **MOE, shared_expert_intermediate_size=12, norm_topk_prob=False),
    "qwen3_moe": t.Qwen3MoeConfig(**SHAPE, **MOE, head_dim=8, norm_topk_prob=True),
}


def record(name: str) -> None:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(MODELS[name], attn_implementation="eager")
    model = model.to(torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
            else:
                size = 1.0 if len(parameter) == SHAPE["vocab_size"] else parameter.shape[-1] ** -0.5
                parameter.copy_(size * torch.randn_like(parameter))
        rng = np.random.default_rng(0)
        ids = rng.integers(3, 64, (3, 24))
        mask = np.ones((3, 24), np.int64)
        mask[1, 17:] = mask[2, :5] = 0
        ids *= mask
        positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
        inputs = dict(input_ids=ids, attention_mask=mask, position_ids=positions)
        logits = model(**{k: torch.tensor(v) for k, v in inputs.items()}).logits
        new = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None}
        generated = model.generate(torch.tensor(ids[:1, :12]), **new)[0, 12:]
    model.save_pretrained(HERE / name)
    (HERE / name / "generation_config.json").unlink(missing_ok=True)
    np.savez_compressed(
        HERE / name / "io.npz",
        **{k: v.astype(np.int32) for k, v in inputs.items()},
        logits=logits.numpy(),
        prompt=ids[0, :12].astype(np.int32),
        generated=generated.numpy().astype(np.int32),
    )


for name in sys.argv[1:] or MODELS:
    record(name)
    print(name, {file.name: file.stat().st_size for file in sorted((HERE / name).iterdir())})
