"""``peft_type`` C3A: ``c3a_kernel`` [out / b, in / b, b] of each module, b from ``block_size`` and
``block_size_pattern``. jlora's kernel is the same.
"""

import collections
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jlora.io import matching
from jlora.io.format import Arrays, Config, Format, Tensors, Written, all_layers
from jlora.io.layouts import Hint, View
from jlora.methods import C3A, Method

_KERNEL = "c3a_kernel"


class C3aFormat(Format):
    """C3A."""

    peft_type = "C3A"
    methods = (C3A,)
    suffixes = (_KERNEL,)
    fields = frozenset("block_size block_size_pattern".split())
    inert = frozenset({"init_weights"})

    def _size(self, config: Config, name: str) -> int:
        return matching.by_pattern(config.get("block_size_pattern"), name, config.get("block_size", 256))

    def hint(self, shapes: Mapping[str, Sequence[int]]) -> Hint:
        kernel = shapes.get(_KERNEL)
        if not kernel or len(kernel) != 3:
            return Hint("linear")
        m, n, b = kernel
        return Hint("linear", n * b, m * b)

    def shapes(self, config: Config, name: str, view: View) -> dict[str, tuple[int, ...]]:
        b = self._size(config, name)
        return {_KERNEL: (view.n_out // b, view.n_in // b, b)}

    def method(self, config: Config, names: Sequence[str | None], tied: bool) -> Method:
        sizes = {self._size(config, name) for name in names if name is not None}
        if len(sizes) > 1:
            raise ValueError(
                f"block_size differs along the stacked layers of {names[0]}: {sorted(sizes)}. Use a tree that holds "
                "the layers apart."
            )
        return all_layers(names, C3A(sizes.pop()))

    def read(self, view: View, tensors: Tensors) -> Arrays:
        return {"kernel": tensors[_KERNEL]}

    def write(
        self, method: C3A, layer: int | None, view: View, arrays: Arrays, weight: Callable[[], np.ndarray]
    ) -> Written | None:
        if view.kind != "linear":
            raise ValueError(f"PEFT has C3A for linear weights only, and this is of the kind {view.kind!r}.")
        return Written({_KERNEL: arrays["kernel"]}, method, view.n_out)

    def config(self, facts: Mapping[str, C3A]) -> dict[str, Any]:
        sizes = {name: method.block_size for name, method in facts.items()}
        size = collections.Counter(sizes.values()).most_common(1)[0][0]
        return {
            "block_size": size,
            "block_size_pattern": {matching.pattern_of(name): b for name, b in sizes.items() if b != size},
            "init_weights": "xavier_uniform",
        }
