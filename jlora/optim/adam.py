"""Adam in two parts, as the methods need it that measure its direction: without, and then with its bias correction."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, PyTree


class CountState(NamedTuple):
    """What ``correct_bias`` remembers."""

    count: Int[Array, ""]


def raw_adam(b1: float = 0.9, b2: float = 0.999, eps: float = 1e-6) -> optax.GradientTransformation:
    """``M / (sqrt(V) + eps)``, the moments as they are: the direction of the codes that descend from transformers'
    AdamW, whose eps therefore weighs more in the first steps. Same state as ``optax.scale_by_adam``."""

    def init(params: PyTree) -> optax.ScaleByAdamState:
        zeros = lambda: jax.tree.map(jnp.zeros_like, params)
        return optax.ScaleByAdamState(jnp.zeros((), jnp.int32), zeros(), zeros())

    def update(updates: PyTree, state: optax.ScaleByAdamState, params: PyTree | None = None) -> tuple:
        mean = lambda decay: lambda old, new: (decay * old + (1 - decay) * new).astype(old.dtype)
        mu = jax.tree.map(mean(b1), state.mu, updates)
        nu = jax.tree.map(lambda old, new: mean(b2)(old, new * new), state.nu, updates)
        out = jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + eps), mu, nu)
        return out, optax.ScaleByAdamState(optax.safe_increment(state.count), mu, nu)

    return optax.GradientTransformation(init, update)


def correct_bias(b1: float = 0.9, b2: float = 0.999) -> optax.GradientTransformation:
    """Times ``sqrt(1 - b2^t) / (1 - b1^t)``, t = 1, 2, ...: what ``raw_adam`` leaves out."""

    def init(params: PyTree) -> CountState:
        return CountState(jnp.zeros((), jnp.int32))

    def update(updates: PyTree, state: CountState, params: PyTree | None = None) -> tuple:
        count = optax.safe_increment(state.count)
        factor = jnp.sqrt(1 - jnp.asarray(b2, float) ** count) / (1 - jnp.asarray(b1, float) ** count)
        return jax.tree.map(lambda u: (factor * u).astype(u.dtype), updates), CountState(count)

    return optax.GradientTransformation(init, update)
