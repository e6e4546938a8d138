r"""OFT: the inputs of a weight are rotated, block by block; the weight itself keeps its angles.

OFT: Controlling Text-to-Image Diffusion by Orthogonal Finetuning. Qiu et al., 2023. https://arxiv.org/abs/2306.07280
OFTv2: Orthogonal Finetuning Made Scalable. Qiu et al., 2025. https://arxiv.org/abs/2506.19847

.. math::  y = (x R) W, \qquad R = \mathrm{diag}(R_1, \dots, R_n), \qquad
           R_i = I + 2 Q_i + 2 Q_i^2 + 2 Q_i^3 + Q_i^4 \approx (I + Q_i)(I - Q_i)^{-1}

x [..., in], W [in, out] frozen, R_i [b, b] with n b = in, Q_i = -Q_i^T, held by its b (b - 1) / 2 entries above the
diagonal, row by row. Trained: n b (b - 1) / 2 a matrix, or b (b - 1) / 2 with ``share``, where all blocks are one.

* Q starts at zero, so R at the identity.
* The activation is rotated, T in b multiplications for T tokens; neither R as an [in, in] matrix nor R W is formed.
  Convolutions and experts do form R W.
* ``neumann``: k, the terms of the polynomial (OFTv2), 5 here and in PEFT: I + 2 Q + ... + 2 Q^(k-2) + Q^(k-1). It needs
  no solve, and is orthogonal only as far as Q is small.
* ``neumann=None``: the exact rotation, R_i = (I - Q_i)(I + Q_i)^-1, by one elimination for each block and step, which
  can cost more than the layer. What the polynomial approximates is the inverse of this rotation: PEFT has both
  signs and so has jlora, so that files mean the same.
* ``coft``: the norm of each Q_i is at most eps / sqrt(n) (sqrt(1) with ``share``). What is beyond is drawn back where
  the parameters are used, and gradients pass as if it had not been. PEFT writes the drawn-back values over its
  parameters in every forward pass; ``project`` gives them, for who wants its very steps.
* A convolution's blocks run through its window and features in the kernel's own order.

When to use it: to keep what a model knows of the relations between its neurons (the angles of the columns of W are
kept). Small blocks have few parameters and cost little; the change to W has full rank, so it does not export to LoRA.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jlora.linalg import inverse
from jlora.methods.base import Method, Site, require
from jlora.weight import Context, Dot, Params


@jax.custom_jvp
def cayley(q: Float[Array, "*n b b"]) -> Float[Array, "*n b b"]:
    """R = (I - q)(I + q)^-1 = 2 (I + q)^-1 - I, a rotation for a skew-symmetric q."""
    eye = jnp.eye(q.shape[-1], dtype=q.dtype)
    return 2 * inverse(eye + q) - eye


@cayley.defjvp
def _cayley_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    """dR = -(I + R) dq (I + q)^-1, where the inverse is (I + R) / 2: a gradient inverts nothing."""
    rotation = cayley(*primals)
    shifted = jnp.eye(rotation.shape[-1], dtype=rotation.dtype) + rotation
    return rotation, -0.5 * (shifted @ tangents[0] @ shifted)


def cayley_neumann(q: Float[Array, "*n b b"], terms: int) -> Float[Array, "*n b b"]:
    """The first ``terms`` powers of q in (I + q)(I - q)^-1, the last with half its weight."""
    rotation, power = jnp.eye(q.shape[-1], dtype=q.dtype), q
    for i in range(1, terms):
        rotation = rotation + (2.0 if i == 1 or i < terms - 1 else 1.0) * power
        power = power @ q
    return rotation


def skew(v: Float[Array, "*n k"], size: int) -> Float[Array, "*n b b"]:
    """The skew-symmetric matrices with these entries above their diagonals, row by row."""
    upper = jnp.zeros((*v.shape[:-1], size, size), v.dtype).at[(..., *np.triu_indices(size, 1))].set(v)
    return upper - jnp.swapaxes(upper, -1, -2)


def rotate(
    x: Float[Array, "*t in"], blocks: Float[Array, "n b b"], einsum: Callable[..., Array] = jnp.einsum
) -> Float[Array, "*t in"]:
    """x times the block-diagonal matrix; one block is used throughout."""
    size = blocks.shape[-1]
    parts = x.reshape(*x.shape[:-1], x.shape[-1] // size, size)
    if len(blocks) == 1:
        parts = einsum("...nb,bc->...nc", parts, blocks[0])
    else:
        parts = einsum("...nb,nbc->...nc", parts, blocks)
    return parts.reshape(x.shape).astype(x.dtype)


def nearest_divisor(n: int, wanted: int) -> int:
    return min((k for k in range(1, n + 1) if n % k == 0), key=lambda k: (abs(k - wanted), k))


@dataclasses.dataclass(frozen=True)
class OFT(Method):
    """Orthogonal fine-tuning. The formula and shapes are at the top of this file.

    Parameters of a leaf: trainable ``{"q": [*stack, n, b (b - 1) / 2]}``, n = 1 with ``share``.

    Attributes:
      block_size: b, which divides the inputs.
      blocks: n, instead of b: each weight has as many blocks, as large as its inputs make them. (PEFT's ``r``.)
      adjust: where b or n does not divide the inputs, take the nearest number that does, the smaller of two, as PEFT
        does. Without it that is an error.
      share: one rotation for all blocks of a matrix.
      neumann: the number of terms of the polynomial, or None for the exact rotation.
      coft: eps, the bound of constrained OFT, or None.
    """

    block_size: int = 32
    _: dataclasses.KW_ONLY
    blocks: int | None = None
    adjust: bool = False
    share: bool = False
    neumann: int | None = 5
    coft: float | None = None

    sliceable = frozenset({"out"})  # a slice along `in` cuts blocks

    def __post_init__(self):
        for field, least in (("block_size", 1), ("blocks", 1), ("neumann", 2)):
            value = getattr(self, field)
            require(
                (value is None and field != "block_size") or (isinstance(value, int) and value >= least),
                f"OFT({field}={value!r}): an integer of at least {least} is wanted.",
            )
        require(self.coft is None or self.coft > 0, f"OFT(coft={self.coft!r}): a positive number is wanted.")

    def sizes(self, n_in: int) -> tuple[int, int]:
        """(number of blocks, their size)."""
        wanted = self.block_size if self.blocks is None else self.blocks
        given = nearest_divisor(n_in, wanted) if self.adjust else wanted
        return (n_in // given, given) if self.blocks is None else (given, n_in // given)

    def check(self, site: Site) -> str | None:
        if site.axes.kind == "embedding":
            return "OFT rotates inputs, and those of an embedding are its vocabulary; use LoRA for this leaf"
        n_in = site.canonical_shape[1]
        wanted, field = (self.block_size, "block_size") if self.blocks is None else (self.blocks, "blocks")
        if n_in % wanted and not self.adjust:
            nearest = nearest_divisor(n_in, wanted)
            return f"{field} {wanted} does not divide {n_in} inputs; {nearest} does, and is what adjust=True takes"
        return None

    def shape(self, n_in: int) -> tuple[int, int]:
        """Of the trained entries."""
        n, size = self.sizes(n_in)
        return 1 if self.share else n, size * (size - 1) // 2

    def init(self, key: Any, w: Array, site: Site, dtype: Any) -> Params:
        return Params(trainable={"q": jnp.zeros(self.shape(w.shape[0]), dtype)})

    def count(self, site: Site) -> int:
        return site.stack * math.prod(self.shape(site.canonical_shape[1]))

    def dims(self, p: Params) -> Params:
        return Params(trainable={"q": "_ _"})

    def project(self, p: Params) -> dict[str, Array]:
        """q where ``coft`` wants it. The bound is a float32 number, with the roundings that PEFT's takes on its way."""
        q = p.trainable["q"]
        if self.coft is None:
            return {"q": q}
        bound = float(np.float32(1) / np.sqrt(np.float32(q.shape[-2])) * np.float32(self.coft))
        norms = math.sqrt(2.0) * jnp.linalg.norm(q, axis=-1, keepdims=True)
        return {"q": jnp.where(norms <= bound, q, q * (bound / jnp.maximum(norms, bound)))}

    def rotations(self, n_in: int, p: Params) -> Float[Array, "n b b"]:
        """R_i, one with ``share``. At least float32."""
        q = p.trainable["q"]
        q = q + jax.lax.stop_gradient(self.project(p)["q"] - q)
        q = q.astype(jnp.promote_types(q.dtype, jnp.float32))
        q = skew(q, self.sizes(n_in)[1])
        return cayley(q) if self.neumann is None else cayley_neumann(q, self.neumann)

    def weight(self, w: Float[Array, "in out"], p: Params) -> Float[Array, "in out"]:
        turned = jnp.swapaxes(self.rotations(w.shape[0], p), -1, -2)
        return rotate(w.T, turned).T

    def forward(self, dot: Dot, x: Array, w: Array, p: Params, ctx: Context) -> tuple[Array, Any]:
        if dot.kind != "linear" or not dot.features_last(x):
            return super().forward(dot, x, w, p, ctx)
        return dot(rotate(x, self.rotations(w.shape[0], p), dot.einsum), w), None

    def forward_transposed(self, dot: Dot, x: Array, wt: Float[Array, "out in"], p: Params, ctx: Context) -> Array:
        y = dot(x, wt)
        if not dot.features_last(y):
            return super().forward_transposed(dot, x, wt, p, ctx)
        turned = jnp.swapaxes(self.rotations(wt.shape[1], p), -1, -2)
        return rotate(y, turned, dot.einsum)

    def describe(self) -> dict[str, str]:
        return {"rank": f"{self.blocks} blocks" if self.blocks else f"blocks of {self.block_size}"}
