"""The proximal step of SoRA: gates that training drives to zero.

Sparse Low-rank Adaptation of Pre-trained Language Models. Ding et al., 2023. https://arxiv.org/abs/2311.11696
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PyTree


class SoftThresholdState(NamedTuple):
    """What ``soft_threshold`` remembers."""

    count: Int[Array, ""]  # steps taken, for a threshold that is a schedule


def is_gate(path: tuple, leaf: Any) -> bool:
    """Whether a leaf of a trainable tree is a gate: a leaf that its method calls ``gate``."""
    return bool(path) and getattr(path[-1], "key", None) == "gate"


def soft_threshold(
    threshold: float | Callable[[Array], Array],
    *,
    reference: bool = False,
    where: Callable[[tuple, Any], bool] = is_gate,
) -> optax.GradientTransformation:
    r"""The proximal step of an L1 penalty, after any optimizer's step.

    With :math:`v = p + u` the parameters that the optimizer before it would have given, it makes them

    .. math::  \mathrm{sign}(v) \max(|v| - \lambda, 0),

    exactly zero below the threshold. Everything but the gates passes unchanged.

    Args:
      threshold: lambda, a number or a schedule of the step. In the paper's code it is not multiplied by the learning
        rate; the textbook's step for a penalty of weight c at the learning rate eta has lambda = c * eta. Raising it
        leaves fewer ranks; around 1e-4 to 1e-3 as a rule.
      reference: do what the authors' code does: it shrinks in place, then sets to zero what is now below the threshold,
        so that entries up to twice the threshold vanish, and leaves entries of exactly the threshold.
      where: ``(path, leaf) -> bool``, the leaves to threshold.

    Returns:
      A transformation to chain after the optimizer, for it looks at the finished update; ``update`` wants the
      parameters. It raises ``ValueError`` for a tree without gates.

    >>> tx = optax.chain(optax.adamw(1e-3), jlora.optim.soft_threshold(3e-4))

    The authors give the gates an optimizer and a learning rate of their own and no weight decay: ``optax.partition``
    does that, with this inside the gates' chain.
    """

    def init(params: PyTree) -> SoftThresholdState:
        paths = jax.tree_util.tree_leaves_with_path(params)
        if not any(where(path, leaf) for path, leaf in paths):
            raise ValueError(
                "soft_threshold finds no gate among the parameters: it is for methods with gates, like jlora.SoRA, or "
                "for the leaves that where=(path, leaf) -> bool chooses."
            )
        return SoftThresholdState(jnp.zeros((), jnp.int32))

    def update(updates: PyTree, state: SoftThresholdState, params: PyTree | None = None) -> tuple[PyTree, Any]:
        if params is None:
            raise ValueError("soft_threshold wants the parameters: tx.update(grads, state, params).")
        at = threshold(state.count) if callable(threshold) else threshold

        def one(path: tuple, p: Array, u: Array) -> Array:
            if not where(path, p):
                return u
            return shrink(p + u, at, reference).astype(p.dtype) - p

        updates = jax.tree_util.tree_map_with_path(one, params, updates)
        return updates, SoftThresholdState(optax.safe_increment(state.count))

    return optax.GradientTransformation(init, update)


def shrink(v: Float[Array, ...], threshold: float | Array, reference: bool = False) -> Float[Array, ...]:
    """Soft thresholding; ``reference`` as for ``soft_threshold``."""
    size = jnp.abs(v)
    if reference:
        v = jnp.where(size > threshold, v - jnp.sign(v) * threshold, v)
        return jnp.where(jnp.abs(v) < threshold, jnp.zeros((), v.dtype), v)
    return jnp.sign(v) * jnp.maximum(size - threshold, jnp.zeros((), v.dtype))


def gate_penalty(trainable: PyTree, where: Callable[[tuple, Any], bool] = is_gate) -> Float[Array, ""]:
    """The mean size of all gates, which SoRA's authors add to the loss, times 1e-3 by default."""
    gates = [leaf for path, leaf in jax.tree_util.tree_leaves_with_path(trainable) if where(path, leaf)]
    if not gates:
        raise ValueError(
            "gate_penalty finds no gate among the parameters; it is for methods with gates, like jlora.SoRA."
        )
    return sum(jnp.abs(gate).sum() for gate in gates) / sum(gate.size for gate in gates)
