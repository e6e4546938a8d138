"""Optax transformations that know what low-rank factors are."""

from jlora.optim.apollo import apollo as apollo
from jlora.optim.apollo import scale_by_apollo as scale_by_apollo
from jlora.optim.dct import dct as dct
from jlora.optim.fira import fira as fira
from jlora.optim.fira import scale_by_fira as scale_by_fira
from jlora.optim.galore import galore as galore
from jlora.optim.schedules import warm_restarts as warm_restarts
from jlora.optim.sora import gate_penalty as gate_penalty
from jlora.optim.sora import soft_threshold as soft_threshold
