"""``peft_type`` HIRA.

============  =====================================================  =================================================
weight        tensors                                                jlora
============  =====================================================  =================================================
linear        hira_A [r, in], hira_B [out, r]                        a = A^T, b = B^T
embedding     hira_embedding_A [r, vocab], hira_embedding_B [out,    the same
              r]
convolution   hira_A [r, in, *window], hira_B [out, r, 1, ...]       a = A flattened to [in, r] in the kernel's own
                                                                     order, b = B^T
============  =====================================================  =================================================
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jlora.io import matching
from jlora.io.format import Arrays, Config, Format, Tensors, Written
from jlora.io.layouts import Hint, View
from jlora.methods import HiRA, Method

_A, _B, _EMBEDDING_A, _EMBEDDING_B = "hira_A", "hira_B", "hira_embedding_A", "hira_embedding_B"


class HiraFormat(Format):
    """HIRA."""

    peft_type = "HIRA"
    methods = (HiRA,)
    suffixes = (_A, _B, _EMBEDDING_A, _EMBEDDING_B)
    fields = frozenset("r hira_dropout rank_pattern".split())
    inert = frozenset({"init_weights"})
    lacks = frozenset({"bias"})

    def _rank(self, config: Config, name: str) -> int:
        return matching.by_pattern(config.get("rank_pattern"), name, config.get("r", 32))

    def hint(self, shapes: Mapping[str, Sequence[int]]) -> Hint:
        embedding = _EMBEDDING_A in shapes or _EMBEDDING_B in shapes
        a, b = (shapes.get(key) for key in ((_EMBEDDING_A, _EMBEDDING_B) if embedding else (_A, _B)))
        n_in = int(np.prod(a[1:])) if a and len(a) > 1 else None
        kind = "embedding" if embedding else "conv" if a and len(a) > 2 else "linear"
        return Hint(kind, n_in, b[0] if b else None)

    def shapes(self, config: Config, name: str, view: View) -> dict[str, tuple[int, ...]]:
        r = self._rank(config, name)
        if view.kind == "embedding":
            return {_EMBEDDING_A: (r, view.n_in), _EMBEDDING_B: (view.n_out, r)}
        if view.kind == "conv":
            return {_A: (r, *view.window), _B: (view.n_out, r, *(1,) * (len(view.window) - 1))}
        return {_A: (r, view.n_in), _B: (view.n_out, r)}

    def method(self, config: Config, names: Sequence[str | None], tied: bool) -> Method:
        ranks = {self._rank(config, name) for name in names if name is not None}
        if len(ranks) > 1:
            raise ValueError(
                f"HiRA of a stacked leaf has one rank, and the file has {sorted(ranks)} for "
                f"{[name for name in names if name][:2]} and so on: use a tree that holds the layers apart."
            )
        return HiRA(ranks.pop(), dropout=config.get("hira_dropout", 0.0), lookup_only=tied)

    def read(self, view: View, tensors: Tensors) -> Arrays:
        if view.kind == "embedding":
            return {"a": tensors[_EMBEDDING_A].T, "b": tensors[_EMBEDDING_B].T}
        if view.kind == "conv":
            return {"a": view.window_rows(tensors[_A]), "b": tensors[_B].reshape(view.n_out, -1).T}
        return {"a": tensors[_A].T, "b": tensors[_B].T}

    def write(
        self, method: HiRA, layer: int | None, view: View, arrays: Arrays, weight: Callable[[], np.ndarray]
    ) -> Written | None:
        if view.kind == "experts":
            raise ValueError("PEFT has no HiRA for bare parameters. Merge the adapter instead: jlora.merge.")
        if layer is not None and not arrays["a"].any() and not arrays["b"].any():
            return None  # zero and staying so. It is how a layer without tensors is read
        a, b = arrays["a"], arrays["b"]
        if view.kind == "embedding":
            tensors = {_EMBEDDING_A: a.T, _EMBEDDING_B: b.T}
        elif view.kind == "conv":
            ones = (1,) * (len(view.window) - 1)
            tensors = {_A: view.window_tensor(a), _B: b.T.reshape(view.n_out, -1, *ones)}
        else:
            tensors = {_A: a.T, _B: b.T}
        return Written(tensors, method, view.n_out)

    def config(self, facts: Mapping[str, HiRA]) -> dict[str, Any]:
        rank, ranks = matching.as_pattern({name: method.rank for name, method in facts.items()})
        rates = {method.dropout for method in facts.values()}
        if len(rates) > 1:
            raise ValueError(f"A HIRA file has one dropout for all its modules, and here are {sorted(rates)}.")
        return {"r": rank, "rank_pattern": ranks, "hira_dropout": rates.pop()}
