"""Smaller adapters out of trained ones, outside of jit: what is not wanted any more is dropped."""

from collections.abc import Callable, Mapping
from typing import Any

from jlora.adapt import Adapted
from jlora.methods.base import Method, Site
from jlora.methods.branches import Branches
from jlora.methods.lora import LoRA
from jlora.methods.nested import Nested
from jlora.methods.sora import SoRA
from jlora.repack import live_terms
from jlora.weight import Params


def truncate(adapted: Adapted, rank: int) -> Adapted:
    """Nested adapters (``DyLoRA``, ``MatryoshkaLoRA``) as plain LoRA of a rank that was chosen after training.

    The result runs, merges and is saved as any LoRA, and is what ``bind(context={"rank": rank})`` computes. Leaves with
    other methods stay as they are.
    """
    return _each(
        adapted, Nested, lambda _, site, p: site.method.truncated(p, rank), "truncate", "DyLoRA or MatryoshkaLoRA"
    )


def prune(adapted: Adapted) -> Adapted:
    """``SoRA`` adapters as plain LoRA of the ranks whose gate is not zero, exactly. A leaf without any is not adapted
    any more. Leaves with other methods stay as they are. To go on with the gates: ``jlora.repack``."""

    def smaller(path: str, site: Site, p: Params) -> tuple[LoRA, Params] | None:
        terms = live_terms(path, site, p)
        if not terms.rank:
            return None
        site, p = terms.cut(site, p)
        return site.method.folded(p)

    return _each(adapted, SoRA, smaller, "prune", "SoRA")


def choose(adapted: Adapted, context: Mapping[str, Any]) -> Adapted:
    """Adapters with several branches (``MTLoRA``, ``ViDA``, ``MarkBoard``, ``MTSK``, ``LoLA``, ``XLoRA``) as the plain
    LoRA that a context chooses, and what ``bind(context=context)`` computes. A leaf where no branch acts is not adapted
    any more. Leaves with other methods stay as they are.

    >>> jlora.merge(jlora.rank.choose(adapted, {"task": "depth"}))
    """
    return _each(
        adapted, Branches, lambda _, site, p: site.method.chosen(p, context), "choose", "a method with branches"
    )


def _each(
    adapted: Adapted,
    kind: type[Method],
    smaller: Callable[[str, Site, Params], tuple[LoRA, Params] | None],
    verb: str,
    names: str,
) -> Adapted:
    trainable, frozen, sites, found = dict(adapted.trainable), dict(adapted.frozen), {}, False
    for path, site in adapted.sites.items():
        if not isinstance(site.method, kind):
            sites[path] = site
            continue
        found = True
        result = smaller(path, site, Params(trainable.pop(path), frozen.pop(path, None)))
        if result is not None:
            method, p = result
            trainable[path] = p.trainable
            sites[path] = Site(method, site.axes, site.shape)
    if not found:
        raise ValueError(f"There is nothing to {verb}: no leaf is adapted by {names}.")
    return adapted.replace(trainable=trainable, frozen=frozen, _sites=tuple(sites.items()))
