"""``peft_type`` RANDLORA: ``randlora_lambda`` [r, n] and ``randlora_gamma`` [n, lo] of each module, and one pair of
random bases for all, ``randlora_A`` [r, 1, max lo] and ``randlora_B`` [max hi, max n, r]. small = A without its middle
axis, large = B. PEFT 0.21 writes copies of the pair below every module as well; they are passed over and not written.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jlora.io.format import Arrays, Config, Format, Tensors, Written, one_method
from jlora.io.layouts import Hint, View
from jlora.methods import Method, RandLoRA

_LAMBDA, _GAMMA = "randlora_lambda", "randlora_gamma"
_SHARED_A, _SHARED_B = "randlora_A", "randlora_B"


class RandloraFormat(Format):
    """RANDLORA."""

    peft_type = "RANDLORA"
    methods = (RandLoRA,)
    suffixes = (_LAMBDA, _GAMMA)
    shared = (_SHARED_A, _SHARED_B)
    fields = frozenset("r randlora_alpha randlora_dropout sparse very_sparse save_projection".split())
    inert = frozenset("init_weights projection_prng_key".split())

    def hint(self, shapes: Mapping[str, Sequence[int]]) -> Hint:
        return Hint("linear")

    def shapes(self, config: Config, name: str, view: View) -> dict[str, tuple[int, ...]]:
        r, lo = config.get("r", 32), min(view.n_in, view.n_out)
        n = -(-lo // r)
        return {_LAMBDA: (r, n), _GAMMA: (n, lo)}

    def method(self, config: Config, names: Sequence[str | None], tied: bool) -> Method:
        very_sparse = bool(config.get("very_sparse", False))
        return RandLoRA(
            config.get("r", 32),
            config.get("randlora_alpha", 640),
            dropout=config.get("randlora_dropout", 0.0),
            sparse=bool(config.get("sparse", False)) and not very_sparse,
            very_sparse=very_sparse,
        )

    def read(self, view: View, tensors: Tensors) -> Arrays:
        return {"lambda": tensors[_LAMBDA], "gamma": tensors[_GAMMA]}

    def read_shared(self, config: Config, views: Sequence[View], tensors: Tensors) -> dict[str, Arrays]:
        if set(tensors) != set(self.shared):
            raise ValueError(
                f"it lacks the random bases {sorted(set(self.shared) - set(tensors))} (save_projection="
                f"{str(config.get('save_projection', True)).lower()}). Without them the file stands for random numbers "
                "of PyTorch's own generator, which JAX does not have. Load it with PEFT, set save_projection=True in "
                "its config and save it again"
            )
        a, b, rank = tensors[_SHARED_A], tensors[_SHARED_B], config.get("r", 32)
        sizes = [sorted((view.n_in, view.n_out)) for view in views]
        lo, hi = (max(pair[i] for pair in sizes) for i in (0, 1))
        fits = a.ndim == b.ndim == 3 and a.shape[:2] == (rank, 1) and b.shape[2] == rank
        if not (fits and a.shape[2] >= lo and b.shape[0] >= hi and b.shape[1] >= -(-lo // rank)):
            raise ValueError(
                f"its random bases are {a.shape} and {b.shape}; rank {rank} and weights of up to {lo} x {hi} want at "
                f"least {(rank, 1, lo)} and {(hi, -(-lo // rank), rank)}: it is the adapter of another model"
            )
        return {RandLoRA.group: {"small": a[:, 0], "large": b}}

    def write(
        self, method: RandLoRA, layer: int | None, view: View, arrays: Arrays, weight: Callable[[], np.ndarray]
    ) -> Written | None:
        if view.kind != "linear":
            raise ValueError(f"PEFT has RandLoRA for linear weights only, and this is of the kind {view.kind!r}.")
        if layer is not None and not arrays["lambda"].any() and not arrays["gamma"].any():
            return None  # zero and staying so: both gradients vanish. It is how a layer without tensors is read
        return Written({_LAMBDA: arrays["lambda"], _GAMMA: arrays["gamma"]}, method, view.n_out)

    def write_shared(self, methods: Sequence[Method], groups: Mapping[str, Arrays]) -> Tensors:
        names = {method.group for method in methods}
        if len(names) > 1:
            raise ValueError(f"A RANDLORA file has one pair of bases, and here are the groups {sorted(names)}.")
        pair = groups[names.pop()]
        return {_SHARED_A: pair["small"][:, None], _SHARED_B: pair["large"]}

    def config(self, facts: Mapping[str, Any]) -> dict[str, Any]:
        method = one_method(facts, self.peft_type)
        return {
            "r": method.rank,
            "randlora_alpha": int(method.alpha) if method.alpha == int(method.alpha) else method.alpha,
            "randlora_dropout": method.dropout,
            "sparse": method.sparse,
            "very_sparse": method.very_sparse,
            "save_projection": True,
            "projection_prng_key": 0,
        }
