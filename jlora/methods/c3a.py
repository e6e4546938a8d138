r"""C3A: the change of a weight is made of circulant blocks, each known by one column.

Parameter-Efficient Fine-Tuning via Circular Convolution. Chen et al., 2024. https://arxiv.org/abs/2407.19342

.. math::  \Delta W_{n b + i,\, m b + j} = \frac{1}{\mathrm{in}}\, K_{m n,\,(i - j) \bmod b}

W [in, out] frozen, K [out / b, in / b, b] trained; b, the block size, divides in and out. Trained: in out / b a matrix.
In the frequencies of a discrete Fourier transform along the blocks a circulant matrix is diagonal:

.. math::  \hat z_{m f} = \frac{1}{\mathrm{in}} \sum_n \hat x_{n f}\, \overline{\hat K_{m n f}}, \qquad y = x W + z

* The products take 4 T in out / b FLOPs for T tokens, 2 / b of the base's, and the transforms 2 T (in + out) b as
  products with a matrix, or T (in + out) log b for b above 512; no [in, out] matrix is formed. On convolutions, lookups
  and ragged experts the change is formed.
* K starts at zero, so the output starts as the base's. PEFT and the authors start from random numbers and off the base:
  ``start="xavier"``, "kaiming" or "gaussian".
* Where the activations are bfloat16 the transforms and products run in float32.

When to use it: a high rank, and a count that does not depend on it. b as large as both sizes allow has the fewest
parameters. It does not export to plain LoRA but truncated.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from jlora.kernels import product
from jlora.methods.base import Method, Site, require, sharded_as
from jlora.methods.miss import nearest_divisor
from jlora.weight import Context, Dot, Params

_STARTS = ("zeros", "xavier", "kaiming", "gaussian")


@dataclasses.dataclass(frozen=True)
class C3A(Method):
    """Circular convolution adaptation. The formula and shapes are at the top of this file.

    Parameters of a leaf: trainable ``{"kernel": [*stack, out / b, in / b, b]}``.

    Attributes:
      block_size: b, a divisor of in and of out.
      start: "zeros", which is the base, or "xavier", "kaiming" (uniform) or "gaussian", which are not.
    """

    block_size: int = 256
    _: dataclasses.KW_ONLY
    start: str = "zeros"

    def __post_init__(self):
        require(
            isinstance(self.block_size, int) and self.block_size > 0,
            f"C3A(block_size={self.block_size!r}): a positive integer is wanted, 64 to 1024 as a rule.",
        )
        require(self.start in _STARTS, f"C3A(start={self.start!r}): one of {', '.join(_STARTS)} is wanted.")

    def check(self, site: Site) -> str | None:
        _, n_in, n_out = site.canonical_shape
        both = math.gcd(n_in, n_out)
        if both % self.block_size:
            nearest = nearest_divisor(both, self.block_size)
            return f"block_size {self.block_size} does not divide both in = {n_in} and out = {n_out}; try {nearest}"

    def init(self, key: Any, w: Array, site: Site, dtype: Any) -> Params:
        (n_in, n_out), b = w.shape, self.block_size
        shape = (n_out // b, n_in // b, b)
        if self.start == "zeros":
            kernel = jnp.zeros(shape, dtype)
        elif self.start == "gaussian":
            kernel = jax.random.normal(key, shape, dtype)
        else:
            bound = (6 / (n_in + n_out if self.start == "xavier" else n_in)) ** 0.5
            kernel = jax.random.uniform(key, shape, dtype, -bound, bound)
        return Params(trainable={"kernel": kernel})

    def count(self, site: Site) -> int:
        _, n_in, n_out = site.canonical_shape
        return site.stack * n_in * n_out // self.block_size

    def dims(self, p: Params) -> Params:
        return Params(trainable={"kernel": "_ _ _"})

    def weight(self, w: Float[Array, "in out"], p: Params) -> Float[Array, "in out"]:
        b, kernel = self.block_size, p.trainable["kernel"].astype(w.dtype)
        turn = (jnp.arange(b)[:, None] - jnp.arange(b)) % b
        blocks = kernel.transpose(1, 2, 0)[:, turn, :].transpose(0, 1, 3, 2) / w.shape[0]
        return w + sharded_as(w, blocks.reshape(w.shape))

    def forward(self, dot: Dot, x: Array, w: Array, p: Params, ctx: Context) -> tuple[Array, Any]:
        if dot.kind != "linear":
            return super().forward(dot, x, w, p, ctx)
        return self._branch(x, dot(x, w), p, False, w.shape[0], ctx), None

    def forward_transposed(self, dot: Dot, x: Array, wt: Float[Array, "out in"], p: Params, ctx: Context) -> Array:
        return self._branch(x, dot(x, wt), p, True, wt.shape[1], ctx)

    def _branch(self, x: Array, y: Array, p: Params, transposed: bool, n_in: int, ctx: Context) -> Array:
        change = _circular(_whole_features(x), p.trainable["kernel"], transposed, n_in, ctx.implementation)
        return y + sharded_as(y, change.astype(y.dtype))

    def describe(self) -> dict[str, str]:
        return {"rank": f"blocks of {self.block_size}"}


_LONGEST = 512  # a block that is transformed as a matrix product


def _whole_features(x: Array) -> Array:
    """x with all of its features on every device, where its type says otherwise (explicit sharding)."""
    spec = jax.typeof(x).sharding.spec
    return x if not spec or spec[-1] is None else jax.reshard(x, PartitionSpec(*spec[:-1], None))


def _circular(
    x: Float[Array, "*t p"], kernel: Float[Array, "m n b"], transposed: bool, n_in: int, implementation: str | None
) -> Float[Array, "*t q"]:
    """x times the change of the weight, or times its transpose, by way of frequencies.

    A spectrum is pairs of real numbers, and its product with the kernel's one real matrix product for each pair, which
    backends do faster than a complex one.
    """
    b, (*tokens, _) = kernel.shape[-1], x.shape
    wide = jnp.promote_types(x.dtype, jnp.float32)
    times = functools.partial(product, implementation=implementation)
    of_x = _spectrum(x.astype(wide).reshape(*tokens, -1, b), times)
    real, imag = jnp.moveaxis(_spectrum(kernel.astype(wide), times), -1, 0)
    # A complex number as the 2 x 2 matrix that multiplies by it; the first pair is two real ones.
    lone = jnp.arange(real.shape[-1]) == 0
    cross = jnp.where(lone, 0.0, imag if transposed else -imag)
    matrices = jnp.stack([real, cross, -cross, jnp.where(lone, imag, real)], axis=-1).reshape(*real.shape, 2, 2)
    matrices = jnp.einsum("mnfcd->fmcnd" if transposed else "mnfcd->fncmd", matrices)
    f, n, _, m, _ = matrices.shape
    of_x = jnp.moveaxis(of_x, -2, -3).reshape(*tokens, f, 2 * n)
    z = jax.vmap(times, (-2, 0), -2)(of_x, matrices.reshape(f, 2 * n, 2 * m))
    z = jnp.moveaxis(z.reshape(*tokens, f, m, 2), -3, -2)
    return _blocks(z, b, times).reshape(*tokens, -1) / n_in


def _waves(b: int, dtype: Any) -> Float[Array, "b f 2"]:
    """The matrix of the transform: cosines and sines of each frequency. Of the lowest, and of the highest of an even b,
    there are cosines only; they make the first pair, so that b numbers have b frequencies."""
    angle = 2 * jnp.pi / b * (jnp.arange(b)[:, None] * jnp.arange((b + 1) // 2) % b).astype(dtype)
    waves = jnp.stack([jnp.cos(angle), -jnp.sin(angle)], axis=-1)
    return waves if b % 2 else waves.at[:, 0, 1].set((1 - 2 * (jnp.arange(b) % 2)).astype(dtype))


def _spectrum(blocks: Float[Array, "*t b"], times: Callable[..., Array]) -> Float[Array, "*t f 2"]:
    """The discrete Fourier transform of real blocks, half of it. Short ones are multiplied by its matrix: that is fast
    wherever products are, and other axes stay sharded as they are."""
    b = blocks.shape[-1]
    if b <= _LONGEST:
        return times(blocks, _waves(b, blocks.dtype).reshape(b, -1)).reshape(*blocks.shape[:-1], -1, 2)
    spectrum = jnp.fft.rfft(blocks)
    pairs = jnp.stack([spectrum.real, spectrum.imag], axis=-1)
    return pairs if b % 2 else pairs[..., :-1, :].at[..., 0, 1].set(spectrum.real[..., -1])


def _blocks(pairs: Float[Array, "*t f 2"], b: int, times: Callable[..., Array]) -> Float[Array, "*t b"]:
    """The inverse."""
    if b <= _LONGEST:
        twice = jnp.where(jnp.arange((b + 1) // 2) == 0, 1.0, 2.0).astype(pairs.dtype) / b  # for the half left out
        waves = _waves(b, pairs.dtype) * twice[:, None]
        return times(pairs.reshape(*pairs.shape[:-2], -1), waves.reshape(b, -1).T)
    real, imag = pairs[..., 0], pairs[..., 1].at[..., 0].set(0.0)
    if b % 2 == 0:
        real = jnp.concatenate([real, pairs[..., :1, 1]], axis=-1)
        imag = jnp.concatenate([imag, jnp.zeros_like(imag[..., :1])], axis=-1)
    return jnp.fft.irfft(jax.lax.complex(real, imag), b)
