r"""What methods with several LoRA pairs on one weight have in common.

.. math::  y = x W + \sum_k l_k s_k\,(\mathrm{drop}(x) A_k) B_k

W [in, out] frozen; for each branch k, A_k [in, r_k] and B_k [r_k, out] trained, s_k its static scale, l_k its strength:
what is chosen at run time, by ``adapted.bind(context={...})``. Trained: (in + out) times the sum of the r_k. Every pair
starts as LoRA's, so the output starts as the base's for any strengths.

The branches that act are one pair of concatenated rank, so they cost one LoRA of that rank and not several. What a
method takes from the context it says itself; the forms of a choice are the same everywhere:

* a name or a Python integer: known to the compiler, and the other branches cost nothing; a program for each choice;
* an array of integers, []: one program for all choices, at the cost of all their branches;
* an array of integers, [batch]: a choice for each example. The activation is then [batch, ..., in], the batch first,
  wherever an adapted weight is multiplied; lookups, convolutions and experts that are handed rows of their own have no
  such axis. Examples that a model flattens into rows of tokens are refused as soon as the sizes show it.

A branch whose number is not in the range of an array's entries does not act. ``jlora.rank.choose(adapted, context)``
makes a plain LoRA of what a context chooses, exactly, for merging and for PEFT's files.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jlora.factors import Factors
from jlora.methods.base import Method, Site, check_rank, dropout, require
from jlora.methods.lora import LoRA
from jlora.weight import Context, Dot, Params

Strength = Any  # a number, or an array [] or [batch]


@dataclasses.dataclass(frozen=True)
class Branches(Method):
    """The base of these methods; they override ``ranks``, ``scale_of`` and ``strengths``.

    Parameters of a leaf: trainable ``{name: Factors(a [*stack, in, r], b [*stack, r, out])}``.
    """

    sliceable = frozenset({"in", "out"})

    @property
    def ranks(self) -> dict[str, int]:
        """The branches and their ranks."""
        raise NotImplementedError

    def scale_of(self, name: str) -> float:
        """s of a branch."""
        return 1.0

    def strengths(self, values: Mapping[str, Any]) -> dict[str, Strength]:
        """l of the branches that act, from the values of a context; those left out do not act. Without values: what
        training without a context and ``merge`` use."""
        raise NotImplementedError

    # Creation.

    def require_ranks(self) -> None:
        """For ``__post_init__``: ranks and dropout are what they should be."""
        for name, rank in self.ranks.items():
            require(
                isinstance(rank, int) and rank > 0,
                f"{self.name}: the rank of {name!r} is a positive integer, 4 to 64 as a rule; got {rank!r}.",
            )
        require(0.0 <= self.dropout < 1.0, f"{self.name}(dropout={self.dropout}): a rate in [0, 1) is wanted.")

    def check(self, site: Site) -> str | None:
        name, rank = max(self.ranks.items(), key=lambda item: item[1])
        problem = check_rank(rank, site)
        return problem and f"{name}: {problem}"

    def init_pair(self, name: str, key: Any, w: Array, site: Site, dtype: Any) -> Factors:
        """The start of a branch."""
        return LoRA(self.ranks[name]).init(key, w, site, dtype).trainable

    def init(self, key: Any, w: Array, site: Site, dtype: Any) -> Params:
        keys = jax.random.split(key, len(self.ranks))
        pairs = {name: self.init_pair(name, k, w, site, dtype) for name, k in zip(self.ranks, keys, strict=True)}
        return Params({name: Factors(f.a, f.b, self.scale_of(name)) for name, f in pairs.items()})

    def count(self, site: Site) -> int:
        _, n_in, n_out = site.canonical_shape
        return site.stack * sum(self.ranks.values()) * (n_in + n_out)

    def dims(self, p: Params) -> Params:
        return Params({name: Factors("in rank", "rank out", self.scale_of(name)) for name in self.ranks})

    # Use. Pairs may have stack axes in front here: a ragged product hands over all experts at once.

    def pair(self, name: str, p: Params) -> Factors:
        """A branch, ready for use."""
        return p.trainable[name]

    def joined(self, p: Params, strengths: Mapping[str, Strength]) -> Factors:
        """The branches that act as one pair; strengths of examples do not enter."""
        pairs = [self.pair(name, p) for name in strengths]
        own = [1.0 if jnp.ndim(strength) else strength for strength in strengths.values()]
        gains = [f.scale * strength for f, strength in zip(pairs, own, strict=True)]
        b = jnp.concatenate([f.b for f in pairs], axis=-2)
        if all(isinstance(gain, float) for gain in gains) and len(set(gains)) == 1:
            return Factors(jnp.concatenate([f.a for f in pairs], axis=-1), b, gains[0])
        scaled = [f.a * jnp.asarray(gain, f.a.dtype) for f, gain in zip(pairs, gains, strict=True)]
        return Factors(jnp.concatenate(scaled, axis=-1), b)

    def by_example(self, strengths: Mapping[str, Strength]) -> Float[Array, "batch r"] | None:
        """What multiplies the concatenated rank for each example; None if all examples have the same strengths."""
        each = [jnp.asarray(strength) if jnp.ndim(strength) else jnp.ones(1) for strength in strengths.values()]
        sizes = {strength.size for strength in strengths.values() if jnp.ndim(strength)}
        if not sizes:
            return None
        (n,) = sizes
        ranks = [self.ranks[name] for name in strengths]
        columns = [jnp.broadcast_to(strength[:, None], (n, r)) for strength, r in zip(each, ranks, strict=True)]
        return jnp.concatenate(columns, axis=1)

    def factors(self, w: Float[Array, "in out"], p: Params) -> Factors | None:
        strengths = self.strengths({})
        return self.joined(p, strengths) if strengths else None

    def weight(self, w: Float[Array, "in out"], p: Params) -> Float[Array, "in out"]:
        return self.weight_in(w, p, {})

    def weight_in(self, w: Float[Array, "in out"], p: Params, values: Mapping[str, Any]) -> Float[Array, "in out"]:
        strengths = self.strengths(values)
        if self.by_example(strengths) is not None:
            raise ValueError(f"{self.name} was bound with a choice for each example: there is no one weight to form.")
        if not strengths:
            return w
        f = self.joined(p, strengths)
        return w + f.scale * (f.a.astype(w.dtype) @ f.b.astype(w.dtype))

    def forward(self, dot: Dot, x: Array, w: Array, p: Params, ctx: Context) -> tuple[Array, Any]:
        strengths = self.strengths(ctx.values or {})
        if not strengths:
            return dot(x, w), None
        f, gains = self.joined(p, strengths), self.by_example(strengths)
        if gains is None:
            return LoRA(f.rank, dropout=self.dropout).forward(dot, x, w, Params(f), ctx)
        gains = self._of_rows(gains, dot, x)
        h = dot.inner(dropout(x, self.dropout, ctx.key), f.a)
        return dot(x, w) + dot.outer(h * (f.scale * gains).astype(h.dtype), f.b), None

    def forward_transposed(self, dot: Dot, x: Array, wt: Float[Array, "out in"], p: Params, ctx: Context) -> Array:
        strengths = self.strengths(ctx.values or {})
        if not strengths:
            return dot(x, wt)
        f, gains = self.joined(p, strengths).swap(), self.by_example(strengths)
        if gains is None:
            return dot.factored(x, wt, f, ctx)
        gains = self._of_rows(gains, dot, x)
        h = dot.inner(x, f.a)
        return dot(x, wt) + dot.outer(h * (f.scale * gains).astype(h.dtype), f.b)

    def _of_rows(self, gains: Float[Array, "batch r"], dot: Dot, x: Array) -> Float[Array, "batch ... r"]:
        n, r = gains.shape
        if dot.kind not in ("linear", "transposed") or x.ndim < 2 or x.shape[0] != n:
            raise ValueError(
                f"{self.name} was bound with a choice for each of {n} examples, and is used in a {dot.kind} product of "
                f"an activation {x.shape}, where [{n}, ..., features] is wanted: the examples first. Give the model "
                f"{n} examples, or bind one choice for all."
            )
        return gains.reshape(n, *(1,) * (x.ndim - 2), r)

    # Afterwards.

    def chosen(self, p: Params, values: Mapping[str, Any]) -> tuple[LoRA, Params] | None:
        """The plain LoRA that these values choose, and its parameters for a whole stack; None if no branch acts."""
        strengths = self.strengths(values)
        require(
            self.by_example(strengths) is None,
            f"{self.name}: a choice for each example is no one adapter; choose a name or an integer.",
        )
        if not strengths:
            return None
        f = self.joined(p, strengths)
        method = LoRA(f.rank, alpha=float(f.scale * f.rank), dropout=self.dropout)
        return method, Params(Factors(f.a, f.b, method.scale))

    def describe(self) -> dict[str, str]:
        scales = {f"{self.scale_of(name):g}" for name in self.ranks}
        return {"rank": "+".join(map(str, self.ranks.values())), "scale": "/".join(sorted(scales))}


def pick(choice: Any, names: Sequence[str], what: str) -> dict[str, Strength]:
    """Strengths for one of several branches, given by its name, its number, or an array of numbers ([] or [batch])."""
    if isinstance(choice, str):
        if choice not in names:
            raise ValueError(f"context[{what!r}] = {choice!r}: one of {', '.join(names)} is wanted.")
        return {choice: 1.0}
    if isinstance(choice, (int, np.integer)) and not isinstance(choice, bool):
        if not 0 <= choice < len(names):
            raise ValueError(f"context[{what!r}] = {choice}: a number from 0 to {len(names) - 1} is wanted.")
        return {names[choice]: 1.0}
    if not isinstance(choice, (jax.Array, np.ndarray)) or not jnp.issubdtype(choice.dtype, jnp.integer):
        raise ValueError(f"context[{what!r}] is a name, an integer or an array of integers; got {choice!r}.")
    if choice.ndim > 1:
        raise ValueError(f"context[{what!r}] is an array [] or [batch]; got one of shape {choice.shape}.")
    return {name: choice == i for i, name in enumerate(names)}
