"""``peft_type`` HRA: ``hra_u`` [in, r] of each module. It is u, a convolution's with its inputs in PyTorch's order."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jlora.io.format import Arrays, Config, Format, Tensors, Written, all_layers, one_method
from jlora.io.layouts import Hint, View
from jlora.methods import HRA, Method

_U = "hra_u"


class HraFormat(Format):
    """HRA."""

    peft_type = "HRA"
    methods = (HRA,)
    suffixes = (_U,)
    fields = frozenset("r apply_GS init_weights".split())
    lacks = frozenset({"fan_in_fan_out"})

    def hint(self, shapes: Mapping[str, Sequence[int]]) -> Hint:
        u = shapes.get(_U)
        return Hint(None, u[0] if u else None, None)

    def shapes(self, config: Config, name: str, view: View) -> dict[str, tuple[int, ...]]:
        return {_U: (view.n_in, config.get("r", 8))}

    def method(self, config: Config, names: Sequence[str | None], tied: bool) -> Method:
        return all_layers(names, HRA(config.get("r", 8), orthogonal=bool(config.get("apply_GS", False))))

    def read(self, view: View, tensors: Tensors) -> Arrays:
        u = tensors[_U]
        return {"u": view.window_rows(u.T.reshape(-1, *view.window)) if view.kind == "conv" else u}

    def write(
        self, method: HRA, layer: int | None, view: View, arrays: Arrays, weight: Callable[[], np.ndarray]
    ) -> Written | None:
        if view.kind not in ("linear", "conv"):
            raise ValueError(
                f"PEFT has HRA for linear weights and convolutions, and this is of the kind {view.kind!r}."
            )
        u = arrays["u"]
        if view.kind == "conv":
            u = view.window_tensor(u).reshape(u.shape[1], -1).T
        return Written({_U: u}, method, view.n_out)

    def config(self, facts: Mapping[str, Any]) -> dict[str, Any]:
        method = one_method(facts, self.peft_type)
        return {"r": method.rank, "apply_GS": method.orthogonal}
