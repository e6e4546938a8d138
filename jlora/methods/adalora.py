r"""AdaLoRA: an update in the form of a singular value decomposition, so that ranks can be taken and given.

AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning. Zhang et al., 2023.
https://arxiv.org/abs/2303.10512

.. math::  y = x W + s\,\bigl((\mathrm{drop}(x) A) \odot e \odot m\bigr) B, \qquad s = \alpha / (r + 10^{-5})

W [in, out] frozen; A [in, r], e [r] and B [r, out] trained; m [r] of ones and zeros, frozen. Trained: r (in + out + 1)
a matrix, r the rank before any of it is taken away.

* A and B are normal with deviation 0.02, e starts at 0, so the output starts as the base's. That A and B have nearly
  orthonormal columns and rows, which gives e its meaning, is the business of a penalty on the training loss.
* This file is the form alone; ``jlora.rank.adalora`` allocates. A budget is kept by writing zeros into e, which leaves
  a term its gradient and so its way back. m is for ranks that are final: a term with m = 0 is out, gets no gradient at
  all, and is dropped by ``jlora.repack``. It starts as ones; other allocators weigh terms by it.
* s keeps the first r, whatever is left of it, as PEFT does. An alpha of 0 or less stands for alpha = r.

When to use it: with an allocator, for one budget of rank over matrices of unlike importance. Without one it is LoRA
with a gate on each term and another start.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jlora.factors import Factors
from jlora.methods.base import Method, Site, check_rank, require
from jlora.weight import Params


@dataclasses.dataclass(frozen=True)
class AdaLoRA(Method):
    """Low-rank adaptation in singular value form. The formula and shapes are at the top of this file.

    Parameters of a leaf: trainable ``{"a": [*stack, in, r], "e": [*stack, r], "b": [*stack, r, out]}``, frozen
    ``{"mask": [*stack, r]}``.

    Attributes:
      rank: r, the rank of every matrix before allocation; half as much again as the mean rank wanted at the end.
      alpha: numerator of the scale.
      dropout: rate, as for LoRA.
    """

    rank: int = 12
    alpha: float = 8.0
    _: dataclasses.KW_ONLY
    dropout: float = 0.0

    sliceable = frozenset({"in", "out"})

    def __post_init__(self):
        require(
            isinstance(self.rank, int) and self.rank > 0,
            f"AdaLoRA(rank={self.rank!r}): the rank is a positive integer, 6 to 96 as a rule.",
        )
        require(0.0 <= self.dropout < 1.0, f"AdaLoRA(dropout={self.dropout}): a rate in [0, 1) is wanted.")

    @property
    def scale(self) -> float:
        return float((self.alpha if self.alpha > 0 else self.rank) / (self.rank + 1e-5))

    def check(self, site: Site) -> str | None:
        return check_rank(self.rank, site)

    def init(self, key: Any, w: Array, site: Site, dtype: Any) -> Params:
        n_in, n_out = w.shape
        key_a, key_b = jax.random.split(key)
        a = 0.02 * jax.random.normal(key_a, (n_in, self.rank), dtype)
        b = 0.02 * jax.random.normal(key_b, (self.rank, n_out), dtype)
        own = {"a": a, "e": jnp.zeros((self.rank,), dtype), "b": b}
        return Params(trainable=own, frozen={"mask": jnp.ones((self.rank,), dtype)})

    def count(self, site: Site) -> int:
        _, n_in, n_out = site.canonical_shape
        return site.stack * self.rank * (n_in + n_out + 1)

    def dims(self, p: Params) -> Params:
        return Params(trainable={"a": "in rank", "e": "rank", "b": "rank out"}, frozen={"mask": "rank"})

    def factors(self, w: Float[Array, "in out"], p: Params) -> Factors:
        a, e, b = (p.trainable[name] for name in ("a", "e", "b"))
        return Factors(a, b * (e * p.frozen["mask"].astype(e.dtype))[:, None], self.scale)

    def live(self, p: Params) -> Array:
        return p.frozen["mask"]

    def cut(self, p: Params, ranks: tuple[int, ...]) -> tuple[AdaLoRA, Params]:
        rank = p.frozen["mask"].shape[-1]
        return dataclasses.replace(self, rank=rank, alpha=self.scale * (rank + 1e-5)), p

    def describe(self) -> dict[str, str]:
        return {"rank": f"<={self.rank}", "scale": f"{self.scale:g}"}
