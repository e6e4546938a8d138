"""``peft_type`` FOURIERFT: ``fourierft_spectrum`` [n] of each module. The frequencies follow from the seed in the
config and the shape of the weight.
"""

import collections
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jlora.io import matching
from jlora.io.format import Arrays, Config, Format, Tensors, Written, all_layers
from jlora.io.layouts import Hint, View
from jlora.methods import FourierFT, Method
from jlora.torch_random import LIMIT

_SPECTRUM = "fourierft_spectrum"


class FourierftFormat(Format):
    """FOURIERFT."""

    peft_type = "FOURIERFT"
    methods = (FourierFT,)
    suffixes = (_SPECTRUM,)
    fields = frozenset("n_frequency n_frequency_pattern scaling random_loc_seed".split())
    inert = frozenset({"init_weights"})

    def _size(self, config: Config, name: str) -> int:
        return matching.by_pattern(config.get("n_frequency_pattern"), name, config.get("n_frequency", 1000))

    def hint(self, shapes: Mapping[str, Sequence[int]]) -> Hint:
        return Hint("linear")

    def shapes(self, config: Config, name: str, view: View) -> dict[str, tuple[int, ...]]:
        return {_SPECTRUM: (self._size(config, name),)}

    def method(self, config: Config, names: Sequence[str | None], tied: bool) -> Method:
        sizes = {self._size(config, name) for name in names if name is not None}
        if len(sizes) > 1:
            raise ValueError(
                f"n_frequency differs along the stacked layers of {names[0]}: {sorted(sizes)}. Use a tree that holds "
                "the layers apart."
            )
        seed = config.get("random_loc_seed", 777)
        return all_layers(names, FourierFT(sizes.pop(), float(config.get("scaling", 150.0)), seed=seed))

    def read(self, view: View, tensors: Tensors) -> Arrays:
        _check_size(view)
        return {"spectrum": tensors[_SPECTRUM]}

    def write(
        self, method: FourierFT, layer: int | None, view: View, arrays: Arrays, weight: Callable[[], np.ndarray]
    ) -> Written | None:
        if view.kind != "linear":
            raise ValueError(f"PEFT has FourierFT for linear weights only, and this is of the kind {view.kind!r}.")
        _check_size(view)
        return Written({_SPECTRUM: arrays["spectrum"]}, method, view.n_out)

    def config(self, facts: Mapping[str, FourierFT]) -> dict[str, Any]:
        common = {(method.scaling, method.seed) for method in facts.values()}
        if len(common) > 1:
            raise ValueError(f"A FOURIERFT file has one scaling and one seed, and here are {sorted(common)}.")
        ((scaling, seed),) = common
        sizes = {name: method.n for name, method in facts.items()}
        size = collections.Counter(sizes.values()).most_common(1)[0][0]
        return {
            "n_frequency": size,
            "n_frequency_pattern": {matching.pattern_of(name): n for name, n in sizes.items() if n != size},
            "scaling": scaling,
            "random_loc_seed": seed,
            "init_weights": False,
        }


def _check_size(view: View) -> None:
    if view.n_in * view.n_out >= LIMIT:
        raise ValueError(
            f"a weight of {view.n_in} inputs and {view.n_out} outputs is too large: from {LIMIT} entries on PyTorch "
            "draws frequencies in another way, which is not known here"
        )
