r"""DeLoRA: a low-rank update whose direction and strength are trained apart.

Decoupling Angles and Strength in Low-rank Adaptation. Bini, Girrbach and Akata, 2025. https://arxiv.org/abs/2503.18225

.. math::  \Delta W = \mathrm{diag}(n)\, A\, \mathrm{diag}(g)\, B, \quad g_k = \frac{\lambda}{r\,\|A_{:k}\|\,\|B_{k:}\|}

W [in, out] frozen, A [in, r], B [r, out] and the scalar lambda trained; n [in] the norms of W's rows as they were at
the start, frozen; g [r]. Trained: r (in + out) + 1 a matrix.

* Every one of the r terms A_:k B_k: is brought to norm lambda / r, so without n the update is never larger than lambda,
  however large A and B grow. n makes that relative to what the weight does with each input.
* Norms are taken to be at least 1e-4, as in PEFT. B starts at 0 (A uniform in +-1/sqrt(in)), so the output starts as
  the base's; but as soon as a row of B is longer than 1e-4, which one step of Adam sees to, its term has its full
  length. The start therefore is steep, and lambda is what has to be small where that hurts.
* A padded or unused term of zeros stays zero.

When to use it: long training or large learning rates, where LoRA drifts far from the base; lambda bounds how far.
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

_LEAST = 1e-4


@dataclasses.dataclass(frozen=True)
class DeLoRA(Method):
    """Low-rank adaptation of decoupled angle and strength. The formula and shapes are at the top of this file.

    Parameters of a leaf: trainable ``{"a": [*stack, in, r], "b": [*stack, r, out], "strength": [*stack]}``, frozen
    ``{"norms": [*stack, in]}``.

    Attributes:
      rank: r. More terms, each of the smaller length lambda / r.
      strength: where lambda starts, the bound on the update relative to the weight's rows.
      dropout: rate, as for LoRA.
    """

    rank: int = 8
    strength: float = 15.0
    _: dataclasses.KW_ONLY
    dropout: float = 0.0

    def __post_init__(self):
        require(
            isinstance(self.rank, int) and self.rank > 0,
            f"DeLoRA(rank={self.rank!r}): the rank is a positive integer, 4 to 64 as a rule.",
        )
        require(
            self.strength != 0,
            "DeLoRA(strength=0): nothing would learn, since every gradient has the strength or the update as a factor.",
        )
        require(0.0 <= self.dropout < 1.0, f"DeLoRA(dropout={self.dropout}): a rate in [0, 1) is wanted.")

    def check(self, site: Site) -> str | None:
        return check_rank(self.rank, site)

    def init(self, key: Any, w: Array, site: Site, dtype: Any) -> Params:
        n_in, n_out = w.shape
        a = jax.random.uniform(key, (n_in, self.rank), dtype, -(n_in**-0.5), n_in**-0.5)
        b = jnp.zeros((self.rank, n_out), dtype)
        own = {"a": a, "b": b, "strength": jnp.asarray(self.strength, dtype)}
        return Params(trainable=own, frozen={"norms": jnp.linalg.norm(w.astype(dtype), axis=1)})

    def count(self, site: Site) -> int:
        _, n_in, n_out = site.canonical_shape
        return site.stack * (self.rank * (n_in + n_out) + 1)

    def dims(self, p: Params) -> Params:
        return Params(trainable={"a": "in rank", "b": "rank out", "strength": ""}, frozen={"norms": "in"})

    def factors(self, w: Float[Array, "in out"], p: Params) -> Factors:
        a, b, strength = (p.trainable[name] for name in ("a", "b", "strength"))
        gain = strength / self.rank / (_norms(a, 0) * _norms(b, 1))
        return Factors(a * p.frozen["norms"].astype(a.dtype)[:, None], b * gain.astype(b.dtype)[:, None])

    def describe(self) -> dict[str, str]:
        return {"rank": str(self.rank), "scale": "trained"}


def _norms(x: Array, axis: int) -> Array:
    """Along an axis, at least ``_LEAST``, and with a gradient of zero below that."""
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return jnp.sqrt(jnp.maximum(jnp.sum(jnp.square(x), axis=axis), _LEAST**2))
