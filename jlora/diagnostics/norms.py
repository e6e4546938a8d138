r"""The largest entries of queries and keys, and where an adapter moves them.

Computational Limits of Low-Rank Adaptation (LoRA) Fine-Tuning for Transformer Models. Hu et al., 2024.
https://arxiv.org/abs/2406.03136

.. math::  \max |X W|, \quad \max |X \Delta|, \quad \max |X (W + \Delta)|, \qquad
           \text{against } \sqrt{\ln L}

X [L, in] are the inputs of a projection of L tokens to queries or keys, W [in, out] its weight and Delta = s A B the
change. The paper proves, assuming SETH, that gradients of LoRA can be approximated in less than quadratic time in L
exactly where norms of such products are below a threshold, and that there they can in almost linear time.

Verified from the abstract: the threshold and the products it is about. That it grows as sqrt(log L), and is one of the
largest entry, is the common form of such results; the constant is not known here. So ``ratio``, the entry over
sqrt(ln L), is to be compared between adapters, and above 1 says that no guarantee is near, not that training is slow.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jlora.factors import Factors


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class EntryNorms:
    """The largest entries of what a projection gives.

    Attributes:
      base: of X W.
      change: of what the adapter adds, X Delta.
      adapted: of their sum.
      length: L.
    """

    base: Float[Array, "*stack"]
    change: Float[Array, "*stack"]
    adapted: Float[Array, "*stack"]
    length: int = dataclasses.field(metadata=dict(static=True))

    @property
    def ratio(self) -> Float[Array, "*stack"]:
        """``adapted`` over sqrt(ln L)."""
        return self.adapted / entry_threshold(self.length)


def entry_threshold(length: int) -> float:
    """sqrt(ln L)."""
    if length < 2:
        raise ValueError(f"A sequence of {length} tokens has no threshold: at least 2 are wanted.")
    return math.sqrt(math.log(length))


def entry_norms(
    x: Float[Array, "*batch length in"],
    w: Float[Array, "in out"],
    change: Factors | Float[Array, "in out"],
    *,
    head_dim: int | None = None,
) -> EntryNorms:
    """The largest entries for these inputs.

    Args:
      head_dim: with it, queries and keys each have a share of the 1 / sqrt(head_dim) of their product, as if it were
        part of both weights: every entry is divided by head_dim^(1/4).
    """
    if x.ndim < 2 or x.shape[-1] != w.shape[-2]:
        raise ValueError(f"Inputs [..., length, in] are wanted for a weight [in, out]; got {x.shape} and {w.shape}.")
    of_base = x @ w
    if isinstance(change, Factors):
        of_change = change.scale * ((x @ change.a) @ change.b)
    else:
        of_change = x @ change
    share = 1.0 if head_dim is None else head_dim**-0.25
    largest = lambda y: share * jnp.max(jnp.abs(y))
    return EntryNorms(largest(of_base), largest(of_change), largest(of_base + of_change), x.shape[-2])
