r"""LoftQ: a quantized base and a LoRA start that together come close to the weight.

LoftQ: LoRA-Fine-Tuning-Aware Quantization for Large Language Models. Li et al., 2023. https://arxiv.org/abs/2310.08659

From A B = 0, a number of times over:

.. math::  Q \leftarrow \mathrm{quantize}(W - s A B), \qquad s A B \leftarrow \mathrm{SVD}_r(W - Q)

W [in, out], Q its quantized base, A [in, r], B [r, out], s the scale of LoRA. The singular values are shared evenly:
s A A^T = s B^T B up to rotation. The output starts closer to that of W than a quantized base's does alone, the more so
the fewer bits Q has. Every iteration after the first costs another quantization and SVD; the error need not fall.

PEFT gives A and B the product that s A B has here, and so starts at W's approximation only where alpha is the rank.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from jlora import paths
from jlora.adapt import Adapted, plan
from jlora.factors import Factors
from jlora.linalg import truncated_svd
from jlora.methods.base import Site
from jlora.methods.lora import LoRA
from jlora.paths import Pattern
from jlora.quant.leaf import Quantized
from jlora.quant.nf4 import NF4
from jlora.quant.tree import check_options
from jlora.storage import is_abstract, is_stored, one_by_one
from jlora.weight import Axes


def loftq(
    params: PyTree,
    method: LoRA,
    to: type[Quantized] = NF4,
    targets: Pattern | Sequence[Pattern] = "all-linear",
    *,
    iterations: int = 1,
    exclude: Pattern | Sequence[Pattern] = (),
    fn: Callable | None = None,
    args: Sequence[Any] = (),
    usage: Mapping[str, Any] | None = None,
    axes: Mapping[Pattern, Axes] | None = None,
    param_dtype: Any = None,
    allow_unmatched: bool = False,
    **options: Any,
) -> Adapted:
    """``quantize`` and ``adapt`` in one: what is adapted is quantized, and the adapters begin with what that lost.

    >>> adapted = jlora.quant.loftq(params, jlora.LoRA(16), fn=apply, args=(batch,))

    Nothing in it is random. The original weights are not kept.

    Args:
      method: ``LoRA``, of one rank.
      to, options: the format and its options, as for ``quantize``.
      iterations: of the alternation at the top of this file.
      targets, exclude, fn, args, usage, axes, param_dtype, allow_unmatched: as for ``jlora.adapt``.

    Raises:
      ValueError: as ``jlora.adapt`` does; a leaf is quantized already; the method is another.
    """
    if type(method) is not LoRA or method.varies or method.start is not None:
        raise ValueError(f"LoftQ starts LoRA(rank, alpha) of one rank and scale; got {method}.")
    if iterations < 1:
        raise ValueError(f"iterations={iterations}: at least one is wanted.")
    check_options(to, options)
    sites = plan(
        params,
        method,
        targets,
        exclude=exclude,
        fn=fn,
        args=args,
        usage=usage,
        axes=axes,
        allow_unmatched=allow_unmatched,
    )
    leaves, treedef = paths.flatten(params)
    base, trainable = [], {}
    for path, leaf in leaves:
        if path not in sites:
            base.append(leaf)
            continue
        if is_stored(leaf):
            raise ValueError(f"{path!r} is quantized already: {leaf!r}. LoftQ wants the weight itself.")
        dtype = jnp.promote_types(leaf.dtype, jnp.float32) if param_dtype is None else jnp.dtype(param_dtype)
        start = functools.partial(
            _start, to=to, site=sites[path], options=tuple(options.items()), iterations=iterations, dtype=dtype
        )
        stored, trainable[path] = jax.eval_shape(start, leaf) if is_abstract(leaf) else start(leaf)
        base.append(stored)
    return Adapted(jax.tree.unflatten(treedef, base), trainable, {}, tuple(sites.items()))


@functools.partial(jax.jit, static_argnames=("to", "site", "options", "iterations", "dtype"))
def _start(
    leaf: jax.Array, *, to: type[Quantized], site: Site, options: tuple, iterations: int, dtype: Any
) -> tuple[Quantized, Factors]:
    template = to(site.axes, tuple(leaf.shape), jnp.dtype(leaf.dtype), **dict(options))
    one = lambda w: start_of_matrix(w, template, site.method, iterations, dtype)
    return one_by_one(one, site.canonical_shape[0])(site.axes.to_canonical(leaf))


def start_of_matrix(
    w: Float[Array, "in out"], template: Quantized, method: LoRA, iterations: int, dtype: Any
) -> tuple[Quantized, Factors]:
    """The quantized base of one matrix, stored as ``template`` says, and the pair."""
    w = w.astype(template.wide)
    change = jnp.zeros_like(w)
    for i in range(iterations):
        stored = template.encode(w - change)
        u, s, vh = truncated_svd(w - stored.matrix().astype(w.dtype), method.rank)
        if i + 1 < iterations:
            change = (u * s) @ vh
    root = jnp.sqrt(s / method.scale)
    return stored, Factors((u * root).astype(dtype), (root[:, None] * vh).astype(dtype), method.scale)
