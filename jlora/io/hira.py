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

PEFT (0.21.2) gives all modules the rank ``r`` and passes ``rank_pattern`` over: the tensors say what the ranks are.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jlora.io import matching
from jlora.io.format import HEAD, Arrays, Config, Format, Tensors, Written
from jlora.io.layouts import Hint, View
from jlora.methods import HiRA, Method

_A, _B, _EMBEDDING_A, _EMBEDDING_B = "hira_A", "hira_B", "hira_embedding_A", "hira_embedding_B"
_FIRST = re.compile(rf"{HEAD}(.+)\.(?:{_A}|{_EMBEDDING_A})(?:\.[^.]+){{0,2}}")


class HiraFormat(Format):
    """HIRA."""

    peft_type = "HIRA"
    methods = (HiRA,)
    suffixes = (_A, _B, _EMBEDDING_A, _EMBEDDING_B)
    fields = frozenset("r hira_dropout rank_pattern".split())
    inert = frozenset({"init_weights"})
    lacks = frozenset({"bias"})

    def settle(self, config: Config, tensors: Tensors) -> Config:
        """The ranks are those of the tensors, whatever the config says."""
        found = {key: _FIRST.fullmatch(key) for key in tensors}
        each = {match[1]: len(tensors[key]) for key, match in found.items() if match and tensors[key].ndim}
        if not each:
            return config
        rank, ranks = matching.as_pattern(each)
        return {**config, "r": rank, "rank_pattern": ranks}

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
        ranks = {method.rank: name for name, method in facts.items()}
        if len(ranks) > 1:
            raise ValueError(
                "PEFT gives all modules of a HiRA file one rank, whatever its rank_pattern says, and here are "
                f"{', '.join(f'{rank} ({name})' for rank, name in sorted(ranks.items()))}: it could not load the file. "
                "Train them with one rank, save them one at a time, or merge (jlora.merge)."
            )
        rates = {method.dropout for method in facts.values()}
        if len(rates) > 1:
            raise ValueError(f"A HIRA file has one dropout for all its modules, and here are {sorted(rates)}.")
        return {"r": next(iter(ranks)), "rank_pattern": {}, "hira_dropout": rates.pop()}
