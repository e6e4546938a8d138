"""``peft_type`` VBLORA: ``vblora_logits_A`` [r, in / v, h] and ``vblora_logits_B`` [out / v, r, h] of each module, and
one ``vblora_vector_bank`` [h, v] for all. a = logits_A, b = logits_B with its first two axes exchanged.

With ``save_only_topk_weights`` a module has instead of each: ``.._topk_indices`` [.., k], and ``.._topk_weights``
[.., k - 1], the softmax of the kept logits without its last entry. Their logarithms are logits that give the same
weights; what was not kept is read as a number far below them.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jlora.io.format import Arrays, Config, Format, Tensors, Written, all_layers, one_method
from jlora.io.layouts import Hint, View
from jlora.methods import Method, VBLoRA

_A, _B = "vblora_logits_A", "vblora_logits_B"
_PLACES, _WEIGHTS = "_topk_indices", "_topk_weights"
_BANK = "vblora_vector_bank"
_NOT_KEPT = -1e4  # finite, so that weight decay does not make it a NaN


class VbloraFormat(Format):
    """VBLORA."""

    peft_type = "VBLORA"
    methods = (VBLoRA,)
    suffixes = (_A, _B)
    shared = (_BANK,)
    fields = frozenset("r num_vectors vector_length topk vblora_dropout save_only_topk_weights".split())
    inert = frozenset("init_logits_std init_vector_bank_bound".split())

    def _facts(self, config: Config) -> VBLoRA:
        return VBLoRA(
            config.get("r", 4),
            num_vectors=config.get("num_vectors", 256),
            vector_length=config.get("vector_length", 256),
            topk=config.get("topk", 2),
            dropout=config.get("vblora_dropout", 0.0),
            init_bank=config.get("init_vector_bank_bound", 0.02),
            init_logits=config.get("init_logits_std", 0.1),
            store_topk=bool(config.get("save_only_topk_weights", False)),
        )

    def complete(self, config: Config, tensors: Tensors, modules: Callable[[], dict[str, tuple[int, int]]]) -> Tensors:
        if not config.get("save_only_topk_weights", False):
            return tensors
        out = {key: tensor for key, tensor in tensors.items() if not key.endswith((_PLACES, _WEIGHTS))}
        for key, places in tensors.items():
            stem = key.removesuffix(_PLACES)
            if stem != key and stem + _WEIGHTS in tensors:
                out[stem] = _logits(places, tensors[stem + _WEIGHTS], config.get("num_vectors", 256))
        return out

    def hint(self, shapes: Mapping[str, Sequence[int]]) -> Hint:
        return Hint("linear")  # pieces of a length that only the config knows

    def shapes(self, config: Config, name: str, view: View) -> dict[str, tuple[int, ...]]:
        method = self._facts(config)
        r, h, v = method.rank, method.num_vectors, method.vector_length
        return {_A: (r, view.n_in // v, h), _B: (view.n_out // v, r, h)}

    def method(self, config: Config, names: Sequence[str | None], tied: bool) -> Method:
        return all_layers(names, self._facts(config))

    def read(self, view: View, tensors: Tensors) -> Arrays:
        return {"a": tensors[_A], "b": tensors[_B].transpose(1, 0, 2)}

    def read_shared(self, config: Config, views: Sequence[View], tensors: Tensors) -> dict[str, Arrays]:
        method = self._facts(config)
        found, wanted = tensors.get(_BANK), (method.num_vectors, method.vector_length)
        if found is None or found.shape != wanted:
            raise ValueError(f"its {_BANK} is {'missing' if found is None else found.shape}; the config wants {wanted}")
        return {method.group: {"bank": found}}

    def write(
        self, method: VBLoRA, layer: int | None, view: View, arrays: Arrays, weight: Callable[[], np.ndarray]
    ) -> Written | None:
        if view.kind != "linear":
            raise ValueError(f"PEFT has VB-LoRA for linear weights only, and this is of the kind {view.kind!r}.")
        tensors = {_A: arrays["a"], _B: arrays["b"].transpose(1, 0, 2)}
        if method.store_topk:
            tensors = {k: v for name, logits in tensors.items() for k, v in _kept(name, logits, method.topk).items()}
        return Written(tensors, method, view.n_out)

    def write_shared(self, methods: Sequence[Method], groups: Mapping[str, Arrays]) -> Tensors:
        names = {method.group for method in methods}
        if len(names) > 1:
            raise ValueError(f"A VBLORA file has one bank, and here are the groups {sorted(names)}.")
        return {_BANK: groups[names.pop()]["bank"]}

    def config(self, facts: Mapping[str, Any]) -> dict[str, Any]:
        method = one_method(facts, self.peft_type)
        return {
            "r": method.rank,
            "num_vectors": method.num_vectors,
            "vector_length": method.vector_length,
            "topk": method.topk,
            "vblora_dropout": method.dropout,
            "save_only_topk_weights": method.store_topk,
            "init_vector_bank_bound": method.init_bank,
            "init_logits_std": method.init_logits,
        }


def _logits(places: np.ndarray, weights: np.ndarray, n: int) -> np.ndarray:
    """Logits [.., n] whose kept ones, at ``places`` [.., k], have the softmax ``weights`` [.., k - 1] and the rest."""
    if places.shape[:-1] != weights.shape[:-1] or places.shape[-1] != weights.shape[-1] + 1 or places.max() >= n:
        raise ValueError(f"places {places.shape} and weights {weights.shape} are not of one piece each, of {n} vectors")
    weights = weights.astype(np.float64)
    weights = np.concatenate([weights, 1.0 - weights.sum(-1, keepdims=True)], -1)
    logits = np.full((*places.shape[:-1], n), _NOT_KEPT)
    np.put_along_axis(logits, places.astype(np.int64), np.log(np.maximum(weights, np.finfo(np.float32).tiny)), -1)
    return logits


def _kept(name: str, logits: np.ndarray, k: int) -> Tensors:
    """The inverse, keyed as on disk."""
    places = np.argsort(-logits, axis=-1, kind="stable")[..., :k]
    kept = np.take_along_axis(logits, places, -1).astype(np.float64)
    weights = np.exp(kept - kept[..., :1])
    weights = (weights / weights.sum(-1, keepdims=True))[..., :-1]
    n = logits.shape[-1]
    narrow = np.uint8 if n < 2**8 else np.int16 if n < 2**15 else np.int32
    return {name + _PLACES: places.astype(narrow), name + _WEIGHTS: weights}
