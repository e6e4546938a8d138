"""Learning rates that come back up: for optax, as any schedule."""

from __future__ import annotations

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float


def warm_restarts(
    peak: float, period: float, *, growth: float = 1.0, end: float = 0.0, warmup: float = 0.0
) -> optax.Schedule:
    r"""A cosine from the peak to the end value, over and over, each cycle ``growth`` times as long as the one before.

    SGDR: Stochastic Gradient Descent with Warm Restarts. Loshchilov and Hutter, 2016. https://arxiv.org/abs/1608.03983

    .. math::  e + (p - e)\,\tfrac12 \bigl(1 + \cos(\pi\, t_c / T_c)\bigr)

    with t_c the steps since cycle c began and T_c = period * growth^c. It has no last step and no list of cycles, as
    ``optax.sgdr_schedule`` has.

    Args:
      peak: value at the start of a cycle.
      period: length of the first cycle, in steps.
      growth: at least 1; 2 doubles every cycle.
      end: value that a cycle approaches.
      warmup: steps over which the value first rises from ``end`` to ``peak``, in a line; the cycles begin after them.

    Returns:
      A function of the step, a number or an array.

    >>> tx = optax.adamw(warm_restarts(2e-5, period=1000, growth=2, end=1e-6, warmup=500))
    """
    if not (period > 0 and growth >= 1 and warmup >= 0):
        raise ValueError(
            f"warm_restarts(period={period}, growth={growth}, warmup={warmup}): a positive period, a growth of at "
            "least 1 and a warm-up of no less than 0 steps are wanted."
        )

    def schedule(step: float | Array) -> Float[Array, ""]:
        time = jnp.maximum(jnp.asarray(step, float) - warmup, 0.0) / period  # in first cycles
        if growth == 1:
            within = time % 1.0
        else:
            begin = lambda cycle: (growth**cycle - 1.0) / (growth - 1.0)
            cycle = jnp.floor(jnp.log1p(time * (growth - 1.0)) / jnp.log(growth))
            cycle = jnp.where(begin(cycle + 1.0) <= time, cycle + 1.0, cycle)  # the logarithm is rounded
            cycle = jnp.where(begin(cycle) > time, cycle - 1.0, cycle)
            within = (time - begin(cycle)) / growth**cycle
        value = end + (peak - end) * 0.5 * (1.0 + jnp.cos(jnp.pi * within))
        if warmup == 0:
            return value
        rising = end + (peak - end) * jnp.asarray(step, float) / warmup
        return jnp.where(jnp.asarray(step) < warmup, rising, value)

    return schedule
