r"""RoAd: the outputs of a weight are rotated in pairs, and scaled.

3-in-1: 2D Rotary Adaptation for Efficient Finetuning, Efficient Batching and Composability. Liao and Monz, 2024.
https://arxiv.org/abs/2409.00119

.. math::  z = x W, \qquad y = c \odot z + s \odot \mathrm{half}(z),\quad c = \alpha \cos\theta,\; s = \alpha \sin\theta

W [in, out] frozen. The outputs are cut into groups of g; in each, feature i of the first half and feature i of the
second make a pair, and half maps the halves (z1, z2) to (-z2, z1). alpha and theta are trained; there are

==========  ==========================  =========================================================
variant     trained a matrix            theta and alpha
==========  ==========================  =========================================================
1           out                         [out / 2], one of each for a pair: a true rotation, scaled
2           2 out                       [out], one of each for an output
4           4 out                       [2 out], group by group: g for c, then g for s
==========  ==========================  =========================================================

* theta starts at 0 and alpha at 1, so the output starts as the base's.
* It is elementwise on the result: no product, no temporary but the result's own. It merges into the weight.
* The bias of the layer is no part of it: y + bias. The paper, and PEFT, rotate the bias with the product; ``Follow``
  on the bias does that, and a PEFT file is read so.

When to use it: very many adapters of a few kilobytes, and batches in which every row has its own.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jlora.methods.base import Method, Site, require
from jlora.methods.oft import nearest_divisor
from jlora.weight import Context, Dot, Params


def half(z: Float[Array, "*t out"], group: int) -> Float[Array, "*t out"]:
    """(z1, z2) -> (-z2, z1), the halves of every group."""
    return _swap(_halves(z, group)).reshape(z.shape)


def _halves(z: Float[Array, "*t out"], group: int) -> Float[Array, "*t n 2 g/2"]:
    return z.reshape(*z.shape[:-1], z.shape[-1] // group, 2, group // 2)


def _swap(parts: Float[Array, "*t n 2 g/2"]) -> Float[Array, "*t n 2 g/2"]:
    return jnp.stack([-parts[..., 1, :], parts[..., 0, :]], axis=-2)


def turn(group: int, z: Float[Array, "*t out"], c: Float[Array, "*t out"], s: Array) -> Float[Array, "*t out"]:
    """c z + s half(z), summed while the halves are apart: XLA fuses that, and not a sum after ``half``."""
    parts = _halves(z, group)
    return (parts * _halves(c, group) + _swap(parts) * _halves(s, group)).reshape(z.shape)


# With the gradient by hand: half is skew-symmetric, so a gradient turns back as one more elementwise pass. JAX would
# pad and add the halves instead, each as large as z.
_turn_by_hand = jax.custom_vjp(turn, nondiff_argnums=(0,))


def _forward(group: int, z: Array, c: Array, s: Array) -> tuple[Array, tuple[Array, ...]]:
    return turn(group, z, c, s), (z, c, s)


def _backward(group: int, kept: tuple[Array, ...], dy: Array) -> tuple[Array, ...]:
    z, c, s = kept
    gains = jax.vjp(lambda c, s: z * c + half(z, group) * s, c, s)[1]
    return dy * c - half(dy * s, group), *gains(dy)


_turn_by_hand.defvjp(_forward, _backward)


@dataclasses.dataclass(frozen=True)
class RoAd(Method):
    """2D rotary adaptation. The formula and shapes are at the top of this file.

    Parameters of a leaf: trainable ``{"theta": [*stack, k], "alpha": [*stack, k]}``, k = out / 2, out or 2 out.

    Attributes:
      variant: 1, 2 or 4: how many outputs' worth of numbers.
      group_size: g, even, which divides the outputs.
    """

    variant: int = 1
    _: dataclasses.KW_ONLY
    group_size: int = 64

    sliceable = frozenset({"in"})  # a slice along `out` cuts pairs

    def __post_init__(self):
        require(self.variant in (1, 2, 4), f"RoAd(variant={self.variant!r}): 1, 2 or 4 is wanted.")
        require(
            isinstance(self.group_size, int) and self.group_size > 0 and self.group_size % 2 == 0,
            f"RoAd(group_size={self.group_size!r}): a positive and even integer is wanted.",
        )

    def check(self, site: Site) -> str | None:
        n_out = site.canonical_shape[2]
        if n_out % 2:
            return f"{n_out} outputs have no pairs; leave it out of the targets, or use IA3, which wants none"
        if n_out % self.group_size:
            nearest = 2 * nearest_divisor(n_out // 2, self.group_size // 2)
            return f"group_size {self.group_size} does not divide {n_out} outputs; the nearest that does is {nearest}"
        return None

    def size(self, n_out: int) -> int:
        """Of theta, and of alpha."""
        return n_out * self.variant // 2

    def init(self, key: Any, w: Array, site: Site, dtype: Any) -> Params:
        size = self.size(w.shape[1])
        return Params(trainable={"theta": jnp.zeros(size, dtype), "alpha": jnp.ones(size, dtype)})

    def count(self, site: Site) -> int:
        return site.stack * 2 * self.size(site.canonical_shape[2])

    def dims(self, p: Params) -> Params:
        return Params(trainable={"theta": "_", "alpha": "_"})

    def gains(self, w: Float[Array, "in out"], p: Params) -> tuple[Float[Array, " out"], Float[Array, " out"]]:
        """c and s."""
        alpha, g = p.trainable["alpha"], self.group_size
        # Complex, since XLA on CPU would form a real cosine anew for every token that it multiplies.
        direction = jnp.exp(1j * p.trainable["theta"])
        c, s = alpha * direction.real, alpha * direction.imag
        if self.variant == 1:
            c, s = (jnp.repeat(v.reshape(-1, 1, g // 2), 2, axis=1).reshape(-1) for v in (c, s))
        if self.variant == 4:
            c, s = (v.reshape(-1, 2, g)[:, i].reshape(-1) for i, v in enumerate((c, s)))
        return c, s

    def weight(self, w: Float[Array, "in out"], p: Params) -> Float[Array, "in out"]:
        c, s = self.gains(w, p)
        return w * c.astype(w.dtype) + half(w, self.group_size) * s.astype(w.dtype)

    def forward(self, dot: Dot, x: Array, w: Array, p: Params, ctx: Context) -> tuple[Array, Any]:
        if dot.kind == "conv":
            return super().forward(dot, x, w, p, ctx)
        y, (c, s) = dot(x, w), dot.per_matrix(self.gains, w, p)
        rotation = turn if ctx.implementation == "plain" else _turn_by_hand
        return rotation(self.group_size, y, dot.along(y, c), dot.along(y, s)), None

    def forward_transposed(self, dot: Dot, x: Array, wt: Float[Array, "out in"], p: Params, ctx: Context) -> Array:
        c, s = (gain.astype(x.dtype) for gain in self.gains(wt.T, p))
        return dot(x * c - half(x * s, self.group_size), wt)

    def describe(self) -> dict[str, str]:
        return {"rank": f"pairs in {self.group_size}"}
