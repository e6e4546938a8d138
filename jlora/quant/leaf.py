"""What the formats have in common: a weight's shape and axes, and one matrix of it at a time."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jlora.storage import Stored, one_by_one
from jlora.weight import Axes


@dataclasses.dataclass(frozen=True)
class Quantized(Stored):
    """A quantized weight. A frozen pytree: it can be jitted over, donated, checkpointed; ``jax.tree.map`` of an index
    over it gives the weight of one layer.

    The matrix that is stored is PyTorch's, by rows: [out, in], and of an embedding [vocabulary, features]. Blocks,
    where there are any, run along its rows.

    Attributes:
      layout: the axes of the weight that was quantized.
      of_shape: its shape.
      dtype: its dtype, and that of the matrices.
    """

    layout: Axes
    of_shape: tuple[int, ...]
    dtype: Any

    options: ClassVar[tuple[str, ...]] = ()
    """Fields that a user chooses."""

    # The format.

    @classmethod
    def of(cls, w: Array, axes: Axes, **options: Any) -> Self:
        """Quantize a weight whose axes are these. Its matrices are quantized one after another."""
        template = cls(axes, tuple(w.shape), jnp.dtype(w.dtype), **options)
        return one_by_one(template.encode, axes.canonical_shape(w.shape)[0])(axes.to_canonical(w))

    def encode(self, w: Float[Array, "in out"]) -> Self:
        """Another matrix, stored as this one is; of no stack."""
        raise NotImplementedError

    # What it is.

    @property
    def axes(self) -> Axes:
        """Which axes of ``shape`` are what. A stack axis that was indexed away is gone."""
        kept = self._kept()
        number = {axis: i for i, axis in enumerate(kept)}
        groups = [[number[a] for a in group if a in number] for group in self._groups()]
        inputs, outputs, stack = map(tuple, groups)
        return Axes(inputs, outputs, stack, self.layout.kind, number.get(self.layout.features))

    @property
    def shape(self) -> tuple[int, ...]:
        stack = dict(zip(self._stack(), self.stack_shape, strict=True))
        return tuple(stack.get(axis, self.of_shape[axis]) for axis in self._kept())

    def _groups(self) -> tuple[tuple[int, ...], ...]:
        return self.layout.inputs, self.layout.outputs, self.layout.stack

    def _stack(self) -> tuple[int, ...]:
        """The stack axes that are left."""
        return self.layout.stack[len(self.layout.stack) - len(self.stack_shape) :]

    def _kept(self) -> list[int]:
        gone = set(self.layout.stack) - set(self._stack())
        return [axis for axis in range(len(self.of_shape)) if axis not in gone]

    @property
    def matrix_shape(self) -> tuple[int, int]:
        return self.layout.canonical_shape(self.of_shape)[1:]

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes that are stored."""
        return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))

    # To and fro.

    def dequantize(self) -> Array:
        """The weight as an array. In ``jlora.lift`` that is not needed, and costs what quantizing was to save."""
        return self.axes.from_canonical(self.canonical(), self.shape)

    def like(self, w: Array) -> Self:
        """Another weight of the same shape and axes, stored as this one is."""
        return one_by_one(self.encode, self.stack_shape)(self.axes.to_canonical(w))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self.dequantize(), dtype)

    def __repr__(self) -> str:
        stored = ", ".join(f"{leaf.dtype}{list(leaf.shape)}" for leaf in jax.tree.leaves(self))
        return f"{type(self).__name__}({jnp.dtype(self.dtype)}{list(self.shape)}, stored as {stored})"

    # PyTorch's matrix.

    @property
    def row_shape(self) -> tuple[int, int]:
        """(rows, columns) of what is stored."""
        return self.matrix_shape if self.layout.kind == "embedding" else self.matrix_shape[::-1]

    def to_rows(self, w: Float[Array, "in out"]) -> Array:
        return w if self.layout.kind == "embedding" else w.T

    def from_rows(self, w: Array) -> Float[Array, "in out"]:
        """The inverse, in the weight's dtype, and a constant."""
        w = jax.lax.stop_gradient(w.astype(self.dtype))
        return w if self.layout.kind == "embedding" else w.T

    @property
    def wide(self) -> Any:
        """The dtype of the arithmetic."""
        return jnp.promote_types(self.dtype, jnp.float32)


def over(x: float | Array, y: Array) -> Array:
    """x / y, and 0 where y is: what is all zeros has no scale."""
    return jnp.where(y == 0, 0, x / jnp.where(y == 0, 1, y))
