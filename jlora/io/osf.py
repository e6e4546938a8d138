"""``peft_type`` OSF: ``osf_svd_params.U_low`` [out, m - k], ``.S_low`` [m - k] and ``.V_low`` [m - k, in] of a module.
a = V_low^T, s = S_low, b = U_low^T. What they started from and what is kept are not in the file: they follow from the
base weight, which is decomposed again, as PEFT does (in float32: what it trained is relative to that, to rounding). The
parameters are read as they are, ``constrained=False``.
"""

import collections
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jlora.io.format import Arrays, Config, Format, Tensors, Written, all_layers
from jlora.io.layouts import Hint, View
from jlora.methods import OSF, Method
from jlora.weight import Params

_U, _S, _V = (f"osf_svd_params.{name}" for name in ("U_low", "S_low", "V_low"))


class OsfFormat(Format):
    """OSF."""

    peft_type = "OSF"
    methods = (OSF,)
    suffixes = (_U, _S, _V)
    fields = frozenset("effective_rank rank_pattern".split())
    inert = frozenset("init_weights target_svd_config".split())
    lacks = frozenset({"bias", "fan_in_fan_out"})

    def _kept(self, config: Config, name: str) -> int | float:
        kept = config.get("effective_rank")
        for pattern, own in (config.get("rank_pattern") or {}).items():
            if re.search(pattern, name):  # PEFT's rule here, unlike elsewhere
                kept = own
                break
        return 0.5 if kept is None else kept if kept < 1 else int(kept)

    def hint(self, shapes: Mapping[str, Sequence[int]]) -> Hint:
        u, v = shapes.get(_U), shapes.get(_V)
        return Hint("linear", v[1] if v else None, u[0] if u else None)

    def shapes(self, config: Config, name: str, view: View) -> dict[str, tuple[int, ...]]:
        low = min(view.n_in, view.n_out) - OSF(self._kept(config, name)).kept_of(view.n_in, view.n_out)
        return {_U: (view.n_out, low), _S: (low,), _V: (low, view.n_in)}

    def method(self, config: Config, names: Sequence[str | None], tied: bool) -> Method:
        kept = {self._kept(config, name) for name in names if name is not None}
        if len(kept) > 1:
            raise ValueError(
                f"OSF of a stacked leaf keeps one number of directions, and the file has {sorted(kept)} for "
                f"{[name for name in names if name][:2]} and so on: use a tree that holds the layers apart."
            )
        return all_layers(names, OSF(kept.pop(), constrained=False))

    def read(self, view: View, tensors: Tensors) -> Arrays:
        return {"a": tensors[_V].T, "s": tensors[_S], "b": tensors[_U].T}

    def derived(self, method: OSF, weight: Callable[[], np.ndarray], arrays: Arrays) -> Arrays:
        start = method.decomposed(jnp.asarray(weight(), jnp.promote_types(weight().dtype, jnp.float32)))
        return {f"frozen/{name}": np.asarray(leaf) for name, leaf in start.frozen.items()}

    def write(
        self, method: OSF, layer: int | None, view: View, arrays: Arrays, weight: Callable[[], np.ndarray]
    ) -> Written | None:
        if view.kind != "linear":
            raise ValueError(f"PEFT has OSF for linear weights only, and this is of the kind {view.kind!r}.")
        trainable = {name: jnp.asarray(array) for name, array in arrays.items() if not name.startswith("frozen/")}
        frozen = {name.removeprefix("frozen/"): jnp.asarray(array) for name, array in arrays.items()}
        low = method.project(Params(trainable, frozen))  # PEFT takes them as they are
        a, s, b = (np.asarray(low[name]) for name in "asb")
        return Written({_U: b.T, _S: s, _V: a.T}, method, view.n_out)

    def config(self, facts: Mapping[str, Any]) -> dict[str, Any]:
        kept = {name: method.kept for name, method in facts.items()}
        usual = collections.Counter(kept.values()).most_common(1)[0][0]
        others = {rf"(^|\.){re.escape(name)}$": own for name, own in kept.items() if own != usual}
        return {"effective_rank": usual, "rank_pattern": others or None}
