"""The pair of low-rank factors, the one node type that every room of the library knows."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Factors:
    """A low-rank matrix ``scale * a @ b``, as a pytree node with the leaves ``a`` and ``b``.

    Optimizers that treat the two factors of a pair together find them by this type; everything else sees two arrays.

    Attributes:
      a: maps the input to the rank, ``[*stack, in, r]``.
      b: maps the rank to the output, ``[*stack, r, out]``.
      scale: a static number (alpha / r, say), part of the tree's structure and not of its leaves.
    """

    a: Float[Array, "*stack in r"]
    b: Float[Array, "*stack r out"]
    scale: float = dataclasses.field(default=1.0, metadata=dict(static=True))

    @property
    def rank(self) -> int:
        return self.a.shape[-1]

    def product(self) -> Float[Array, "*stack in out"]:
        """``scale * a @ b``, formed. For merging and for tests: nothing on the way of a training step calls it."""
        return self.scale * (self.a @ self.b)

    def less(self, start: Factors) -> Factors:
        """``scale * (a b - a0 b0)`` as a pair of both ranks together, (a - a0) b + a0 (b - b0): of differences, so that
        no large products cancel. The start has no gradient."""
        a0, b0 = start.a.astype(self.a.dtype), start.b.astype(self.b.dtype)
        a = jnp.concatenate([self.a - a0, a0], axis=-1)
        return Factors(a, jnp.concatenate([self.b, self.b - b0], axis=-2), self.scale)

    def swap(self) -> Factors:
        """The factors of the transposed matrix: ``(a b)^T = b^T a^T``."""
        return Factors(self.b.swapaxes(-1, -2), self.a.swapaxes(-1, -2), self.scale)
