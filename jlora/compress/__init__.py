"""Smaller weights and attention, as functions of arrays: what is trained in the place of a weight, but as no method.

``jlora.factorize`` with ``PELA``, ``SLTrain`` or ``Maestro`` makes smaller models whole.
"""

from jlora.compress.dsformer import DenseSparse as DenseSparse
from jlora.compress.dsformer import dense_sparse as dense_sparse
from jlora.compress.dsformer import straight_through as straight_through
from jlora.compress.lama import lowrank_pooling as lowrank_pooling
from jlora.compress.lr2vq import Codes as Codes
from jlora.compress.lr2vq import low_rank_codes as low_rank_codes
from jlora.compress.lr2vq import nearest as nearest
