"""``peft_type`` LOHA.

======================  ========================================  ====================================================
weight                  tensors                                   jlora
======================  ========================================  ====================================================
linear                  hada_w1_a [out, r], hada_w1_b [r, in]     b1 = w1_a^T, a1 = w1_b^T; the same for 2
convolution             hada_w1_a [out, r],                       the same, with the rows of a1 in the kernel's own
                        hada_w1_b [r, in * window]                order
convolution,            hada_t1 [r, r, *window],                  t1 = [window, r, 1, r] or [1, r, window, r], the last
use_effective_conv2d    hada_w1_a [r, out], hada_w1_b [r, in]     axis the first of hada_t1; b1 = w1_a, a1 = w1_b^T
======================  ========================================  ====================================================

The scale is not stored: alpha / r of each module's own r and alpha.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jlora.io import matching
from jlora.io.format import Arrays, Config, Format, Tensors, Written
from jlora.io.layouts import Hint, View
from jlora.methods import LoHa, Method


def _names(i: int) -> tuple[str, str, str]:
    return f"hada_w{i}_a", f"hada_w{i}_b", f"hada_t{i}"


class LohaFormat(Format):
    """LOHA."""

    peft_type = "LOHA"
    methods = (LoHa,)
    suffixes = (*_names(1), *_names(2))
    fields = frozenset("r alpha rank_pattern alpha_pattern use_effective_conv2d".split())
    inert = frozenset("rank_dropout module_dropout init_weights".split())
    lacks = frozenset({"bias", "fan_in_fan_out"})

    def _rank_alpha(self, config: Config, name: str) -> tuple[int, float]:
        rank = matching.by_pattern(config.get("rank_pattern"), name, config.get("r", 8))
        return rank, matching.by_pattern(config.get("alpha_pattern"), name, config.get("alpha", 8))

    def hint(self, shapes: Mapping[str, Sequence[int]]) -> Hint:
        up, down, core = (shapes.get(name) for name in _names(1))
        if core:
            window = math.prod(core[2:])
            return Hint("conv", down[1] * window if down else None, up[1] if up else None)
        return Hint(None, down[1] if down else None, up[0] if up else None)

    def _tucker(self, effective: bool, view: View) -> bool:
        return effective and view.kind == "conv" and math.prod(view.window[1:]) > 1

    def shapes(self, config: Config, name: str, view: View) -> dict[str, tuple[int, ...]]:
        r, _ = self._rank_alpha(config, name)
        if self._tucker(config.get("use_effective_conv2d", False), view):
            each = (r, view.n_out), (r, view.window[0]), (r, r, *view.core_window)
        else:
            each = (view.n_out, r), (r, view.n_in)
        return {name: shape for i in (1, 2) for name, shape in zip(_names(i), each, strict=False)}

    def method(self, config: Config, names: Sequence[str | None], tied: bool) -> Method:
        each = {self._rank_alpha(config, name) for name in names if name is not None}
        if len(each) > 1:
            raise ValueError(
                f"LoHa of a stacked leaf has one rank and one alpha, and the file has {sorted(each)} for "
                f"{[name for name in names if name][:2]} and so on: use a tree that holds the layers apart."
            )
        ((rank, alpha),) = each
        return LoHa(rank, alpha, effective_conv=bool(config.get("use_effective_conv2d", False)))

    def read(self, view: View, tensors: Tensors) -> Arrays:
        arrays = {}
        for i in (1, 2):
            up, down, core = (tensors.get(name) for name in _names(i))
            if core is not None:
                r = len(core)
                t = core.reshape(r, r, -1)
                t = t.transpose(2, 1, 0)[:, :, None] if view.features_last else t.transpose(1, 2, 0)[None]
                arrays |= {f"a{i}": down.T, f"b{i}": up, f"t{i}": t}
            elif view.kind == "conv":
                arrays |= {f"a{i}": view.window_rows(down.reshape(-1, *view.window)), f"b{i}": up.T}
            else:
                arrays |= {f"a{i}": down.T, f"b{i}": up.T}
        return arrays

    def write(
        self, method: LoHa, layer: int | None, view: View, arrays: Arrays, weight: Callable[[], np.ndarray]
    ) -> Written | None:
        if view.kind not in ("linear", "conv"):
            raise ValueError(
                f"PEFT has LoHa for linear weights and convolutions, and this is of the kind {view.kind!r}."
            )
        if layer is not None and not any(array.any() for array in arrays.values()):
            return None  # zero and staying so. It is how a layer without tensors is read
        tensors = {}
        for i in (1, 2):
            a, b, t = (arrays.get(f"{name}{i}") for name in "abt")
            if t is not None:
                t = t[:, :, 0].transpose(2, 1, 0) if view.features_last else t[0].transpose(2, 0, 1)
                each = b, a.T, t.reshape(*t.shape[:2], *view.core_window)
            elif view.kind == "conv":
                each = b.T, view.window_tensor(a).reshape(a.shape[1], -1)
            else:
                each = b.T, a.T
            tensors |= dict(zip(_names(i), each, strict=False))
        return Written(tensors, method, view.n_out)

    def config(self, facts: Mapping[str, LoHa]) -> dict[str, Any]:
        effective = {method.effective_conv for method in facts.values()}
        if len(effective) > 1:
            raise ValueError("PEFT's use_effective_conv2d holds for all modules of a file, and here some have it.")
        rank, ranks = matching.as_pattern({name: method.rank for name, method in facts.items()})
        alpha, alphas = matching.as_pattern({name: method.alpha for name, method in facts.items()})
        return {
            "r": rank,
            "alpha": alpha,
            "rank_pattern": ranks,
            "alpha_pattern": alphas,
            "use_effective_conv2d": effective == {True},
            "rank_dropout": 0.0,
            "module_dropout": 0.0,
        }
