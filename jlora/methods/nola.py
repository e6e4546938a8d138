r"""NOLA: both factors are combinations of random matrices that are never stored.

NOLA: Compressing LoRA using Linear Combination of Random Basis. Koohpayegani et al., 2023.
https://arxiv.org/abs/2310.02556

.. math::  y = x W + s\,(\mathrm{drop}(x) A) B, \qquad A = A_0 + \sum_{i < m} \alpha_i R_i, \quad
           B = \sum_{i < m} \beta_i T_i, \qquad s = \alpha / r

W [in, out] frozen; alpha [m] and beta [m] trained; R_i [in, r] and T_i [r, out] uniform in +-1/sqrt(m), A_0 [in, r]
uniform in +-1/sqrt(in), all drawn anew from a seed whenever they are needed. Trained: 2 m a matrix, whatever r and the
sizes of the matrix.

* alpha and beta start at 0, so the output starts as the base's; through A_0 beta has a gradient at once.
* The sum runs over one random matrix at a time, and the backward pass draws them again: no more than one is in memory.
* The seed is two integers for Threefry, drawn in float32 whatever the dtype of the coefficients: the same numbers on
  every device and with every default generator. The authors' files, which hold seeds of PyTorch's, are not read.

When to use it: the smallest files where the rank has to be high. It draws m r (in + out) random numbers in a forward
pass and as many in a backward one, which is more work than LoRA of rank r unless the batch is large: merge it to serve.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt32

from jlora.factors import Factors
from jlora.methods.base import Method, Site, check_rank, require
from jlora.weight import Params


def random_matrix(seed: UInt32[Array, 2], i: Any, shape: tuple[int, int]) -> Array:
    """The i-th matrix of a seed, uniform in +-1."""
    key = jax.random.fold_in(jax.random.wrap_key_data(seed, impl="threefry2x32"), i)
    return jax.random.uniform(key, shape, jnp.float32, -1.0, 1.0)


def combination(seed: UInt32[Array, 2], coefficients: Float[Array, " m"], shape: tuple[int, int]) -> Array:
    """The sum of the first m matrices of a seed, times the coefficients."""

    @jax.checkpoint
    def add(total: Array, term: tuple[Array, Array]) -> tuple[Array, None]:
        i, coefficient = term
        return total + coefficient * random_matrix(seed, i, shape).astype(total.dtype), None

    terms = jnp.arange(coefficients.shape[0]), coefficients
    return jax.lax.scan(add, jnp.zeros(shape, coefficients.dtype), terms)[0]


@dataclasses.dataclass(frozen=True)
class NOLA(Method):
    """Combinations of random factors. The formula and shapes are at the top of this file.

    Parameters of a leaf: trainable ``{"a": [*stack, m], "b": [*stack, m]}``, the coefficients; frozen
    ``{"seed": [*stack, 2, 2]}``, of A and of B.

    Attributes:
      rank: r.
      alpha: numerator of the scale.
      terms: m, how many random matrices each factor is a combination of.
      dropout: rate, as for LoRA.
    """

    rank: int = 16
    alpha: float = 16.0
    _: dataclasses.KW_ONLY
    terms: int = 128
    dropout: float = 0.0

    def __post_init__(self):
        for field in ("rank", "terms"):
            value = getattr(self, field)
            require(isinstance(value, int) and value > 0, f"NOLA({field}={value!r}): a positive integer is wanted.")
        require(0.0 <= self.dropout < 1.0, f"NOLA(dropout={self.dropout}): a rate in [0, 1) is wanted.")

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def check(self, site: Site) -> str | None:
        return check_rank(self.rank, site)

    def init(self, key: Any, w: Array, site: Site, dtype: Any) -> Params:
        zeros = jnp.zeros((self.terms,), dtype)
        return Params(trainable={"a": zeros, "b": zeros}, frozen={"seed": jax.random.bits(key, (2, 2), jnp.uint32)})

    def count(self, site: Site) -> int:
        return site.stack * 2 * self.terms

    def dims(self, p: Params) -> Params:
        return Params(trainable={"a": "_", "b": "_"}, frozen={"seed": "_ _"})

    def factors(self, w: Array, p: Params) -> Factors:
        (n_in, n_out), seed, size = w.shape, p.frozen["seed"], self.terms**-0.5
        a, b = p.trainable["a"], p.trainable["b"]
        start = random_matrix(seed[0], self.terms, (n_in, self.rank)).astype(a.dtype) * n_in**-0.5
        a = start + combination(seed[0], a * size, (n_in, self.rank))
        return Factors(a, combination(seed[1], b * size, (self.rank, n_out)), self.scale)

    def describe(self) -> dict[str, str]:
        return {"rank": str(self.rank), "scale": f"{self.scale:g}"}
