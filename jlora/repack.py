"""Smaller arrays after ranks were chosen: what is masked is dropped, and the optimizer's state follows."""

from __future__ import annotations

import dataclasses
from typing import Any, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Array, Bool, Int, PyTree

from jlora.adapt import Adapted
from jlora.methods.base import Site
from jlora.storage import is_abstract
from jlora.weight import Params


@overload
def repack(adapted: Adapted) -> Adapted: ...


@overload
def repack(adapted: Adapted, opt_state: PyTree) -> tuple[Adapted, PyTree]: ...


def repack(adapted: Adapted, opt_state: PyTree = None) -> Any:
    """The same adapters without the ranks that are out of use, outside of jit: smaller arrays, and one compilation.

    >>> adapted, opt_state = jlora.repack(adapted, opt_state)

    Out of use is what no output and no gradient depends on: a zero in the mask of ``AdaLoRA``, ``TriAdaptLoRA`` and
    ``Maestro``; in ``LoRA`` a column of A and row of B that are both zero. In ``SoRA`` it is a gate that is zero,
    although that has a gradient (``jlora.optim.soft_threshold``): here it is final. The scale stays. A leaf of which
    nothing is left is not adapted any more. The matrices of a stacked leaf keep as many ranks as the one with most, the
    others padded with zeros that stay zero; of ``LoRA``, with one stack axis, their ranks become ``LoRA.ranks``. Leaves
    of other methods stay as they are.

    Args:
      adapted: with adapters of which ranks were taken.
      opt_state: the state of an optimizer of ``adapted.trainable``, of an allocator (``jlora.rank``), or any tree of
        such. Wherever it mirrors the trainable tree, masked or not (``optax.masked``, ``partition``, ``MultiSteps``),
        it loses the same ranks, so that the next step is the one that the masked adapters would have taken: of
        optimizers that treat every entry alike, as Adam does, exactly.

    Returns:
      The smaller adapters; with ``opt_state``, the two.

    Raises:
      ValueError: no leaf has ranks that can be dropped; a mask is not finite; ``opt_state`` has arrays that belong to a
        parameter and are not of its shape (factored moments, projections), of which nobody knows what to drop.
    """
    trainable, frozen, sites, kept = dict(adapted.trainable), dict(adapted.frozen), dict(adapted.sites), {}
    for path, site in adapted.sites.items():
        p = Params(adapted.trainable[path], adapted.frozen.get(path))
        terms = live_terms(path, site, p)
        if terms is None:
            continue
        kept[path] = terms
        del trainable[path], sites[path]
        frozen.pop(path, None)
        if terms.rank:
            sites[path], p = terms.cut(site, p)
            trainable[path] = p.trainable
            if p.frozen is not None:
                frozen[path] = p.frozen
    if not kept:
        raise ValueError(
            "There is nothing to repack: no leaf is adapted by a method of which ranks can be taken, LoRA, AdaLoRA, "
            f"SoRA, TriAdaptLoRA or Maestro; got {sorted({site.method.name for site in sites.values()})}. "
            "(jlora.rank.truncate is for nested ranks, jlora.to_lora for any method that merges.)"
        )
    order = [path for path in adapted.sites if path in sites]
    trainable = {path: trainable[path] for path in adapted.trainable if path in trainable}
    smaller = adapted.replace(trainable=trainable, frozen=frozen, _sites=tuple((path, sites[path]) for path in order))
    return smaller if opt_state is None else (smaller, _follow(opt_state, adapted, smaller, kept))


@dataclasses.dataclass(frozen=True)
class Terms:
    """Which terms of rank one of a leaf's matrices are kept, those in use first, in the order they had.

    Attributes:
      order: where they stood.
      live: whether they are in use; where not, they fill a matrix of lower rank up.
    """

    order: Int[np.ndarray, "*stack rank"]
    live: Bool[np.ndarray, "*stack rank"]

    @classmethod
    def of(cls, live: Bool[np.ndarray, "*stack r"]) -> Terms:
        rank = int(np.max(np.count_nonzero(live, axis=-1), initial=0))
        order = np.argsort(~live, axis=-1, kind="stable")[..., :rank]
        return cls(order, np.take_along_axis(live, order, axis=-1))

    @property
    def rank(self) -> int:
        return self.order.shape[-1]

    @property
    def ranks(self) -> tuple[int, ...]:
        """Of every matrix, in the order of the stack."""
        return tuple(np.count_nonzero(self.live, axis=-1).reshape(-1).tolist())

    def take(self, leaf: Array, names: str) -> Array:
        """``leaf``, [*stack, ...] with the rest of its axes named as in ``Method.dims``, of the kept terms alone."""
        out, stack = leaf, self.order.shape[:-1]
        for axis, name in enumerate(names.split(), len(stack)):
            if name == "rank":
                shape = [*stack, *(self.rank if i == axis else 1 for i in range(len(stack), leaf.ndim))]
                out = jnp.take_along_axis(out, self.order.reshape(shape), axis) * self.live.reshape(shape)
        out = out.astype(leaf.dtype)
        placed = isinstance(leaf, jax.Array) and isinstance(leaf.sharding, NamedSharding)
        return jax.device_put(out, leaf.sharding) if placed else out  # the rank is whole on every device

    def cut(self, site: Site, p: Params) -> tuple[Site, Params]:
        """A leaf of the kept terms."""
        dims = site.method.dims(p)._replace(shared=None)
        method, p = site.method.cut(jax.tree.map(self.take, p, dims), self.ranks)
        return Site(method, site.axes, site.shape), p


def live_terms(path: str, site: Site, p: Params) -> Terms | None:
    """What is in use of a leaf; None for a method that has no ranks to drop."""
    weights = None if site.method.whole_leaf else site.method.live(p)
    if weights is None:
        return None
    if is_abstract(p) or any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(p)):
        raise ValueError(
            f"{path!r} has no numbers here, and shapes depend on them: repack outside of jit, with arrays."
        )
    weights = np.asarray(weights)
    if not np.all(np.isfinite(weights)):
        raise ValueError(
            f"{path!r}: the mask is not finite, for the scores that it was made from were not: training had diverged. "
            "Go back to a checkpoint from before, and lower the learning rate."
        )
    return Terms.of(weights != 0)


def _follow(state: PyTree, old: Adapted, new: Adapted, kept: dict[str, Terms]) -> PyTree:
    """``state`` of the trainable tree of ``old`` as one of that of ``new``."""

    def mirrors(node: Any) -> bool:
        """By structure, for a tree of labels (``optax.partition``) may have the same keys."""
        if not isinstance(node, dict) or not node or not node.keys() <= old.trainable.keys():
            return False
        fits = lambda path, own: _is_masked(own) or _parts(own, old.trainable[path]) is not None
        return all(fits(path, own) or _is_of_matrices(own, kept.get(path)) for path, own in node.items())

    def leaf(where: tuple, node: Any) -> Any:
        if mirrors(node):
            return {path: one((*where, path), path, own) for path, own in node.items() if path in new.trainable}
        if getattr(node, "ndim", 0) and jnp.issubdtype(node.dtype, jnp.floating):
            raise ValueError(_unknown(where, node, "belongs to no parameter"))
        return node

    def one(where: tuple, path: str, own: Any) -> Any:
        terms = kept.get(path)
        if terms is not None and _is_of_matrices(own, terms):
            return terms.take(own, "rank") if own.ndim == terms.order.ndim else own
        p = Params(old.trainable[path], old.frozen.get(path))
        parts = _parts(own, p.trainable)
        if terms is None or parts is None:
            return own
        names = _parts(old.sites[path].method.dims(p).trainable, p.trainable)
        leaves = zip(parts, jax.tree.leaves(p.trainable), names, strict=True)
        taken = [_part(where, part, like, name, terms) for part, like, name in leaves]
        return jax.tree.structure(new.trainable[path]).unflatten(taken)  # with the new scale

    return jax.tree_util.tree_map_with_path(leaf, state, is_leaf=mirrors)


def _is_masked(node: Any) -> bool:
    """Whether a part of a state is nothing, as ``optax.MaskedNode`` is."""
    return not jax.tree.leaves(node)


def _parts(node: Any, own: PyTree) -> list[Any] | None:
    """What a part of a state has in the places of a leaf's parameters; None if it is no such tree."""
    try:
        return jax.tree.structure(own).flatten_up_to(node)
    except (ValueError, TypeError):
        return None


def _is_of_matrices(node: Any, terms: Terms | None) -> bool:
    """Whether a part of a state is one number for each term or each matrix, as allocators have them."""
    stack = () if terms is None else terms.order.shape[:-1]
    return (
        terms is not None
        and hasattr(node, "shape")
        and node.shape[: len(stack)] == stack
        and node.ndim < len(stack) + 2
    )


def _part(where: tuple, part: Any, like: Array, names: str, terms: Terms) -> Any:
    if _is_masked(part) or getattr(part, "shape", None) == ():
        return part
    if getattr(part, "shape", None) != like.shape:
        raise ValueError(_unknown(where, part, f"belongs to a parameter of shape {like.shape}"))
    return terms.take(part, names)


def _unknown(where: tuple, node: Any, what: str) -> str:
    shape = getattr(node, "shape", type(node).__name__)
    place = "".join(f"[{key!r}]" if isinstance(key, str) else str(key) for key in where)
    return (
        f"opt_state{place} of shape {shape} {what}: which of it to drop is not known. Repack the adapters alone, "
        "jlora.repack(adapted), and start the optimizer anew, tx.init(adapted.trainable)."
    )
