r"""OLoRA: the factors start at a part of the weight's QR decomposition.

OLoRA: Orthonormal Low-Rank Adaptation of Large Language Models. Büyükakyüz, 2024. https://arxiv.org/abs/2406.01775

.. math::  W^\top = Q R, \qquad A_0 = (R_{1..r})^\top, \qquad B_0 = (Q_{\cdot,1..r})^\top

W [in, out]; B0 [r, out] has orthonormal rows, A0 [in, r] = W B0^T is zero above its diagonal. The diagonal of R is
positive here, so that the factors do not depend on the platform.

* B0 spans the first r rows of W, those of the first r input features: the decomposition has no pivoting. Only these
  rows are decomposed, and the rest is one product: it costs 2 r in out + 2 r^2 out FLOPs.
* The product is not divided by the scale, as PiSSA's is: what starts and is subtracted is s A0 B0.

When to use it: an orthonormal start at a price far below a singular value decomposition.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from jlora.linalg import qr
from jlora.methods.base import Site, Start


@dataclasses.dataclass(frozen=True)
class OLoRA(Start):
    """Orthonormal factors from QR. The formula and shapes are at the top of this file."""

    def check(self, rank: int, site: Site) -> str | None:
        most = min(site.canonical_shape[1:])
        return f"rank {rank} is above the {most} columns that its QR has" if rank > most else None

    def pair(self, key: Any, w: Array, rank: int, scale: float, stats: Any) -> tuple[Array, Array]:
        q, r = qr(w[:rank].T)
        q = q * jnp.where(jnp.diagonal(r) < 0, -1.0, 1.0).astype(q.dtype)
        return jnp.tril(w @ q), q.T
