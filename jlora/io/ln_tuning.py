"""``peft_type`` LN_TUNING: ``ln_tuning_layers.weight`` and ``ln_tuning_layers.bias`` of each module, trained copies of
its parameters. They are ``Full``. It is read only: a file of full copies alone says nothing that the tree of
``jlora.merge`` does not.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jlora.io.format import Arrays, Config, Format, Tensors, Written
from jlora.io.layouts import Hint, View
from jlora.methods import Method

_INFIX = ".ln_tuning_layers."


class LnTuningFormat(Format):
    """LN_TUNING. No weight has an adapter of it: everything is a full copy."""

    peft_type = "LN_TUNING"
    methods = ()
    suffixes = ()
    fields = frozenset()
    lacks = frozenset({"bias", "fan_in_fan_out"})

    def complete(self, config: Config, tensors: Tensors, modules: Callable[[], dict[str, tuple[int, int]]]) -> Tensors:
        if not any(_INFIX in key for key in tensors):
            raise ValueError("it has no tensors of ln_tuning_layers")
        # The name of the adapter may follow, as in memory.
        parts = {key: key.partition(_INFIX) for key in tensors}
        return {
            f"{head}.{tail.rpartition('.')[2]}" if infix else key: tensors[key]
            for key, (head, infix, tail) in parts.items()
        }

    def hint(self, shapes: Mapping[str, Sequence[int]]) -> Hint:
        return Hint()

    def shapes(self, config: Config, name: str, view: View) -> dict[str, tuple[int, ...]]:
        return {}

    def method(self, config: Config, names: Sequence[str | None], tied: bool) -> Method:
        raise NotImplementedError("no weight is adapted")

    def read(self, view: View, tensors: Tensors) -> Arrays:
        raise NotImplementedError("no weight is adapted")

    def write(
        self, method: Method, layer: int | None, view: View, arrays: Arrays, weight: Callable[[], np.ndarray]
    ) -> Written | None:
        raise NotImplementedError("no weight is adapted")

    def config(self, facts: Mapping[str, Any]) -> dict[str, Any]:
        return {}
