"""``peft_type`` BEFT: ``beft_bias`` [1, out] of each module, added to its outputs. It is ``Offset`` on the bias.

BEFT: Bias-Efficient Fine-Tuning of Language Models. Huang et al., 2025. https://arxiv.org/abs/2509.15974 is about which
biases to choose (those of the values), and needs no method of its own: ``{"**/v_proj/bias": jlora.Offset()}``. Models
without biases have no leaf to carry it, and PEFT cannot merge it there either; they are refused.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jlora.io.format import Arrays, Config, Format, Tensors, Written
from jlora.io.layouts import Hint, View
from jlora.methods import Method, Offset


class BeftFormat(Format):
    """BEFT."""

    peft_type = "BEFT"
    methods = (Offset,)
    suffixes = ()
    offset = "beft_bias"
    fields = frozenset()
    inert = frozenset({"init_weights"})
    lacks = frozenset({"bias", "fan_in_fan_out"})

    def complete(self, config: Config, tensors: Tensors, modules: Callable) -> Tensors:
        return {key: t.reshape(-1) if self.offset in key.split(".") else t for key, t in tensors.items()}

    def hint(self, shapes: Mapping[str, Sequence[int]]) -> Hint:
        return Hint("linear", None, shapes[self.offset][0])

    def shapes(self, config: Config, name: str, view: View) -> dict[str, tuple[int, ...]]:
        return {self.offset: (1, view.n_out)}

    def method(self, config: Config, names: Sequence[str | None], tied: bool) -> Method:
        raise NotImplementedError("A BEFT file has nothing to say of weights.")

    def read(self, view: View, tensors: Tensors) -> Arrays:
        return {}

    def write(
        self, method: Offset, layer: int | None, view: View, arrays: Arrays, weight: Callable[[], np.ndarray]
    ) -> Written | None:
        delta = arrays["delta"].reshape(1, -1)
        return Written({self.offset: method.scale * delta}, method, delta.size)

    def config(self, facts: Mapping[str, Any]) -> dict[str, Any]:
        return {"init_weights": True}
