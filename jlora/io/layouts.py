"""How one matrix of a tree and the PyTorch parameter of the same name lie in memory.

PyTorch's linear weight is [out, in], its convolution [out, in, *window]; a Flax kernel is [in, out] and
[*window, in, out]. The axes of a leaf are given, or read off its name and the sizes that the file states.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from jlora.weight import Axes

KERNELS = ("kernel", "w")
TABLES = ("embedding", "embeddings")


@dataclasses.dataclass(frozen=True)
class View:
    """One matrix (or the experts of one PyTorch parameter), as a format needs to know it.

    Attributes:
      kind: "linear", "embedding", "conv", or "experts" for a bare parameter (PEFT's ``target_parameters``).
      n_in, n_out: the canonical sizes; for a convolution n_in counts window and features.
      experts: sizes of the stack axes that a bare parameter has on disk, too: (E,), or ().
      window: of a convolution, (in features, *window) in PyTorch's order.
      features_last: whether the canonical in axis of a convolution has its features after the window.
    """

    kind: str
    n_in: int
    n_out: int
    experts: tuple[int, ...] = ()
    window: tuple[int, ...] = ()
    features_last: bool = True

    @property
    def core_window(self) -> tuple[int, ...]:
        """The window axes of a Tucker core. PEFT's has two of them for a convolution along one axis, too."""
        window = self.window[1:]
        return (*window, 1) if len(window) == 1 else window

    def window_rows(self, tensor: np.ndarray) -> np.ndarray:
        """[k, in features, *window] as canonical [in, k]."""
        if self.features_last:
            tensor = np.moveaxis(tensor, 1, -1)
        return tensor.reshape(len(tensor), self.n_in).T

    def window_tensor(self, rows: np.ndarray) -> np.ndarray:
        """The inverse: canonical [in, k] as [k, in features, *window]."""
        features, *window = self.window
        if not self.features_last:
            return rows.T.reshape(-1, features, *window)
        return np.moveaxis(rows.T.reshape(-1, *window, features), -1, 1)


def view(axes: Axes, shape: Sequence[int], leaf: str, bare: bool, named: int) -> View:
    """The view of a leaf of which the first ``named`` stack axes are part of the module's name."""
    stack, n_in, n_out = axes.canonical_shape(shape)
    if bare:
        return View("experts", n_in, n_out, experts=stack[named:])
    if axes.kind != "conv":
        return View(axes.kind, n_in, n_out)
    sizes = [shape[axis] for axis in axes.inputs]
    last = leaf != "weight"  # PyTorch's own name means PyTorch's own layout
    features, window = (sizes[-1], sizes[:-1]) if last else (sizes[0], sizes[1:])
    return View("conv", n_in, n_out, window=(features, *window), features_last=last)


@dataclasses.dataclass(frozen=True)
class Hint:
    """What the tensors of a file tell of the matrix they adapt; None where they do not tell."""

    kind: str | None = None
    n_in: int | None = None
    n_out: int | None = None

    def fits(self, axes: Axes, shape: Sequence[int]) -> bool:
        _, n_in, n_out = axes.canonical_shape(shape)
        return self.n_in in (None, n_in) and self.n_out in (None, n_out)


def candidates(leaf: str, shape: Sequence[int], kind: str | None, named: int, bare: bool) -> list[Axes]:
    """The axes that a leaf of this name may have, without being told. Its first ``named`` axes are stacked."""
    stack, rest = tuple(range(named)), tuple(range(named, len(shape)))
    if len(rest) < 2:
        return []
    *_, first, last = rest
    both_ways = [((last,), (first,)), ((first,), (last,))]
    if bare:
        stack = (*stack, *rest[:-2])
        return [Axes(ins, outs, stack) for ins, outs in both_ways] if len(rest) < 4 else []
    if kind is None:
        kind = "embedding" if leaf in TABLES else "conv" if len(rest) >= (3 if leaf == "weight" else 4) else "linear"
    if kind == "embedding" or leaf in TABLES:
        return [Axes(rest[:1], rest[1:], stack, "embedding")]
    if kind == "conv":
        return [Axes(rest[1:], rest[:1], stack, kind) if leaf == "weight" else Axes(rest[:-1], rest[-1:], stack, kind)]
    if leaf == "weight":
        return [Axes(ins, outs, stack) for ins, outs in both_ways] if len(rest) == 2 else []
    return [Axes(rest[:k], rest[k:], stack) for k in range(1, len(rest))]


# Whole leaves, which no adapter reads but PyTorch's layout still concerns.


def to_torch(leaf: str, array: np.ndarray) -> np.ndarray | None:
    """A leaf (of one layer) as PyTorch's parameter. None where the name and shape do not tell how."""
    if leaf in KERNELS:
        if array.ndim == 3:
            return None  # a convolution in one dimension, or a linear layer with several heads
        return array.T if array.ndim < 4 else np.moveaxis(array, (-1, -2), (0, 1))
    return array.reshape(-1) if leaf in ("bias", "b") else array


def from_torch(leaf: str, shape: Sequence[int], tensor: np.ndarray, fan_in_fan_out: bool) -> np.ndarray | None:
    """PyTorch's parameter as a leaf (of one layer) of this shape. None if it does not fit."""
    shape = tuple(shape)
    if leaf in KERNELS:
        if fan_in_fan_out and tensor.shape == shape:
            return tensor
        if tensor.ndim > 2:
            tensor = np.moveaxis(tensor, (0, 1), (-1, -2))
            return tensor if tensor.shape == shape else None
        splits = [(math.prod(shape[k:]), math.prod(shape[:k])) for k in range(1, len(shape))]
        return tensor.T.reshape(shape) if tensor.shape in splits else None
    if leaf in ("bias", "b"):
        return tensor.reshape(shape) if tensor.shape == (math.prod(shape),) else None
    return tensor if tensor.shape == shape else None
