r"""LR2VQ: the rows of a weight, cut into short vectors, as a linear map of few codewords.

Learning Low-Rank Representations for Model Compression. Zhu et al., 2022. https://arxiv.org/abs/2211.11397

.. math::  w_i \approx c_{k(i)} L, \qquad k(i) = \arg\min_k \| z_i - c_k \|^2, \qquad w_i \approx z_i L

The weight [in, out] is cut along its outputs into n = in out / m vectors w_i [m]; z_i [d] is the representation of one,
C [K, d] the codebook, L [d, m] the map, one a weight. Stored: n integers below K, K d + d m numbers. Plain vector
quantization is d = m; a smaller d takes noise away from what is clustered, and leaves m to decide the size and d to
decide the accuracy.

Verified from the abstract: the decomposition, and what m and d are for. Not known here: how the paper trains the three
together, and its estimate of d. Here z and L start as the singular value decomposition's, C by Lloyd's iteration, and
``nearest`` is for training: a hard choice with the gradient of a soft one.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key


@functools.partial(jax.tree_util.register_dataclass, data_fields=("codebook", "lift", "codes"), meta_fields=("shape",))
@dataclasses.dataclass(frozen=True)
class Codes:
    """A weight by codes.

    Attributes:
      codebook: C.
      lift: L.
      codes: k(i).
      shape: (in, out).
    """

    codebook: Float[Array, "k d"]
    lift: Float[Array, "d m"]
    codes: Int[Array, " n"]
    shape: tuple[int, int]

    def product(self) -> Float[Array, "in out"]:
        """The weight, formed: of K vectors, each where its code is."""
        return (self.codebook @ self.lift)[self.codes].reshape(self.shape)


@functools.partial(jax.jit, static_argnames=("length", "dim", "codes", "iterations"))
def low_rank_codes(
    w: Float[Array, "in out"], *, length: int, dim: int, codes: int, key: Key[Array, ""], iterations: int = 25
) -> Codes:
    """Codes near ``w``.

    Args:
      length: m, a divisor of out.
      dim: d, at most m.
      codes: K.
      key: draws which vectors the clusters start at.
      iterations: of Lloyd's. A cluster that is left without a vector stays where it is.
    """
    n = w.size // length
    if w.shape[1] % length or not 1 <= dim <= length or not 1 <= codes:
        raise ValueError(
            f"low_rank_codes(length={length}, dim={dim}, codes={codes}) of {w.shape}: a length that divides the "
            "outputs, 1 <= dim <= length and a positive number of codes are wanted."
        )
    vectors = w.reshape(n, length).astype(jnp.promote_types(w.dtype, jnp.float32))
    with jax.default_matmul_precision("highest"):
        _, _, vh = jnp.linalg.svd(vectors, full_matrices=False)
        lift = vh[:dim]
        z = vectors @ lift.T
        codebook = z[jax.random.choice(key, n, (codes,), replace=codes > n)]

        def step(codebook: Array, _: None) -> tuple[Array, None]:
            at = _closest(z, codebook)
            count = jnp.zeros(codes, z.dtype).at[at].add(1)[:, None]
            total = jnp.zeros_like(codebook).at[at].add(z)
            return jnp.where(count > 0, total / jnp.maximum(count, 1), codebook), None

        codebook, _ = jax.lax.scan(step, codebook, None, iterations)
        return Codes(codebook, lift, _closest(z, codebook), w.shape)


def nearest(z: Float[Array, "n d"], codebook: Float[Array, "k d"], temperature: float = 1.0) -> Float[Array, "n d"]:
    """The codeword next to each representation, with the gradient of the mean of all of them, weighted by
    ``softmax(-|z - c|^2 / temperature)``, for both arguments."""
    soft = jax.nn.softmax(-_distances(z, codebook) / temperature, axis=-1) @ codebook
    hard = codebook[_closest(z, codebook)]
    return soft + jax.lax.stop_gradient(hard - soft)


def _distances(z: Array, codebook: Array) -> Float[Array, "n k"]:
    products = jnp.matmul(z, codebook.T, precision=jax.lax.Precision.HIGHEST)
    return jnp.sum(jnp.square(z), 1)[:, None] - 2 * products + jnp.sum(jnp.square(codebook), 1)


def _closest(z: Array, codebook: Array) -> Int[Array, " n"]:
    return jnp.argmin(_distances(z, codebook), axis=1)
