"""ResNet: stages of residual layers of convolutions (He et al. 2016), with a classification head.

    Layer(x) = act(f(x) + s(x))

f is two 3x3 convolutions, or 1x1, 3x3, 1x1 with a quarter of the features in between, each followed by a norm and all
but the last by ReLU; s is the identity or, where the shape changes, a 1x1 convolution and a norm. The norm is BatchNorm
as it is in use,

    BatchNorm(x) = (x - running_mean) / sqrt(running_var + eps) * scale + bias        (of each of the features)

with the checkpoint's statistics in training, too. They are leaves beside scale and bias that nothing trains
(`Family.statistics`), so that what is merged, or loaded again from an adapter's file, is the model that was trained.
Under PEFT, PyTorch's `train()` moves them by the batches that pass, and the adapter's file does not hold them.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jlora.train.models import encoders, hf
from jlora.train.models.encoders import ACTIVATIONS
from jlora.train.models.layers import dot_general_f32
from jlora.train.models.remat import Remat, rematerialized


@dataclasses.dataclass(frozen=True, kw_only=True)
class ResNetConfig:
    """Shapes and switches of ResNet; hashable, so that equal ones share compiled functions."""

    channels: int = 3
    embedding_size: int = 64
    hidden_sizes: tuple[int, ...] = (256, 512, 1024, 2048)
    """Features that each stage gives."""
    depths: tuple[int, ...] = (3, 4, 6, 3)
    """Layers of each stage."""
    bottleneck: bool = True
    activation: str = "relu"
    """Of the stem and after each sum; within a layer it is ReLU."""
    downsample_in_first_stage: bool = False
    downsample_in_bottleneck: bool = False
    """Whether the first convolution of a bottleneck has the stride, and not the second."""
    head: str | None = None
    """What is on top, one of the keys of `HEADS`; None for the bare model."""
    num_labels: int = 2
    dtype: str = "float32"
    """Of parameters and activations. Norms, pooling and logits are float32 whatever it says."""

    def __post_init__(self):
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"hidden_act is {self.activation!r}; built are {', '.join(ACTIVATIONS)}")
        if len(self.hidden_sizes) != len(self.depths):
            raise ValueError(f"hidden_sizes {self.hidden_sizes} and depths {self.depths}: wanted one of each a stage")
        if self.bottleneck and any(size % 4 for size in self.hidden_sizes):
            raise ValueError(f"hidden_sizes {self.hidden_sizes} of bottlenecks must be multiples of 4")


_READ = (
    "num_channels", "embedding_size", "hidden_sizes", "depths", "layer_type", "hidden_act", "downsample_in_first_stage",
    "downsample_in_bottleneck",
    # Of backbones for other models, which are not built.
    "stage_names", "out_features", "out_indices",
)  # fmt: skip
_BOTTLENECK = {"basic": False, "bottleneck": True}


def config(source: dict[str, Any]) -> ResNetConfig:
    """Reads a Hugging Face config.json of `model_type` "resnet"."""
    hf.refuse_unknown(source, _READ)
    kind = source.get("layer_type", "bottleneck")
    if kind not in _BOTTLENECK:
        raise ValueError(f"layer_type is {kind!r}; built are {', '.join(_BOTTLENECK)}")
    return ResNetConfig(
        **encoders.head_fields(source, {"ResNetForImageClassification": "classification", "ResNetModel": None}),
        channels=source.get("num_channels", 3),
        embedding_size=source.get("embedding_size", 64),
        hidden_sizes=tuple(source.get("hidden_sizes", ResNetConfig.hidden_sizes)),
        depths=tuple(source.get("depths", ResNetConfig.depths)),
        bottleneck=_BOTTLENECK[kind],
        activation=source.get("hidden_act", "relu"),
        downsample_in_first_stage=source.get("downsample_in_first_stage", False),
        downsample_in_bottleneck=source.get("downsample_in_bottleneck", False),
    )


class BatchNorm(nn.Module):
    """The norm with the statistics it has; computed in float32."""

    eps: float = 1e-5

    @nn.compact
    def __call__(self, x: Float[Array, "... d"]) -> Float[Array, "... d"]:
        zeros, ones = nn.initializers.zeros, nn.initializers.ones
        inits = {"running_mean": zeros, "running_var": ones, "scale": ones, "bias": zeros}
        mean, var, scale, bias = (
            self.param(name, init, x.shape[-1:], x.dtype).astype(jnp.float32) for name, init in inits.items()
        )
        y = (x.astype(jnp.float32) - mean) * (jax.lax.rsqrt(var + self.eps) * scale) + bias
        return y.astype(x.dtype)


class ConvNorm(nn.Module):
    """A convolution without bias, and the norm of what it gives."""

    config: ResNetConfig
    features: int
    window: int
    stride: int = 1

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b i j d"]:
        dtype, pad = self.config.dtype, self.window // 2
        init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
        conv = nn.Conv(
            self.features, (self.window, self.window), self.stride, (pad, pad), use_bias=False, dtype=dtype,
            param_dtype=dtype, kernel_init=init, name="convolution",
        )  # fmt: skip
        return BatchNorm(name="normalization")(conv(x))


class Layer(nn.Module):
    config: ResNetConfig
    features: int
    stride: int

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b i j d"]:
        c, n, stride = self.config, self.features, self.stride
        first, second = (stride, 1) if c.downsample_in_bottleneck else (1, stride)
        parts = [(n // 4, 1, first), (n // 4, 3, second), (n, 1, 1)] if c.bottleneck else [(n, 3, stride), (n, 3, 1)]
        y = x
        for i, part in enumerate(parts):
            y = ConvNorm(c, *part, name=f"layer_{i}")(nn.relu(y) if i else y)
        if x.shape[-1] != n or stride != 1:
            x = ConvNorm(c, n, 1, stride, name="shortcut")(x)
        return ACTIVATIONS[c.activation](y + x)


class Stage(nn.Module):
    """Layers of one size, of which the first may halve the image."""

    config: ResNetConfig
    index: int
    remat: Remat

    @nn.compact
    def __call__(self, x):
        c, layer = self.config, rematerialized(Layer, self.remat)
        halves = self.index > 0 or c.downsample_in_first_stage
        for i in range(c.depths[self.index]):
            stride = 2 if halves and i == 0 else 1
            x = layer(c, c.hidden_sizes[self.index], stride, name=f"layers_{i}")(x)
        return x


class Embedder(nn.Module):
    """The stem: a quarter of the height and of the width."""

    config: ResNetConfig

    @nn.compact
    def __call__(self, pixels):
        x = ConvNorm(self.config, self.config.embedding_size, 7, 2, name="embedder")(pixels.astype(self.config.dtype))
        return nn.max_pool(ACTIVATIONS[self.config.activation](x), (3, 3), (2, 2), ((1, 1), (1, 1)))


class Encoder(nn.Module):
    config: ResNetConfig
    remat: Remat

    @nn.compact
    def __call__(self, x):
        for i in range(len(self.config.depths)):
            x = Stage(self.config, i, self.remat, name=f"stages_{i}")(x)
        return x


class ResNetModel(nn.Module):
    """The stages alone: images [b, height, width, channels] to features of their parts [b, i, j, d]."""

    config: ResNetConfig
    remat: Remat = "none"

    def setup(self):
        self.embedder = Embedder(self.config)
        self.encoder = Encoder(self.config, self.remat)

    def __call__(self, pixels: Float[Array, "b h w c"]) -> Float[Array, "b i j d"]:
        if pixels.ndim != 4 or pixels.shape[-1] != self.config.channels:
            raise ValueError(f"wanted images [b, height, width, {self.config.channels}], got {pixels.shape}")
        return self.encoder(self.embedder(pixels))


class Head(nn.Module):
    """The mean over the image, and a linear layer; in PyTorch the second of a sequence."""

    config: ResNetConfig

    @nn.compact
    def __call__(self, x: Float[Array, "b i j d"]) -> Float[Array, "b labels"]:
        c = self.config
        linear = nn.Dense(c.num_labels, dtype=c.dtype, param_dtype=c.dtype, dot_general=dot_general_f32, name="1")
        return linear(x.mean(axis=(1, 2), dtype=jnp.float32).astype(x.dtype))


class ResNetForImageClassification(nn.Module):
    """Logits [b, labels] in float32 of images [b, height, width, channels] of any size."""

    config: ResNetConfig
    remat: Remat = "none"

    def setup(self):
        self.resnet = ResNetModel(self.config, self.remat)
        self.classifier = Head(self.config)

    def __call__(self, pixels: Float[Array, "b h w c"]) -> Float[Array, "b labels"]:
        return self.classifier(self.resnet(pixels))


HEADS = {None: ResNetModel, "classification": ResNetForImageClassification}


def module(config: ResNetConfig, remat: Remat = "none") -> nn.Module:
    return HEADS[config.head](config, remat)


def inputs(config: ResNetConfig) -> tuple[jax.ShapeDtypeStruct, ...]:
    return (jax.ShapeDtypeStruct((1, 224, 224, config.channels), jnp.float32),)


LAYOUT = hf.Layout(
    renames=((r"_(\d+)\.", r".\1."),),
    prefix="resnet.",
    new_head=r"^classifier/",
    redundant=r"\.num_batches_tracked$|^classifier\.",
)
FAMILY = hf.Family(
    "resnet", config, module, LAYOUT, inputs, writes_text=False, targets=("**/convolution/kernel",),
    statistics=("**/running_mean", "**/running_var"),
)  # fmt: skip
