r"""LoRA: a trainable low-rank matrix beside a frozen weight.

LoRA: Low-Rank Adaptation of Large Language Models. Hu et al., 2021. https://arxiv.org/abs/2106.09685
rsLoRA: A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA. Kalajdzievski, 2023. https://arxiv.org/abs/2312.03732

.. math::  y = x W + s\,(\mathrm{drop}(x) A) B, \qquad s = \alpha / r \quad (\text{rsLoRA: } s = \alpha / \sqrt r)

x [..., in], W [in, out] frozen, A [in, r], B [r, out] trained. Trained: r (in + out) a matrix.

* A linear weight starts with A uniform in +-1/sqrt(in) and B = 0; an embedding the other way round, A = 0 and B normal
  with deviation 1: then a row of A that was never looked up stays zero, and so does its part of the table.
* A convolution's A is a convolution with r outputs (window, strides, padding and dilation of the base), B is 1x1. With
  feature groups each group applies the same A to its own inputs; PEFT, which has one A a group there, differs.
* Experts [E, in, out] and scanned layers [L, in, out] have a pair each.
* ``start``: another start of A and B (``jlora.init``). Where their product does not start at zero, what it starts at is
  taken away again, so that the output starts as the base's and the base stays what it is:

.. math::  \Delta W = s\,(A B - A_0 B_0) = s\,\bigl((A - A_0) B + A_0 (B - B_0)\bigr)

  In the second form, which runs, two large products do not have to cancel in the activations' dtype, and nothing but
  zeros is added at the start. It is a pair of rank 2 r; so is what PEFT's files hold then, for the original weights.

When to use it: always first. It costs 6 T r (in + out) FLOPs on top of the frozen model's 4 T in out for T tokens and
merges without a trace.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jlora.factors import Factors
from jlora.methods.base import Method, Site, Start, check_rank, check_start, require, unsharded
from jlora.weight import Params


@dataclasses.dataclass(frozen=True)
class LoRA(Method):
    """Low-rank adaptation. The formula, shapes and papers are at the top of this file.

    Parameters of a leaf: trainable ``Factors(a [*stack, in, r], b [*stack, r, out])``. With ``ranks`` or ``alphas``
    the scales are an array, frozen ``{"scale": [*stack]}``, and the pair's own static scale is 1.

    Attributes:
      rank: r. More rank fits more, costs more, and with alpha / r scaling does not learn faster.
      alpha: numerator of the scale. Raising it is close to raising the learning rate of the branch.
      rslora: divide by sqrt(r) instead of r, which keeps large ranks learning.
      dropout: rate, on the input of the branch only. Active exactly when the tree was bound with a key,
        ``adapted.bind(trainable, context={"key": key})``.
      init_a: "default" as above, or "gaussian": A normal with deviation 1/r.
      ranks, alphas: for a stacked weight, the true rank and alpha of each index of the (single) stack axis, where
        they differ; ``rank`` is then the largest, the pairs are padded by zeros, and a rank of 0 leaves an index
        unadapted. Zero padding is exact and stays zero under training: its gradient is zero.
      lookup_only: adapt the lookups of a tied embedding and not its use as the output head, as PEFT does. Such a
        weight cannot be merged.
      start: where A and B start, one of ``jlora.init``; None for what is said above.
    """

    rank: int = 8
    alpha: float = 16.0
    _: dataclasses.KW_ONLY
    rslora: bool = False
    dropout: float = 0.0
    init_a: str = "default"
    ranks: tuple[int, ...] | None = None
    alphas: tuple[float, ...] | None = None
    lookup_only: bool = False
    start: Start | None = None

    sliceable = frozenset({"in", "out"})
    takes_start: ClassVar[bool] = False
    """Whether a subclass has ``start``, as LoRA itself has."""

    def __post_init__(self):
        require(
            isinstance(self.rank, int) and self.rank > 0,
            f"{self.name}(rank={self.rank!r}): the rank is a positive integer, 4 to 64 as a rule.",
        )
        without = self.alpha is None and type(self).alpha is None  # a subclass that has one of its own
        require(
            without or isinstance(self.alpha, numbers.Real) and math.isfinite(self.alpha),
            f"{self.name}(alpha={self.alpha!r}): a finite number is wanted, the rank or twice the rank as a rule.",
        )
        require(
            isinstance(self.dropout, numbers.Real) and 0.0 <= self.dropout < 1.0,
            f"{self.name}(dropout={self.dropout!r}): a rate in [0, 1) is wanted.",
        )
        require(
            self.init_a in ("default", "gaussian"),
            f"{self.name}(init_a={self.init_a!r}): 'default' or 'gaussian' is wanted.",
        )
        check_start(self.start, self.name)
        require(
            self.start is None or type(self) is LoRA or self.takes_start,
            f"{self.name}(start={self.start}): {self.name} has a start of its own; LoRA, DoRA and ALoRA take another.",
        )
        require(
            self.start is None or self.init_a == "default",
            f"{self.name}(init_a={self.init_a!r}, start={self.start}): one of the two says where A starts.",
        )
        for field in ("ranks", "alphas"):
            if getattr(self, field) is not None:
                object.__setattr__(self, field, tuple(getattr(self, field)))
        if self.ranks is not None:
            require(
                min(self.ranks) >= 0 and max(self.ranks) == self.rank,
                f"{self.name}(rank={self.rank}, ranks={self.ranks}): ranks are not negative and the largest is `rank`.",
            )
        require(
            not self.varies or self.start is None or self.start.nested,
            f"{self.name}(start={self.start}) has one rank and one alpha for all matrices of a leaf, without ranks= "
            "and alphas=.",
        )

    def scale_of(self, rank: int, alpha: float | None = None) -> float:
        """s for a true rank; 0 for rank 0."""
        alpha = self.alpha if alpha is None else alpha
        return float(alpha / (math.sqrt(rank) if self.rslora else rank)) if rank else 0.0

    @property
    def scale(self) -> float:
        return self.scale_of(self.rank)

    @property
    def varies(self) -> bool:
        """Whether rank or alpha differ along the stack."""
        return self.ranks is not None or self.alphas is not None

    @property
    def subtracts(self) -> bool:
        """Whether what the product starts at is taken away."""
        return self.start is not None and self.start.subtracts

    @property
    def needs(self) -> tuple[str, ...]:
        return () if self.start is None else self.start.needs

    def per_index(self, n: int) -> list[tuple[int, float]]:
        """(rank, alpha) for each of n stack indices."""
        return list(zip(self.ranks or (self.rank,) * n, self.alphas or (self.alpha,) * n, strict=True))

    def check(self, site: Site) -> str | None:
        if self.varies:
            stack, given = site.canonical_shape[0], {len(v) for v in (self.ranks, self.alphas) if v is not None}
            if len(stack) != 1 or given != {stack[0]}:
                wanted = f"{stack[0]} of them" if len(stack) == 1 else "no such lists"
                return (
                    f"ranks and alphas have one entry for each index of a single stack axis, and the stack is {stack}; "
                    f"{wanted} are wanted here, or one rank and alpha for all"
                )
        return check_rank(self.rank, site) or (self.start and self.start.check(self.rank, site))

    def check_stats(self, site: Site, stats: Any) -> str | None:
        return self.start.check_stats(self.rank, site, stats)

    def init(self, key: Any, w: Array, site: Site, dtype: Any, stats: Any = None) -> Params:
        n_in, n_out = w.shape
        if self.start is not None:
            wide = jnp.promote_types(jnp.promote_types(w.dtype, dtype), jnp.float32)
            with jax.default_matmul_precision("highest"):
                a, b = self.start.pair(key, unsharded(w).astype(wide), self.rank, self.scale, stats)
            pair = a.astype(dtype), b.astype(dtype)
            frozen = {"start": Factors(*pair)} if self.subtracts else None
            return Params(Factors(*pair, scale=1.0 if self.varies else self.scale), frozen)
        if site.axes.kind == "embedding":
            pair = jnp.zeros((n_in, self.rank), dtype), jax.random.normal(key, (self.rank, n_out), dtype)
        elif self.init_a == "gaussian":
            pair = jax.random.normal(key, (n_in, self.rank), dtype) / self.rank, jnp.zeros((self.rank, n_out), dtype)
        else:
            bound = n_in**-0.5
            a = jax.random.uniform(key, (n_in, self.rank), dtype, -bound, bound)
            pair = a, jnp.zeros((self.rank, n_out), dtype)
        return Params(trainable=Factors(*pair, scale=1.0 if self.varies else self.scale))

    def init_stack(self, p: Params, site: Site, dtype: Any) -> Params:
        if not self.varies:
            return p
        scales = [self.scale_of(r, alpha) for r, alpha in self.per_index(site.canonical_shape[0][0])]
        return Params(self.mask_ranks(p.trainable), {"scale": jnp.asarray(np.array(scales), dtype)})

    def mask_ranks(self, factors: Factors) -> Factors:
        """A stacked pair with everything beyond each index's true rank set to zero."""
        if self.ranks is None:
            return factors
        live = jnp.arange(self.rank) < jnp.asarray(self.ranks)[:, None]
        return Factors(factors.a * live[:, None, :], factors.b * live[:, :, None], factors.scale)

    def count(self, site: Site) -> int:
        stack, n_in, n_out = site.canonical_shape
        ranks = [r for r, _ in self.per_index(stack[0])] if self.varies else [self.rank] * math.prod(stack)
        return sum(ranks) * (n_in + n_out)

    def dims(self, p: Params) -> Params:
        pair = Factors("in rank", "rank out", p.trainable.scale)
        start = {"start": Factors("in rank", "rank out")} if self.subtracts else None
        return Params(trainable=pair, frozen={"scale": ""} if self.varies else start)

    def factors(self, w: Array, p: Params) -> Factors:
        if self.subtracts:
            return p.trainable.less(p.frozen["start"])
        if not self.varies:
            return p.trainable
        return Factors(p.trainable.a, p.trainable.b * p.frozen["scale"].astype(p.trainable.b.dtype))

    def live(self, p: Params) -> Array | None:
        if type(self) is not LoRA or self.subtracts:
            return None
        return jnp.any(p.trainable.a != 0, axis=-2) | jnp.any(p.trainable.b != 0, axis=-1)

    def cut(self, p: Params, ranks: tuple[int, ...]) -> tuple[LoRA, Params]:
        f, stack = p.trainable, p.trainable.a.shape[:-2]
        scales = [self.scale_of(*own) for own in self.per_index(math.prod(stack))]
        root = math.sqrt if self.rslora else float
        alphas = [scale * root(r) if r else self.alpha for scale, r in zip(scales, ranks, strict=True)]
        rank = max(ranks)
        changes: dict[str, Any] = {"rank": rank, "alpha": alphas[ranks.index(rank)], "ranks": None, "alphas": None}
        if len(stack) == 1 and (self.varies or len(set(ranks)) > 1):
            changes |= {"ranks": ranks, "alphas": tuple(alphas)}
        method = dataclasses.replace(self, **changes)
        if not method.varies:
            return method, Params(Factors(f.a, f.b, method.scale))
        own = [method.scale_of(*own) for own in method.per_index(stack[0])]
        return method, Params(Factors(f.a, f.b), {"scale": jnp.asarray(own, f.b.dtype)})

    def describe(self) -> dict[str, str]:
        if self.varies:
            return {"rank": f"<={self.rank}", "scale": "varies"}
        return {"rank": str(self.rank), "scale": f"{self.scale:g}"}
