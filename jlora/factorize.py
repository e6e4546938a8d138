"""A smaller model: pairs of factors in the places of weights, and the weights gone."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from jlora import paths
from jlora.adapt import Adapted, adapt
from jlora.methods.base import Method
from jlora.methods.pela import PELA
from jlora.paths import Pattern
from jlora.quant.leaf import Quantized
from jlora.storage import is_abstract
from jlora.weight import Axes


def factorize(
    params: PyTree,
    ratio: float | Method | Mapping[Pattern, Method] = 2.0,
    targets: Pattern | Sequence[Pattern] | None = None,
    *,
    exclude: Pattern | Sequence[Pattern] = (),
    fn: Callable | None = None,
    args: Sequence[Any] = (),
    usage: Mapping[str, Any] | None = None,
    axes: Mapping[Pattern, Axes] | None = None,
    param_dtype: Any = None,
    key: jax.Array | None = None,
) -> Adapted:
    """``params`` with the best pairs of low-rank factors in the places of its weights: PELA's conversion. Or with
    another method that stands in a weight's place, ``SLTrain`` or ``Maestro``.

    >>> small = jlora.factorize(params, ratio=2.0, fn=apply, args=(batch,), exclude="**/head/**")
    >>> logits = jlora.lift(apply)(small.bind(), batch)

    The result is used and trained as what ``jlora.adapt`` makes, and keeps nothing of the weights: where they stood in
    ``base`` there is a leaf of no bytes that remembers shape and axes. ``jlora.merge`` multiplies the pairs out. The
    backward pass takes the product with the first factor once more. To keep the weights beside the pairs, as teachers,
    use ``jlora.adapt(params, jlora.PELA(ratio), ...)``; what that trains can go on here, with
    ``factorize(params, ratio, ...).replace(trainable=trainable)``.

    Args:
      ratio: the parameters of a weight of in x out become in out / ratio or a little fewer: the rank is
        floor(in out / (ratio (in + out))). Or a method; or rules, pattern -> method, in the place of targets: those of
        ``jlora.rank.welore``, say.
      targets, exclude, fn, args, usage, axes, param_dtype: as for ``jlora.adapt``.
      key: for methods that start at random.

    Raises:
      ValueError: a method that needs the weights.
    """
    methods = ratio if isinstance(ratio, Method | Mapping) else PELA(ratio)
    for method in methods.values() if isinstance(methods, Mapping) else (methods,):
        if not method.replaces:
            raise ValueError(f"{method} changes weights and cannot do without them: use jlora.adapt for it.")
    made = adapt(
        params,
        methods,
        targets,
        exclude=exclude,
        fn=fn,
        args=args,
        usage=usage,
        axes=axes,
        param_dtype=param_dtype,
        key=jax.random.key(0) if key is None else key,
    )
    leaves, treedef = paths.flatten(params)
    kept = [_absent(leaf, made.sites[path].axes) if path in made.sites else leaf for path, leaf in leaves]
    return made.replace(base=jax.tree.unflatten(treedef, kept))


def _absent(leaf: Any, axes: Axes) -> Absent:
    of = functools.partial(Absent.of, axes=axes)
    return jax.eval_shape(of, leaf) if is_abstract(leaf) else of(leaf)


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("nothing",), meta_fields=("layout", "of_shape", "dtype")
)
@dataclasses.dataclass(frozen=True, repr=False)
class Absent(Quantized):
    """A weight of which shape, axes and dtype are kept, for a method that stands in its place.

    Attributes:
      nothing: [*stack, 0]: what a scan over the weight slices.
    """

    nothing: Array | None = None

    @classmethod
    def of(cls, w: Array, axes: Axes) -> Absent:
        stack, *_ = axes.canonical_shape(w.shape)
        return cls(axes, tuple(w.shape), jnp.dtype(w.dtype), jnp.zeros((*stack, 0), jnp.uint8))

    @property
    def stack_shape(self) -> tuple[int, ...]:
        return self.nothing.shape[:-1]

    def encode(self, w: Float[Array, "in out"]) -> Absent:
        return dataclasses.replace(self, nothing=jnp.zeros(0, jnp.uint8))

    def matrix(self) -> Float[Array, "in out"]:
        return jnp.zeros(self.matrix_shape, self.dtype)
