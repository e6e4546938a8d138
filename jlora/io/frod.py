"""``peft_type`` FROD: ``frod_lambda_l`` [in] and ``frod_lambda_s_values`` [K] of each module; of each kind of modules,
by the ends of their names, ``frod_V.KIND`` [in, in], ``frod_s_indices.KIND`` [2, K] and ``frod_s_size.KIND``, in twice.
diagonal = lambda_l, values = lambda_s_values, v = V, and the places are the indices with the two rows exchanged: PEFT's
S is the transpose. A kind is a group here.

U is not in the file: it follows from V and the base weight, in float64 here; PEFT rounds it to float32. When PEFT reads
a file it takes V from there and keeps the U of a V that it has just found by itself. So it is right only if that comes
out the same, signs and all, and an adapter that began elsewhere would be wrong in it: none is written.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jlora.io.format import HEAD, Arrays, Config, Format, Tensors, Written, all_layers
from jlora.io.layouts import Hint, View
from jlora.methods import FRoD, Method

_L, _S, _V, _PLACES = "frod_lambda_l", "frod_lambda_s_values", "frod_V", "frod_s_indices"


def kind(module: str) -> str:
    """PEFT's name for the modules that share a basis with this one."""
    *_, over, above, last = ["", "", *module.split(".")]
    if not above or above.isdigit():
        return last
    return "attention_output" if (over, above, last) == ("attention", "output", "dense") else f"{above}_{last}"


class FrodFormat(Format):
    """FROD, read only."""

    peft_type = "FROD"
    methods = ()
    suffixes = (_L, _S, _V, _PLACES)
    fields = frozenset("sparse_rate regularization_alpha save_projection".split())
    inert = frozenset("init_weights projection_prng_key frod_dropout progressbar runtime_offload_base_weight".split())

    def complete(self, config: Config, tensors: Tensors, modules: Callable) -> Tensors:
        """V and the places at each module, where the file has them once for a kind."""
        common = {key: t for key, t in tensors.items() if re.match(rf"base_model\.({_V}|{_PLACES}|frod_s_size)\.", key)}
        tensors = {key: tensor for key, tensor in tensors.items() if key not in common}
        for key in list(tensors):
            match = re.fullmatch(rf"({HEAD}(.+))\.{_L}(?:\.[^.]+)?", key)
            for name in (_V, _PLACES) if match else ():
                at = f"base_model.{name}.{kind(match[2])}"
                found = next((t for k, t in common.items() if k == at or k.startswith(f"{at}.")), None)
                if found is None:
                    saved = str(config.get("save_projection", True)).lower()
                    raise ValueError(
                        f"it lacks {at} (save_projection={saved}), which depends on how PyTorch decomposes and draws. "
                        "Load it with PEFT, set save_projection=True in its config and save it again"
                    )
                tensors[f"{match[1]}.{name}"] = found
        return tensors

    def hint(self, shapes: Mapping[str, Sequence[int]]) -> Hint:
        diagonal = shapes.get(_L)
        return Hint("linear", diagonal[0] if diagonal else None, None)

    def _method(self, config: Config, name: str) -> FRoD:
        density, ridge = config.get("sparse_rate", 0.01), config.get("regularization_alpha", 1e-3)
        return FRoD(density, ridge=ridge, group=f"{FRoD.group}.{kind(name)}")

    def shapes(self, config: Config, name: str, view: View) -> dict[str, tuple[int, ...]]:
        n, count = view.n_in, self._method(config, name).entries(view.n_in)
        return {_L: (n,), _S: (count,), _V: (n, n), _PLACES: (2, count)}

    def method(self, config: Config, names: Sequence[str | None], tied: bool) -> Method:
        methods = {self._method(config, name) for name in names if name is not None}
        if len(methods) > 1:
            raise ValueError(
                f"{next(name for name in names if name)} and what is stacked with it are of different kinds to PEFT, "
                f"{sorted(method.group for method in methods)}. Use a tree that holds the layers apart."
            )
        return all_layers(names, methods.pop())

    def read(self, view: View, tensors: Tensors) -> Arrays:
        group = f"group/{view.n_in}"
        shared = {f"{group}/v": tensors[_V], f"{group}/places": tensors[_PLACES][::-1]}
        return {"diagonal": tensors[_L], "values": tensors[_S]} | shared

    def derived(self, method: FRoD, weight: Callable[[], np.ndarray], arrays: Arrays) -> Arrays:
        v = arrays[f"group/{len(arrays['diagonal'])}/v"].astype(np.float64)
        w = weight().astype(np.float64)
        try:
            c = np.linalg.solve(v, w)
        except np.linalg.LinAlgError:
            c = np.linalg.pinv(v, rcond=1e-6) @ w
        lengths = np.linalg.norm(c, axis=1)
        there = lengths > 1e-12  # PEFT's rule: what a matrix does not have is noise of unit length
        u = np.where(there, 1 / np.where(there, lengths, 1.0), 0.0)[:, None] * c
        return {"frozen/u": u, "frozen/start": lengths}

    def write(
        self, method: FRoD, layer: int | None, view: View, arrays: Arrays, weight: Callable[[], np.ndarray]
    ) -> Written | None:
        raise NotImplementedError("no method is written so")

    def config(self, facts: Mapping[str, Any]) -> dict[str, Any]:
        raise NotImplementedError("no method is written so")
