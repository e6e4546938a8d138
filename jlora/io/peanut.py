"""``peft_type`` PEANUT: ``peanut_A.weight`` [r, out], ``peanut_B.weight`` [out, r] and, with a depth,
``peanut_encoders.0.weight``, ``peanut_decoders.0.weight`` and so on [r, r] of each module. a, b, encoders and decoders
are their transposes.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jlora.io.format import Arrays, Config, Format, Tensors, Written, all_layers, one_method
from jlora.io.layouts import Hint, View
from jlora.methods import Method, PEANuT

_A, _B = "peanut_A.weight", "peanut_B.weight"
_STACKS = {"encoders": "peanut_encoders", "decoders": "peanut_decoders"}  # stacked below, no file has them so
_ACTIVATIONS = {
    "relu": "relu",
    "tanh": "tanh",
    "sigmoid": "sigmoid",
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "linear": "linear",
}


class PeanutFormat(Format):
    """PEANUT."""

    peft_type = "PEANUT"
    methods = (PEANuT,)
    suffixes = (_A, _B, *_STACKS.values())
    fields = frozenset("r depth act_fn scaling".split())
    inert = frozenset({"init_weights"})
    lacks = frozenset({"bias", "fan_in_fan_out"})

    def check(self, config: Config) -> str | None:
        act = config.get("act_fn", "relu")
        return None if act in _ACTIVATIONS else f"act_fn={act!r}, where one of {sorted(_ACTIVATIONS)} is read"

    def complete(self, config: Config, tensors: Tensors, modules: Callable[[], dict[str, tuple[int, int]]]) -> Tensors:
        found = {key: re.fullmatch(r"(.*peanut_(?:en|de)coders)(?:\..*)?\.(\d+)\.weight", key) for key in tensors}
        rest = {key: tensor for key, tensor in tensors.items() if not found[key]}
        levels: dict[str, dict[int, np.ndarray]] = {}
        for key, match in found.items():
            if match:
                levels.setdefault(match[1], {})[int(match[2])] = tensors[key]
        for key, each in levels.items():
            if len({tensor.shape for tensor in each.values()}) > 1:
                raise ValueError(f"the matrices of {key} have different shapes")
            rest[key] = np.stack([each[level] for level in sorted(each)])
        return rest

    def finish(self, config: dict[str, Any], tensors: Tensors) -> tuple[dict[str, Any], Tensors]:
        out = {}
        for key, tensor in tensors.items():
            stacked = key.endswith(tuple(_STACKS.values()))
            out |= {f"{key}.{i}.weight": one for i, one in enumerate(tensor)} if stacked else {key: tensor}
        return config, out

    def hint(self, shapes: Mapping[str, Sequence[int]]) -> Hint:
        b = shapes.get(_B)
        return Hint("linear", None, b[0] if b else None)

    def shapes(self, config: Config, name: str, view: View) -> dict[str, tuple[int, ...]]:
        r, depth = config.get("r", 32), config.get("depth", 0)
        return {_A: (r, view.n_out), _B: (view.n_out, r)} | {
            suffix: (depth, r, r) for suffix in _STACKS.values() if depth
        }

    def method(self, config: Config, names: Sequence[str | None], tied: bool) -> Method:
        method = PEANuT(
            config.get("r", 32),
            depth=config.get("depth", 0),
            activation=_ACTIVATIONS[config.get("act_fn", "relu")],
            scale=config.get("scaling", 1.0),
        )
        return all_layers(names, method)

    def read(self, view: View, tensors: Tensors) -> Arrays:
        stacks = {name: tensors[key].transpose(0, 2, 1) for name, key in _STACKS.items() if key in tensors}
        return {"a": tensors[_A].T, "b": tensors[_B].T} | stacks

    def write(
        self, method: PEANuT, layer: int | None, view: View, arrays: Arrays, weight: Callable[[], np.ndarray]
    ) -> Written | None:
        if view.kind != "linear":
            raise ValueError(f"PEFT has PEANuT for linear weights only, and this is of the kind {view.kind!r}.")
        tensors = {_A: arrays["a"].T, _B: arrays["b"].T}
        tensors |= {key: arrays[name].transpose(0, 2, 1) for name, key in _STACKS.items() if name in arrays}
        return Written(tensors, method, view.n_out)

    def config(self, facts: Mapping[str, Any]) -> dict[str, Any]:
        method = one_method(facts, self.peft_type)
        names = {ours: theirs for theirs, ours in reversed(_ACTIVATIONS.items())}
        if method.activation not in names:
            raise ValueError(f"PEFT has no activation {method.activation!r}. Merge instead: jlora.merge.")
        return {
            "r": method.rank,
            "depth": method.depth,
            "act_fn": names[method.activation],
            "scaling": method.scale,
        }
