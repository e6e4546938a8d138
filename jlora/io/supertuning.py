"""``peft_type`` SUPERTUNING: ``supertuning_values`` [K] and ``supertuning_indices`` [K] of each module, places counted
through PyTorch's weight [out, in], the largest entry first; with a rank ``supertuning_lora_A.weight`` [r, in] and
``supertuning_lora_B.weight`` [out, r]. jlora's values and places are the same in its own orientation and order.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jlora.io.format import Arrays, Config, Format, Tensors, Written, one_method
from jlora.io.layouts import Hint, View
from jlora.methods import Method, SuperTuning

_VALUES, _INDICES = "supertuning_values", "supertuning_indices"
_A, _B = "supertuning_lora_A.weight", "supertuning_lora_B.weight"


class SupertuningFormat(Format):
    """SUPERTUNING."""

    peft_type = "SUPERTUNING"
    methods = (SuperTuning,)
    suffixes = (_VALUES, _INDICES, _A, _B)
    fields = frozenset("sparsity select_top r lora_alpha lora_dropout save_precomputed_indices".split())
    inert = frozenset({"init_weights"})
    lacks = frozenset({"bias", "fan_in_fan_out"})

    def check(self, config: Config) -> str | None:
        if not config.get("save_precomputed_indices", True):
            return (
                "save_precomputed_indices=False: which of equal entries PyTorch takes is not known here. Load it with "
                "PEFT, set save_precomputed_indices=True in its config and save it again"
            )
        return None

    def _method(self, config: Config) -> SuperTuning:
        return SuperTuning(
            config.get("sparsity", 0.99),
            largest=bool(config.get("select_top", True)),
            rank=config.get("r") or 0,
            alpha=config.get("lora_alpha"),
            dropout=config.get("lora_dropout", 0.0),
        )

    def hint(self, shapes: Mapping[str, Sequence[int]]) -> Hint:
        a, b = shapes.get(_A), shapes.get(_B)
        return Hint("linear", a[1] if a else None, b[0] if b else None)

    def shapes(self, config: Config, name: str, view: View) -> dict[str, tuple[int, ...]]:
        method = self._method(config)
        size, r = (method.size(view.n_in, view.n_out),), method.rank
        return {_VALUES: size, _INDICES: size} | ({_A: (r, view.n_in), _B: (view.n_out, r)} if r else {})

    def method(self, config: Config, names: Sequence[str | None], tied: bool) -> Method:
        return self._method(config)

    def read(self, view: View, tensors: Tensors) -> Arrays:
        columns, rows = np.divmod(tensors[_INDICES].astype(np.int64), view.n_in)
        at = rows * view.n_out + columns
        if at.min() < 0 or columns.max() >= view.n_out or len(np.unique(at)) < len(at):
            raise ValueError(
                f"{_INDICES} has places outside of a weight of {view.n_in} inputs and {view.n_out} outputs, or one "
                "of them twice"
            )
        order = np.argsort(at)
        arrays = {"values": tensors[_VALUES][order], "frozen/places": np.stack([rows, columns])[:, order]}
        pair = {"factors/a": tensors[_A].T, "factors/b": tensors[_B].T} if _A in tensors else {}
        return arrays | pair

    def absent(self, method: SuperTuning, weight: Callable[[], np.ndarray]) -> Arrays:
        # Places outside of the weight: nothing is changed, and nothing trained. The pair is zero and stays so.
        n_in, n_out = weight().shape
        nowhere = n_in + np.arange(method.size(n_in, n_out))
        return {"frozen/places": np.stack([nowhere, np.zeros_like(nowhere)])}

    def write(
        self, method: SuperTuning, layer: int | None, view: View, arrays: Arrays, weight: Callable[[], np.ndarray]
    ) -> Written | None:
        if view.kind != "linear":
            raise ValueError(f"PEFT has Super-Tuning for linear weights only, and this is of the kind {view.kind!r}.")
        rows, columns = arrays["frozen/places"].astype(np.int64)
        if not (rows < view.n_in).any():
            return None
        size = np.abs(weight()[rows, columns])
        at = columns * view.n_in + rows
        order = np.lexsort((at, -size if method.largest else size))
        tensors = {_VALUES: arrays["values"][order], _INDICES: at[order].astype(np.int32)}
        if method.rank:
            tensors |= {_A: arrays["factors/a"].T, _B: arrays["factors/b"].T}
        return Written(tensors, method, view.n_out)

    def config(self, facts: Mapping[str, Any]) -> dict[str, Any]:
        method = one_method(facts, self.peft_type)
        return {
            "sparsity": method.sparsity,
            "select_top": method.largest,
            "r": method.rank or None,
            "lora_alpha": method.scale * method.rank if method.rank else None,
            "lora_dropout": method.dropout,
            "save_precomputed_indices": True,
        }
