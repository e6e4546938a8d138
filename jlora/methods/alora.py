r"""aLoRA: LoRA that acts only from an invocation in the text on, so that what was computed before it can be reused.

Activated LoRA: Fine-tuned LLMs for Intrinsics. Greenewald et al., 2025. https://arxiv.org/abs/2504.12397

.. math::  y_t = x_t W + [t \ge t_0]\; s\,(\mathrm{drop}(x_t) A) B, \qquad s = \alpha / r

x [batch, seq, in], t a place in the sequence, t_0 for each example the place where the last occurrence of the
invocation tokens begins; W [in, out] frozen, A [in, r] and B [r, out] trained, with LoRA's start (and its rsLoRA).
Trained: r (in + out) a matrix. Before t_0 the result is the base's to the last bit, and so are the keys and values that
a model caches there.

Which tokens follow the invocation is bound as one of

* ``context={"alora_offsets": offsets}``: [batch] integers, the number of tokens from t_0 to the end, as PEFT counts;
  what is not positive, and None in a list, stands for no invocation: the base alone. ``invocation_offsets(ids,
  tokens)`` finds them. Counted from the end, they stay right when a model with a cache is given the next token alone;
* ``context={"alora_mask": mask}``: [batch, seq] booleans, true where the adapter acts.

The activation must then have these axes in front, [batch, seq, ..., in]; inside a ``vmap`` over the examples the batch
axis is absent from both. Without either, every token given is taken to follow the invocation: plain LoRA, which is
right for tokens that are generated after it, and where a prefix comes from the base's cache. Departure: PEFT, given no
offsets, is the base, with a gradient of zero.

There is no weight to merge. Embeddings and convolutions have no aLoRA, in PEFT neither.

When to use it: many small skills on one long conversation, none of which computes the conversation anew.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from jlora.factors import Factors
from jlora.methods.base import Site, dropout, require
from jlora.methods.lora import LoRA
from jlora.weight import Context, Dot, Params


@dataclasses.dataclass(frozen=True)
class ALoRA(LoRA):
    """LoRA from the invocation on. The formula and shapes are at the top of this file; the rest is LoRA's.

    Attributes:
      invocation_tokens: the ids of the invocation, kept for ``invocation_offsets`` and for PEFT's files.
    """

    _: dataclasses.KW_ONLY
    invocation_tokens: tuple[int, ...] = ()

    mergeable = False
    takes_start = True

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "invocation_tokens", tuple(map(int, self.invocation_tokens)))
        require(not self.lookup_only, "ALoRA(lookup_only=True): lookups know no places in a sequence; use LoRA.")

    def check(self, site: Site) -> str | None:
        if site.axes.kind != "linear":
            return (
                f"aLoRA wants to know which token an activation is of, and a weight of kind {site.axes.kind!r} does "
                "not; use LoRA for this leaf"
            )
        return super().check(site)

    def forward(self, dot: Dot, x: Array, w: Array, p: Params, ctx: Context) -> tuple[Array, Any]:
        active = _active(dot, x, ctx.values or {})
        if active is None:
            return super().forward(dot, x, w, p, ctx)
        f = self.factors(w, p)
        return dot(x, w) + _branch(dot, dropout(x, self.dropout, ctx.key), f, active), None

    def forward_transposed(self, dot: Dot, x: Array, wt: Array, p: Params, ctx: Context) -> Array:
        active = _active(dot, x, ctx.values or {})
        if active is None:
            return super().forward_transposed(dot, x, wt, p, ctx)
        return dot(x, wt) + _branch(dot, x, self.factors(wt.T, p).swap(), active)


def _branch(dot: Dot, x: Array, f: Factors, active: Array) -> Array:
    h = dot.inner(x, f.a) * f.scale
    return dot.outer(jnp.where(active, h, jnp.zeros((), h.dtype)), f.b)  # rows of zeros stay zeros


def _active(dot: Dot, x: Array, values: Mapping[str, Any]) -> Bool[Array, "batch seq ..."] | None:
    """Where the adapter acts, with an axis of 1 for every further axis of x; None for everywhere."""
    offsets, mask = values.get("alora_offsets"), values.get("alora_mask")
    if offsets is None and mask is None:
        return None
    if mask is None:
        if isinstance(offsets, (list, tuple)):
            offsets = [0 if offset is None else offset for offset in offsets]
        offsets = jnp.asarray(offsets)
        lead, fits = offsets.shape, x.ndim > offsets.ndim + 1 and x.shape[: offsets.ndim] == offsets.shape
        wanted = ", ".join(map(str, (*lead, "seq", "..., features")))
    else:
        mask = jnp.asarray(mask)
        fits = x.ndim > mask.ndim and x.shape[: mask.ndim] == mask.shape
        wanted = ", ".join(map(str, (*mask.shape, "..., features")))
    if dot.kind not in ("linear", "transposed") or not fits:
        raise ValueError(
            f"aLoRA is used in a {dot.kind} product of an activation {x.shape}, where the offsets or the mask it was "
            f"bound with want [{wanted}]. Bind those of this batch, one for each example, and adapt only weights whose "
            "activations keep the axes of examples and tokens."
        )
    if mask is None:
        seq = x.shape[offsets.ndim]
        mask = jnp.arange(seq) >= seq - offsets[..., None]
    return mask.reshape(*mask.shape, *(1,) * (x.ndim - mask.ndim))


def invocation_offsets(ids: Int[Array, "*batch seq"], tokens: Sequence[int]) -> Int[Array, "*batch"]:
    """For each row, how many tokens there are from the start of the last occurrence of ``tokens`` to the row's end; -1
    where they do not occur. The start itself is ``seq - offset``.

    >>> invocation_offsets(jnp.array([[1, 2, 3, 4], [2, 3, 2, 3], [4, 4, 4, 4]]), (2, 3))
    Array([ 3,  2, -1], dtype=int32)
    """
    n, seq = len(tokens), ids.shape[-1]
    if n == 0:
        raise ValueError("No invocation tokens were given.")
    ids = jnp.asarray(ids)
    if n > seq:
        return jnp.full(ids.shape[:-1], -1)
    starts = np.arange(seq - n + 1)
    found = (ids[..., starts[:, None] + np.arange(n)] == jnp.asarray(tokens)).all(axis=-1)
    last = jnp.max(jnp.where(found, starts, -1), axis=-1)
    return jnp.where(last < 0, -1, seq - last)
