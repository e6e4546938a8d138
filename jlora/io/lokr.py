"""``peft_type`` LOKR.

=============  =================================================================  ====================================
weight         tensors                                                            jlora
=============  =================================================================  ====================================
linear         lokr_w1 [o1, i1], or lokr_w1_a [o1, r], lokr_w1_b [r, i1]          w1 = w1^T; b1 = w1_a^T, a1 = w1_b^T
               lokr_w2 [o2, i2], or lokr_w2_a [o2, r], lokr_w2_b [r, i2]          the same
convolution    lokr_w2 [o2, i2, *window], or lokr_w2_b [r, i2 * window]           w2 and a2 = [before, i2, after, ...]
with a core    lokr_t2 [r, r, *window], with a 1 for a window of one axis;        t2 = [window, r, 1, r] or
               lokr_w2_a [r, o2], lokr_w2_b [r, i2]                               [1, r, window, r], the last axis the
                                                                                  first of lokr_t2; b2 = w2_a,
                                                                                  a2 = w2_b^T
=============  =================================================================  ====================================

A core is there with ``use_effective_conv2d``, for windows of more than one place where W_2 is not whole.

The scale is not stored: alpha / r of each module's own r and alpha.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jlora.io import matching
from jlora.io.format import Arrays, Config, Format, Tensors, Written
from jlora.io.layouts import Hint, View
from jlora.methods import LoKr, Method

_CORE = "lokr_t2"
_SCRAMBLED = (
    "of a convolution along one axis with a whole W_2, PEFT (0.21.2) brings the entries of the Kronecker product into "
    "another order, which is no LoKr. A smaller r, or use_effective_conv2d, makes a W_2 that is not whole."
)


class LokrFormat(Format):
    """LOKR."""

    peft_type = "LOKR"
    methods = (LoKr,)
    suffixes = (*(f"lokr_w{i}{part}" for i in (1, 2) for part in ("", "_a", "_b")), _CORE)
    fields = frozenset(
        "r alpha rank_pattern alpha_pattern decompose_both decompose_factor use_effective_conv2d init_weights".split()
    )
    inert = frozenset("rank_dropout module_dropout rank_dropout_scale".split())
    lacks = frozenset({"bias", "fan_in_fan_out"})

    def _of(self, config: Config, name: str) -> LoKr:
        return LoKr(
            matching.by_pattern(config.get("rank_pattern"), name, config.get("r", 8)),
            matching.by_pattern(config.get("alpha_pattern"), name, config.get("alpha", 8)),
            decompose_both=bool(config.get("decompose_both", False)),
            factor=config.get("decompose_factor", -1),
            zero="second" if config.get("init_weights") == "lycoris" else "first",
            effective_conv=bool(config.get("use_effective_conv2d", False)),
        )

    def hint(self, shapes: Mapping[str, Sequence[int]]) -> Hint:
        outputs, inputs = 1, 1
        for i in (1, 2):
            whole, up, down = (shapes.get(f"lokr_w{i}{part}") for part in ("", "_a", "_b"))
            if whole:
                outputs, inputs = outputs * whole[0], inputs * int(np.prod(whole[1:]))
            elif up and down:
                outputs, inputs = outputs * up[0], inputs * down[1]
            else:
                return Hint()
        core = shapes.get(_CORE)
        if core and up:  # beside a core the outputs are the columns of lokr_w2_a
            return Hint("conv", inputs * math.prod(core[2:]), outputs // up[0] * up[1])
        conv = len(shapes.get("lokr_w2", ())) > 2
        return Hint("conv" if conv else None, inputs, outputs)

    def shapes(self, config: Config, name: str, view: View) -> dict[str, tuple[int, ...]]:
        method = self._of(config, name)
        features, *window = view.window if view.kind == "conv" else (view.n_in,)
        (i1, i2), (o1, o2) = method.split(features, view.n_out)
        first, second = method.whole(features, view.n_out)
        r, n = method.rank, math.prod(window)
        one = {"lokr_w1": (o1, i1)} if first else {"lokr_w1_a": (o1, r), "lokr_w1_b": (r, i1)}
        if second:
            if len(window) == 1:
                raise ValueError(f"{name}: {_SCRAMBLED}")
            return one | {"lokr_w2": (o2, i2, *window)}
        if method.effective_conv and n > 1:
            return one | {"lokr_w2_a": (r, o2), "lokr_w2_b": (r, i2), _CORE: (r, r, *view.core_window)}
        return one | {"lokr_w2_a": (o2, r), "lokr_w2_b": (r, i2 * n)}

    def method(self, config: Config, names: Sequence[str | None], tied: bool) -> Method:
        each = {self._of(config, name) for name in names if name is not None}
        if len(each) > 1:
            raise ValueError(
                f"LoKr of a stacked leaf has one rank and one alpha, and the file has {sorted(map(str, each))} for "
                f"{[name for name in names if name][:2]} and so on: use a tree that holds the layers apart."
            )
        return each.pop()

    def read(self, view: View, tensors: Tensors) -> Arrays:
        names = {"lokr_w1": "w1", "lokr_w1_a": "b1", "lokr_w1_b": "a1"}
        names |= {key.replace("1", "2"): name.replace("1", "2") for key, name in names.items()} | {_CORE: "t2"}
        arrays = {names[key]: tensor if tensor.ndim > 2 else tensor.T for key, tensor in tensors.items()}
        if view.kind != "conv":
            return arrays
        if "t2" in arrays:
            t = arrays["t2"].reshape(*arrays["t2"].shape[:2], -1)  # [r of the outputs, r of the inputs, window]
            t = t.transpose(2, 1, 0)[:, :, None] if view.features_last else t.transpose(1, 2, 0)[None]
            return arrays | {"b2": tensors["lokr_w2_a"], "t2": t}
        if "w2" in arrays:
            w2 = tensors["lokr_w2"]
        else:
            w2 = tensors["lokr_w2_b"]
            w2 = w2.reshape(len(w2), -1, *view.window[1:])
        w2 = w2.reshape(*w2.shape[:2], -1)  # [outputs or r, i2, window]
        w2 = w2.transpose(2, 1, 0)[:, :, None] if view.features_last else w2.transpose(1, 2, 0)[None]
        return arrays | {"w2" if "w2" in arrays else "a2": w2}

    def write(
        self, method: LoKr, layer: int | None, view: View, arrays: Arrays, weight: Callable[[], np.ndarray]
    ) -> Written | None:
        if view.kind not in ("linear", "conv"):
            raise ValueError(
                f"PEFT has LoKr for linear weights and convolutions, and this is of the kind {view.kind!r}."
            )
        if layer is not None and not any(array.any() for array in arrays.values()):
            return None  # zero and staying so. It is how a layer without tensors is read
        if "w2" in arrays and len(view.window[1:]) == 1:
            raise ValueError(_SCRAMBLED)
        tensors = {}
        for name, array in arrays.items():
            key = _CORE if name == "t2" else f"lokr_w{name[1]}" + {"w": "", "a": "_b", "b": "_a"}[name[0]]
            if array.ndim > 2:
                array = array[:, :, 0].transpose(2, 1, 0) if view.features_last else array[0].transpose(2, 0, 1)
                array = array.reshape(*array.shape[:2], *(view.core_window if name == "t2" else view.window[1:]))
                tensors[key] = array.reshape(len(array), -1) if name == "a2" else array
            else:
                tensors[key] = array if name == "b2" and "t2" in arrays else array.T
        return Written(tensors, method, view.n_out)

    def config(self, facts: Mapping[str, LoKr]) -> dict[str, Any]:
        rest = {(m.decompose_both, m.factor, m.zero, m.effective_conv) for m in facts.values()}
        if len(rest) > 1:
            raise ValueError(
                "A LOKR file says one decompose_both, factor, zero and effective_conv of all its modules, and here are "
                f"{sorted(set(map(str, facts.values())))}."
            )
        ((both, factor, zero, effective),) = rest
        rank, ranks = matching.as_pattern({name: method.rank for name, method in facts.items()})
        alpha, alphas = matching.as_pattern({name: method.alpha for name, method in facts.items()})
        return {
            "r": rank,
            "alpha": alpha,
            "rank_pattern": ranks,
            "alpha_pattern": alphas,
            "decompose_both": both,
            "decompose_factor": factor,
            "init_weights": "lycoris" if zero == "second" else True,
            "use_effective_conv2d": effective,
            "rank_dropout": 0.0,
            "module_dropout": 0.0,
        }
