"""``peft_type`` DEFT: ``deft_P`` [out, r] and ``deft_R`` [r, in] of each module. b = P^T, a = R^T; ``para`` has no R.
A module with fewer outputs than r has as many directions as outputs.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jlora.io.format import Arrays, Config, Format, Tensors, Written, all_layers, one_method
from jlora.io.layouts import Hint, View
from jlora.methods import DEFT, Method

_P, _R = "deft_P", "deft_R"


class DeftFormat(Format):
    """DEFT."""

    peft_type = "DEFT"
    methods = (DEFT,)
    suffixes = (_P, _R)
    fields = frozenset("r alpha decomposition_method para deft_dropout".split())
    inert = frozenset("init_scale init_weights".split())

    def _method(self, config: Config) -> DEFT:
        return DEFT(
            config.get("r", 8),
            config.get("alpha") or None,
            directions=config.get("decomposition_method", "relu"),
            inject=not config.get("para", False),
            dropout=config.get("deft_dropout", 0.0),
        )

    def hint(self, shapes: Mapping[str, Sequence[int]]) -> Hint:
        p, r = shapes.get(_P), shapes.get(_R)
        return Hint("linear", r[1] if r else None, p[0] if p else None)

    def shapes(self, config: Config, name: str, view: View) -> dict[str, tuple[int, ...]]:
        method = self._method(config)
        rank = method.rank_of(view.n_out)
        return {_P: (view.n_out, rank)} | ({_R: (rank, view.n_in)} if method.inject else {})

    def method(self, config: Config, names: Sequence[str | None], tied: bool) -> Method:
        return all_layers(names, self._method(config))

    def read(self, view: View, tensors: Tensors) -> Arrays:
        return {"b": tensors[_P].T} | ({"a": tensors[_R].T} if _R in tensors else {})

    def write(
        self, method: DEFT, layer: int | None, view: View, arrays: Arrays, weight: Callable[[], np.ndarray]
    ) -> Written | None:
        if view.kind != "linear":
            raise ValueError(f"PEFT has DEFT for linear weights only, and this is of the kind {view.kind!r}.")
        tensors = {_P: arrays["b"].T} | ({_R: arrays["a"].T} if method.inject else {})
        return Written(tensors, method, view.n_out)

    def config(self, facts: Mapping[str, Any]) -> dict[str, Any]:
        method = one_method(facts, self.peft_type)
        if method.alpha is not None and method.alpha != int(method.alpha):
            raise ValueError(f"PEFT's DEFT has whole numbers for alpha, and here is {method.alpha}.")
        return {
            "r": method.rank,
            "alpha": None if method.alpha is None else int(method.alpha),
            "decomposition_method": method.directions,
            "para": not method.inject,
            "deft_dropout": method.dropout,
        }
