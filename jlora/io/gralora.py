"""``peft_type`` GRALORA: ``gralora_A`` [k, in / k, r] and ``gralora_B`` [k, r, out / k] of each module, and with
``hybrid_r`` the pair ``gralora_A_general.weight`` [r_h, in], ``gralora_B_general.weight`` [out, r_h].

jlora's a is A flattened to [in, r], its b [r, out] is the k matrices of B beside each other, and the hybrid is a pair
as LORA has it. The scale is not stored: alpha / (r + hybrid_r).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jlora.io.format import Arrays, Config, Format, Tensors, Written, one_method
from jlora.io.layouts import Hint, View
from jlora.methods import GraLoRA, Method

_A, _B = "gralora_A", "gralora_B"
_HYBRID_A, _HYBRID_B = "gralora_A_general.weight", "gralora_B_general.weight"


class GraloraFormat(Format):
    """GRALORA."""

    peft_type = "GRALORA"
    methods = (GraLoRA,)
    suffixes = (_A, _B, _HYBRID_A, _HYBRID_B)
    fields = frozenset("r alpha gralora_k hybrid_r gralora_dropout".split())
    inert = frozenset({"init_weights"})

    def hint(self, shapes: Mapping[str, Sequence[int]]) -> Hint:
        a, b = shapes.get(_A), shapes.get(_B)
        return Hint("linear", a[0] * a[1] if a else None, b[0] * b[2] if b else None)

    def shapes(self, config: Config, name: str, view: View) -> dict[str, tuple[int, ...]]:
        k, rank, hybrid = (config.get(*pair) for pair in (("gralora_k", 2), ("r", 32), ("hybrid_r", 0)))
        shapes = {_A: (k, view.n_in // k, rank), _B: (k, rank, view.n_out // k)}
        if hybrid:
            shapes |= {_HYBRID_A: (hybrid, view.n_in), _HYBRID_B: (view.n_out, hybrid)}
        return shapes

    def method(self, config: Config, names: Sequence[str | None], tied: bool) -> Method:
        return GraLoRA(
            rank=config.get("r", 32),
            alpha=config.get("alpha", 64),
            blocks=config.get("gralora_k", 2),
            hybrid_rank=config.get("hybrid_r", 0),
            dropout=config.get("gralora_dropout", 0.0),
        )

    def read(self, view: View, tensors: Tensors) -> Arrays:
        a, b = tensors[_A], tensors[_B]
        arrays = {"a": a.reshape(view.n_in, -1), "b": b.transpose(1, 0, 2).reshape(-1, view.n_out)}
        if _HYBRID_A in tensors:
            arrays |= {"hybrid/a": tensors[_HYBRID_A].T, "hybrid/b": tensors[_HYBRID_B].T}
        return arrays

    def write(
        self, method: GraLoRA, layer: int | None, view: View, arrays: Arrays, weight: Callable[[], np.ndarray]
    ) -> Written | None:
        if view.kind != "linear":
            raise ValueError(f"PEFT has GraLoRA for linear weights only, and this is of the kind {view.kind!r}.")
        if layer is not None and not any(array.any() for array in arrays.values()):
            return None  # zero and staying so: it is how a layer without tensors is read
        k = method.blocks
        tensors = {
            _A: arrays["a"].reshape(k, view.n_in // k, method.rank),
            _B: arrays["b"].reshape(method.rank, k, view.n_out // k).transpose(1, 0, 2),
        }
        if method.hybrid_rank:
            tensors |= {_HYBRID_A: arrays["hybrid/a"].T, _HYBRID_B: arrays["hybrid/b"].T}
        return Written(tensors, method, view.n_out)

    def config(self, facts: Mapping[str, Any]) -> dict[str, Any]:
        method = one_method(facts, self.peft_type)
        return {
            "r": method.rank,
            "alpha": method.alpha,
            "gralora_k": method.blocks,
            "hybrid_r": method.hybrid_rank,
            "gralora_dropout": method.dropout,
            "init_weights": True,
        }
