"""``peft_type`` MISS: ``miss_block`` of each module, and what it means by ``init_weights``.

==================  ==================  ==============================================================
init_weights        miss_block          jlora
==================  ==================  ==============================================================
true, false         [r, out]            MiSS, the same
"mini"              [r, mini_r]         MiSS(mini=mini_r), the same
"bat"               [out / r, r, r]     Bat, every block transposed
==================  ==================  ==============================================================
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jlora.io.format import Arrays, Config, Format, Tensors, Written, all_layers, one_method
from jlora.io.layouts import Hint, View
from jlora.methods import Bat, Method, MiSS

_BLOCK = "miss_block"


class MissFormat(Format):
    """MISS."""

    peft_type = "MISS"
    methods = (MiSS, Bat)
    suffixes = (_BLOCK,)
    fields = frozenset("r mini_r miss_dropout init_weights".split())

    def check(self, config: Config) -> str | None:
        init = config.get("init_weights", True)
        if init not in (True, False, None, "bat", "mini"):
            return f"init_weights={init!r}, where true, false, 'bat' or 'mini' is wanted"

    def hint(self, shapes: Mapping[str, Sequence[int]]) -> Hint:
        block = shapes.get(_BLOCK)
        # Of two axes, the second is the outputs, or (mode "mini") divides them: that is for `shapes` to say.
        return Hint("linear", None, block[0] * block[1] if block and len(block) == 3 else None)

    def shapes(self, config: Config, name: str, view: View) -> dict[str, tuple[int, ...]]:
        rank, mode = config.get("r", 64), config.get("init_weights", True)
        if mode == "bat":
            return {_BLOCK: (view.n_out // rank, rank, rank)}
        return {_BLOCK: (rank, config.get("mini_r", 1) if mode == "mini" else view.n_out)}

    def method(self, config: Config, names: Sequence[str | None], tied: bool) -> Method:
        rank, mode = config.get("r", 64), config.get("init_weights", True)
        if mode == "bat":
            return all_layers(names, Bat(rank))  # PEFT applies no dropout in this mode
        mini = config.get("mini_r", 1) if mode == "mini" else None
        return all_layers(names, MiSS(rank, mini=mini, dropout=config.get("miss_dropout", 0.0)))

    def read(self, view: View, tensors: Tensors) -> Arrays:
        block = tensors[_BLOCK]
        return {"block": block if block.ndim == 2 else block.transpose(0, 2, 1)}

    def write(
        self, method: Method, layer: int | None, view: View, arrays: Arrays, weight: Callable[[], np.ndarray]
    ) -> Written | None:
        if view.kind != "linear":
            raise ValueError(f"PEFT has MiSS for linear weights only, and this is of the kind {view.kind!r}.")
        block = arrays["block"]
        return Written({_BLOCK: block if block.ndim == 2 else block.transpose(0, 2, 1)}, method, view.n_out)

    def config(self, facts: Mapping[str, Any]) -> dict[str, Any]:
        method = one_method(facts, self.peft_type)
        if isinstance(method, Bat):
            return {"r": method.rank, "mini_r": 1, "miss_dropout": 0.0, "init_weights": "bat"}
        return {
            "r": method.rank,
            "mini_r": method.mini or 1,
            "miss_dropout": method.dropout,
            "init_weights": True if method.mini is None else "mini",
        }
