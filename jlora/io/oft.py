"""``peft_type`` OFT: ``oft_R.weight`` [n, b (b - 1) / 2] of each module, one row with ``block_share``. It is q.

PEFT's blocks of a convolution run through the features first and the window last. A kernel that has them the other way
round has other blocks, unless its window is a single point; it is refused.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jlora.io.format import Arrays, Config, Format, Tensors, Written, all_layers, one_method
from jlora.io.layouts import Hint, View
from jlora.methods import OFT, Method

_R = "oft_R.weight"


def same_order(view: View) -> bool:
    """Whether the inputs of a convolution are in PyTorch's order."""
    return view.kind != "conv" or not view.features_last or math.prod(view.window[1:]) == 1


class OftFormat(Format):
    """OFT."""

    peft_type = "OFT"
    methods = (OFT,)
    suffixes = (_R,)
    fields = frozenset(
        "r oft_block_size block_share coft eps use_cayley_neumann num_cayley_neumann_terms init_weights".split()
    )
    inert = frozenset({"module_dropout"})

    def check(self, config: Config) -> str | None:
        if config.get("use_cayley_neumann", True) and config.get("num_cayley_neumann_terms", 5) < 2:
            return "num_cayley_neumann_terms below 2, which makes every rotation the identity; use 5"
        return None

    def _method(self, config: Config) -> OFT:
        r, terms = config.get("r", 0), config.get("num_cayley_neumann_terms", 5)
        return OFT(
            config.get("oft_block_size", 32) or 32,
            blocks=r or None,
            adjust=True,
            share=bool(config.get("block_share", False)),
            # PEFT's polynomial of 3 terms has 4.
            neumann=(4 if terms == 3 else terms) if config.get("use_cayley_neumann", True) else None,
            coft=config.get("eps", 6e-5) if config.get("coft") else None,
        )

    def hint(self, shapes: Mapping[str, Sequence[int]]) -> Hint:
        return Hint()

    def shapes(self, config: Config, name: str, view: View) -> dict[str, tuple[int, ...]]:
        if not same_order(view):
            raise ValueError(
                f"{name!r}: PEFT's OFT blocks of this convolution run through features first, window last; the leaf "
                "has them the other way round, where the same rotation has no such blocks. Merge it in PEFT."
            )
        return {_R: self._method(config).shape(view.n_in)}

    def method(self, config: Config, names: Sequence[str | None], tied: bool) -> Method:
        return all_layers(names, self._method(config))

    def read(self, view: View, tensors: Tensors) -> Arrays:
        return {"q": tensors[_R]}

    def write(
        self, method: OFT, layer: int | None, view: View, arrays: Arrays, weight: Callable[[], np.ndarray]
    ) -> Written | None:
        if view.kind not in ("linear", "conv") or not same_order(view):
            raise ValueError(
                "PEFT has OFT for linear weights and for convolutions in PyTorch's order of features and window."
            )
        return Written({_R: arrays["q"]}, method, view.n_out)

    def config(self, facts: Mapping[str, Any]) -> dict[str, Any]:
        # PEFT adjusts sizes always; where they fit, that is nothing.
        method = one_method({k: dataclasses.replace(v, adjust=True) for k, v in facts.items()}, self.peft_type)
        return {
            "r": method.blocks or 0,
            "oft_block_size": 0 if method.blocks else method.block_size,
            "block_share": method.share,
            "coft": method.coft is not None,
            "eps": 6e-5 if method.coft is None else method.coft,
            "use_cayley_neumann": method.neumann is not None,
            "num_cayley_neumann_terms": method.neumann or 5,
        }
