"""U-Net: images to images (Ronneberger et al. 2015), for segmentation or, told the noise, denoising (Ho et al. 2020).

A way down, of which every level is a block and a convolution of stride 2, and a way up, of which every level is a
transposed convolution of stride 2, the features of the same size from the way down beside it, and a block:

    Block(x, t) = x W_s + act(norm(act(norm(x * W_1 + b_1) + t W_t) * W_2 + b_2))

with 3x3 convolutions `*`, groups of features normalized, and t features of the level of noise, or none. There are no
checkpoints of it: it is an example of a model with every kind of convolution, for tests and for the documentation.
"""

from collections.abc import Sequence

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float


class Block(nn.Module):
    features: int
    groups: int

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], t: Float[Array, "b k"] | None) -> Float[Array, "b h w d"]:
        y = nn.GroupNorm(self.groups, name="norm_1")(nn.Conv(self.features, (3, 3), name="conv_1")(x))
        if t is not None:
            y += nn.Dense(self.features, name="time")(t)[:, None, None]
        y = nn.GroupNorm(self.groups, name="norm_2")(nn.Conv(self.features, (3, 3), name="conv_2")(nn.silu(y)))
        return nn.Dense(self.features, use_bias=False, name="shortcut")(x) + nn.silu(y)


class UNet(nn.Module):
    """Images [b, height, width, c] to [b, height, width, channels].

    Args:
      channels: of what it gives: classes of each pixel, or the channels of the noise.
      widths: features of each level, the first that of the whole image. Height and width are halved between levels.
      groups: how many groups of features are normalized.

    With `t` [b], the level of noise between 0 and 1, every block is told it. A model is initialized with it or without.
    """

    channels: int
    widths: Sequence[int] = (32, 64, 128)
    groups: int = 8

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], t: Float[Array, " b"] | None = None) -> Float[Array, "b h w d"]:
        *outer, middle = self.widths
        if any(side % 2 ** len(outer) for side in x.shape[1:3]):
            raise ValueError(f"images of {x.shape[1:3]} cannot be halved {len(outer)} times")
        t = None if t is None else nn.silu(nn.Dense(4 * self.widths[0], name="time")(waves(t, self.widths[0])))
        beside = []
        for i, width in enumerate(outer):
            x = Block(width, self.groups, name=f"down_{i}")(x, t)
            beside.append(x)
            x = nn.Conv(width, (3, 3), 2, name=f"halve_{i}")(x)
        x = Block(middle, self.groups, name="middle")(x, t)
        for i, width in reversed(list(enumerate(outer))):
            x = nn.ConvTranspose(width, (4, 4), (2, 2), name=f"double_{i}")(x)
            x = Block(width, self.groups, name=f"up_{i}")(jnp.concatenate([x, beside[i]], axis=-1), t)
        return nn.Conv(self.channels, (1, 1), name="head")(x)


def waves(t: Float[Array, " b"], size: int) -> Float[Array, "b size"]:
    """Sines and cosines of t, of wavelengths from 2 pi / 1000 to 2 pi."""
    angles = t[:, None] * jnp.geomspace(1000.0, 1.0, size // 2)
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)
