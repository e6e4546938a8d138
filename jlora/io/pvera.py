"""``peft_type`` PVERA: as VERA, with ``pvera_lambda_d`` [2 r] and ``pvera_A`` [2 r, max in], the mean's half first.
Whether PEFT draws at inference, and from which seed, is in its config; here a tree that is bound with a key draws.
"""

from jlora.io.vera import VeraFormat
from jlora.methods import PVeRA


class PveraFormat(VeraFormat):
    """PVERA."""

    peft_type = "PVERA"
    methods = (PVeRA,)
    suffixes = ("pvera_lambda_d", "pvera_lambda_b")
    shared = ("pvera_A", "pvera_B")
    fields = frozenset("r d_initial pvera_dropout save_projection projection_prng_key".split())
    inert = frozenset("init_weights sample_at_inference generator_seed".split())

    def inner(self, rank: int) -> int:
        return 2 * rank
