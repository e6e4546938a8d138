r"""LoLA: LoRA whose strength rises and falls in cycles while it is trained.

LoLA-SpecViT: Local Attention SwiGLU Vision Transformer with LoRA for Hyperspectral Imaging. Zidi et al., 2025.
https://arxiv.org/abs/2506.17759

.. math::  y = x W + l(t)\,\tfrac{\alpha}{r}\,(x A) B, \qquad
    l(t) = l_{min} + (1 - l_{min})\,\tfrac12 \bigl(1 + \cos(\pi\, t_c / T_c)\bigr)

W [in, out] frozen; A [in, r], B [r, out] trained, with LoRA's start. Trained: r (in + out) a matrix. t_c is the time
since the start of cycle c, whose length T_c is the first one's times growth^c: a cosine with warm restarts.

``bind(context={"step": t})`` sets t, an integer or an array; without it, and in ``merge``, the strength is ``final``.
With ``lowest=1`` it is LoRA at any step.

The paper speaks of modulating the adaptation's strength; its training script, as far as published, cycles the learning
rate: ``jlora.optim.warm_restarts`` is that schedule, and plain LoRA with it is what the script runs. (Its warm-up gives
all parameters the same rate, which undoes the lower one that those outside LoRA are meant to have.)

When to use it: small data, where restarts help to leave a poor minimum.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jlora.methods.base import require
from jlora.methods.branches import Branches, Strength
from jlora.optim.schedules import warm_restarts


@dataclasses.dataclass(frozen=True)
class LoLA(Branches):
    """LoRA of cyclical strength. The formula and shapes are at the top of this file.

    Parameters of a leaf: trainable ``{"lora": Factors}``.

    Attributes:
      rank: r.
      alpha: numerator of the scale.
      period: length of the first cycle, in steps.
      growth: every cycle is so many times as long as the one before.
      lowest: the strength at the end of a cycle, l_min.
      final: the strength without a step: for evaluation, ``merge`` and files.
      dropout: rate, as for LoRA.
    """

    rank: int = 16
    alpha: float = 32.0
    _: dataclasses.KW_ONLY
    period: float = 1000.0
    growth: float = 2.0
    lowest: float = 0.1
    final: float = 1.0
    dropout: float = 0.0

    def __post_init__(self):
        require(
            self.period > 0 and self.growth >= 1,
            f"LoLA(period={self.period}, growth={self.growth}): a positive period and a growth of at least 1.",
        )
        self.require_ranks()

    @property
    def ranks(self) -> dict[str, int]:
        return {"lora": self.rank}

    def scale_of(self, name: str) -> float:
        return float(self.alpha / self.rank)

    def strengths(self, values: Mapping[str, Any]) -> dict[str, Strength]:
        step = values.get("step")
        if step is None:
            return {"lora": float(self.final)}
        return {"lora": warm_restarts(1.0, self.period, growth=self.growth, end=self.lowest)(step)}
