r"""LoRA-SB: the factors of LoRA-XS start at the first update of full fine-tuning, and the output with it.

Initialization using Update Approximation is a Silver Bullet for Extremely Efficient Low-Rank Fine-Tuning (LoRA-SB).
Ponkshe et al., 2024. https://arxiv.org/abs/2411.19557

.. math::
    U = -\eta\,\mathrm{sign}\Bigl(\sum_b G_b\Bigr) \approx P\,\mathrm{diag}(\sigma)\,Q^\top, \qquad
    A = P, \quad M_0 = \mathrm{diag}(\sigma) / s, \quad B = Q^\top

G_b [in, out] the gradients of the calibration's batches, U the first step of AdamW at the learning rate eta; P [in, r],
Q [out, r]. A and B stay, M [r, r] is trained: as A^T A = B B^T = I, its gradient s A^T G B^T is the best projection of
G on what M can say. The output starts at that of W plus U's best approximation of rank r, by design.

* eta is the rate of the first step, which with warm-up is the peak over the steps of the warm-up.
* The sign of a sum needs every entry of it: no sketch will do. In bfloat16 small gradients are noise, and so are their
  signs; ``calibrate`` sums products in float32, whatever the model's dtype.
* The authors' alpha is r, so that s = 1. Here the start is U for any alpha.

When to use it: ``jlora.LoRAXS`` with this start, where r^2 numbers a matrix have to do.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from jlora.init.lora_ga import none_is_zero
from jlora.linalg import truncated_svd
from jlora.methods.base import Site, Start, require


@dataclasses.dataclass(frozen=True)
class LoRASB(Start):
    """Update approximation, for ``jlora.LoRAXS``. The formula and shapes are at the top of this file.

    >>> jlora.LoRAXS(64, alpha=64, start=jlora.init.LoRASB(learning_rate=1e-4))

    Attributes:
      learning_rate: eta.
      iterations: of the subspace iteration that decomposes large updates.
    """

    learning_rate: float
    _: dataclasses.KW_ONLY
    iterations: int = 10

    needs = ("g",)
    subtracts = False

    def __post_init__(self):
        require(
            isinstance(self.learning_rate, (int, float)) and self.learning_rate > 0,
            f"LoRASB(learning_rate={self.learning_rate!r}): that of the first step is wanted, a positive number.",
        )

    def check(self, rank: int, site: Site) -> str | None:
        return "LoRA-SB starts a middle between frozen factors: give it to jlora.LoRAXS"

    def check_stats(self, rank: int, site: Site, stats: Mapping[str, Array]) -> str | None:
        return none_is_zero(stats["g"])

    def parts(
        self, key: Any, rank: int, scale: float, stats: Mapping[str, Array]
    ) -> tuple[Float[Array, "in rank"], Float[Array, "rank rank"], Float[Array, "rank out"]]:
        """A, M and B."""
        update = -self.learning_rate * jnp.sign(stats["g"])
        u, s, vh = truncated_svd(update, rank, key=key, iterations=self.iterations)
        return u, jnp.diag(s / scale), vh
