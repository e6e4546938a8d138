"""``peft_type`` TRAINABLE_TOKENS: ``trainable_tokens_delta`` [n, hidden] of each table: in spite of the name the new
rows themselves. Which rows, ``token_indices`` of the config says, for all tables.

In the files of other types the same tensor is called ``token_adapter.trainable_tokens_delta`` and the config field
``trainable_token_indices``: a list, or one for each table. ``load`` and ``save`` see to those.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jlora.io.format import Arrays, Config, Format, Tensors, Written, one_method
from jlora.io.layouts import Hint, View
from jlora.methods import Method, TrainableTokens

_ROWS = "trainable_tokens_delta"
BESIDE = f"token_adapter.{_ROWS}"


class TokensFormat(Format):
    """TRAINABLE_TOKENS."""

    peft_type = "TRAINABLE_TOKENS"
    methods = (TrainableTokens,)
    suffixes = (_ROWS,)
    fields = frozenset({"token_indices"})
    inert = frozenset({"init_weights"})
    lacks = frozenset({"bias", "fan_in_fan_out"})
    lookups_only = False
    copies_tables = False

    def hint(self, shapes: Mapping[str, Sequence[int]]) -> Hint:
        return Hint("embedding", None, shapes[_ROWS][-1])

    def shapes(self, config: Config, name: str, view: View) -> dict[str, tuple[int, ...]]:
        return {_ROWS: (len(config["token_indices"]), view.n_out)}

    def method(self, config: Config, names: Sequence[str | None], tied: bool) -> Method:
        return TrainableTokens(tuple(config["token_indices"]))

    def read(self, view: View, tensors: Tensors) -> Arrays:
        return {"rows": tensors[_ROWS]}

    def write(
        self, method: TrainableTokens, layer: int | None, view: View, arrays: Arrays, weight: Callable[[], np.ndarray]
    ) -> Written | None:
        if view.kind != "embedding":
            raise ValueError(f"PEFT has trainable tokens for embeddings only, and this is of the kind {view.kind!r}.")
        return Written({_ROWS: arrays["rows"]}, method, view.n_out)

    def config(self, facts: Mapping[str, Any]) -> dict[str, Any]:
        return {"token_indices": list(one_method(facts, self.peft_type).indices), "init_weights": True}
