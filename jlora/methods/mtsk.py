r"""Llama-MTSK: LoRA for inputs at several scales of compression, one for all of them, one for each, or both.

Adaptive Audio-Visual Speech Recognition via Matryoshka-Based Multimodal LLMs. Cappellazzo, Kim and Petridis, 2025.
https://arxiv.org/abs/2503.06362

.. math::  y_k = x W + s\,(x A_g) B_g + s\,(x A_k) B_k, \qquad s = \alpha / r

W [in, out] frozen; A_g, A_k [in, r] and B_g, B_k [r, out] trained, for K scales k. The strategy says which of the two
terms are there. Trained: r (in + out) a matrix, times 1 ("global"), K ("specific") or K + 1 ("both"). Every pair has
LoRA's start.

``bind(context={"scale": k})`` chooses the scale, in the forms of ``branches.py``: a name, a number, or an array of
numbers for examples of different scales in a batch. Without it, and in ``merge``, it is the first scale. A step of
training sums the losses of the scales, one ``bind`` each.

Seen in the text: global and scale-specific pairs, and three strategies. Of this paper no code was found; in that of its
successor by the same author (Omni-AVSR) the pairs stand at the query and value projections, a scale's part is played by
a modality, and "rank" is a factor by which the hidden size is divided. Here it is the rank, and A and not B starts
random.

When to use it: one model that is run at several costs, where a shared adapter alone falls short at the coarse scales.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jlora.methods.base import require
from jlora.methods.branches import Branches, Strength, pick

_GLOBAL = "global"


@dataclasses.dataclass(frozen=True)
class MTSK(Branches):
    """A global branch, one for each scale, or both. The formula and shapes are at the top of this file.

    Parameters of a leaf: trainable ``{"global": Factors, scale: Factors, ...}``, those that the strategy has.

    Attributes:
      rank: r.
      scales: the names of the scales, or how many there are: "0", "1", and so on.
      strategy: "global", "specific" or "both".
      alpha: numerator of the scale factor.
      dropout: rate, as for LoRA.
    """

    rank: int = 8
    scales: int | tuple[str, ...] = 2
    _: dataclasses.KW_ONLY
    strategy: str = "both"
    alpha: float = 16.0
    dropout: float = 0.0

    def __post_init__(self):
        if not isinstance(self.scales, int):
            object.__setattr__(self, "scales", tuple(self.scales))
        names = self.names
        require(
            len(names) > 0 and len({*names, _GLOBAL}) == len(names) + 1,
            f"MTSK(scales={self.scales!r}): a positive number of scales, or names of their own, none {_GLOBAL!r}.",
        )
        require(
            self.strategy in ("global", "specific", "both"),
            f"MTSK(strategy={self.strategy!r}): 'global', 'specific' or 'both' is wanted.",
        )
        self.require_ranks()

    @property
    def names(self) -> tuple[str, ...]:
        """The scales."""
        return tuple(map(str, range(self.scales))) if isinstance(self.scales, int) else self.scales

    @property
    def ranks(self) -> dict[str, int]:
        everywhere = {} if self.strategy == "specific" else {_GLOBAL: self.rank}
        return everywhere | ({} if self.strategy == "global" else dict.fromkeys(self.names, self.rank))

    def scale_of(self, name: str) -> float:
        return float(self.alpha / self.rank)

    def strengths(self, values: Mapping[str, Any]) -> dict[str, Strength]:
        scale = values.get("scale")
        chosen = pick(0 if scale is None else scale, self.names, "scale")
        everywhere = {} if self.strategy == "specific" else {_GLOBAL: 1.0}
        return everywhere | ({} if self.strategy == "global" else chosen)
