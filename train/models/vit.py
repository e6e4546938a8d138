"""ViT: a pre-norm encoder of image patches (Dosovitskiy et al. 2021), with a classification head."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jlora.train.models import encoders, hf
from jlora.train.models.encoders import ACTIVATIONS, dense, layer_norm
from jlora.train.models.layers import dot_general_f32
from jlora.train.models.remat import Remat


@dataclasses.dataclass(frozen=True, kw_only=True)
class ViTConfig(encoders.EncoderConfig):
    """Shapes and switches of ViT; sizes are (height, width)."""

    image_size: tuple[int, int] = (224, 224)
    patch_size: tuple[int, int] = (16, 16)
    channels: int = 3
    qkv_bias: bool = True

    def __post_init__(self):
        super().__post_init__()
        if any(image % patch for image, patch in zip(self.image_size, self.patch_size, strict=True)):
            raise ValueError(f"images of {self.image_size} do not divide into patches of {self.patch_size}")

    @property
    def patches(self) -> int:
        return (self.image_size[0] // self.patch_size[0]) * (self.image_size[1] // self.patch_size[1])


_READ = (
    "image_size", "patch_size", "num_channels", "qkv_bias",
    # Of the pooler and of masked image modelling, which are not built.
    "pooler_act", "pooler_output_size", "encoder_stride",
)  # fmt: skip


def config(source: dict[str, Any]) -> ViTConfig:
    """Reads a Hugging Face config.json of `model_type` "vit"."""
    heads = {"ViTForImageClassification": "classification", "ViTModel": None}
    pair = lambda value: (value, value) if isinstance(value, int) else tuple(value)
    return ViTConfig(
        **encoders.encoder_fields(source, heads, _READ),
        image_size=pair(source.get("image_size", 224)),
        patch_size=pair(source.get("patch_size", 16)),
        channels=source.get("num_channels", 3),
        qkv_bias=source.get("qkv_bias", True),
    )


class PatchEmbeddings(nn.Module):
    config: ViTConfig

    @nn.compact
    def __call__(self, pixels):
        c = self.config
        init = nn.initializers.normal(c.init_range)
        conv = nn.Conv(
            c.hidden_size, c.patch_size, c.patch_size, "VALID", dtype=c.dtype, param_dtype=c.dtype, kernel_init=init,
            name="projection",
        )  # fmt: skip
        return conv(pixels).reshape(len(pixels), c.patches, c.hidden_size)


class Embeddings(nn.Module):
    """A row for the class, then one for each patch; positions are added."""

    config: ViTConfig

    @nn.compact
    def __call__(self, pixels):
        c = self.config
        init = nn.initializers.truncated_normal(c.init_range)
        x = PatchEmbeddings(c, name="patch_embeddings")(pixels)
        first = self.param("cls_token", init, (1, 1, c.hidden_size), c.dtype)
        positions = self.param("position_embeddings", init, (1, c.patches + 1, c.hidden_size), c.dtype)
        return jnp.concatenate([jnp.broadcast_to(first, (len(x), *first.shape[1:])), x], axis=1) + positions


class Attention(nn.Module):
    config: ViTConfig

    @nn.compact
    def __call__(self, x):
        c = self.config
        q, k, v = (dense(c, c.hidden_size, f"{name}_proj", c.qkv_bias)(x) for name in "qkv")
        return dense(c, c.hidden_size, "o_proj")(encoders.attention(q, k, v, c.num_heads, None))


class MLP(nn.Module):
    config: ViTConfig

    @nn.compact
    def __call__(self, x):
        x = ACTIVATIONS[self.config.activation](dense(self.config, self.config.intermediate_size, "fc1")(x))
        return dense(self.config, self.config.hidden_size, "fc2")(x)


class Layer(nn.Module):
    config: ViTConfig

    @nn.compact
    def __call__(self, x):
        x = x + Attention(self.config, name="attention")(layer_norm(self.config, "layernorm_before")(x))
        return x + MLP(self.config, name="mlp")(layer_norm(self.config, "layernorm_after")(x)), None


class ViTModel(nn.Module):
    """The encoder alone, with its final norm: images [b, height, width, channels] to [b, 1 + patches, d]."""

    config: ViTConfig
    remat: Remat = "none"

    def setup(self):
        self.embeddings = Embeddings(self.config)
        self.layers = encoders.scanned(Layer, self.config, self.remat, broadcast=0)
        self.layernorm = layer_norm(self.config)

    def __call__(self, pixels: Float[Array, "b h w c"]) -> Float[Array, "b n d"]:
        c = self.config
        if pixels.shape[1:] != (*c.image_size, c.channels):
            raise ValueError(f"wanted images of {(*c.image_size, c.channels)}, got {pixels.shape[1:]}")
        return self.layernorm(self.layers(self.embeddings(pixels))[0])


class ViTForImageClassification(nn.Module):
    """Logits [b, labels] in float32 of images [b, height, width, channels]."""

    config: ViTConfig
    remat: Remat = "none"

    def setup(self):
        self.vit = ViTModel(self.config, self.remat)
        self.classifier = dense(self.config, self.config.num_labels, dot_general=dot_general_f32)

    def __call__(self, pixels: Float[Array, "b h w c"]) -> Float[Array, "b labels"]:
        return self.classifier(self.vit(pixels)[:, 0])


HEADS = {None: ViTModel, "classification": ViTForImageClassification}


def module(config: ViTConfig, remat: Remat = "none") -> nn.Module:
    return HEADS[config.head](config, remat)


def inputs(config: ViTConfig) -> tuple[jax.ShapeDtypeStruct, ...]:
    return (jax.ShapeDtypeStruct((1, *config.image_size, config.channels), jnp.float32),)


# The module's names are those that transformers has in memory, which adapters use; its files keep older ones.
LAYOUT = hf.Layout(
    renames=(
        (r"\blayers\.(\d+)\.", r"encoder.layer.\1."),
        (r"\.attention\.q_proj\.", ".attention.attention.query."),
        (r"\.attention\.k_proj\.", ".attention.attention.key."),
        (r"\.attention\.v_proj\.", ".attention.attention.value."),
        (r"\.attention\.o_proj\.", ".attention.output.dense."),
        (r"\.mlp\.fc1\.", ".intermediate.dense."),
        (r"\.mlp\.fc2\.", ".output.dense."),
    ),
    prefix="vit.",
    new_head=r"^classifier/",
    redundant=r"(^|\.)pooler\.|^classifier\.",
)
FAMILY = hf.Family("vit", config, module, LAYOUT, inputs, writes_text=False)
