"""``peft_type`` DELORA: ``delora_A`` [r, in], ``delora_B`` [out, r], ``delora_lambda`` [1] and ``delora_w_norm`` [in]
of each module. jlora's a and b are A^T and B^T, its strength is lambda, and its norms, which it does not train, are
w_norm. The r of the config, of each module, divides lambda.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jlora.io import matching
from jlora.io.format import Arrays, Config, Format, Tensors, Written
from jlora.io.layouts import Hint, View
from jlora.methods import DeLoRA, Method

_A, _B, _STRENGTH, _NORMS = "delora_A", "delora_B", "delora_lambda", "delora_w_norm"


class DeloraFormat(Format):
    """DELORA."""

    peft_type = "DELORA"
    methods = (DeLoRA,)
    suffixes = (_A, _B, _STRENGTH, _NORMS)
    fields = frozenset("r delora_lambda module_dropout rank_pattern lambda_pattern".split())
    inert = frozenset({"init_weights"})

    def hint(self, shapes: Mapping[str, Sequence[int]]) -> Hint:
        a, b = shapes.get(_A), shapes.get(_B)
        return Hint("linear", a[1] if a else None, b[0] if b else None)

    def _rank(self, config: Config, name: str) -> int:
        return matching.by_pattern(config.get("rank_pattern"), name, config.get("r", 8))

    def shapes(self, config: Config, name: str, view: View) -> dict[str, tuple[int, ...]]:
        rank = self._rank(config, name)
        return {_A: (rank, view.n_in), _B: (view.n_out, rank), _STRENGTH: (1,), _NORMS: (view.n_in,)}

    def method(self, config: Config, names: Sequence[str | None], tied: bool) -> Method:
        here = [name for name in names if name is not None]
        ranks = {self._rank(config, name) for name in here}
        if len(ranks) > 1:
            raise ValueError(
                f"{here[0]} and the layers that are stacked with it have the ranks {sorted(ranks)}, and DeLoRA divides "
                "by the rank. Use a tree that holds the layers apart."
            )
        strength = matching.by_pattern(config.get("lambda_pattern"), here[0], config.get("delora_lambda", 15))
        return DeLoRA(ranks.pop(), strength, dropout=config.get("module_dropout", 0.0))

    def read(self, view: View, tensors: Tensors) -> Arrays:
        strength = tensors[_STRENGTH].reshape(())
        return {"a": tensors[_A].T, "b": tensors[_B].T, "strength": strength, "frozen/norms": tensors[_NORMS]}

    def write(
        self, method: DeLoRA, layer: int | None, view: View, arrays: Arrays, weight: Callable[[], np.ndarray]
    ) -> Written | None:
        if view.kind != "linear":
            raise ValueError(f"PEFT has DeLoRA for linear weights only, and this is of the kind {view.kind!r}.")
        if layer is not None and not arrays["a"].any() and not arrays["b"].any():
            return None  # zero and staying so: it is how a layer without tensors is read
        strength, norms = arrays["strength"].reshape(1), arrays["frozen/norms"]
        return Written({_A: arrays["a"].T, _B: arrays["b"].T, _STRENGTH: strength, _NORMS: norms}, method, view.n_out)

    def config(self, facts: Mapping[str, Any]) -> dict[str, Any]:
        rank, ranks = matching.as_pattern({name: method.rank for name, method in facts.items()})
        strength, strengths = matching.as_pattern({name: method.strength for name, method in facts.items()})
        return {
            "r": rank,
            "rank_pattern": ranks,
            "delora_lambda": strength,
            "lambda_pattern": strengths,
            "module_dropout": max(method.dropout for method in facts.values()),
            "init_weights": True,
        }
