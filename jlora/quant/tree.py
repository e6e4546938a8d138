"""Quantizing the leaves of a parameter tree, and back."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jaxtyping import PyTree

from jlora import paths
from jlora.adapt import plan
from jlora.methods.base import Method
from jlora.paths import Pattern
from jlora.quant.leaf import Quantized
from jlora.quant.nf4 import NF4
from jlora.storage import dense, is_abstract, is_stored
from jlora.weight import Axes


@dataclasses.dataclass(frozen=True)
class _Storage(Method):
    """A rule of ``plan`` that stores what it matches."""

    to: type[Quantized]

    def __str__(self) -> str:
        return f"quantize to {self.to.__name__}"


def quantize(
    params: PyTree,
    to: type[Quantized] = NF4,
    targets: Pattern | Sequence[Pattern] = "all-linear",
    *,
    exclude: Pattern | Sequence[Pattern] = (),
    fn: Callable | None = None,
    args: Sequence[Any] = (),
    usage: Mapping[str, Any] | None = None,
    axes: Mapping[Pattern, Axes] | None = None,
    allow_unmatched: bool = False,
    **options: Any,
) -> PyTree:
    """The tree with quantized weights in the places of the targets. Everything else is the tree's own.

    >>> small = jlora.quant.quantize(params, jlora.quant.NF4, fn=apply, args=(batch,))
    >>> small = jlora.quant.quantize(params, jlora.quant.Int8, "**/embedding", axes={"**/embedding": axes})

    Leaves are quantized one after another, and within a stacked leaf its matrices. Works under ``jit`` (where the tree
    may be donated) and on leaves that are ``jax.ShapeDtypeStruct``. On a mesh the compiler decides where what is stored
    lies. With explicit sharding it is sharded as the weight was; of ``NF4`` a product brings the codes together, and
    where these cannot be cut evenly, or blocks go on from row to row, they are stored whole on every device.

    Args:
      to: the format, ``NF4`` or ``Int8``.
      targets, exclude, fn, args, usage, axes, allow_unmatched: which leaves, and which of their axes are inputs and
        outputs, as for ``jlora.adapt``. "all-linear" leaves embeddings and heads as they are.
      options: of the format: ``block_size`` and ``double`` of ``NF4``.

    Raises:
      ValueError: as ``jlora.adapt`` does; or a leaf is quantized already.
    """
    check_options(to, options)
    sites = plan(
        params,
        _Storage(to),
        targets,
        exclude=exclude,
        fn=fn,
        args=args,
        usage=usage,
        axes=axes,
        allow_unmatched=allow_unmatched,
    )
    leaves, treedef = paths.flatten(params)
    return jax.tree.unflatten(
        treedef,
        [quantize_leaf(path, leaf, to, sites[path].axes, options) if path in sites else leaf for path, leaf in leaves],
    )


def dequantize(tree: PyTree) -> PyTree:
    """The tree with arrays in the places of its quantized weights."""
    return jax.tree.map(dense, tree, is_leaf=is_stored)


def quantize_leaf(path: str, leaf: Any, to: type[Quantized], axes: Axes, options: Mapping[str, Any]) -> Quantized:
    if is_stored(leaf):
        raise ValueError(
            f"{path!r} is quantized already: {leaf!r}. Leave it out with exclude=, or dequantize it first."
        )
    fn = functools.partial(_quantize, to=to, axes=axes, options=tuple(options.items()))
    return jax.eval_shape(fn, leaf) if is_abstract(leaf) else fn(leaf)


@functools.partial(jax.jit, static_argnames=("to", "axes", "options"))
def _quantize(leaf: jax.Array, *, to: type[Quantized], axes: Axes, options: tuple) -> Quantized:
    return to.of(leaf, axes, **dict(options))


def check_options(to: type[Quantized], options: Mapping[str, Any]) -> None:
    if not (isinstance(to, type) and issubclass(to, Quantized)):
        raise TypeError(f"to={to!r}: a format is wanted, jlora.quant.NF4 or jlora.quant.Int8.")
    if unknown := [name for name in options if name not in to.options]:
        raise ValueError(f"{to.__name__} has no option {unknown[0]!r}; it has {', '.join(to.options) or 'none'}.")
