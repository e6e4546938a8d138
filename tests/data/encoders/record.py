"""Tiny random encoders of transformers, with what they compute: python record.py [NAME ...]

For each: config.json and model.safetensors as `save_pretrained` leaves them, and io.npz with the inputs, three texts of
which the second is padded on the right, and so is the third, or on the left where no head reads its first token, or two
images, and

    logits          of the head, float32, eager attention; by token they are meaningful where the mask is 1
    hidden, pooled  in their place for a model without a head
"""

import pathlib
import sys

import numpy as np
import torch
import transformers as t

HERE = pathlib.Path(__file__).parent
VOCAB = 40
SHAPE = dict(
    vocab_size=VOCAB, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2,
    max_position_embeddings=18, type_vocab_size=2,
)  # fmt: skip

MODELS = {
    "roberta_masked_lm": (t.RobertaForMaskedLM, t.RobertaConfig(**SHAPE, hidden_act="relu")),
    "roberta": (t.RobertaForSequenceClassification, t.RobertaConfig(**SHAPE, num_labels=3)),
    "bert_masked_lm": (t.BertForMaskedLM, t.BertConfig(**SHAPE, hidden_act="gelu_new", pad_token_id=1)),
    "bert_bare": (t.BertModel, t.BertConfig(**SHAPE, pad_token_id=1)),
    "resnet": (
        t.ResNetForImageClassification,
        t.ResNetConfig(
            embedding_size=6, hidden_sizes=[8, 16], depths=[2, 1], hidden_act="silu", downsample_in_first_stage=True,
            downsample_in_bottleneck=True, num_labels=3,
        ),
    ),
    "resnet_basic": (
        t.ResNetForImageClassification,
        t.ResNetConfig(embedding_size=6, hidden_sizes=[6, 8], depths=[1, 2], layer_type="basic", num_labels=3),
    ),
}  # fmt: skip


def texts(rng: np.random.Generator, left: bool) -> dict[str, np.ndarray]:
    ids = rng.integers(3, VOCAB, (3, 12))
    mask = np.ones_like(ids)
    mask[1, 9:] = mask[2, :4] = 0
    mask[2] = mask[2] if left else mask[2, ::-1]
    ids[mask == 0] = 1  # the padding token of RoBERTa
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": rng.integers(0, 2, ids.shape)}


def images(rng: np.random.Generator) -> dict[str, np.ndarray]:
    return {"pixel_values": rng.standard_normal((2, 3, 33, 40)).astype(np.float32)}


def record(name: str) -> None:
    cls, config = MODELS[name]
    torch.manual_seed(0)
    config._attn_implementation = "eager"
    model = cls(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # away from zeros, ones and the tiny initial scale
            parameter.add_(torch.randn_like(parameter) * 0.3)
        for key, buffer in model.named_buffers():
            if key.endswith(("running_mean", "running_var")):
                buffer.add_(torch.randn_like(buffer).abs() * 0.5)
        model.tie_weights()
        rng = np.random.default_rng(0)
        inputs = images(rng) if "resnet" in name else texts(rng, left="masked_lm" in name)
        found = model(**{key: torch.from_numpy(value) for key, value in inputs.items()})
        if "logits" in found:
            out = {"logits": found.logits.numpy()}
        else:
            out = {"hidden": found.last_hidden_state.numpy(), "pooled": found.pooler_output.numpy()}
    model.save_pretrained(HERE / name)
    np.savez_compressed(HERE / name / "io.npz", **inputs, **out)


if __name__ == "__main__":
    for name in sys.argv[1:] or MODELS:
        record(name)
