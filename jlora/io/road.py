"""``peft_type`` ROAD: ``road_theta`` and ``road_alpha`` of each module, [out / 2], [out] or [2 out]. PEFT's RoAd turns
biases with the outputs: a module's bias becomes ``Follow``.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jlora.io.format import Arrays, Config, Format, Tensors, Written, all_layers, one_method
from jlora.io.layouts import Hint, View
from jlora.methods import Method, RoAd

_THETA, _ALPHA = "road_theta", "road_alpha"
_VARIANTS = {"road_1": 1, "road_2": 2, "road_4": 4}


class RoadFormat(Format):
    """ROAD."""

    peft_type = "ROAD"
    methods = (RoAd,)
    suffixes = (_THETA, _ALPHA)
    fields = frozenset("variant group_size init_weights".split())
    lacks = frozenset({"bias", "fan_in_fan_out"})

    def check(self, config: Config) -> str | None:
        variant = config.get("variant", "road_1")
        return None if variant in _VARIANTS else f"variant={variant!r}, where one of {sorted(_VARIANTS)} is wanted"

    def follows(self, method: Method) -> bool:
        return True

    def _method(self, config: Config) -> RoAd:
        return RoAd(_VARIANTS[config.get("variant", "road_1")], group_size=config.get("group_size", 64))

    def hint(self, shapes: Mapping[str, Sequence[int]]) -> Hint:
        return Hint("linear")

    def shapes(self, config: Config, name: str, view: View) -> dict[str, tuple[int, ...]]:
        size = (self._method(config).size(view.n_out),)
        return {_THETA: size, _ALPHA: size}

    def method(self, config: Config, names: Sequence[str | None], tied: bool) -> Method:
        return all_layers(names, self._method(config))

    def read(self, view: View, tensors: Tensors) -> Arrays:
        return {"theta": tensors[_THETA], "alpha": tensors[_ALPHA]}

    def write(
        self, method: RoAd, layer: int | None, view: View, arrays: Arrays, weight: Callable[[], np.ndarray]
    ) -> Written | None:
        if view.kind != "linear":
            raise ValueError(f"PEFT has RoAd for linear weights only, and this is of the kind {view.kind!r}.")
        return Written({_THETA: arrays["theta"], _ALPHA: arrays["alpha"]}, method, view.n_out)

    def config(self, facts: Mapping[str, Any]) -> dict[str, Any]:
        method = one_method(facts, self.peft_type)
        return {"variant": f"road_{method.variant}", "group_size": method.group_size}
