"""Dropout whose mask follows from the key and the place of an entry alone, so that a kernel can make any part of it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PRNGKeyArray


def dropout(x: Float[Array, "*shape"], rate: float, key: PRNGKeyArray | None) -> Float[Array, "*shape"]:
    """Inverted dropout. The identity when there is no key."""
    if key is None or rate == 0.0:
        return x
    check_rate(rate)
    return jnp.where(keep_mask(key, rate, x.shape), x / jnp.asarray(1.0 - rate, x.dtype), jnp.zeros((), x.dtype))


def keep_mask(key: PRNGKeyArray, rate: float, shape: tuple[int, ...]) -> Bool[Array, "*shape"]:
    """Which entries dropout leaves."""
    return jax.random.bits(key, shape, jnp.uint32) >= np.uint32(threshold(rate))


def threshold(rate: float) -> int:
    """Of 32 random bits, below which number they drop an entry: a comparison of whole numbers."""
    return min(round(rate * 2**32), 2**32 - 1)


def check_rate(rate: float) -> None:
    if not 0 <= rate < 1:
        raise ValueError(f"got a dropout of {rate}; want a rate in [0, 1)")
