r"""Training one factor of every pair: FFA-LoRA and LoRA-FA.

Improving LoRA in Privacy-preserving Federated Learning (FFA-LoRA). Sun et al., 2024. https://arxiv.org/abs/2403.12313
LoRA-FA: Memory-efficient Low-rank Adaptation for Large Language Models Fine-tuning. Zhang et al., 2023.
https://arxiv.org/abs/2308.03303

.. math::  \text{FFA: } d_A = 0,\; d_B = g_B \qquad \text{LoRA-FA: } d_A = 0,\;
           d_B = s^{-2} (A^\top A + \delta I)^{-1} g_B

g_B [r, out], A [in, r], s the pair's scale. LoRA-FA's B is such that s A d_B is the projection of the weight's gradient
on the columns of A, the best that a frozen A allows. Optimizer state: that of B alone. Averages of many clients' A B
are then exact, for A is the same; and A's noise does not multiply B's, under differential privacy.

The gradient of A is still computed unless the loss stops it: inside the loss, ``jax.lax.stop_gradient`` on A lets the
compiler drop the work and the activations it wants. Read in PEFT's code of LoRA-FA; the authors of FFA-LoRA publish
none that was found.
"""

from __future__ import annotations

import jax
import optax
from jaxtyping import Array, PyTree

from jlora.optim.pairs import PairTree, roles
from jlora.optim.riemannian import scale_by_gram_inverse


def ffa(base: optax.GradientTransformation, freeze: str = "a") -> optax.GradientTransformationExtraArgs:
    """An optimizer for one factor of every pair and for what is in no pair; the other factor does not move at all.

    Args:
      base: the whole optimizer. It sees single factors: no transformation that wants pairs.
      freeze: "a", or "b". An embedding's A starts at zero, and with it frozen the pair would never do anything: there
        "b" is right.

    >>> tx = jlora.optim.ffa(optax.adamw(1e-4))
    """
    if freeze not in ("a", "b"):
        raise ValueError(f'ffa(freeze={freeze!r}): "a" or "b" is wanted.')

    def labels(tree: PyTree) -> PyTree:
        PairTree(tree, "ffa")
        return jax.tree.map(lambda role: "frozen" if role == freeze else "trained", roles(tree))

    return optax.partition({"trained": base, "frozen": optax.set_to_zero()}, labels)


def lora_fa(base: optax.GradientTransformation, damping: float | Array = 1e-8) -> optax.GradientTransformationExtraArgs:
    """An optimizer for every B, on the projected gradients of LoRA-FA, and for what is in no pair; A stays.

    Args:
      base: the whole optimizer. PEFT's is transformers' AdamW: eps 1e-6, without bias correction in its denominator.
      damping: delta.

    >>> tx = jlora.optim.lora_fa(optax.adamw(1e-4))
    """
    return optax.chain(scale_by_gram_inverse(damping, scale_correction=True), ffa(base))
