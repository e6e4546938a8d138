"""``peft_type`` VERA: ``vera_lambda_d`` [r] and ``vera_lambda_b`` [out] of each module, and one pair of projections,
``vera_A`` [r, max in] and ``vera_B`` [max out, r], for all. d and b are what jlora calls them; a = A^T, b = B^T.

A file without the projections (``save_projection`` false) has the seed from which PyTorch drew them, A first; they are
drawn again here, to the same bits (``jlora/torch_random.py``).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jlora.io.format import Arrays, Config, Format, Tensors, Written
from jlora.io.layouts import Hint, View
from jlora.methods import Method, VeRA
from jlora.torch_random import kaiming_uniform


class VeraFormat(Format):
    """VERA."""

    peft_type = "VERA"
    methods = (VeRA,)
    suffixes = ("vera_lambda_d", "vera_lambda_b")
    shared = ("vera_A", "vera_B")
    fields = frozenset("r d_initial vera_dropout save_projection projection_prng_key".split())
    inert = frozenset({"init_weights"})

    @property
    def _method(self) -> type[VeRA]:
        return self.methods[0]

    @property
    def _dropout(self) -> str:
        return f"{self.peft_type.lower()}_dropout"

    def inner(self, rank: int) -> int:
        """How many columns a has, and numbers d."""
        return rank

    def hint(self, shapes: Mapping[str, Sequence[int]]) -> Hint:
        out = shapes.get(self.suffixes[1])
        return Hint("linear", None, out[0] if out else None)

    def shapes(self, config: Config, name: str, view: View) -> dict[str, tuple[int, ...]]:
        d, b = self.suffixes
        return {d: (self.inner(config.get("r", 256)),), b: (view.n_out,)}

    def method(self, config: Config, names: Sequence[str | None], tied: bool) -> Method:
        rank, d, dropout = (config.get(*pair) for pair in (("r", 256), ("d_initial", 0.1), (self._dropout, 0.0)))
        return self._method(rank=rank, d_initial=d, dropout=dropout)

    def read(self, view: View, tensors: Tensors) -> Arrays:
        return {"d": tensors[self.suffixes[0]], "b": tensors[self.suffixes[1]]}

    def read_shared(self, config: Config, views: Sequence[View], tensors: Tensors) -> dict[str, Arrays]:
        rank = config.get("r", 256)
        n_in, n_out = max(view.n_in for view in views), max(view.n_out for view in views)
        if not tensors and not config.get("save_projection", True):
            a, b = kaiming_uniform([(self.inner(rank), n_in), (n_out, rank)], config.get("projection_prng_key", 0))
            return {self._method.group: {"a": a.T, "b": b.T}}
        if set(tensors) != set(self.shared):
            raise ValueError(
                f"it lacks the shared projections {sorted(set(self.shared) - set(tensors))}, and its config says "
                f"save_projection={str(config.get('save_projection', True)).lower()}: fetch it again"
            )
        a, b = (tensors[name] for name in self.shared)
        # The projections may be larger than what these modules use: each takes the leading part.
        if a.ndim != 2 or b.ndim != 2 or a.shape[0] != self.inner(rank) or b.shape[1] != rank:
            raise ValueError(f"its projections are {a.shape} and {b.shape}; the rank of the config is {rank}")
        if a.shape[1] < n_in or b.shape[0] < n_out:
            raise ValueError(
                f"its projections are {a.shape} and {b.shape}, too small for weights of up to {n_in} inputs and "
                f"{n_out} outputs: it is the adapter of another model"
            )
        return {self._method.group: {"a": a.T, "b": b.T}}

    def write(
        self, method: VeRA, layer: int | None, view: View, arrays: Arrays, weight: Callable[[], np.ndarray]
    ) -> Written | None:
        if view.kind != "linear":
            raise ValueError(f"PEFT has {method.name} for linear weights only, and this is of the kind {view.kind!r}.")
        if layer is not None and not arrays["d"].any() and not arrays["b"].any():
            return None  # zero and staying so: both gradients vanish. It is how a layer without tensors is read
        return Written(dict(zip(self.suffixes, (arrays["d"], arrays["b"]), strict=True)), method, view.n_out)

    def write_shared(self, methods: Sequence[Method], groups: Mapping[str, Arrays]) -> Tensors:
        names = {method.group for method in methods}
        if len(names) > 1:
            raise ValueError(
                f"A {self.peft_type} file has one pair of projections, and here are the groups {sorted(names)}."
            )
        pair = groups[names.pop()]
        return {name: np.asarray(pair[part]).T for name, part in zip(self.shared, "ab", strict=True)}

    def config(self, facts: Mapping[str, Any]) -> dict[str, Any]:
        method = next(iter(facts.values()))  # they share a group, so they are equal
        return {
            "r": method.rank,
            "d_initial": method.d_initial,
            self._dropout: method.dropout,
            "save_projection": True,
            "projection_prng_key": 0,
        }
