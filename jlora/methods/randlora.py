r"""RandLoRA: a sum of random low-rank matrices, of full rank together, of which the diagonals are trained.

RandLoRA: Full-rank parameter-efficient fine-tuning of large models. Albert et al., 2025.
https://arxiv.org/abs/2502.00987

.. math::  y = x W + s\,(\mathrm{drop}(x) A) B, \qquad A B = \sum_{k < n r} u_k v_k^T \ (\text{or its transpose})

.. math::  u_{i n + j} = \lambda_{ij}\, S_i \odot \gamma_j, \qquad v_{j r + i} = L_{:ji}, \qquad s = \alpha / r

W [in, out] frozen, lo = min(in, out), hi = max(in, out), n = ceil(lo / r). lambda [r, n] and gamma [n, lo] are
trained, S [r, max lo] and L [max hi, max n, r] are frozen, one pair for the whole model, of which each matrix takes the
leading part. A holds the u and B the v if in <= out, else the other way round. Trained: n (r + lo) a matrix: a larger r
trains less.

* The paper's sum pairs S_i with L_{:ji} in every term j. PEFT and the authors' code run through the (i, j) of the two
  in different orders, as written above, and so pair other vectors. The rank is as full, and files want that order.
* lambda starts at 0 and gamma at 1 / max(n, lo), so the output starts as the base's and gamma's first gradient is zero.
* S and L are uniform, or with ``sparse`` and ``very_sparse`` mostly zeros and signs, divided by their deviation.

When to use it: where the change is known not to be of low rank and full training is too much to store. A and B have
n r >= lo columns: it costs 2 to 3 times what the frozen weight costs to run, and merges.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jlora.factors import Factors
from jlora.methods.base import Method, Site, require
from jlora.weight import Params


@dataclasses.dataclass(frozen=True)
class RandLoRA(Method):
    """A full-rank sum of random matrices. The formula and shapes are at the top of this file.

    Parameters of a leaf: trainable ``{"lambda": [*stack, r, n], "gamma": [*stack, n, lo]}``; of the group: frozen
    ``{"small": [r, max lo], "large": [max hi, max n, r]}``.

    Attributes:
      rank: r, of each random matrix.
      alpha: numerator of the scale; 20 r as a rule.
      dropout: rate, as for LoRA.
      sparse: entries of the random matrices are -1, 0 or 1, a third of them not 0.
      very_sparse: likewise, with one in sqrt(max lo) not 0.
      group: name of the shared pair. Two rules of different rank need two names.
    """

    rank: int = 32
    alpha: float = 640.0
    _: dataclasses.KW_ONLY
    dropout: float = 0.0
    sparse: bool = False
    very_sparse: bool = False
    group: str = "randlora"

    def __post_init__(self):
        require(
            isinstance(self.rank, int) and self.rank > 0,
            f"RandLoRA(rank={self.rank!r}): the rank is a positive integer, 8 to 64 as a rule.",
        )
        require(0.0 <= self.dropout < 1.0, f"RandLoRA(dropout={self.dropout}): a rate in [0, 1) is wanted.")
        require(
            not (self.sparse and self.very_sparse),
            "RandLoRA(sparse=True, very_sparse=True): one of the two says how sparse.",
        )

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def bases(self, lo: int) -> int:
        """n, of a matrix whose smaller side is lo."""
        return -(-lo // self.rank)

    def init(self, key: Any, w: Array, site: Site, dtype: Any) -> Params:
        lo = min(w.shape)
        n = self.bases(lo)
        gamma = jnp.full((n, lo), 1 / max(n, lo), dtype)
        return Params(trainable={"lambda": jnp.zeros((self.rank, n), dtype), "gamma": gamma})

    def init_shared(self, key: Any, sites: dict[str, Site], dtype: Any) -> Params:
        sizes = [sorted(site.canonical_shape[1:]) for site in sites.values()]
        lo, hi = (max(pair[i] for pair in sizes) for i in (0, 1))
        share = 1 / 3 if self.sparse else lo**-0.5 if self.very_sparse else None

        def basis(key: Any, shape: tuple[int, ...]) -> Array:
            # The deviation is that of the distribution; PEFT divides by that of the sample.
            u = jax.random.uniform(key, shape, dtype, -1.0, 1.0)
            if share is None:
                return u * 3**0.5
            return jnp.where(jnp.abs(u) < share, jnp.sign(u), 0.0).astype(dtype) * share**-0.5

        key_small, key_large = jax.random.split(key)
        large = basis(key_large, (hi, self.bases(lo), self.rank))
        return Params(frozen={"small": basis(key_small, (self.rank, lo)), "large": large})

    def count(self, site: Site) -> int:
        lo = min(site.canonical_shape[1:])
        return site.stack * self.bases(lo) * (self.rank + lo)

    def dims(self, p: Params) -> Params:
        return Params(trainable={"lambda": "rank _", "gamma": "_ _"}, shared={"large": "_ _ rank", "small": "rank _"})

    def factors(self, w: Array, p: Params) -> Factors:
        lo, hi = sorted(w.shape)
        weights, gains = p.trainable["lambda"], p.trainable["gamma"]
        small, large = (p.shared[name].astype(gains.dtype) for name in ("small", "large"))
        # Term by term: XLA sums the gradient of gains over the slowest axis of the whole five times slower, on CPU.
        u = jax.lax.map(lambda term: term[0][:, None] * (term[1] * gains), (weights, small[:, :lo]))
        u = u.reshape(-1, lo)  # [r n, lo], r slowest
        v = large[:hi, : gains.shape[0]].reshape(hi, -1)  # [hi, n r], n slowest
        return Factors(u.T, v.T, self.scale) if w.shape[0] <= w.shape[1] else Factors(v, u, self.scale)

    def describe(self) -> dict[str, str]:
        return {"rank": str(self.rank), "scale": f"{self.scale:g}"}
