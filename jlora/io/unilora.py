"""``peft_type`` UNILORA: one vector ``unilora_theta_d`` [d] for all modules, and with ``save_indices`` of each module
``unilora_indices_A`` [r, in], ``unilora_indices_B`` [out, r] and ``unilora_scales_A``, ``unilora_scales_B`` of the same
shapes. theta = theta_d, places a = indices_A^T and b = indices_B^T; of the scales, which are equal where the indices
are, jlora keeps one for each entry of theta.

A file without indices stands for numbers that numpy draws from ``proj_seed``: d places, each D // d times and some of
them once more, shuffled and dealt to the modules in the order in which the PyTorch model defines them, A before B. That
order is in no file. It is known here for the modules of transformers' models; else such a file is refused.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jlora.io.format import Arrays, Config, Format, Tensors, Written, all_layers, one_method
from jlora.io.layouts import Hint, View
from jlora.methods import Method, UniLoRA

_A, _B, _SCALES_A, _SCALES_B = "unilora_indices_A", "unilora_indices_B", "unilora_scales_A", "unilora_scales_B"
_THETA, _SCALE = "unilora_theta_d", "unilora_scale"  # the second is made below, no file has it
# Siblings in the order of their definition, one line a family.
_ORDERS = (
    ("q_proj", "k_proj", "v_proj", "o_proj"),
    ("query", "key", "value"),
    ("self_attn", "mlp"),
    ("attention", "intermediate", "output"),
    ("self", "output"),
    ("gate_proj", "up_proj", "down_proj"),
    ("c_attn", "c_proj"),
    ("attn", "mlp"),
    ("c_fc", "c_proj"),
    ("qkv_proj", "o_proj"),
    ("gate_up_proj", "down_proj"),
)


class UniloraFormat(Format):
    """UNILORA."""

    peft_type = "UNILORA"
    methods = (UniLoRA,)
    suffixes = (_A, _B)
    shared = (_THETA, _SCALE)
    fields = frozenset("r theta_d_length unilora_dropout proj_seed save_indices".split())
    inert = frozenset("init_weights init_theta_d_bound".split())

    def complete(self, config: Config, tensors: Tensors, modules: Callable[[], dict[str, tuple[int, int]]]) -> Tensors:
        length = config.get("theta_d_length", 256)
        indices = {key: tensor for key, tensor in tensors.items() if key.rpartition(".")[2] in (_A, _B)}
        if not indices:
            indices = _drawn(config.get("proj_seed", 42), length, config.get("r", 4), modules())
            counts = np.bincount(np.concatenate([each.ravel() for each in indices.values()]), minlength=length)
            scale = (1 / np.sqrt(np.maximum(counts, 1).astype(np.float32))).astype(np.float32)  # as PEFT rounds it
            return tensors | indices | {f"base_model.{_SCALE}": scale}
        scale = np.zeros(length)
        for key, each in indices.items():
            scales = tensors.get(key.replace(_A, _SCALES_A).replace(_B, _SCALES_B))
            if scales is None or scales.shape != each.shape or each.min() < 0 or each.max() >= length:
                raise ValueError(f"{key} {each.shape} has no scales of its shape, or goes beyond a vector of {length}")
            scale[each] = scales
        rest = {key: tensor for key, tensor in tensors.items() if key.rpartition(".")[2] not in (_SCALES_A, _SCALES_B)}
        return rest | {f"base_model.{_SCALE}": scale}

    def hint(self, shapes: Mapping[str, Sequence[int]]) -> Hint:
        a, b = shapes.get(_A), shapes.get(_B)
        return Hint("linear", a[-1] if a else None, b[0] if b else None)

    def shapes(self, config: Config, name: str, view: View) -> dict[str, tuple[int, ...]]:
        rank = config.get("r", 4)
        return {_A: (rank, view.n_in), _B: (view.n_out, rank)}

    def method(self, config: Config, names: Sequence[str | None], tied: bool) -> Method:
        method = UniLoRA(
            config.get("r", 4),
            length=config.get("theta_d_length", 256),
            dropout=config.get("unilora_dropout", 0.0),
            init_theta=config.get("init_theta_d_bound", 0.02),
        )
        return all_layers(names, method)

    def read(self, view: View, tensors: Tensors) -> Arrays:
        return {"frozen/a": tensors[_A].T, "frozen/b": tensors[_B].T}

    def read_shared(self, config: Config, views: Sequence[View], tensors: Tensors) -> dict[str, Arrays]:
        found, wanted = tensors.get(_THETA), (config.get("theta_d_length", 256),)
        if found is None or found.shape != wanted:
            shape = "missing" if found is None else found.shape
            raise ValueError(f"its {_THETA} is {shape}; the config wants {wanted}")
        return {UniLoRA.group: {"theta": found, "scale": tensors[_SCALE]}}

    def write(
        self, method: UniLoRA, layer: int | None, view: View, arrays: Arrays, weight: Callable[[], np.ndarray]
    ) -> Written | None:
        if view.kind != "linear":
            raise ValueError(f"PEFT has Uni-LoRA for linear weights only, and this is of the kind {view.kind!r}.")
        a, b = (arrays[f"frozen/{name}"].T.astype(np.int64) for name in "ab")
        scale = arrays["group/scale"]
        return Written({_A: a, _B: b, _SCALES_A: scale[a], _SCALES_B: scale[b]}, method, view.n_out)

    def write_shared(self, methods: Sequence[Method], groups: Mapping[str, Arrays]) -> Tensors:
        names = {method.group for method in methods}
        if len(names) > 1:
            raise ValueError(f"A UNILORA file has one vector, and here are the groups {sorted(names)}.")
        return {_THETA: groups[names.pop()]["theta"]}

    def config(self, facts: Mapping[str, Any]) -> dict[str, Any]:
        method = one_method(facts, self.peft_type)
        return {
            "r": method.rank,
            "theta_d_length": method.length,
            "unilora_dropout": method.dropout,
            "init_theta_d_bound": method.init_theta,
            "save_indices": True,
            "proj_seed": 42,
        }


def _drawn(seed: int, length: int, rank: int, modules: Mapping[str, tuple[int, int]]) -> Tensors:
    """The indices of all modules, keyed as on disk."""
    order = sorted(modules, key=position)
    _check_order(order)
    total = sum(rank * (n_in + n_out) for n_in, n_out in modules.values())
    rng = np.random.default_rng(seed)
    places = np.repeat(np.arange(length), total // length)
    places = np.concatenate([places, rng.choice(length, total % length, replace=False)])
    rng.shuffle(places)
    out, start = {}, 0
    for module in order:
        n_in, n_out = modules[module]
        for suffix, shape in ((_A, (rank, n_in)), (_B, (n_out, rank))):
            size = shape[0] * shape[1]
            out[f"base_model.model.{module}.{suffix}"] = places[start : start + size].reshape(shape)
            start += size
    return out


def position(module: str) -> list[tuple]:
    """Sorts modules as PyTorch defines them, as far as ``undecided`` says so."""
    return [_rank(segment) for segment in module.split(".")]


def _rank(segment: str) -> tuple:
    stem, number = re.fullmatch(r"(.*?)(\d*)", segment).groups()
    place = next((i * 100 + order.index(stem) for i, order in enumerate(_ORDERS) if stem in order), -1)
    return place, stem, int(number or -1)


def undecided(modules: Sequence[str]) -> tuple[str, str] | None:
    """Two neighbours of which it is not known which PyTorch defines first, or None."""
    for first, second in zip(modules, modules[1:], strict=False):
        pairs = zip(first.split("."), second.split("."), strict=False)
        one, other = next((pair for pair in pairs if pair[0] != pair[1]), ("", ""))
        stems = [re.fullmatch(r"(.*?)(\d*)", segment)[1] for segment in (one, other)]
        if stems[0] != stems[1] and not any(set(stems) <= set(order) for order in _ORDERS):
            return first, second
    return None


def _check_order(modules: Sequence[str]) -> None:
    if pair := undecided(modules):
        raise ValueError(
            "it lacks the indices (save_indices=false), which follow from its seed and the order of modules, and "
            f"which of {pair[0]!r} and {pair[1]!r} PyTorch has first is not known. Load it with PEFT, set "
            "save_indices=True in its config and save it again"
        )
