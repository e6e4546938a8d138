r"""BOFT: the inputs of a weight are rotated by a product of sparse rotations, a butterfly, and its outputs scaled.

Parameter-Efficient Orthogonal Finetuning via Butterfly Factorization. Liu et al., 2023. https://arxiv.org/abs/2311.06243

.. math::  y = \bigl((x\,B_m \cdots B_1)\, W\bigr) \odot s, \; B_i = P_i\,\mathrm{diag}(R_{i1}, \dots, R_{in}) P_i^\top

x [..., in], W [in, out] frozen; R_ij [b, b] = (I - Q)(I + Q)^-1 of the skew-symmetric part Q of a trained [b, b], n b =
in; s [out] trained. Trained: m n b^2 + out a matrix, of which a little less than half of the m n b^2 act (as in PEFT).

* P_i brings together, for every block, half a block each from the two halves of a group of 2^(i-1) b inputs; P_1 is the
  identity. With m = log2(n) + 1 every input meets every other. With m = 1 it is OFT with a scale.
* Q starts at zero and s at one, so the output starts as the base's.
* The activation is rotated, m T in b multiplications for T tokens, the permutations being transposes of small axes; no
  [in, in] matrix is formed. Convolutions and experts form the rotated weight.
* s is on the product alone, not on the layer's bias, as in PEFT.

When to use it: for rotations that mix more inputs than OFT's blocks at the same count. It is the slowest of the family.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from jlora.methods.base import Method, Site, require
from jlora.methods.oft import cayley, nearest_divisor, rotate
from jlora.weight import Context, Dot, Params


def turn(
    x: Float[Array, "*t in"],
    blocks: Float[Array, "m n b b"],
    transposed: bool = False,
    einsum: Callable[..., Array] = jnp.einsum,
) -> Float[Array, "*t in"]:
    """``x B_m ... B_1``, or ``x B_1^T ... B_m^T``, its inverse."""
    size = blocks.shape[-1]
    levels = range(len(blocks)) if transposed else reversed(range(len(blocks)))
    for i in levels:
        level = jnp.swapaxes(blocks[i], -1, -2) if transposed else blocks[i]
        if i == 0:
            x = rotate(x, level, einsum)
            continue
        groups = lambda x, *axes: x.reshape(*x.shape[:-1], -1, *axes, size // 2)
        flat = lambda parts, like=x: jnp.swapaxes(parts, -2, -3).reshape(like.shape)
        x = rotate(flat(groups(x, 2, 2**i)), level, einsum)
        x = flat(groups(x, 2**i, 2))
    return x


@dataclasses.dataclass(frozen=True)
class BOFT(Method):
    """Butterfly orthogonal fine-tuning. The formula and shapes are at the top of this file.

    Parameters of a leaf: trainable ``{"q": [*stack, m, n, b, b], "s": [*stack, out]}``.

    Attributes:
      block_size: b, which divides the inputs, with ``levels`` above 1 to the power of 2 that they want.
      blocks: n, instead of b.
      levels: m, the number of sparse rotations.
    """

    block_size: int = 4
    _: dataclasses.KW_ONLY
    blocks: int | None = None
    levels: int = 1

    sliceable = frozenset({"out"})  # a slice along `in` cuts blocks

    def __post_init__(self):
        for field in ("block_size", "blocks", "levels"):
            value = getattr(self, field)
            require(
                (value is None and field == "blocks") or (isinstance(value, int) and value >= 1),
                f"BOFT({field}={value!r}): a positive integer is wanted.",
            )

    def sizes(self, n_in: int) -> tuple[int, int]:
        """(number of blocks, their size)."""
        size = self.block_size if self.blocks is None else n_in // self.blocks
        return n_in // size, size

    def check(self, site: Site) -> str | None:
        if site.axes.kind == "embedding":
            return "BOFT rotates inputs, and those of an embedding are its vocabulary; use LoRA for this leaf"
        n_in = site.canonical_shape[1]
        wanted, field = (self.block_size, "block_size") if self.blocks is None else (self.blocks, "blocks")
        if n_in % wanted:
            nearest = nearest_divisor(n_in, wanted)
            return f"{field} {wanted} does not divide {n_in} inputs; the nearest that does is {nearest}"
        (n, size), most = self.sizes(n_in), 1
        if size % 2 == 0:
            while n % 2**most == 0:
                most += 1
        if self.levels > most:
            return (
                f"levels {self.levels} wants blocks of even size, and a multiple of 2^{self.levels - 1} of them; "
                f"{n_in} inputs are {n} blocks of {size}, which allow {most}"
            )
        return None

    def init(self, key: Any, w: Array, site: Site, dtype: Any) -> Params:
        n, size = self.sizes(w.shape[0])
        q = jnp.zeros((self.levels, n, size, size), dtype)
        return Params(trainable={"q": q, "s": jnp.ones((w.shape[1],), dtype)})

    def count(self, site: Site) -> int:
        _, n_in, n_out = site.canonical_shape
        return site.stack * (self.levels * n_in * self.sizes(n_in)[1] + n_out)

    def dims(self, p: Params) -> Params:
        return Params(trainable={"q": "_ _ _ _", "s": "out"})

    def rotations(self, p: Params) -> Float[Array, "m n b b"]:
        """R_ij. At least float32."""
        q = p.trainable["q"]
        q = q.astype(jnp.promote_types(q.dtype, jnp.float32))
        return cayley(0.5 * (q - jnp.swapaxes(q, -1, -2)))

    def weight(self, w: Float[Array, "in out"], p: Params) -> Float[Array, "in out"]:
        return turn(w.T, self.rotations(p), transposed=True).T * p.trainable["s"].astype(w.dtype)

    def forward(self, dot: Dot, x: Array, w: Array, p: Params, ctx: Context) -> tuple[Array, Any]:
        if dot.kind != "linear" or not dot.features_last(x):
            return super().forward(dot, x, w, p, ctx)
        return dot.per_output(dot(turn(x, self.rotations(p), einsum=dot.einsum), w), p.trainable["s"]), None

    def forward_transposed(self, dot: Dot, x: Array, wt: Float[Array, "out in"], p: Params, ctx: Context) -> Array:
        y = dot(x * p.trainable["s"].astype(x.dtype), wt)
        if not dot.features_last(y):
            return super().forward_transposed(dot, x, wt, p, ctx)
        return turn(y, self.rotations(p), transposed=True, einsum=dot.einsum)

    def describe(self) -> dict[str, str]:
        return {"rank": f"{self.blocks} blocks" if self.blocks else f"blocks of {self.block_size}"}
