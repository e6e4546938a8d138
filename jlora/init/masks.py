r"""SHiRA's masks: which entries of a weight are trained, by their size, their gradient, or both.

Sparse High Rank Adapters. Bhardwaj et al., 2024. https://arxiv.org/abs/2406.13175
SNIP: Single-shot Network Pruning based on Connection Sensitivity. Lee et al., 2018. https://arxiv.org/abs/1810.02340

=============  ========================  ================
start          score of an entry (i, o)  the paper's name
=============  ========================  ================
MagnitudeMask  abs(W_io)                 SHiRA-WM
GradientMask   abs(G_io)                 SHiRA-Grad
SNIPMask       abs(W_io G_io)            SHiRA-SNIP
=============  ========================  ================

W [in, out]; G [in, out] the mean gradient over the batches of the calibration. The K entries of a matrix that have the
largest scores are trained, K as the method says; of equal scores, those that come first, row by row.

* Read in the paper: the scores, and that the choice is made in each layer by itself. That gradients are summed with
  their signs over the batches, as in one large batch, is derived: their code is not there to be read.
* |W G| is to the first order how much the loss changes where the entry is set to zero.
* The values start at zero, and the output as the base's.

When to use them: ``SNIPMask`` first, the paper's best on language; ``MagnitudeMask`` where there are no data. They cost
nothing while training.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax.numpy as jnp
from jaxtyping import Array, Float

from jlora.init.lora_ga import none_is_zero
from jlora.methods.base import Site, Start


class _Mask(Start):
    subtracts = False

    def check(self, rank: int, site: Site) -> str | None:
        return f"{type(self).__name__} chooses entries of a weight, and factors have none: give it to jlora.SHiRA"

    def scores(self, w: Float[Array, "in out"], stats: Mapping[str, Array] | None) -> Float[Array, "in out"]:
        """How much an entry is wanted."""
        raise NotImplementedError


class _OfGradient(_Mask):
    needs = ("g",)

    def check_stats(self, rank: int, site: Site, stats: Mapping[str, Array]) -> str | None:
        return none_is_zero(stats["g"])


@dataclasses.dataclass(frozen=True)
class MagnitudeMask(_Mask):
    """The largest entries of the weight, for ``jlora.SHiRA``. See the top of this file."""

    def scores(self, w, stats):
        return jnp.abs(w)


@dataclasses.dataclass(frozen=True)
class GradientMask(_OfGradient):
    """The entries with the largest gradients, for ``jlora.SHiRA``. See the top of this file."""

    def scores(self, w, stats):
        return jnp.abs(stats["g"])


@dataclasses.dataclass(frozen=True)
class SNIPMask(_OfGradient):
    """The entries whose product with their gradient is largest, for ``jlora.SHiRA``. See the top of this file."""

    def scores(self, w, stats):
        return jnp.abs(w * stats["g"])
