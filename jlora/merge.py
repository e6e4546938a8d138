"""Folding adapters into weights."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from jlora import paths
from jlora.adapt import Adapted
from jlora.methods.base import Site
from jlora.weight import Params


def merge(adapted: Adapted, *, allow_tied_change: bool = False) -> PyTree:
    """A plain parameter tree whose weights are the effective weights.

    The tree has the base's structure, dtypes and shardings; leaves that are not adapted are the base's own buffers. The
    arithmetic is float32 or wider. There is no un-merging: ``adapted.base`` still holds the original, exactly.

    Args:
      adapted: what ``adapt`` made, trained or not.
      allow_tied_change: merge an adapter that acts on an embedding's lookups only (``lookup_only``) although that
        changes the output head that shares the table.

    Raises:
      ValueError: the method has no weight to merge, or the merge would change another use of the leaf.
    """
    sites = adapted.sites
    leaves, treedef = paths.flatten(adapted.base)
    return jax.tree.unflatten(
        treedef,
        [
            _merged(adapted, path, leaf, sites[path], allow_tied_change) if path in sites else leaf
            for path, leaf in leaves
        ],
    )


def _merged(adapted: Adapted, path: str, leaf: Any, site: Site, allow_tied_change: bool) -> Any:
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
    if traced or not isinstance(leaf, jax.Array):
        return _effective(leaf, p, site=site)
    return jax.jit(_effective, static_argnames="site", out_shardings=leaf.sharding)(leaf, p, site=site)


def _effective(leaf: jax.Array, p: Params, *, site: Site) -> jax.Array:
    wide = jnp.promote_types(leaf.dtype, jnp.float32)
    if site.method.whole_leaf:
        return site.method.weight(leaf.astype(wide), p).astype(leaf.dtype)
    one = lambda w, own: site.method.weight(w, own._replace(shared=p.shared))
    for _ in site.canonical_shape[0]:
        one = jax.vmap(one)
    w = one(site.axes.to_canonical(leaf).astype(wide), p._replace(shared=None))
    return site.axes.from_canonical(w, leaf.shape).astype(leaf.dtype)
