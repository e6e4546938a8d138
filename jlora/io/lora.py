"""``peft_type`` LORA: LoRA, rsLoRA, DoRA, aLoRA, BD-LoRA, KaSA, VeLoRA and MonteCLoRA.

==================  =====================================  ==========================================================
weight              tensors                                jlora
==================  =====================================  ==========================================================
linear              lora_A [r, in], lora_B [out, r]        a = A^T [in, r], b = B^T [r, out]
embedding           lora_embedding_A [r, vocab], _B        the same
convolution         lora_A [r, in, *window],               a = A flattened to [in, r] in the kernel's own order
                    lora_B [out, r, 1, ...]
bare parameter      lora_A [E r, in], rows expert by       a [E, in, r], b [E, r, out]
                    expert; lora_B [out, r E], columns
                    rank by rank
DoRA beside these   lora_magnitude_vector [out],           magnitude [out]
                    [1, out, 1, ...] for a convolution
BD-LoRA             lora_A [r, in / n] or              a [in, r / n], the blocks turned one by one, or
                    lora_B [out, r / n]                b = B^T [r / n, out]
KaSA beside these   lora_diag [r]                      sigma [r]
==================  =====================================  ==========================================================

The scale is not stored: alpha / r, or alpha / sqrt(r) with ``use_rslora``, of each module's own r and alpha. aLoRA's
tensors are those of LoRA; ``alora_invocation_tokens`` in the config tells them apart. ``use_bdlora`` says by the last
part of a module's name which of its factors has blocks. What KaSA takes from the base weight is in no file: PEFT
decomposes it again, in float32, and so does this. ALLoRA is written as LoRA, which its result is.
"""

import collections
import dataclasses
import functools
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jlora.io import matching
from jlora.io.format import Arrays, Config, Format, Tensors, Written, all_layers
from jlora.io.layouts import Hint, View
from jlora.methods import ALLoRA, ALoRA, BDLoRA, DoRA, KaSA, LoRA, Method, MonteCLoRA, VeLoRA

_A, _B, _EMBEDDING_A, _EMBEDDING_B = "lora_A.weight", "lora_B.weight", "lora_embedding_A", "lora_embedding_B"
_MAGNITUDE, _SIGMA, _DIRECTION = "lora_magnitude_vector", "lora_diag", "lora_velora_embed"
_STD, _MIXTURE, _VARIANCE, _WEIGHTS = (
    f"lora_monteclora_sampler.{name}"
    for name in ("std_prior", "expert_weights_prior", "gaussian_var_prior", "expert_weights")
)
# What a config field makes of LoRA. PEFT has them for linear weights only.
_KINDS = {
    "alora_invocation_tokens": "aLoRA", "use_bdlora": "BD-LoRA", "kasa_config": "KaSA", "velora_config": "VeLoRA",
    "monteclora_config": "MonteCLoRA",
}  # fmt: skip
_BLOCKED = {"in": "target_modules_bd_a", "out": "target_modules_bd_b"}
# These start from factors of the base weight and leave the base changed; the file holds what is relative to that.
_CHANGED_BASE = ("pissa", "olora", "corda", "lora_ga", "loftq")


@dataclasses.dataclass(frozen=True)
class _Facts:
    method: LoRA | BDLoRA | KaSA | MonteCLoRA
    rank: int
    alpha: float
    experts: bool

    @property
    def scale(self) -> float:
        return LoRA(self.rank, self.alpha, rslora=self.method.rslora).scale


class LoraFormat(Format):
    """LORA."""

    peft_type = "LORA"
    methods = (LoRA, DoRA, ALLoRA, ALoRA, BDLoRA, KaSA, VeLoRA, MonteCLoRA)
    suffixes = (_A, _B, _EMBEDDING_A, _EMBEDDING_B, _MAGNITUDE, _SIGMA, _DIRECTION, _STD, _MIXTURE, _VARIANCE, _WEIGHTS)
    offset = "lora_B.bias"
    beside_tokens = True
    fields = frozenset(
        "r lora_alpha lora_dropout use_rslora use_dora rank_pattern alpha_pattern lora_bias init_lora_weights "
        "target_parameters alora_invocation_tokens use_bdlora kasa_config velora_config monteclora_config".split()
    )
    inert = frozenset(
        "eva_config corda_config lora_ga_config loftq_config megatron_core qalora_group_size".split()
    )  # of the last two the switches are elsewhere

    def check(self, config: Config) -> str | None:
        init = config.get("init_lora_weights", True)
        if isinstance(init, str) and init.lower().startswith(_CHANGED_BASE):
            return (
                f"init_lora_weights={init!r}: the tensors are relative to a base weight that this initialization "
                "changed. Convert it to plain LoRA in PEFT: save_pretrained(..., path_initial_model_for_weight_"
                "conversion=...)"
            )
        beside = [name for name in ("use_dora", "lora_bias", "target_parameters") if config.get(name)]
        kinds = [name for name in _KINDS if config.get(name)]
        if len(kinds + beside) > 1 and kinds:
            return f"{' and '.join((kinds + beside)[:2])}: they are not read together"
        return None

    def _blocked(self, config: Config, name: str) -> str | None:
        """The side of a module on which BD-LoRA has its blocks."""
        fields, last = config.get("use_bdlora") or {}, name.rpartition(".")[2]
        found = [side for side, field in _BLOCKED.items() if any(part in last for part in fields.get(field) or ())]
        if len(found) > 1:
            raise ValueError(f"{name}: use_bdlora gives both of its factors blocks, where one is wanted.")
        return found[0] if found else None

    def _rank_alpha(self, config: Config, name: str) -> tuple[int, float]:
        rank = matching.by_pattern(config.get("rank_pattern"), name, config.get("r", 8))
        return rank, matching.by_pattern(config.get("alpha_pattern"), name, config.get("lora_alpha", 8))

    def scale(self, config: Config, name: str) -> float:
        rank, alpha = self._rank_alpha(config, name)
        return LoRA(rank, alpha, rslora=config.get("use_rslora", False)).scale

    def complete(self, config: Config, tensors: Tensors, modules: Callable[[], Any]) -> Tensors:
        """Without the directions that VeLoRA takes from each batch anew."""
        velora = config.get("velora_config")
        if not velora:
            return tensors
        if not _fixed(velora):
            return {key: tensor for key, tensor in tensors.items() if not key.endswith(_DIRECTION)}
        unset = [key for key, tensor in tensors.items() if key.endswith(_DIRECTION) and not tensor.any()]
        if unset:
            raise ValueError(f"{unset[0]} is zero: it was to be set by the first batch in PEFT, and never was.")
        return tensors

    def hint(self, shapes: Mapping[str, Sequence[int]]) -> Hint:
        embedding = _EMBEDDING_A in shapes or _EMBEDDING_B in shapes
        a, b = (shapes.get(key) for key in ((_EMBEDDING_A, _EMBEDDING_B) if embedding else (_A, _B)))
        n_in = int(np.prod(a[1:])) if a and len(a) > 1 else None
        kind = "embedding" if embedding else "conv" if a and len(a) > 2 else "linear"
        return Hint(kind, n_in, b[0] if b else None)

    def shapes(self, config: Config, name: str, view: View) -> dict[str, tuple[int, ...]]:
        rank, _ = self._rank_alpha(config, name)
        kind = next((kind for field, kind in _KINDS.items() if config.get(field)), None)
        if kind and view.kind != "linear":
            raise ValueError(f"{name}: {kind} is for linear weights, and this is one of kind {view.kind!r}.")
        if view.kind == "embedding":
            shapes = {_EMBEDDING_A: (rank, view.n_in), _EMBEDDING_B: (view.n_out, rank)}
        elif view.kind == "conv":
            ones = (1,) * (len(view.window) - 1)
            shapes = {_A: (rank, *view.window), _B: (view.n_out, rank, *ones)}
        else:
            rows = math.prod(view.experts) * rank
            shapes = {_A: (rows, view.n_in), _B: (view.n_out, rows)}
        if side := self._blocked(config, name):
            suffix, blocks = _A if side == "in" else _B, config["use_bdlora"].get("nblocks", 1)
            shapes[suffix] = (shapes[suffix][0], shapes[suffix][1] // blocks)
        if config.get("kasa_config"):
            shapes[_SIGMA] = (rank,)
        if (velora := config.get("velora_config")) and _fixed(velora):
            shapes[_DIRECTION] = (-(-view.n_in // velora.get("num_groups", 64)),)
        if monte := config.get("monteclora_config"):
            n = monte.get("num_samples", 8)
            shapes |= {_STD: (rank,), _MIXTURE: (n,), _VARIANCE: (rank, rank), _WEIGHTS: (n,)}
        if config.get("use_dora"):
            ones = (1,) * (len(view.window) - 1)
            shapes[_MAGNITUDE] = (1, view.n_out, *ones) if view.kind == "conv" else (view.n_out,)
        return shapes

    def reason(self, view: View, shapes: Mapping[str, Sequence[int]]) -> str | None:
        a, b = shapes.get(_A), shapes.get(_B)
        if view.kind != "conv" or not a or not b or len(a) < 3 or a[1] <= view.window[0] or a[1] % view.window[0]:
            return None
        groups = a[1] // view.window[0]
        if b[1] * groups != a[0]:
            return None
        return (
            f"these are the shapes of a convolution of {groups} groups. Its LoRA in PEFT goes across the groups and is "
            "no change of the weight (PEFT cannot merge it either), so it is not read here. Leave it out of "
            "target_modules, or train LoHa or LoKr on it"
        )

    def method(self, config: Config, names: Sequence[str | None], tied: bool) -> Method:
        each = [self._rank_alpha(config, name) if name is not None else None for name in names]
        ranks = tuple(pair[0] if pair else 0 for pair in each)
        # The alpha of a layer that is not adapted plays no part; an equal one keeps the method simple.
        some_alpha = next(pair[1] for pair in each if pair)
        alphas = tuple(pair[1] if pair else some_alpha for pair in each)
        options = {"rslora": bool(config.get("use_rslora", False)), "dropout": config.get("lora_dropout", 0.0)}
        sides = {self._blocked(config, name) for name in names if name is not None}
        alike = next(
            (field for field in ("kasa_config", "velora_config", "monteclora_config") if config.get(field)), None
        )
        if alike or sides != {None}:
            if len(sides) > 1 or len(set(filter(None, each))) > 1:
                raise ValueError(f"{names} are stacked and differ in rank, alpha or blocks; use a tree with them apart")
            if sides != {None}:
                blocks = config["use_bdlora"].get("nblocks", 1)
                return all_layers(names, BDLoRA(max(ranks), some_alpha, blocks=blocks, blocked=sides.pop(), **options))
            cls, more = _OPTIONS[alike](config[alike])
            return all_layers(names, cls(max(ranks), some_alpha, **options, **more))
        tokens = config.get("alora_invocation_tokens")
        cls = DoRA if config.get("use_dora") else LoRA
        if tokens:
            cls = functools.partial(ALoRA, invocation_tokens=tuple(tokens))
        return cls(
            rank=max(ranks),
            alpha=some_alpha,
            init_a="gaussian" if config.get("init_lora_weights") == "gaussian" else "default",
            ranks=ranks if len(set(ranks)) > 1 else None,
            alphas=alphas if len(set(alphas)) > 1 else None,
            lookup_only=tied,
            **options,
        )

    def read(self, view: View, tensors: Tensors) -> Arrays:
        if view.kind == "embedding":
            a, b = tensors[_EMBEDDING_A].T, tensors[_EMBEDDING_B].T
        elif view.kind == "conv":
            a, b = view.window_rows(tensors[_A]), tensors[_B].reshape(view.n_out, -1).T
        elif view.kind == "experts":
            n = math.prod(view.experts)
            a = tensors[_A].reshape(n, -1, view.n_in).transpose(0, 2, 1).reshape(*view.experts, view.n_in, -1)
            b = tensors[_B].reshape(view.n_out, -1, n).transpose(2, 1, 0).reshape(*view.experts, -1, view.n_out)
        else:
            a, b = _turned(tensors[_A], view.n_in), tensors[_B].T
        if _SIGMA in tensors:
            return {"factors/a": a, "factors/b": b, "sigma": tensors[_SIGMA]}
        if _STD in tensors:
            return {"factors/a": a, "factors/b": b, "log_std": tensors[_STD], "log_mixture": tensors[_MIXTURE]}
        if _DIRECTION in tensors:
            return {"a": a, "b": b, "frozen/direction": tensors[_DIRECTION]}
        if _MAGNITUDE not in tensors:
            return {"a": a, "b": b}
        return {"factors/a": a, "factors/b": b, "magnitude": tensors[_MAGNITUDE].reshape(-1)}

    def absent(self, method: Method, weight: Callable[[], np.ndarray]) -> Arrays:
        # DoRA's gain, the magnitude over the norm, is then 1.
        return {"magnitude": _norms(weight())} if isinstance(method, DoRA) else {}

    def derived(self, method: Method, weight: Callable[[], np.ndarray], arrays: Arrays) -> Arrays:
        if not isinstance(method, KaSA):
            return {}
        u, s, vh = np.linalg.svd(weight().astype(np.float32), full_matrices=False)
        r = method.rank
        return {"frozen/cut_a": u[:, -r:] * s[-r:], "frozen/cut_b": vh[-r:]}

    def write(
        self, method: Method, layer: int | None, view: View, arrays: Arrays, weight: Callable[[], np.ndarray]
    ) -> Written | None:
        method = method.as_lora() if isinstance(method, ALLoRA) else method
        rank, alpha = method.rank, method.alpha
        if layer is not None and isinstance(method, LoRA) and method.varies:
            rank = method.ranks[layer] if method.ranks else rank
            alpha = method.alphas[layer] if method.alphas else alpha
        dora = isinstance(method, DoRA)
        if dora and method.method is not None:
            raise ValueError(f"PEFT has DoRA over LoRA only, and this is {method}. Merge it instead: jlora.merge.")
        if dora and view.kind == "experts":
            raise ValueError("PEFT has no DoRA for bare parameters. Merge the adapter instead: jlora.merge.")
        if isinstance(method, (BDLoRA, KaSA, VeLoRA, MonteCLoRA)) and view.kind != "linear":
            raise ValueError(f"PEFT has {method.name} for linear weights only, and this is of the kind {view.kind!r}.")
        nested = isinstance(method, (DoRA, KaSA, MonteCLoRA))
        a, b = (arrays["factors/a"], arrays["factors/b"]) if nested else (arrays["a"], arrays["b"])
        if isinstance(method, LoRA) and method.subtracts:  # for the weight as it was before anything started
            a0, b0 = arrays["frozen/start/a"], arrays["frozen/start/b"]
            a, b = np.concatenate([a - a0, a0], axis=-1), np.concatenate([b, b - b0], axis=-2)
            rank, alpha = 2 * rank, alpha * (math.sqrt(2) if method.rslora else 2)
        if rank == 0:
            if not dora or np.allclose(arrays["magnitude"], _norms(weight()), rtol=1e-5):
                return None
            rank = 1  # PEFT has no magnitudes without a pair: this one is zero
        if isinstance(method, KaSA):
            _check_cut(self.derived(method, weight, arrays), arrays, weight())
        a, b = a[..., :rank], b[..., :rank, :]
        if view.kind == "embedding":
            tensors = {_EMBEDDING_A: a.T, _EMBEDDING_B: b.T}
        elif view.kind == "conv":
            ones = (1,) * (len(view.window) - 1)
            tensors = {_A: view.window_tensor(a), _B: b.T.reshape(view.n_out, rank, *ones)}
        elif view.kind == "experts":
            a, b = (x.reshape(-1, *x.shape[-2:]) for x in (a, b))
            tensors = {
                _A: a.transpose(0, 2, 1).reshape(-1, view.n_in),
                _B: b.transpose(2, 1, 0).reshape(view.n_out, -1),
            }
        else:
            tensors = {_A: _turned(a, rank), _B: b.T}
        if isinstance(method, KaSA):
            tensors[_SIGMA] = arrays["sigma"]
        if isinstance(method, VeLoRA):
            size = -(-view.n_in // method.groups)
            tensors[_DIRECTION] = arrays.get("frozen/direction", np.zeros(size, a.dtype))
        if isinstance(method, MonteCLoRA):
            tensors |= {
                _STD: arrays["log_std"],
                _MIXTURE: arrays["log_mixture"],
                _VARIANCE: np.eye(rank, dtype=a.dtype),
            }
            tensors[_WEIGHTS] = np.full(method.samples, 1 / method.samples, a.dtype)
        if dora:
            ones = (1,) * (len(view.window) - 1)
            magnitude = arrays["magnitude"]
            tensors[_MAGNITUDE] = magnitude.reshape(1, -1, *ones) if view.kind == "conv" else magnitude
        return Written(tensors, _Facts(method, rank, alpha, view.kind == "experts"), view.n_out)

    def offset_scale(self, facts: _Facts) -> float | None:
        return facts.scale if type(facts.method) is LoRA and not facts.experts else None

    def config(self, facts: Mapping[str, _Facts]) -> dict[str, Any]:
        methods = {fact.method for fact in facts.values()}
        dora = {isinstance(method, DoRA) for method in methods}
        if len(dora) > 1:
            raise ValueError(
                "PEFT's use_dora holds for all modules of a file, and here some are LoRA and some DoRA: use one of the "
                "two for all, or merge (jlora.merge)."
            )
        tokens = {method.invocation_tokens if isinstance(method, ALoRA) else None for method in methods}
        if len(tokens) > 1 or () in tokens:
            raise ValueError(
                "PEFT's alora_invocation_tokens hold for all modules of a file, and here they are "
                f"{sorted(map(str, tokens))}: give every ALoRA the same invocation_tokens, with no LoRA beside them."
            )
        kinds = {str(fields): fields for fields in map(_fields_of, methods)}
        if len(kinds) > 1:
            raise ValueError(
                "PEFT's kasa_config, velora_config and monteclora_config hold for all modules of a file, and here are "
                f"{sorted(map(str, methods))}: save them one at a time, or merge (jlora.merge)."
            )
        rslora = {method.rslora for method in methods}
        # One file, one rule for the scale: where the methods differ, alpha is what gives each its own under alpha / r.
        alphas = {name: fact.alpha if len(rslora) == 1 else fact.scale * fact.rank for name, fact in facts.items()}
        ranks = {name: fact.rank for name, fact in facts.items()}
        alphas = {name: int(alpha) if alpha == int(alpha) else alpha for name, alpha in alphas.items()}
        rank, alpha = (collections.Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
        return {
            "r": rank,
            "lora_alpha": alpha,
            "rank_pattern": {matching.pattern_of(name): r for name, r in ranks.items() if r != rank},
            "alpha_pattern": {matching.pattern_of(name): value for name, value in alphas.items() if value != alpha},
            "use_rslora": rslora == {True},
            "use_dora": dora == {True},
            "alora_invocation_tokens": next(map(list, filter(None, tokens)), None),
            "lora_dropout": _dropout(facts.values()),
            "init_lora_weights": "gaussian" if {getattr(m, "init_a", None) for m in methods} == {"gaussian"} else True,
            **_blocks({name: fact.method for name, fact in facts.items()}),
            **kinds.popitem()[1],
        }


def _fixed(velora: Mapping[str, Any]) -> bool:
    return velora.get("init_type", "batch_average") != "batch_average"


def _velora_options(fields: Mapping[str, Any]) -> tuple[type[Method], dict[str, Any]]:
    direction = "fixed" if _fixed(fields) else "average"
    return VeLoRA, {"groups": fields.get("num_groups", 64), "gain": fields.get("scale", 1.0), "direction": direction}


def _monteclora_options(fields: Mapping[str, Any]) -> tuple[type[Method], dict[str, Any]]:
    names = {"samples": ("num_samples", 8), "noise": ("sample_scaler", 1e-4), "prior": ("dirichlet_prior", 0.1)}
    return MonteCLoRA, {name: fields.get(*field) for name, field in names.items()}


# The method and its options, from those config fields that hold for a whole file.
_OPTIONS = {
    "kasa_config": lambda fields: (KaSA, {}),
    "velora_config": _velora_options,
    "monteclora_config": _monteclora_options,
}


def _fields_of(method: Method) -> dict[str, Any]:
    """The config fields of what a method is beside LoRA, where they hold for the whole file."""
    match method:
        case KaSA():
            return {"kasa_config": {"beta": 1e-4, "gamma": 1e-3}}
        case VeLoRA():
            init = "batch_average" if method.direction == "average" else "random"
            return {"velora_config": {"num_groups": method.groups, "scale": method.gain, "init_type": init}}
        case MonteCLoRA():
            fields = {"num_samples": method.samples, "sample_scaler": method.noise, "dirichlet_prior": method.prior}
            return {"monteclora_config": fields}
    return {}


def _turned(tensor: np.ndarray, n: int) -> np.ndarray:
    """[r, n] transposed; or, if it is a column of blocks [r, n / blocks], each of them by itself: [n, r / blocks]."""
    r, size = tensor.shape
    blocks = n // size
    return tensor.reshape(blocks, r // blocks, size).transpose(0, 2, 1).reshape(n, r // blocks)


def _blocks(methods: Mapping[str, Method]) -> dict[str, Any]:
    """``use_bdlora``, if it is. It tells modules apart by the last parts of their names, and by what these contain."""
    blocked = [method for method in methods.values() if isinstance(method, BDLoRA)]
    if not blocked:
        return {}
    sides = {(name.rpartition(".")[2], getattr(method, "blocked", None)) for name, method in methods.items()}
    parts = {side: sorted(last for last, its in sides if its == side) for side in _BLOCKED}
    clash = [last for last, its in sides for side in _BLOCKED if its != side and any(p in last for p in parts[side])]
    numbers = {method.blocks for method in blocked}
    if clash or len(numbers) > 1 or not all(type(method) in (LoRA, BDLoRA) for method in methods.values()):
        raise ValueError(
            "PEFT's use_bdlora has one number of blocks for a file, chooses their side by the last part of a module's "
            f"name, and has LoRA beside it only; here are {sorted({str(method) for method in methods.values()})}"
            + (f", and {sorted(set(clash))} could not be told apart." if clash else ".")
        )
    strict = len(blocked) == len(methods)
    fields = {field: parts[side] for side, field in _BLOCKED.items()}
    return {"use_bdlora": fields | {"nblocks": numbers.pop(), "match_strict": strict}}


def _check_cut(wanted: Arrays, arrays: Arrays, w: np.ndarray) -> None:
    """That KaSA took from a weight what PEFT will take."""
    product = lambda arrays: arrays["frozen/cut_a"].astype(np.float64) @ arrays["frozen/cut_b"]
    if np.abs(product(arrays) - product(wanted)).max() > 1e-3 * np.abs(w).max():
        raise ValueError(
            "what it took from the base weight are not its smallest singular components, which PEFT takes. Merge "
            "instead: jlora.merge."
        )


def _norms(w: np.ndarray) -> np.ndarray:
    """Of the columns of [in, out]."""
    return np.linalg.norm(w.astype(np.promote_types(w.dtype, np.float32)), axis=0)


def _dropout(facts: Any) -> float:
    """One rate for the file; it concerns nothing but further training."""
    if any(fact.experts for fact in facts):
        return 0.0  # PEFT refuses to load anything else with bare parameters
    rates = {fact.method.dropout for fact in facts}
    if len(rates) > 1:
        warnings.warn(f"A PEFT config has one dropout rate; of {sorted(rates)} the largest is written.", stacklevel=2)
    return max(rates)
