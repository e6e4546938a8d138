r"""SoRA: a trained gate for every rank, that a proximal step sets to zero where it does not pay.

Sparse Low-rank Adaptation of Pre-trained Language Models. Ding et al., 2023. https://arxiv.org/abs/2311.11696

.. math::  y = x W + s\,\bigl((\mathrm{drop}(x) A) \odot g\bigr) B, \qquad s = \alpha / R

W [in, out] frozen, A [in, R], B [R, out] and g [R] trained. Trained: R (in + out) + R a matrix.

* A and B start as LoRA's, g normal with deviation 1; the output starts as the base's. s stays alpha / R, however many
  gates are left.
* A gate is driven to zero by ``jlora.optim.soft_threshold``, after any optimizer, at a threshold that may rise
  (``jlora.rank.stages``); ``jlora.optim.gate_penalty`` is the term that the authors add to the loss. Afterwards
  ``jlora.rank.prune(adapted)`` drops what is zero and gives a plain LoRA of the remaining rank; ``jlora.repack`` drops
  it and keeps the gates. A zero gate still has a gradient, and may return, as long as its row of B is not zero.

When to use it: to let training find the rank of every layer. It costs what LoRA of rank R costs until it is pruned.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from jaxtyping import Array

from jlora.factors import Factors
from jlora.methods.base import Method, Site, check_rank, require
from jlora.methods.lora import LoRA
from jlora.weight import Params


@dataclasses.dataclass(frozen=True)
class SoRA(Method):
    """Low-rank adaptation with a gate for every rank. The formula and shapes are at the top of this file.

    Parameters of a leaf: trainable ``{"factors": Factors(a [*stack, in, R], b [*stack, R, out]), "gate": [*stack,
    R]}``.

    Attributes:
      rank: R, the rank to start from.
      alpha: numerator of the scale alpha / R.
      dropout: rate, as for LoRA.
    """

    rank: int = 8
    alpha: float = 16.0
    _: dataclasses.KW_ONLY
    dropout: float = 0.0

    sliceable = frozenset({"in", "out"})

    def __post_init__(self):
        require(
            isinstance(self.rank, int) and self.rank > 0,
            f"SoRA(rank={self.rank!r}): the rank to start from is a positive integer, 8 to 64 as a rule.",
        )
        require(0.0 <= self.dropout < 1.0, f"SoRA(dropout={self.dropout}): a rate in [0, 1) is wanted.")

    def check(self, site: Site) -> str | None:
        return check_rank(self.rank, site)

    def init(self, key: Any, w: Array, site: Site, dtype: Any) -> Params:
        key_pair, key_gate = jax.random.split(key)
        pair = LoRA(self.rank, self.alpha).init(key_pair, w, site, dtype).trainable
        return Params({"factors": pair, "gate": jax.random.normal(key_gate, (self.rank,), dtype)})

    def count(self, site: Site) -> int:
        _, n_in, n_out = site.canonical_shape
        return site.stack * self.rank * (n_in + n_out + 1)

    def dims(self, p: Params) -> Params:
        scale = p.trainable["factors"].scale
        return Params({"factors": Factors("in rank", "rank out", scale), "gate": "rank"})

    def factors(self, w: Array, p: Params) -> Factors:
        f = p.trainable["factors"]
        return Factors(f.a * p.trainable["gate"].astype(f.a.dtype), f.b, f.scale)

    def live(self, p: Params) -> Array:
        return p.trainable["gate"]

    def cut(self, p: Params, ranks: tuple[int, ...]) -> tuple[SoRA, Params]:
        f, rank = p.trainable["factors"], p.trainable["gate"].shape[-1]
        method = dataclasses.replace(self, rank=rank, alpha=self.alpha * rank / self.rank)
        return method, Params(p.trainable | {"factors": Factors(f.a, f.b, float(method.alpha / rank))})

    def folded(self, p: Params) -> tuple[LoRA, Params]:
        """The plain LoRA with the gates in its A, for a whole stack."""
        f, method = p.trainable["factors"], LoRA(self.rank, self.alpha, dropout=self.dropout)
        return method, Params(Factors(f.a * p.trainable["gate"][..., None, :], f.b, method.scale))

    def describe(self) -> dict[str, str]:
        return {"rank": f"<={self.rank}", "scale": f"{self.alpha / self.rank:g}"}
