r"""LoRA+: a larger learning rate for B than for A.

LoRA+: Efficient Low Rank Adaptation of Large Models. Hayou et al., 2024. https://arxiv.org/abs/2402.12354

.. math::  \Delta A = u_A, \qquad \Delta B = \lambda u_B

with u the updates [in, r] and [r, out] of any optimizer, its weight decay included. In wide models A and B want rates
of different order, which one rate cannot give. The authors' code and PEFT's were read.

Departures: they also raise the rate of every parameter of one axis (biases, norms, DoRA's magnitude) and take decay
off those; here what is in no pair keeps the base's rate and decay. They give the factors on embeddings a rate of their
own: an embedding's A starts at zero and its B does not, the other way round, so ``optax.partition`` is the way there.
"""

from __future__ import annotations

import optax
from jaxtyping import Array, PyTree

from jlora.factors import Factors
from jlora.optim.pairs import PairTree


def lora_plus(base: optax.GradientTransformation, ratio: float | Array = 16.0) -> optax.GradientTransformationExtraArgs:
    """An optimizer, with ``ratio`` times its updates for every B.

    Formula, paper and departures are at the top of this file. When to use it: always worth a try beside plain AdamW;
    it costs nothing.

    Args:
      base: the whole optimizer with its learning rate, which is that of A. Half of what plain LoRA wants is the
        authors' advice.
      ratio: lambda, at least 1. Their examples have 16 and 20; larger for harder tasks. 1 is the base.

    >>> tx = jlora.optim.lora_plus(optax.adamw(1e-4), ratio=16)
    """

    def init(params: PyTree) -> optax.EmptyState:
        PairTree(params, "lora_plus")
        return optax.EmptyState()

    def update(
        updates: PyTree, state: optax.EmptyState, params: PyTree | None = None
    ) -> tuple[PyTree, optax.EmptyState]:
        tree = PairTree(updates, "lora_plus")
        faster = [Factors(f.a, (ratio * f.b).astype(f.b.dtype), f.scale) for f in tree.factors]
        return tree.replaced(updates, faster), state

    return optax.chain(base, optax.GradientTransformation(init, update))
