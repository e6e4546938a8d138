"""Parts that the families with layer norms share: encoders (BERT, RoBERTa, ViT) and GPT-2.

A block sees h heads of width d / h, with no notion of order but what the embeddings hold:

    Attention(x) = softmax(Q K^T / sqrt(d / h)) V W_o + b_o      (Q, K, V = x W + b, by heads)
    MLP(x)       = act(x W_1 + b_1) W_2 + b_2

and is either pre-norm, x + f(LayerNorm(x)), or post-norm, LayerNorm(x + f(x)).
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import flax.linen as nn
import jax
from jaxtyping import Array, Bool, Float

from jlora.train.models import hf
from jlora.train.models.remat import Remat, rematerialized

_TANH_GELU = functools.partial(nn.gelu, approximate=True)
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": functools.partial(nn.gelu, approximate=False),
    "gelu_new": _TANH_GELU,
    "gelu_fast": _TANH_GELU,
    "gelu_pytorch_tanh": _TANH_GELU,
    "relu": nn.relu,
    "silu": nn.silu,
    "swish": nn.silu,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """Shapes and switches that all encoders have; hashable, so that equal ones share compiled functions."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    activation: str = "gelu"
    norm_eps: float = 1e-12
    init_range: float = 0.02
    head: str | None = None
    """What is on top, one of the keys of the family's `HEADS`; None for the bare encoder."""
    num_labels: int = 2
    dtype: str = "float32"
    """Of parameters and activations. Norms, softmax and logits are float32 whatever it says."""

    def __post_init__(self):
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"hidden_act is {self.activation!r}; built are {', '.join(ACTIVATIONS)}")
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of {self.num_heads} attention heads")


_READ = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "hidden_act", "layer_norm_eps",
    "initializer_range", "is_decoder", "add_cross_attention", "tie_word_embeddings",
)  # fmt: skip


def encoder_fields(source: dict[str, Any], heads: Mapping[str, str | None], reads: Iterable[str]) -> dict[str, Any]:
    """The fields of `EncoderConfig` from a config.json.

    Args:
      source: the content of config.json.
      heads: the head of each architecture that is built; the first is that of a file which does not say.
      reads: the entries that the family reads itself, or that do not concern it.
    """
    hf.refuse_unknown(source, {*_READ, *reads})
    need = functools.partial(hf.needed, source)
    for key in ("is_decoder", "add_cross_attention"):
        hf.refuse_unless(source, key, False)
    return head_fields(source, heads) | {
        "hidden_size": need("hidden_size"),
        "intermediate_size": need("intermediate_size"),
        "num_layers": need("num_hidden_layers"),
        "num_heads": need("num_attention_heads"),
        "activation": source.get("hidden_act", "gelu"),
        "norm_eps": source.get("layer_norm_eps", 1e-12),
        "init_range": source.get("initializer_range", 0.02),
    }


def head_fields(source: dict[str, Any], heads: Mapping[str, str | None]) -> dict[str, Any]:
    """What is on top, and how many classes it has; `heads` as for `encoder_fields`."""
    architectures = source.get("architectures") or list(heads)[:1]
    if architectures[0] not in heads:
        raise ValueError(f"the architecture is {architectures[0]!r}; built are {', '.join(heads)}")
    labels = len(source["id2label"]) if source.get("id2label") else source.get("num_labels", 2)
    return {"head": heads[architectures[0]], "num_labels": labels}


def dense(config: Any, features: int, name: str | None = None, bias: bool = True, **more: Any) -> nn.Dense:
    init = nn.initializers.normal(config.init_range)
    return nn.Dense(features, bias, config.dtype, config.dtype, kernel_init=init, name=name, **more)


def table(config: Any, rows: int, name: str | None = None) -> nn.Embed:
    init = nn.initializers.normal(config.init_range)
    return nn.Embed(rows, config.hidden_size, config.dtype, config.dtype, embedding_init=init, name=name)


def layer_norm(config: Any, name: str | None = None) -> nn.LayerNorm:
    """(x - mean) / sqrt(variance + eps) * scale + bias; the statistics in float32 and in two passes."""
    return nn.LayerNorm(config.norm_eps, config.dtype, config.dtype, use_fast_variance=False, name=name)


def attention(
    q: Float[Array, "b t d"], k: Float[Array, "b s d"], v: Float[Array, "b s d"], heads: int, mask: Array | None
) -> Float[Array, "b t d"]:
    """Scaled dot-product attention by heads; `mask` [b or 1, t, s] says what is seen, None all."""
    split = lambda x: x.reshape(*x.shape[:2], heads, -1)
    y = jax.nn.dot_product_attention(split(q), split(k), split(v), mask=None if mask is None else mask[:, None])
    return y.reshape(q.shape)


def scanned(block: type[nn.Module], config: Any, remat: Remat, broadcast: int = 1) -> nn.Module:
    """`config.num_layers` blocks with stacked parameters, called with the activations and `broadcast` other inputs."""
    block = rematerialized(block, remat, prevent_cse=False)
    stack = nn.scan(
        block,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=(nn.broadcast,) * broadcast,
        length=config.num_layers,
    )
    return stack(config)


def same_segment(segment_ids: Array | None) -> Bool[Array, "b t t"] | None:
    """The mask by which a token sees all tokens of its own segment: several in a row, or 0 for padding."""
    return None if segment_ids is None else segment_ids[:, :, None] == segment_ids[:, None, :]
