r"""Orthogonal start: both factors are at random and their product is zero.

Datta, 2024, https://datta0.github.io/posts/rethink-lora-init/#orthogonal-initialisation, as it is in PEFT.

.. math::  A_0 = G_A O_1 / 10, \qquad B_0 = O_2^\top G_B / 10

O [r, r] random orthogonal, O_1 and O_2 [r/2, r] its even and its odd rows, G_A [in, r/2] and G_B [r/2, out] normal. As
O_1 O_2^T = 0, so is A0 B0, up to rounding: nothing has to be subtracted. The rank is even.

When to use it: both factors have gradients from the first step, where LoRA's A waits for B.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from jaxtyping import Array

from jlora.linalg import qr
from jlora.methods.base import Site, Start, require


@dataclasses.dataclass(frozen=True)
class Orthogonal(Start):
    """Factors in orthogonal subspaces of the rank. The formula and shapes are at the top of this file.

    Attributes:
      std: deviation of the entries of G, 0.1 for what is divided by 10.
    """

    std: float = 0.1

    subtracts = False

    def __post_init__(self):
        require(self.std > 0, f"Orthogonal(std={self.std}): a positive deviation is wanted.")

    def check(self, rank: int, site: Site) -> str | None:
        return f"half of the rank goes to each factor, and {rank} is odd" if rank % 2 else None

    def pair(self, key: Any, w: Array, rank: int, scale: float, stats: Any) -> tuple[Array, Array]:
        key_o, key_a, key_b = jax.random.split(key, 3)
        o = qr(jax.random.normal(key_o, (rank, rank), w.dtype))[0]
        a = jax.random.normal(key_a, (w.shape[0], rank // 2), w.dtype) @ o[0::2]
        b = o[1::2].T @ jax.random.normal(key_b, (rank // 2, w.shape[1]), w.dtype)
        return self.std * a, self.std * b
