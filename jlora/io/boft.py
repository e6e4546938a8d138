"""``peft_type`` BOFT: ``boft_R`` [m, n, b, b] of each module, which is q, and ``boft_s`` [out, 1], of a convolution
[1, out].

PEFT has more than one level only with its CUDA extension; without it, it trains one, whatever the config says. The
tensors tell. For convolutions see ``oft.py``.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jlora.io.format import Arrays, Config, Format, Tensors, Written, all_layers, one_method
from jlora.io.layouts import Hint, View
from jlora.io.oft import same_order
from jlora.methods import BOFT, Method

_R, _S = "boft_R", "boft_s"
_LEVELS = "boft_n_butterfly_factor"


class BoftFormat(Format):
    """BOFT."""

    peft_type = "BOFT"
    methods = (BOFT,)
    suffixes = (_R, _S)
    fields = frozenset(f"boft_block_size boft_block_num {_LEVELS} init_weights".split())
    inert = frozenset({"boft_dropout"})

    def settle(self, config: Config, tensors: Tensors) -> Config:
        levels = {len(tensor) for key, tensor in tensors.items() if _R in key.split(".")}
        return {**config, _LEVELS: levels.pop()} if len(levels) == 1 else config

    def _method(self, config: Config) -> BOFT:
        return BOFT(
            config.get("boft_block_size", 4) or 4,
            blocks=config.get("boft_block_num", 0) or None,
            levels=config.get(_LEVELS, 1),
        )

    def hint(self, shapes: Mapping[str, Sequence[int]]) -> Hint:
        r, s = shapes.get(_R), shapes.get(_S)
        return Hint(None, r[1] * r[2] if r else None, max(s) if s else None)

    def shapes(self, config: Config, name: str, view: View) -> dict[str, tuple[int, ...]]:
        if not same_order(view):
            raise ValueError(
                f"{name!r}: PEFT's BOFT blocks of this convolution run through features first, window last; the leaf "
                "has them the other way round, where the same rotation has no such blocks. Merge it in PEFT."
            )
        method = self._method(config)
        n, size = method.sizes(view.n_in)
        scale = (1, view.n_out) if view.kind == "conv" else (view.n_out, 1)
        return {_R: (method.levels, n, size, size), _S: scale}

    def method(self, config: Config, names: Sequence[str | None], tied: bool) -> Method:
        return all_layers(names, self._method(config))

    def read(self, view: View, tensors: Tensors) -> Arrays:
        return {"q": tensors[_R], "s": tensors[_S].reshape(-1)}

    def write(
        self, method: BOFT, layer: int | None, view: View, arrays: Arrays, weight: Callable[[], np.ndarray]
    ) -> Written | None:
        if view.kind not in ("linear", "conv") or not same_order(view):
            raise ValueError(
                "PEFT has BOFT for linear weights and for convolutions in PyTorch's order of features and window."
            )
        scale = arrays["s"].reshape((1, -1) if view.kind == "conv" else (-1, 1))
        return Written({_R: arrays["q"], _S: scale}, method, view.n_out)

    def config(self, facts: Mapping[str, Any]) -> dict[str, Any]:
        method = one_method(facts, self.peft_type)
        return {
            "boft_block_size": 0 if method.blocks else method.block_size,
            "boft_block_num": method.blocks or 0,
            _LEVELS: method.levels,
        }
