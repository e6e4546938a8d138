r"""LoRA with fewer parameters by tying or masking parts of its factors: Block-LoRA and TriAdaptLoRA's split.

One Head Eight Arms: Block Matrix based Low Rank Adaptation for CLIP-based Few-Shot Learning (Block-LoRA). Zhou et al.,
2025. https://arxiv.org/abs/2501.16720
TriAdaptLoRA: Brain-Inspired Triangular Adaptive Low-Rank Adaptation for Parameter-Efficient Fine-Tuning. Liang et al.,
2025. https://arxiv.org/abs/2501.08008

Neither has public code: both follow what the papers' abstracts say, and the papers may mean more.

Block-LoRA: A [in, r] is n blocks of columns, tied to one A_0 [in, r / n]; B [r, out] is n blocks of rows B_i:

.. math::  y = x W + s\,(\mathrm{drop}(x) A_0) \sum_i B_i, \qquad s = \alpha / r

Trained: in r / n + r out a matrix. A_0 starts as LoRA's A and the B_i at 0 (an embedding's the other way round). All
B_i have the same gradient, so this is LoRA of rank r / n whose B takes n steps at once.

TriAdaptLoRA: A B does not change under A G, G^-1 B, which is r^2 numbers for nothing. As in an LU decomposition, A is
lower trapezoidal, A[i, j] = 0 for i < j, and B upper, B[j, o] = 0 for o < j: the generic matrix of rank r still, with
r (r - 1) fewer parameters and a triangle for every rank. Trained: r (in + out) - r (r - 1). Zeros are masked where they
are used, so neither noise nor weight decay can fill them. Where ranks grow over training, which is the business of
``jlora.rank.triadapt``, a mask holds those that wait.

When to use them: to go below LoRA's count at its rank. The features that come first are privileged by the triangles.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from jlora.factors import Factors
from jlora.methods.base import Method, Site, at_most, check_rank, require
from jlora.methods.lora import LoRA
from jlora.weight import Params


@dataclasses.dataclass(frozen=True)
class _Split(Method):
    """The options that both have.

    Attributes:
      rank: r.
      alpha: numerator of the scale alpha / r.
      dropout: rate, as for LoRA.
    """

    rank: int = 8
    alpha: float = 16.0
    _: dataclasses.KW_ONLY
    dropout: float = 0.0

    def __post_init__(self):
        require(
            isinstance(self.rank, int) and self.rank > 0,
            f"{self.name}(rank={self.rank!r}): the rank is a positive integer, 4 to 64 as a rule.",
        )
        require(0.0 <= self.dropout < 1.0, f"{self.name}(dropout={self.dropout}): a rate in [0, 1) is wanted.")

    @property
    def scale(self) -> float:
        return float(self.alpha / self.rank)

    def describe(self) -> dict[str, str]:
        return {"rank": str(self.rank), "scale": f"{self.scale:g}"}


@dataclasses.dataclass(frozen=True)
class BlockLoRA(_Split):
    """One down-projection shared by n blocks. The formula and shapes are at the top of this file.

    Parameters of a leaf: trainable ``{"a": [*stack, in, r / n], "b": [*stack, n, r / n, out]}``.

    Attributes:
      blocks: n, a divisor of the rank.
    """

    _: dataclasses.KW_ONLY
    blocks: int = 2

    sliceable = frozenset({"in", "out"})

    def __post_init__(self):
        super().__post_init__()
        divisors = [n for n in range(1, self.rank + 1) if self.rank % n == 0]
        require(
            self.blocks in divisors,
            f"BlockLoRA(rank={self.rank}, blocks={self.blocks}): the rank is cut into equal blocks; their number is "
            f"one of {', '.join(map(str, divisors))}, nearest {min(divisors, key=lambda n: abs(n - self.blocks))}.",
        )

    @property
    def block_rank(self) -> int:
        return self.rank // self.blocks

    def check(self, site: Site) -> str | None:
        most = min(site.canonical_shape[1:])
        if self.block_rank > most:
            of = f"rank {self.rank} in {self.blocks} blocks is {self.block_rank} for each, above min(in, out) = {most}"
            return f"{of}; {at_most(self.blocks * most)}"
        return None

    def init(self, key: Any, w: Array, site: Site, dtype: Any) -> Params:
        pair = LoRA(self.block_rank).init(key, w, site, dtype).trainable
        return Params({"a": pair.a, "b": jnp.broadcast_to(pair.b / self.blocks, (self.blocks, *pair.b.shape))})

    def count(self, site: Site) -> int:
        _, n_in, n_out = site.canonical_shape
        return site.stack * (self.block_rank * n_in + self.rank * n_out)

    def dims(self, p: Params) -> Params:
        return Params({"a": "in rank", "b": "_ rank out"})

    def factors(self, w: Array, p: Params) -> Factors:
        return Factors(p.trainable["a"], p.trainable["b"].sum(axis=0), self.scale)

    def describe(self) -> dict[str, str]:
        return super().describe() | {"rank": f"{self.blocks}x{self.block_rank}"}


@dataclasses.dataclass(frozen=True)
class TriAdaptLoRA(_Split):
    """Triangular factors. The formula and shapes are at the top of this file.

    Parameters of a leaf: trainable ``Factors(a [*stack, in, r], b [*stack, r, out])``, with zeros that are not counted;
    frozen ``{"mask": [*stack, r]}``, ones to begin with. A term whose mask is 0 is out and has no gradient.
    """

    def check(self, site: Site) -> str | None:
        return check_rank(self.rank, site)

    def init(self, key: Any, w: Array, site: Site, dtype: Any) -> Params:
        pair = LoRA(self.rank, self.alpha).init(key, w, site, dtype).trainable
        return Params(self.triangular(pair), {"mask": jnp.ones((self.rank,), dtype)})

    def triangular(self, f: Factors) -> Factors:
        """The pair with its zeros in place."""
        return Factors(jnp.tril(f.a), jnp.triu(f.b), f.scale)

    def count(self, site: Site) -> int:
        _, n_in, n_out = site.canonical_shape
        return site.stack * self.rank * (n_in + n_out - self.rank + 1)

    def dims(self, p: Params) -> Params:
        return Params(Factors("in rank", "rank out", p.trainable.scale), {"mask": "rank"})

    def factors(self, w: Array, p: Params) -> Factors:
        f = self.triangular(p.trainable)
        return Factors(f.a, f.b * p.frozen["mask"].astype(f.b.dtype)[:, None], f.scale)

    def live(self, p: Params) -> Array:
        mask = p.frozen["mask"]  # triangles have their place: all before the last in use are kept
        return jnp.cumsum(mask[..., ::-1], axis=-1)[..., ::-1]

    def cut(self, p: Params, ranks: tuple[int, ...]) -> tuple[TriAdaptLoRA, Params]:
        f, rank = p.trainable, p.frozen["mask"].shape[-1]
        method = dataclasses.replace(self, rank=rank, alpha=self.alpha * rank / self.rank)
        return method, Params(Factors(f.a, f.b, method.scale), p.frozen)
