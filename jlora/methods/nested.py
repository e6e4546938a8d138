r"""Nested ranks: one training, and afterwards a LoRA of any rank up to R by cutting off columns.

DyLoRA: Parameter-Efficient Tuning of Pretrained Models using Dynamic Search-Free Low-Rank Adaptation. Valipour et al.,
2022. https://arxiv.org/abs/2210.07558
MatryoshkaLoRA: Learning Accurate Hierarchical Low-Rank Representations for LLM Fine-Tuning. Modoranu, Safaryan and
Alistarh, 2026. https://arxiv.org/abs/2605.07850

W [in, out] frozen, A [in, R], B [R, out] trained, with LoRA's start. Trained: R (in + out) a matrix. A at rank b means
the first b columns of A and rows of B, and the scale of that rank:

.. math::  y_b = x W + s(b)\,(\mathrm{drop}(x) A_{:b}) B_{:b}

* DyLoRA, s(b) = alpha / b: every step draws one b for the whole model and trains y_b; of A and B only the column b - 1
  that it adds has a gradient (``nested=True``, the authors' "frozen" mode), or all b of them. The key given to ``bind``
  draws b, as it draws dropout; without a key the rank is R.
* MatryoshkaLoRA, s(b) one of 1, 1 / b, 1 / sqrt(b): every step trains the sum of the branches of all ``train_ranks`` t,
  at the cost of one, since with P_j the sum of s(t) over t > j

  .. math::  \sum_t s(t)\,(x A_{:t}) B_{:t} = (x A\,\mathrm{diag}(P)) B

  What was trained is the sum; what is used afterwards is y_b, and the two differ even at b = R.

Both: ``bind(context={"rank": b})`` gives y_b for any b, an integer or an array, without compiling anew, and
``jlora.rank.truncate(adapted, b)`` makes it a plain LoRA of rank b. The shapes are those of R throughout: a mask, not a
slice. A weight that is formed and not multiplied (``merge``) is the one trained: DyLoRA's of rank R, Matryoshka's sum.

Under Adam the columns without a gradient still move by their momentum, as in the authors' code.

When to use them: when the rank that a task needs, or a device affords, is not known before training. MatryoshkaLoRA
trains every rank in every step, and DyLoRA one.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jlora.factors import Factors
from jlora.methods.base import Method, Site, check_rank, require
from jlora.methods.lora import LoRA
from jlora.weight import Context, Dot, Params


@dataclasses.dataclass(frozen=True)
class Nested(Method):
    """What the two have in common. Parameters of a leaf: trainable ``Factors(a [*stack, in, R], b [*stack, R, out])``.

    Attributes:
      rank: R, the largest rank.
      dropout: rate, as for LoRA.
      train_ranks: the ranks that are trained, in rising order.
    """

    rank: int = 16
    _: dataclasses.KW_ONLY
    dropout: float = 0.0
    train_ranks: tuple[int, ...] | None = None

    sliceable = frozenset({"in", "out"})

    def __post_init__(self):
        require(
            isinstance(self.rank, int) and self.rank > 0,
            f"{self.name}(rank={self.rank!r}): the largest rank is a positive integer, 8 to 256 as a rule.",
        )
        require(0.0 <= self.dropout < 1.0, f"{self.name}(dropout={self.dropout}): a rate in [0, 1) is wanted.")
        if self.train_ranks is not None:
            ranks = tuple(self.train_ranks)
            object.__setattr__(self, "train_ranks", ranks)
            require(
                len(ranks) > 0 and list(ranks) == sorted(set(ranks)) and 1 <= ranks[0] and ranks[-1] <= self.rank,
                f"{self.name}(rank={self.rank}, train_ranks={ranks}): ranks from 1 to {self.rank} are wanted, rising.",
            )

    def scale_of(self, rank: Any) -> Any:
        """s(b), of a number or of an array."""
        raise NotImplementedError

    def trained(self, f: Factors) -> Factors:
        """The pair that training without a given rank uses."""
        raise NotImplementedError

    def at_rank(self, f: Factors, rank: Any) -> Factors:
        """The pair of y_b, by a mask: b may be traced."""
        live = (jnp.arange(self.rank) < rank).astype(f.a.dtype)
        return Factors(f.a * (live * self.scale_of(jnp.asarray(rank, f.a.dtype))), f.b * live[:, None])

    def truncated(self, p: Params, rank: int) -> tuple[LoRA, Params]:
        """The plain LoRA of rank b, and its parameters for a whole stack."""
        require(
            1 <= rank <= self.rank,
            f"{self.name}(rank={self.rank}) holds the ranks 1 to {self.rank}; got {rank}.",
        )
        method = LoRA(rank, alpha=float(self.scale_of(rank) * rank), dropout=self.dropout)
        return method, Params(Factors(p.trainable.a[..., :rank], p.trainable.b[..., :rank, :], method.scale))

    def check(self, site: Site) -> str | None:
        return check_rank(self.rank, site)

    def init(self, key: Any, w: Array, site: Site, dtype: Any) -> Params:
        pair = LoRA(self.rank).init(key, w, site, dtype).trainable
        return Params(Factors(pair.a, pair.b))

    def count(self, site: Site) -> int:
        _, n_in, n_out = site.canonical_shape
        return site.stack * self.rank * (n_in + n_out)

    def dims(self, p: Params) -> Params:
        return Params(Factors("in rank", "rank out"))

    def factors(self, w: Array, p: Params) -> Factors:
        return self.trained(p.trainable)

    def select(self, f: Factors, ctx: Context) -> Factors:
        """The pair to run with in this context."""
        rank = (ctx.values or {}).get("rank")
        return self.trained(f) if rank is None else self.at_rank(f, rank)

    def forward(self, dot: Dot, x: Array, w: Array, p: Params, ctx: Context) -> tuple[Array, Any]:
        lora = LoRA(self.rank, dropout=self.dropout)
        return lora.forward(dot, x, w, Params(self.select(p.trainable, ctx)), ctx)

    def forward_transposed(self, dot: Dot, x: Array, wt: Array, p: Params, ctx: Context) -> Array:
        return LoRA(self.rank).forward_transposed(dot, x, wt, Params(self.select(p.trainable, ctx)), ctx)


@dataclasses.dataclass(frozen=True)
class DyLoRA(Nested):
    """LoRA of a rank drawn anew in every step. The formula and shapes are at the top of this file.

    Attributes:
      alpha: numerator of the scale alpha / b.
      train_ranks: b is drawn evenly from these; by default from 1 to R.
      nested: only the columns that b adds to the next smaller of the train ranks have a gradient, so that a rank once
        trained stays as it is. Otherwise all b.
    """

    alpha: float = 16.0
    _: dataclasses.KW_ONLY
    nested: bool = True

    model_key = True

    def scale_of(self, rank: Any) -> Any:
        return self.alpha / rank

    def trained(self, f: Factors) -> Factors:
        return Factors(f.a, f.b, float(self.alpha / self.rank))

    def draw(self, key: PRNGKeyArray) -> Int[Array, ""]:
        """b, for the whole model."""
        if self.train_ranks is None:
            return jax.random.randint(key, (), 1, self.rank + 1)
        return jax.random.choice(key, jnp.array(self.train_ranks))

    def select(self, f: Factors, ctx: Context) -> Factors:
        values = ctx.values or {}
        if values.get("key") is None:
            return super().select(f, ctx)
        rank = values["rank"] if values.get("rank") is not None else self.draw(values["key"])
        if self.nested:
            ranks = jnp.array(self.train_ranks or range(1, self.rank))
            below = jnp.max(jnp.where(ranks < rank, ranks, 0), initial=0)
            new = jnp.arange(self.rank) >= below  # what is beyond b is masked anyway
            hold = lambda leaf, mask: jnp.where(mask, leaf, jax.lax.stop_gradient(leaf))
            f = Factors(hold(f.a, new), hold(f.b, new[:, None]), f.scale)
        return self.at_rank(f, rank)


@dataclasses.dataclass(frozen=True)
class MatryoshkaLoRA(Nested):
    """The sum of nested LoRAs, as one with a fixed diagonal. The formula and shapes are at the top of this file.

    A starts in LoRA's +-1/sqrt(in); the authors' code fills a tensor of the other layout, which gives +-1/sqrt(R).

    Attributes:
      scaling: s(b) is 1 for "none", 1 / b for "rank", 1 / sqrt(b) for "sqrt".
      train_ranks: by default the powers of two up to R, and R.
      normalize: the mean over the train ranks instead of the sum.
    """

    _: dataclasses.KW_ONLY
    scaling: str = "sqrt"
    normalize: bool = False

    def __post_init__(self):
        super().__post_init__()
        require(
            self.scaling in ("none", "rank", "sqrt"),
            f"MatryoshkaLoRA(scaling={self.scaling!r}): 'none', 'rank' or 'sqrt' is wanted.",
        )

    @property
    def sums(self) -> tuple[int, ...]:
        """The train ranks."""
        if self.train_ranks is not None:
            return self.train_ranks
        return tuple(sorted({2**i for i in range(self.rank.bit_length())} | {self.rank}))

    def scale_of(self, rank: Any) -> Any:
        return rank ** {"none": 0.0, "rank": -1.0, "sqrt": -0.5}[self.scaling]

    def diagonal(self) -> Float[np.ndarray, " R"]:
        """P."""
        p = np.zeros(self.rank)
        for rank in self.sums:
            p[:rank] += self.scale_of(rank)
        return p / len(self.sums) if self.normalize else p

    def trained(self, f: Factors) -> Factors:
        return Factors(f.a * jnp.asarray(self.diagonal(), f.a.dtype), f.b)

    def describe(self) -> dict[str, str]:
        return {"rank": f"<={self.rank}", "scale": self.scaling}
