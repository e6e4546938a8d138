"""``peft_type`` FOURIERFT: ``fourierft_spectrum`` [n] of each module. The frequencies follow from the seed in the
config and the shape of the weight.
"""

import abc
import collections
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from jlora.io import matching
from jlora.io.format import Arrays, Config, Format, Tensors, Written, all_layers
from jlora.io.layouts import Hint, View
from jlora.methods import FourierFT, Method
from jlora.torch_random import LIMIT


class SpectrumFormat(Format):
    """What FOURIERFT and WAVEFT share: n numbers of each module, in places that only a seed tells.

    Class attributes:
      default: of ``n_frequency``.
    """

    default: ClassVar[int]
    inert = frozenset({"init_weights"})

    @abc.abstractmethod
    def of_size(self, config: Config, n: int) -> Method:
        """The method for n numbers."""

    @abc.abstractmethod
    def common(self, method: Any) -> dict[str, Any]:
        """The config fields that have to be one for all modules."""

    def _size(self, config: Config, name: str) -> int:
        return matching.by_pattern(config.get("n_frequency_pattern"), name, config.get("n_frequency", self.default))

    def hint(self, shapes: Mapping[str, Sequence[int]]) -> Hint:
        return Hint("linear")

    def shapes(self, config: Config, name: str, view: View) -> dict[str, tuple[int, ...]]:
        return {self.suffixes[0]: (self._size(config, name),)}

    def method(self, config: Config, names: Sequence[str | None], tied: bool) -> Method:
        sizes = {self._size(config, name) for name in names if name is not None}
        if len(sizes) > 1:
            raise ValueError(
                f"n_frequency differs along the stacked layers of {names[0]}: {sorted(sizes)}. Use a tree that holds "
                "the layers apart."
            )
        return all_layers(names, self.of_size(config, sizes.pop()))

    def read(self, view: View, tensors: Tensors) -> Arrays:
        _check_size(view)
        return {"spectrum": tensors[self.suffixes[0]]}

    def write(
        self, method: Method, layer: int | None, view: View, arrays: Arrays, weight: Callable[[], np.ndarray]
    ) -> Written | None:
        if view.kind != "linear":
            raise ValueError(f"PEFT has {method.name} for linear weights only, and this is of the kind {view.kind!r}.")
        _check_size(view)
        return Written({self.suffixes[0]: arrays["spectrum"]}, method, view.n_out)

    def config(self, facts: Mapping[str, Any]) -> dict[str, Any]:
        first, *others = [self.common(method) for method in facts.values()]
        for other in others:
            if other != first:
                raise ValueError(
                    f"A {self.peft_type} file says one thing of all its modules, and here are {first} and {other}."
                )
        sizes = {name: method.n for name, method in facts.items()}
        size = collections.Counter(sizes.values()).most_common(1)[0][0]
        pattern = {matching.pattern_of(name): n for name, n in sizes.items() if n != size}
        return {"n_frequency": size, "n_frequency_pattern": pattern, "init_weights": False} | first


class FourierftFormat(SpectrumFormat):
    """FOURIERFT."""

    peft_type = "FOURIERFT"
    methods = (FourierFT,)
    suffixes = ("fourierft_spectrum",)
    fields = frozenset("n_frequency n_frequency_pattern scaling random_loc_seed".split())
    default = 1000

    def of_size(self, config: Config, n: int) -> FourierFT:
        return FourierFT(n, float(config.get("scaling", 150.0)), seed=config.get("random_loc_seed", 777))

    def common(self, method: FourierFT) -> dict[str, Any]:
        return {"scaling": method.scaling, "random_loc_seed": method.seed}


def _check_size(view: View) -> None:
    if view.n_in * view.n_out >= LIMIT:
        raise ValueError(
            f"a weight of {view.n_in} inputs and {view.n_out} outputs is too large: from {LIMIT} entries on PyTorch "
            "draws places in another way, which is not known here"
        )
