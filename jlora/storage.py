"""Weights stored as something other than an array of floats, as the rest of the library sees them.

A ``Stored`` weight stands in a parameter tree where an array stood, and in an ``AdaptedWeight`` where its base stood.
Two rules make that simple. The arrays it holds begin with the axes over which the model stacks its matrices, in
canonical order, and whatever slices the stack (a scan, an index) slices each of them alike. And of one matrix it gives
``[in, out]``, by ``matrix()``, in the place where a product wants it and not before. ``jlora.quant`` has the formats.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Float


class Stored:
    """A weight from which matrices are made when they are needed. As a leaf of a tree it is one leaf, and has besides
    what is below ``axes``, ``shape``, ``ndim``, ``size``, ``nbytes`` and ``dequantize()``."""

    dtype: Any
    """Of the matrices."""

    @property
    def stack_shape(self) -> tuple[int, ...]:
        """The leading axes of every array that is stored, as they are now."""
        raise NotImplementedError

    def matrix(self) -> Float[Array, "in out"]:
        """The matrix, of a weight without stack. A constant: no gradient flows to what is stored."""
        raise NotImplementedError

    def rows(self, take: Callable[[Array], Array]) -> Array | None:
        """The rows of the matrix that ``take`` takes of an array [in, ...], without forming the others. None where the
        format holds no rows."""
        return None

    def canonical(self) -> Float[Array, "*stack in out"]:
        """All matrices at once."""
        fn = type(self).matrix
        for _ in self.stack_shape:
            fn = jax.vmap(fn)
        return fn(near(self))

    def then(self, step: Cast | Cut) -> Stored:
        return Later(self, (step,))


def is_stored(x: Any) -> bool:
    return isinstance(x, Stored)


def dense(x: Any) -> Any:
    """A stored leaf as an array of its shape and dtype; anything else as it is."""
    return x.dequantize() if is_stored(x) else x


def is_far(x: Any) -> bool:
    """Whether an array, or what is stored, lies in the host's memory by its type (``jlora.offload``)."""
    return any(_is_far(part) for part in jax.tree.leaves(x))


def near(x: Any) -> Any:
    """The same in the memory of the device, where one computes."""
    return jax.tree.map(lambda part: _near(part) if _is_far(part) else part, x)


def _near(x: Array) -> Array:
    x = jax.device_put(x, jax.memory.Space.Device)
    # In the order that it comes in. A TPU's compiler would rather have some matrices the other way round, and cannot
    # slice a layer out of a host's array so: it ends the process (libtpu 0.0.42).
    return with_layout_constraint(x, Layout(tuple(range(x.ndim))))


def _is_far(x: Any) -> bool:
    return isinstance(x, jax.Array) and jax.typeof(x).memory_space == jax.memory.Space.Host


def is_abstract(leaf: Any) -> bool:
    """Whether a leaf is shapes without numbers."""
    return any(isinstance(part, jax.ShapeDtypeStruct) for part in jax.tree.leaves(leaf))


def one_by_one(fn: Callable, stack: Sequence[int]) -> Callable:
    """``fn(tree)`` for every matrix of trees with these stack axes, in turn: what it forms is there once."""
    for _ in stack:
        fn = functools.partial(jax.lax.map, fn)
    return fn


# What a model does to a weight before it uses it: put off until there is a matrix.


@dataclasses.dataclass(frozen=True)
class Take:
    """A range of an axis. ``start`` may be traced."""

    start: Any
    size: int
    stride: int = 1

    def __call__(self, leaf: Array, axis: int) -> Array:
        if isinstance(self.start, int):
            limit = self.start + (self.size - 1) * self.stride + 1
            return jax.lax.slice_in_dim(leaf, self.start, max(limit, self.start), self.stride, axis=axis)
        return jax.lax.dynamic_slice_in_dim(leaf, self.start, self.size, axis=axis)

    def within(self, leaf: Array, axis: int, sizes: Sequence[int], at: int) -> Array:
        """Of an axis into which axes of these sizes were flattened, the range of the one in the place ``at``."""
        head, tail = leaf.shape[:axis], leaf.shape[axis + 1 :]
        part = self(leaf.reshape(*head, *sizes, *tail), axis + at)
        return part.reshape(*head, math.prod(part.shape[axis : axis + len(sizes)]), *tail)


@functools.partial(jax.tree_util.register_dataclass, data_fields=(), meta_fields=("dtype",))
@dataclasses.dataclass(frozen=True)
class Cast:
    dtype: Any

    def __call__(self, w: Array) -> Array:
        return w.astype(self.dtype)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("start",),
    meta_fields=("take", "axis", "sizes", "at"),
)
@dataclasses.dataclass(frozen=True)
class Cut:
    """``take.within(w, axis, sizes, at)``; a traced start has the stack axes, like all that is stored."""

    start: Any
    take: Take
    axis: int
    sizes: tuple[int, ...]
    at: int

    @classmethod
    def of(cls, stack: Sequence[int], take: Take, axis: int, sizes: Sequence[int], at: int) -> Cut:
        if isinstance(take.start, int):
            return cls(None, take, axis, tuple(sizes), at)
        return cls(jnp.broadcast_to(take.start, stack), dataclasses.replace(take, start=0), axis, tuple(sizes), at)

    def __call__(self, w: Array) -> Array:
        take = self.take if self.start is None else dataclasses.replace(self.take, start=self.start)
        return take.within(w, self.axis, self.sizes, self.at)


@functools.partial(jax.tree_util.register_dataclass, data_fields=("of", "steps"), meta_fields=())
@dataclasses.dataclass(frozen=True)
class Later(Stored):
    """A stored weight, and what is done to its matrix once there is one."""

    of: Stored
    steps: tuple[Cast | Cut, ...]

    @property
    def stack_shape(self) -> tuple[int, ...]:
        return self.of.stack_shape

    @property
    def dtype(self) -> Any:
        return next((step.dtype for step in reversed(self.steps) if isinstance(step, Cast)), self.of.dtype)

    def matrix(self) -> Array:
        return functools.reduce(lambda w, step: step(w), self.steps, self.of.matrix())

    def rows(self, take: Callable[[Array], Array]) -> Array | None:
        if any(isinstance(step, Cut) for step in self.steps):
            return None
        rows = self.of.rows(take)
        return None if rows is None else rows.astype(self.dtype)

    def then(self, step: Cast | Cut) -> Stored:
        return Later(self.of, (*self.steps, step))
