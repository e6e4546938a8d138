"""``peft_type`` IA3: ``ia3_l`` of each module, jlora's scale.

==================  =======================  ==========================
weight              outputs                  inputs
==================  =======================  ==========================
linear              [out, 1]                 [1, in]
convolution         [1, out, 1, ...]         [1, in features, 1, ...]
==================  =======================  ==========================

``feedforward_modules`` names those whose inputs are scaled. PEFT scales the biases of the others with the outputs: they
become ``Follow``.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jlora.io import matching
from jlora.io.format import Arrays, Config, Format, Tensors, Written, all_layers
from jlora.io.layouts import Hint, View
from jlora.methods import IA3, Method

_L = "ia3_l"


def _shape(view: View, inputs: bool) -> tuple[int, ...]:
    if view.kind == "conv":
        return (1, view.window[0] if inputs else view.n_out, *(1,) * (len(view.window) - 1))
    return (1, view.n_in) if inputs else (view.n_out, 1)


class IA3Format(Format):
    """IA3."""

    peft_type = "IA3"
    methods = (IA3,)
    suffixes = (_L,)
    fields = frozenset({"feedforward_modules"})
    inert = frozenset({"init_ia3_weights"})
    lacks = frozenset({"bias"})

    def follows(self, method: Method) -> bool:
        return method.on == "outputs"

    def hint(self, shapes: Mapping[str, Sequence[int]]) -> Hint:
        shape = shapes[_L]
        if len(shape) > 2:
            return Hint("conv")
        return Hint("linear", shape[1] if shape[0] == 1 else None, shape[0] if shape[1] == 1 and shape[0] > 1 else None)

    def _inputs(self, config: Config, name: str) -> bool:
        modules = config.get("feedforward_modules") or []
        if isinstance(modules, str):
            return re.fullmatch(modules, name) is not None
        return name.endswith(tuple(modules))

    def shapes(self, config: Config, name: str, view: View) -> dict[str, tuple[int, ...]]:
        return {_L: _shape(view, self._inputs(config, name))}

    def method(self, config: Config, names: Sequence[str | None], tied: bool) -> Method:
        kinds = {self._inputs(config, name) for name in names if name is not None}
        if len(kinds) > 1:
            raise ValueError(
                f"Of the layers that are stacked with {names[0]} some are scaled on inputs and some on outputs "
                "(feedforward_modules). Use a tree that holds the layers apart."
            )
        return all_layers(names, IA3("inputs" if kinds.pop() else "outputs"))

    def read(self, view: View, tensors: Tensors) -> Arrays:
        return {"scale": tensors[_L].reshape(-1)}

    def write(
        self, method: IA3, layer: int | None, view: View, arrays: Arrays, weight: Callable[[], np.ndarray]
    ) -> Written | None:
        if view.kind not in ("linear", "conv"):
            raise ValueError(f"PEFT has IA3 for linear weights and convolutions, not for the kind {view.kind!r}.")
        inputs = method.on == "inputs"
        return Written({_L: arrays["scale"].reshape(_shape(view, inputs))}, method, view.n_out)

    def config(self, facts: Mapping[str, Any]) -> dict[str, Any]:
        inputs = {name for name, method in facts.items() if method.on == "inputs"}
        modules = matching.shortest(inputs, facts, boundary=False) if inputs else []
        return {"feedforward_modules": modules, "init_ia3_weights": True}
