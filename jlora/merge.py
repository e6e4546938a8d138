"""Folding adapters into weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from jlora import paths
from jlora.adapt import Adapted, check_adapted
from jlora.methods.base import Site
from jlora.storage import Stored, dense, is_stored, near, one_by_one
from jlora.weight import Params


def merge(adapted: Adapted, *, allow_tied_change: bool = False, requantize: bool = False) -> PyTree:
    """A plain parameter tree whose weights are the effective weights.

    The tree has the base's structure, dtypes and shardings; leaves that are not adapted are the base's own buffers. The
    arithmetic is float32 or wider. There is no un-merging: ``adapted.base`` still holds the original, exactly.

    Quantized weights, adapted or not, become arrays of the dtype they had before: what adapters learned beside them
    loses nothing.

    Args:
      adapted: what ``adapt`` made, trained or not.
      allow_tied_change: merge an adapter that acts on an embedding's lookups only (``lookup_only``) although that
        changes the output head that shares the table.
      requantize: keep quantized leaves quantized, and quantize the effective weights as their base was. That rounds
        them to what the format can say: of an adapter's change, which is small, much may be lost. Measure before
        relying on it.

    Raises:
      ValueError: the method has no weight to merge, or the merge would change another use of the leaf.
    """
    check_adapted(adapted, "merge")
    sites = adapted.sites
    leaves, treedef = paths.flatten(adapted.base)
    return jax.tree.unflatten(
        treedef,
        [
            _merged(adapted, path, leaf, sites[path], allow_tied_change, requantize)
            if path in sites
            else leaf
            if requantize
            else dense(leaf)
            for path, leaf in leaves
        ],
    )


def _merged(adapted: Adapted, path: str, leaf: Any, site: Site, allow_tied_change: bool, requantize: bool) -> Any:
    method = site.method
    if not method.mergeable:
        raise ValueError(f"{path!r}: {method.name} has no weight to merge. Keep it as an adapter, with bind and lift.")
    if method.lookup_only and not allow_tied_change:
        raise ValueError(
            f"{path!r} is adapted for its lookups only, and merging would change the output head that shares the table."
            " Untie them first (a head with a leaf of its own), keep the adapter unmerged, or accept the change with "
            "merge(adapted, allow_tied_change=True)."
        )
    p = adapted.params_of(path, site)
    traced = any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves((leaf, p)))
    if is_stored(leaf):
        fn = _requantized if requantize else _dequantized
        return fn(leaf, p, site=site) if traced else jax.jit(fn, static_argnames="site")(leaf, p, site=site)
    if traced or not isinstance(leaf, jax.Array):
        return _effective(leaf, p, site=site)
    return jax.jit(_effective, static_argnames="site", out_shardings=leaf.sharding)(leaf, p, site=site)


def _effective(leaf: jax.Array, p: Params, *, site: Site) -> jax.Array:
    leaf, wide = near(leaf), jnp.promote_types(leaf.dtype, jnp.float32)
    if site.method.whole_leaf:
        return site.method.weight(leaf.astype(wide), p).astype(leaf.dtype)
    one = lambda w, own: site.method.weight(w, own._replace(shared=p.shared))
    for _ in site.canonical_shape[0]:
        one = jax.vmap(one)
    w = one(jnp.asarray(site.axes.to_canonical(leaf).astype(wide)), p._replace(shared=None))
    return site.axes.from_canonical(w, leaf.shape).astype(leaf.dtype)


def _dequantized(leaf: Stored, p: Params, *, site: Site) -> jax.Array:
    """The effective weight of a quantized leaf as an array. Matrices are formed one after another."""
    if site.method.whole_leaf:
        return _effective(dense(leaf), p, site=site)
    w = _each_matrix(lambda _, w: w.astype(leaf.dtype), leaf, p, site)
    return site.axes.from_canonical(w, leaf.shape)


def _requantized(leaf: Stored, p: Params, *, site: Site) -> Stored:
    """The effective weight of a quantized leaf, quantized again."""
    if site.method.whole_leaf:
        return leaf.like(_effective(dense(leaf), p, site=site))
    return _each_matrix(lambda stored, w: stored.encode(w), leaf, p, site)


def _each_matrix(fn: Callable, leaf: Stored, p: Params, site: Site) -> Any:
    """``fn(what is stored of a matrix, the effective matrix)`` for each."""
    wide = jnp.promote_types(leaf.dtype, jnp.float32)

    def one(each: tuple[Stored, Params]) -> Any:
        stored, own = each
        stored = near(stored)
        return fn(stored, site.method.weight(stored.matrix().astype(wide), own._replace(shared=p.shared)))

    return one_by_one(one, site.canonical_shape[0])((leaf, p._replace(shared=None)))
