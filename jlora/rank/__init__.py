"""Choosing ranks: before, during and after training."""

from jlora.rank.truncate import choose as choose
from jlora.rank.truncate import prune as prune
from jlora.rank.truncate import truncate as truncate
