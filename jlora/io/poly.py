"""``peft_type`` POLY: ``poly_lora_A`` [splits, skills, in / splits, r], ``poly_lora_B`` [splits, skills, r,
out / splits] and ``poly_router.module_logits`` [tasks, splits skills] of each module: a [in, skills, r], b [skills, r,
out] and logits [tasks, splits, skills].
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jlora.io.format import Arrays, Config, Format, Tensors, Written, all_layers
from jlora.io.layouts import Hint, View
from jlora.methods import Method, Poly

_A, _B, _LOGITS = "poly_lora_A", "poly_lora_B", "poly_router.module_logits"


class PolyFormat(Format):
    """POLY."""

    peft_type = "POLY"
    methods = (Poly,)
    suffixes = (_A, _B, _LOGITS)
    fields = frozenset("r n_tasks n_skills n_splits poly_type".split())
    inert = frozenset({"init_weights"})
    lacks = frozenset({"bias", "fan_in_fan_out"})

    def check(self, config: Config) -> str | None:
        kind = config.get("poly_type", "poly")
        return None if kind == "poly" else f"poly_type={kind!r}, where 'poly' is wanted"

    def _method(self, config: Config) -> Poly:
        r, tasks, skills, splits = (
            config.get(*pair) for pair in (("r", 8), ("n_tasks", 1), ("n_skills", 4), ("n_splits", 1))
        )
        return Poly(r, tasks, skills=skills, splits=splits)

    def hint(self, shapes: Mapping[str, Sequence[int]]) -> Hint:
        a, b = shapes.get(_A), shapes.get(_B)
        return Hint("linear", a[0] * a[2] if a else None, b[0] * b[3] if b else None)

    def shapes(self, config: Config, name: str, view: View) -> dict[str, tuple[int, ...]]:
        m = self._method(config)
        head = (m.splits, m.skills)
        return {
            _A: (*head, view.n_in // m.splits, m.rank),
            _B: (*head, m.rank, view.n_out // m.splits),
            _LOGITS: (m.tasks, m.splits * m.skills),
        }

    def method(self, config: Config, names: Sequence[str | None], tied: bool) -> Method:
        return all_layers(names, self._method(config))

    def read(self, view: View, tensors: Tensors) -> Arrays:
        a, b, logits = tensors[_A], tensors[_B], tensors[_LOGITS]
        splits, skills, _, r = a.shape
        return {
            "a": a.transpose(0, 2, 1, 3).reshape(-1, skills, r),
            "b": b.transpose(1, 2, 0, 3).reshape(skills, r, -1),
            "logits": logits.reshape(-1, splits, skills),
        }

    def write(
        self, method: Poly, layer: int | None, view: View, arrays: Arrays, weight: Callable[[], np.ndarray]
    ) -> Written | None:
        if view.kind != "linear":
            raise ValueError(f"PEFT has Poly for linear weights only, and this is of the kind {view.kind!r}.")
        skills, r, splits = method.skills, method.rank, method.splits
        tensors = {
            _A: arrays["a"].reshape(splits, -1, skills, r).transpose(0, 2, 1, 3),
            _B: arrays["b"].reshape(skills, r, splits, -1).transpose(2, 0, 1, 3),
            _LOGITS: arrays["logits"].reshape(method.tasks, -1),
        }
        return Written(tensors, method, view.n_out)

    def config(self, facts: Mapping[str, Any]) -> dict[str, Any]:
        sizes = {(m.rank, m.tasks, m.skills, m.splits) for m in facts.values()}  # ``task`` is not PEFT's business
        if len(sizes) > 1:
            raise ValueError("A POLY file says one thing of all its modules, and here they differ: save them apart.")
        return dict(zip(("r", "n_tasks", "n_skills", "n_splits"), sizes.pop(), strict=True)) | {"poly_type": "poly"}
