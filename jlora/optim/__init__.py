"""Optax transformations that know what low-rank factors are."""

from jlora.optim.schedules import warm_restarts as warm_restarts
from jlora.optim.sora import gate_penalty as gate_penalty
from jlora.optim.sora import soft_threshold as soft_threshold
