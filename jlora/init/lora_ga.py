r"""LoRA-GA: the first step of LoRA moves the weight as that of full fine-tuning would.

LoRA-GA: Low-Rank Adaptation with Gradient Approximation. Wang et al., 2024. https://arxiv.org/abs/2407.05000

.. math::
    G = \partial L / \partial W \approx P\,\mathrm{diag}(\sigma)\,Q^\top, \qquad
    A_0 = c_A\,P_{I}, \qquad B_0 = c_B\,Q_{J}^\top

G [in, out] the mean gradient over the batches of the calibration, P [in, 2r], Q [out, 2r]; I and J disjoint halves of
the first 2r. A step of gradient descent of rate t on A and B moves W by
-t s^2 (A0 A0^T G + G B0^T B0) + O(t^2): with c = 1, t s^2 times the best approximation of G by rank 2r.

==========  ======================================  =====================================  =======================
direction   I                                       J
==========  ======================================  =====================================  =======================
"ArB2r"     the first r                             the second r                           the default
"A2rBr"     the second r                            the first r
"ArBr"      the odd ones (from 0)                   the even ones
"random"    a random half                           the other
==========  ======================================  =====================================  =======================

==========  ================================  ==========================================================
scale       c_A = c_B                         of ``variant="peft"``, where B is Q_J^T times sigma_J
==========  ================================  ==========================================================
"stable"    out^(1/4) / sqrt(gamma)           the same for B, 1 for A
"gd"        1 / s                             1 / s for both
"unit"      1                                 1
"weight"    mean over the first r singular    sigma_1(W) / sigma_J,1 for B, 1 for A
            values of sqrt(sigma(W) / s)
==========  ================================  ==========================================================

* The default is the authors' code. PEFT's differs as the table says, and its "random" has the same half for A and B
  (``variant="peft"``).
* The authors leave W - s A0 B0 as the base. Here W stays, and s A0 B0 is subtracted: the same function.
* ``clip``: where an entry of s A0 B0 is larger than all of W's, A0 and B0 are both made smaller, by the square root of
  the ratio. The authors have it as an option.

When to use it: for as few steps as possible; it costs some dozens of backward passes, and the gradients' memory once
(``calibrate(..., leaves_at_a_time=)`` bounds it).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jlora.linalg import truncated_svd
from jlora.methods.base import Site, Start, require

_DIRECTIONS, _SCALES = ("ArB2r", "A2rBr", "ArBr", "random"), ("stable", "gd", "unit", "weight")


@dataclasses.dataclass(frozen=True)
class LoRAGA(Start):
    """Gradient approximation. The formulas, shapes and tables are at the top of this file.

    Attributes:
      direction, scale: see the tables.
      gamma: of the scale "stable".
      clip: see above.
      variant: "authors" or "peft".
      iterations: of the subspace iteration that decomposes large gradients.
    """

    direction: str = "ArB2r"
    scale: str = "stable"
    _: dataclasses.KW_ONLY
    gamma: float = 16.0
    clip: bool = False
    variant: str = "authors"
    iterations: int = 4

    needs = ("g",)

    def __post_init__(self):
        wants = lambda name, among: f"LoRAGA({name}={getattr(self, name)!r}): one of {', '.join(among)} is wanted."
        require(self.direction in _DIRECTIONS, wants("direction", _DIRECTIONS))
        require(self.scale in _SCALES, wants("scale", _SCALES))
        require(self.variant in ("authors", "peft"), wants("variant", ("authors", "peft")))
        require(self.gamma > 0, f"LoRAGA(gamma={self.gamma}): a positive number is wanted, 16 as a rule.")
        require(self.iterations > 0, f"LoRAGA(iterations={self.iterations}): at least 1 is wanted, 4 as a rule.")

    def check(self, rank: int, site: Site) -> str | None:
        most = min(site.canonical_shape[1:]) // 2
        if rank > most:
            return f"LoRA-GA takes twice the rank from the gradient: rank {rank} is above {most}, half of its size"

    def check_stats(self, rank: int, site: Site, stats: Mapping[str, Array]) -> str | None:
        return none_is_zero(stats["g"]) or few_tokens(2 * rank, stats)

    def pair(self, key: Any, w: Array, rank: int, scale: float, stats: Any) -> tuple[Array, Array]:
        key_svd, key_half = jax.random.split(key)
        u, s, vh = truncated_svd(stats["g"].astype(w.dtype), 2 * rank, key=key_svd, iterations=self.iterations)
        match self.direction:
            case "ArB2r":
                i, j = jnp.arange(rank), jnp.arange(rank, 2 * rank)
            case "A2rBr":
                i, j = jnp.arange(rank, 2 * rank), jnp.arange(rank)
            case "ArBr":
                i, j = jnp.arange(1, 2 * rank, 2), jnp.arange(0, 2 * rank, 2)
            case _:
                shuffled = jax.random.permutation(key_half, 2 * rank)
                i, j = shuffled[:rank], shuffled[:rank] if self.variant == "peft" else shuffled[rank:]
        c_a, c_b = self._scales(w, s[j], rank, scale)
        a, b = c_a * u[:, i], c_b * vh[j]
        if self.variant == "peft":
            b = s[j][:, None] * b
        if self.clip:
            largest = jnp.abs(scale * (a @ b)).max()
            root = jnp.sqrt(jnp.minimum(jnp.abs(w).max() / jnp.maximum(largest, jnp.finfo(w.dtype).tiny), 1.0))
            a, b = a * root, b * root
        return a, b

    def _scales(self, w: Array, s_b: Array, rank: int, scale: float) -> tuple[Any, Any]:
        peft = self.variant == "peft"
        match self.scale:
            case "stable":
                c = w.shape[1] ** 0.25 / self.gamma**0.5
                return (1.0, c) if peft else (c, c)
            case "gd":
                return 1 / scale, 1 / scale
            case "unit":
                return 1.0, 1.0
        s_w = truncated_svd(w, rank, iterations=self.iterations)[1]
        if peft:
            return 1.0, jnp.where(s_b[0] > 0, s_w[0] / s_b[0], 1.0)
        c = jnp.mean(jnp.sqrt(s_w / scale))
        return c, c


def none_is_zero(g: Array) -> str | None:
    """What is wrong where the gradient of a matrix is zero."""
    zero = ~np.asarray(jnp.any(g != 0, axis=(-2, -1)))
    if zero.any():
        return f"the gradient of {int(zero.sum())} of its {zero.size} matrices is zero: the loss does not depend on it"


def few_tokens(wanted: int, stats: Mapping[str, Array]) -> str | None:
    """What is wrong where the gradient is of fewer tokens than the rank that is wanted of it."""
    if "n" in stats and float(np.min(stats["n"])) < wanted:
        few = float(np.min(stats["n"]))
        return f"{wanted} directions are wanted of the gradient of {few:g} tokens; calibrate on more of them"
