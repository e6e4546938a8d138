"""``peft_type`` SHIRA: ``shira_weight`` [K] and ``shira_indices`` [2, K] of each module, rows and columns of PyTorch's
weight, row by row. jlora's values and places are the same in its own orientation and order. The scale is 1 there:
jlora's goes into the values.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jlora.io.format import Arrays, Config, Format, Tensors, Written, one_method
from jlora.io.layouts import Hint, View
from jlora.methods import Method, SHiRA

_VALUES, _INDICES = "shira_weight", "shira_indices"


class ShiraFormat(Format):
    """SHIRA."""

    peft_type = "SHIRA"
    methods = (SHiRA,)
    suffixes = (_VALUES, _INDICES)
    fields = frozenset({"r"})
    inert = frozenset("mask_type random_seed init_weights".split())  # the places are in the file
    lacks = frozenset({"bias"})

    def hint(self, shapes: Mapping[str, Sequence[int]]) -> Hint:
        return Hint("linear")

    def shapes(self, config: Config, name: str, view: View) -> dict[str, tuple[int, ...]]:
        size = SHiRA(config.get("r", 32)).size(view.n_in, view.n_out)
        return {_VALUES: (size,), _INDICES: (2, size)}

    def method(self, config: Config, names: Sequence[str | None], tied: bool) -> Method:
        return SHiRA(config.get("r", 32))

    def read(self, view: View, tensors: Tensors) -> Arrays:
        columns, rows = tensors[_INDICES]
        inside = (rows >= 0) & (rows < view.n_in) & (columns >= 0) & (columns < view.n_out)
        at = rows.astype(np.int64) * view.n_out + columns
        if not inside.all() or len(np.unique(at)) < len(at):
            raise ValueError(
                f"{_INDICES} has places outside of a weight of {view.n_in} inputs and {view.n_out} outputs, or one "
                "of them twice"
            )
        order = np.argsort(at)
        return {"values": tensors[_VALUES][order], "frozen/places": np.stack([rows, columns])[:, order]}

    def absent(self, method: SHiRA, weight: Callable[[], np.ndarray]) -> Arrays:
        # Places outside of the weight: nothing is changed, and nothing trained.
        n_in, n_out = weight().shape
        nowhere = n_in + np.arange(method.size(n_in, n_out))
        return {"frozen/places": np.stack([nowhere, np.zeros_like(nowhere)])}

    def write(
        self, method: SHiRA, layer: int | None, view: View, arrays: Arrays, weight: Callable[[], np.ndarray]
    ) -> Written | None:
        if view.kind != "linear":
            raise ValueError(f"PEFT has SHiRA for linear weights only, and this is of the kind {view.kind!r}.")
        rows, columns = arrays["frozen/places"]
        inside = rows < view.n_in
        if not inside.any():
            return None
        if not inside.all():
            raise ValueError("some of its places are outside of the weight, which PEFT does not know.")
        order = np.lexsort((rows, columns))
        indices = np.stack([columns, rows])[:, order].astype(np.int32)
        return Written({_VALUES: method.scale * arrays["values"][order], _INDICES: indices}, method, view.n_out)

    def config(self, facts: Mapping[str, Any]) -> dict[str, Any]:
        return {"r": one_method(facts, self.peft_type).rank, "mask_type": "random", "random_seed": None}
