"""``peft_type`` GLORA: five paths of each module, ``glora_A`` to ``glora_E``.

==========  ==============================================  ===================================================
form        tensors                                         jlora, for A and a: the same for the others
==========  ==============================================  ===================================================
lora        A.Xd [out, r], A.Xu [r, in], B likewise;        a1 = A.Xu^T [in, r], a2 = A.Xd^T [r, out];
            C.Xd [in, r], C.Xu [r, 1]                       c1 = C.Xd, c2 = C.Xu [r]
vector      A.X [out, 1], C.X [in, 1], D.X [out]            a [out], c [in], d [out]
constant    A.X [1], D.X [1]                                a, d: a number
none        A.zeros [out, in], C.zeros [in, 1],             -
            D.zeros [out]
==========  ==============================================  ===================================================

C, D and E of a module without a bias are "none", whatever the config says. The biases of the others become ``Follow``.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jlora.io.format import HEAD, Arrays, Config, Format, Tensors, Written, all_layers
from jlora.io.layouts import Hint, View
from jlora.methods import GLoRA, Method

_CONFIG = {"ab": ("config_A_B", "lora"), "c": ("config_C", "lora"), "de": ("config_D_E", "constant")}
_BIASED = "_modules_with_a_bias"  # found in the file, for the other functions


def _shapes(method: GLoRA, view: View) -> dict[str, tuple[int, ...]]:
    r, n_in, n_out = method.rank, view.n_in, view.n_out
    shapes = {}
    for path, form in zip("ABCDE", (method.ab, method.ab, method.c, method.de, method.de), strict=True):
        if form == "lora":
            sizes = (n_in, 1) if path == "C" else (n_out, n_in)
            own = {"Xd": (sizes[0], r), "Xu": (r, sizes[1])}
        elif form == "constant":
            own = {"X": (1,)}
        elif path in "DE":
            own = {"X" if form == "vector" else "zeros": (n_out,)}
        elif form == "vector":
            own = {"X": (n_in if path == "C" else n_out, 1)}
        else:
            own = {"zeros": (n_in, 1) if path == "C" else (n_out, n_in)}
        shapes |= {f"glora_{path}.{name}": shape for name, shape in own.items()}
    return shapes


class GloraFormat(Format):
    """GLORA."""

    peft_type = "GLORA"
    methods = (GLoRA,)
    suffixes = tuple(f"glora_{path}.{name}" for path in "ABCDE" for name in ("Xd", "Xu", "X", "zeros"))
    fields = frozenset({"r", _BIASED} | {field for field, _ in _CONFIG.values()})
    inert = frozenset({"init_weights"})
    lacks = frozenset({"fan_in_fan_out"})

    def settle(self, config: Config, tensors: Tensors) -> Config:
        keys = [re.match(rf"{HEAD}(.+)\.glora_[CDE]\.(.+\.)?X[du]?$", key) for key in tensors]
        return {**config, _BIASED: {match[1] for match in keys if match}}

    def check(self, config: Config) -> str | None:
        forms = [config.get(field, usual) for field, usual in _CONFIG.values()]
        if config.get("bias", "none") != "none" and set(forms[1:]) != {"none"}:
            return (
                f"bias={config['bias']!r} with config_C={forms[1]!r} and config_D_E={forms[2]!r} trains the biases "
                "themselves and what is added to them; a leaf has one method here. Merge the two in PEFT"
            )
        return None

    def follows(self, method: Method) -> bool:
        return {method.c, method.de} != {"none"}

    def for_bias(self, tensors: Tensors) -> list[str]:
        acting = []
        for path in "CDE":
            own = {k: tensor for k, tensor in tensors.items() if k.startswith(f"glora_{path}.")}
            if own and all(tensor.any() for tensor in own.values()):  # a product with a zero factor does nothing
                acting += sorted(own)
        return acting

    def _method(self, config: Config, name: str) -> GLoRA:
        forms = {ours: config.get(field, usual) for ours, (field, usual) in _CONFIG.items()}
        if name not in config[_BIASED]:
            forms |= {"c": "none", "de": "none"}
        return GLoRA(config.get("r", 8), **forms)

    def hint(self, shapes: Mapping[str, Sequence[int]]) -> Hint:
        n_in = next(
            (shapes[f"glora_C.{name}"][0] for name in ("Xd", "X", "zeros") if f"glora_C.{name}" in shapes), None
        )
        n_out = next((shapes[f"glora_A.{name}"][0] for name in ("Xd", "zeros") if f"glora_A.{name}" in shapes), None)
        return Hint("linear", n_in, n_out)

    def shapes(self, config: Config, name: str, view: View) -> dict[str, tuple[int, ...]]:
        return _shapes(self._method(config, name), view)

    def method(self, config: Config, names: Sequence[str | None], tied: bool) -> Method:
        methods = {self._method(config, name) for name in names if name is not None}
        if len(methods) > 1:
            raise ValueError(
                f"Of the layers that are stacked with {next(name for name in names if name)} some have a bias in the "
                "file and some have none. Use a tree that holds the layers apart."
            )
        return all_layers(names, methods.pop())

    def read(self, view: View, tensors: Tensors) -> Arrays:
        arrays = {}
        for suffix, tensor in tensors.items():
            path, _, name = suffix.removeprefix("glora_").lower().partition(".")
            if name in ("xd", "xu"):
                inner = name == ("xd" if path == "c" else "xu")
                tensor = tensor if path == "c" else tensor.T
                arrays[f"{path}{1 if inner else 2}"] = tensor if inner or path != "c" else tensor[:, 0]
            elif name == "x":
                arrays[path] = tensor.reshape(()) if tensor.shape == (1,) else tensor.reshape(-1)
        return arrays

    def write(
        self, method: GLoRA, layer: int | None, view: View, arrays: Arrays, weight: Callable[[], np.ndarray]
    ) -> Written | None:
        if view.kind != "linear":
            raise ValueError(f"PEFT has GLoRA for linear weights only, and this is of the kind {view.kind!r}.")
        tensors = {}
        for suffix, shape in _shapes(method, view).items():
            path, _, name = suffix.removeprefix("glora_").lower().partition(".")
            if name == "zeros":
                tensors[suffix] = np.zeros(shape, np.float32)
                continue
            ours = path if name == "x" else f"{path}{1 if name == ('xd' if path == 'c' else 'xu') else 2}"
            tensors[suffix] = (arrays[ours].T if path in "ab" else arrays[ours]).reshape(shape)
        return Written(tensors, method, view.n_out)

    def config(self, facts: Mapping[str, Any]) -> dict[str, Any]:
        methods = set(facts.values())
        full = max(methods, key=lambda method: (method.c != "none", method.de != "none"))
        # Modules without a bias have no C, D and E, whatever the config says.
        if not methods <= {full, dataclasses.replace(full, c="none", de="none") if full.ab != "none" else full}:
            raise ValueError(
                f"A GLORA file says one thing of all its modules, and here are {sorted(map(str, methods))}: save them "
                "one at a time, or merge (jlora.merge)."
            )
        return {"r": full.rank} | {field: getattr(full, ours) for ours, (field, _) in _CONFIG.items()}
