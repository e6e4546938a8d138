"""``peft_type`` ADALORA: ``lora_A`` [k, in], ``lora_E`` [k, 1] and ``lora_B`` [out, k] of each module, A over the
flattened window for a convolution. jlora's a, e and b are A^T, the column E, and B^T.

k is ``init_r``, or what ``rank_pattern``, which is a list of booleans for each module here, has left of it, even 0.
jlora keeps arrays of ``init_r``: what is left comes first, the rest is zero, in the mask too. The scale,
alpha / (init_r + 1e-5), is not stored.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jlora.io.format import Arrays, Config, Format, Tensors, Written, one_method
from jlora.io.layouts import Hint, View
from jlora.methods import AdaLoRA, Method

_A, _E, _B = "lora_A", "lora_E", "lora_B"


class _Facts(NamedTuple):
    method: AdaLoRA
    kept: tuple[bool, ...]


class AdaloraFormat(Format):
    """ADALORA."""

    peft_type = "ADALORA"
    methods = (AdaLoRA,)
    suffixes = (_A, _E, _B)
    fields = frozenset("init_r lora_alpha lora_dropout rank_pattern".split())
    inert = frozenset(
        "r target_r tinit tfinal deltaT beta1 beta2 orth_reg_weight total_step init_lora_weights use_rslora "
        "megatron_core qalora_group_size".split()
    )  # r and use_rslora mean nothing here, in PEFT neither

    @property
    def own_biases(self) -> str:
        return "lora_only"

    def hint(self, shapes: Mapping[str, Sequence[int]]) -> Hint:
        a, b = shapes.get(_A), shapes.get(_B)
        return Hint(None, a[1] if a else None, b[0] if b else None)

    def _rank(self, config: Config, name: str) -> int:
        kept = (config.get("rank_pattern") or {}).get(f"{name}.{_E}")
        return config.get("init_r", 12) if kept is None else sum(kept)

    def shapes(self, config: Config, name: str, view: View) -> dict[str, tuple[int, ...]]:
        rank = self._rank(config, name)
        return {_A: (rank, view.n_in), _E: (rank, 1), _B: (view.n_out, rank)}

    def method(self, config: Config, names: Sequence[str | None], tied: bool) -> Method:
        rank, alpha, dropout = (config.get(*p) for p in (("init_r", 12), ("lora_alpha", 8), ("lora_dropout", 0.0)))
        return AdaLoRA(rank, alpha, dropout=dropout)

    def read(self, view: View, tensors: Tensors) -> Arrays:
        a, e, b = tensors[_A], tensors[_E].reshape(-1), tensors[_B].T
        a = view.window_rows(a.reshape(-1, *view.window)) if view.kind == "conv" else a.T
        return {"a": a, "e": e, "b": b, "frozen/mask": np.ones_like(e)}

    def write(
        self, method: AdaLoRA, layer: int | None, view: View, arrays: Arrays, weight: Callable[[], np.ndarray]
    ) -> Written | None:
        if view.kind not in ("linear", "conv"):
            raise ValueError(f"PEFT has AdaLoRA for linear weights only, and this is of the kind {view.kind!r}.")
        kept = arrays["frozen/mask"] != 0
        a, e, b = arrays["a"][:, kept], arrays["e"] * arrays["frozen/mask"], arrays["b"][kept]
        a = view.window_tensor(a).reshape(-1, view.n_in) if view.kind == "conv" else a.T
        return Written({_A: a, _E: e[kept, None], _B: b.T}, _Facts(method, tuple(map(bool, kept))), view.n_out)

    def config(self, facts: Mapping[str, _Facts]) -> dict[str, Any]:
        method = one_method({name: fact.method for name, fact in facts.items()}, self.peft_type)
        pattern = {f"{name}.{_E}": list(fact.kept) for name, fact in facts.items()}
        return {
            "r": 8,  # PEFT's default; it warns of any other
            "init_r": method.rank,
            "target_r": method.rank,
            "total_step": 1,  # PEFT demands one
            "lora_alpha": method.alpha,
            "lora_dropout": method.dropout,
            "rank_pattern": None if all(map(all, pattern.values())) else pattern,
            "use_dora": False,
            "init_lora_weights": True,
        }
