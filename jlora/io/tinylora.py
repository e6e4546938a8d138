"""``peft_type`` TINYLORA: ``tinylora_A`` [r, in], ``tinylora_B`` [out, r] and ``tinylora_P`` [u, r, r] of each module,
and vectors ``tinylora_v.0``, ``tinylora_v.1``, ... [u] of the model, in the order of the modules that use them.
a = A^T, b = B^T, p has its last two axes swapped. PEFT decomposes a table as the weight [out, in] that it would be in a
linear layer, so there A is [r, features] and B [vocabulary, r]: a = B, b = A, and p as it is.

Either every module has a vector (``weight_tying`` 0) or all have one (1), which is a group here. In the first case
which vector is whose follows from the order in which the PyTorch model defines its modules, which is known for those of
transformers' models; else such a file is refused.
"""

import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jlora.io.format import Arrays, Config, Format, Tensors, Written, one_method
from jlora.io.layouts import Hint, View
from jlora.io.unilora import position, undecided
from jlora.methods import Method, TinyLoRA
from jlora.weight import Axes

_A, _B, _P = "tinylora_A", "tinylora_B", "tinylora_P"
_OWN, _SHARED = "tinylora_own", "tinylora_shared"  # made below, no file has them
_GROUP = "tinylora"
_NOT_SAVED = (
    "without tinylora_P the file stands for random numbers of PyTorch's own generator, which JAX does not have. Load "
    "it with PEFT, set save_projection=True in its config and save it again"
)


class _Hint(Hint):
    """With the sizes of a table the other way round."""

    def fits(self, axes: Axes, shape: Sequence[int]) -> bool:
        one = Hint(None, self.n_out, self.n_in) if axes.kind == "embedding" else Hint(None, self.n_in, self.n_out)
        return one.fits(axes, shape)


class TinyloraFormat(Format):
    """TINYLORA."""

    peft_type = "TINYLORA"
    methods = (TinyLoRA,)
    suffixes = (_A, _B, _P, _OWN)
    shared = (_SHARED,)
    fields = frozenset("r u weight_tying tinylora_dropout save_projection".split())
    inert = frozenset("projection_seed init_v_bound init_weights".split())

    def check(self, config: Config) -> str | None:
        if not config.get("save_projection", True):
            return f"save_projection=False: {_NOT_SAVED}"
        return None

    def complete(self, config: Config, tensors: Tensors, modules: Callable[[], dict[str, tuple[int, int]]]) -> Tensors:
        found = {key: re.fullmatch(r"base_model\.tinylora_v(?:\.[^.]+)?\.(\d+)", key) for key in tensors}
        vectors = {int(match[1]): tensors[key] for key, match in found.items() if match}
        rest = {key: tensor for key, tensor in tensors.items() if not found[key]}
        users = _users(rest)
        if sorted(vectors) != list(range(len(vectors))) or len(vectors) not in (1, len(users)):
            raise ValueError(
                f"it has {len(vectors)} vectors for {len(users)} modules (weight_tying="
                f"{config.get('weight_tying', 0.0)}); one for each or one for all is read here"
            )
        if len(vectors) < len(users) or config.get("weight_tying", 0.0) == 1.0:
            return rest | {f"base_model.{_SHARED}": vectors[0]}
        return rest | {f"{users[i]}.{_OWN}": vector for i, vector in vectors.items()}

    def settle(self, config: Config, tensors: Tensors) -> Config:
        return {**config, "weight_tying": float(f"base_model.{_SHARED}" in tensors)}

    def finish(self, config: dict[str, Any], tensors: Tensors) -> tuple[dict[str, Any], Tensors]:
        rest = {key: tensor for key, tensor in tensors.items() if key.rpartition(".")[2] not in (_OWN, _SHARED)}
        if f"base_model.{_SHARED}" in tensors:
            return config, rest | {"base_model.tinylora_v.0": tensors[f"base_model.{_SHARED}"]}
        vectors = [tensors[f"{user}.{_OWN}"] for user in _users(rest)]
        return config, rest | {f"base_model.tinylora_v.{i}": vector for i, vector in enumerate(vectors)}

    def hint(self, shapes: Mapping[str, Sequence[int]]) -> Hint:
        a, b = shapes.get(_A), shapes.get(_B)
        return _Hint(None, a[1] if a else None, b[0] if b else None)

    def shapes(self, config: Config, name: str, view: View) -> dict[str, tuple[int, ...]]:
        # PEFT lowers the rank by itself where a matrix is smaller.
        r, u = min(config.get("r", 2), view.n_in, view.n_out), config.get("u", 64)
        n_in, n_out = (view.n_out, view.n_in) if view.kind == "embedding" else (view.n_in, view.n_out)
        shapes = {_A: (r, n_in), _B: (n_out, r), _P: (u, r, r)}
        return shapes if config.get("weight_tying") else shapes | {_OWN: (u,)}

    def reason(self, view: View, shapes: Mapping[str, Sequence[int]]) -> str | None:
        return None if _P in shapes else _NOT_SAVED

    def method(self, config: Config, names: Sequence[str | None], tied: bool) -> Method:
        group = _GROUP if config.get("weight_tying") else None
        dropout = config.get("tinylora_dropout", 0.0)
        if tied:
            warnings.warn(
                f"{next(name for name in names if name)} seems to be the output head as well, and TinyLoRA acts there, "
                "too. PEFT's acts on lookups only, so its logits are others. If the head is another leaf, pass "
                "load_peft(..., usage=jlora.usage(apply, params, batch)).",
                stacklevel=4,
            )
        return TinyLoRA(config.get("r", 2), config.get("u", 64), group=group, dropout=dropout)

    def read(self, view: View, tensors: Tensors) -> Arrays:
        own = {"v": tensors[_OWN]} if _OWN in tensors else {}
        if view.kind == "embedding":
            frozen = {"a": tensors[_B], "b": tensors[_A], "p": tensors[_P]}
        else:
            frozen = {"a": tensors[_A].T, "b": tensors[_B].T, "p": tensors[_P].transpose(0, 2, 1)}
        return own | {f"frozen/{name}": array for name, array in frozen.items()}

    def read_shared(self, config: Config, views: Sequence[View], tensors: Tensors) -> dict[str, Arrays]:
        return {_GROUP: {"v": tensors[_SHARED]}} if _SHARED in tensors else {}

    def write(
        self, method: TinyLoRA, layer: int | None, view: View, arrays: Arrays, weight: Callable[[], np.ndarray]
    ) -> Written | None:
        if view.kind not in ("linear", "embedding"):
            raise ValueError(f"PEFT has TinyLoRA for linear weights and tables, and this is of the kind {view.kind!r}.")
        a, b, p = (arrays[f"frozen/{name}"] for name in "abp")
        if not p.any():
            return None
        if view.kind == "embedding":
            tensors = {_A: b, _B: a, _P: p}
        else:
            tensors = {_A: a.T, _B: b.T, _P: p.transpose(0, 2, 1)}
        return Written(tensors | ({_OWN: arrays["v"]} if method.group is None else {}), method, view.n_out)

    def write_shared(self, methods: Sequence[Method], groups: Mapping[str, Arrays]) -> Tensors:
        names = {method.group for method in methods}
        if len(names) > 1:
            raise ValueError(
                f"A TINYLORA file has a vector for each module or one for all, and here are the groups {names}."
            )
        (name,) = names
        return {} if name is None else {_SHARED: groups[name]["v"]}

    def config(self, facts: Mapping[str, Any]) -> dict[str, Any]:
        method = one_method(facts, self.peft_type)
        return {
            "r": method.rank,
            "u": method.size,
            "weight_tying": 0.0 if method.group is None else 1.0,
            "tinylora_dropout": method.dropout,
            "save_projection": True,
            "projection_seed": 42,
        }


def _users(tensors: Tensors) -> list[str]:
    """The modules of a file, by their keys, in PyTorch's order."""
    keys = [key for key in tensors if f".{_A}" in key]
    users = sorted((key[: key.index(f".{_A}")] for key in keys), key=position)
    if pair := undecided(users):
        raise ValueError(
            f"which of {pair[0]!r} and {pair[1]!r} PyTorch has first is not known, and with it which vector is whose. "
            "Use weight_tying=1, or merge it in PEFT"
        )
    return users
