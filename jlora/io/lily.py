"""``peft_type`` LILY: ``lily_A`` [r, in], ``lily_B`` [n r, out] and ``lily_router`` [n, r] of each module. a = A^T, the
b of the group = B cut into n, router = R^T.

What modules share is in the file once for each of them. The B are shared by the modules of one entry of
``target_modules`` and one shape, which are a group here; with ``stride_A`` consecutive ones of these share the A.
"""

import collections
import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jlora.io.format import HEAD, Arrays, Config, Format, Tensors, Written, all_layers
from jlora.io.layouts import Hint, View
from jlora.methods import Lily, Method
from jlora.methods.tied import shape_name

_A, _B, _ROUTER = "lily_A.weight", "lily_B.weight", "lily_router.weight"
_BLOCK = "lily_block"  # not in the file: which A of its group a module has
_BLOCKS = "_blocks"  # neither: how many there are, by module


@dataclasses.dataclass(frozen=True)
class _Facts:
    method: Lily
    shape: tuple[int, int]
    block: int


def _natural(name: str) -> list[Any]:
    """Sorts layer 2 before layer 10."""
    return [int(part) if part.isdigit() else part for part in name.split(".")]


def _group(config: Config, name: str) -> str:
    targets = config.get("target_modules") or []
    fits = [] if isinstance(targets, str) else [entry for entry in targets if name.endswith(entry)]
    return ".".join([Lily.group, *sorted(fits, key=len)[-1:]])


class LilyFormat(Format):
    """LILY."""

    peft_type = "LILY"
    methods = (Lily,)
    suffixes = (_A, _B, _ROUTER, _BLOCK)
    fields = frozenset({"r", "num_B", "scaling", "stride_A", _BLOCKS})
    inert = frozenset({"init_weights"})
    lacks = frozenset({"bias", "fan_in_fan_out"})

    def complete(self, config: Config, tensors: Tensors, modules: Callable) -> Tensors:
        """With a stride: the A of a whole group at each module, and its place among them."""
        stride = config.get("stride_A", 1)
        if stride == 1:
            return tensors
        groups = collections.defaultdict(list)
        for key, tensor in tensors.items():
            match = re.fullmatch(rf"({HEAD}(.+))\.lily_A(?:\.[^.]+)?\.weight", key)
            if match:
                b = next(t for k, t in tensors.items() if k.startswith(f"{match[1]}.lily_B."))
                groups[_group(config, match[2]), tensor.shape, b.shape].append((_natural(match[2]), match[1], key))
        tensors = dict(tensors)
        for members in groups.values():
            keys = [key for _, _, key in sorted(members)]
            for i, key in enumerate(keys):
                if not np.array_equal(tensors[key], tensors[keys[i - i % stride]]):
                    raise ValueError(f"stride_A={stride}, and {key} differs from {keys[i - i % stride]}")
            every = np.stack([tensors[key] for key in keys[::stride]])
            for i, (_, module, key) in enumerate(sorted(members)):
                tensors |= {key: every, f"{module}.{_BLOCK}": np.array(i // stride)}
        return tensors

    def settle(self, config: Config, tensors: Tensors) -> Config:
        at = {re.sub(HEAD, "", key, count=1): len(t) for key, t in tensors.items() if t.ndim == 3}
        return {**config, _BLOCKS: {re.sub(r"\.lily_A\..*", "", key): n for key, n in at.items()}}

    def _method(self, config: Config, name: str) -> Lily:
        numbers = (config.get(*pair) for pair in (("num_B", 2), ("scaling", 1.0), ("stride_A", 1)))
        experts, scale, stride = numbers
        return Lily(config.get("r", 32), experts=experts, scale=scale, stride=stride, group=_group(config, name))

    def hint(self, shapes: Mapping[str, Sequence[int]]) -> Hint:
        a, b = shapes.get(_A), shapes.get(_B)
        return Hint("linear", a[-1] if a else None, b[1] if b else None)

    def shapes(self, config: Config, name: str, view: View) -> dict[str, tuple[int, ...]]:
        method = self._method(config, name)
        n, r = method.experts, method.rank
        shapes = {_A: (r, view.n_in), _B: (n * r, view.n_out), _ROUTER: (n, r)}
        if method.stride == 1:
            return shapes
        return shapes | {_A: (config[_BLOCKS].get(name, 1), r, view.n_in), _BLOCK: ()}

    def method(self, config: Config, names: Sequence[str | None], tied: bool) -> Method:
        methods = {self._method(config, name) for name in names if name is not None}
        if len(methods) > 1:
            raise ValueError(
                f"Layers that are stacked with {next(name for name in names if name)} share nothing with it, since "
                "target_modules names them one by one. Use a tree that holds the layers apart."
            )
        return all_layers(names, methods.pop())

    def read(self, view: View, tensors: Tensors) -> Arrays:
        group, router = f"group/{shape_name(view.n_in, view.n_out)}", tensors[_ROUTER]
        arrays = {"router": router.T, f"{group}/b": tensors[_B].reshape(*router.shape, view.n_out)}
        if _BLOCK not in tensors:
            return arrays | {"a": tensors[_A].T}
        return arrays | {"frozen/a": tensors[_BLOCK], f"{group}/a": tensors[_A].transpose(0, 2, 1)}

    def write(
        self, method: Lily, layer: int | None, view: View, arrays: Arrays, weight: Callable[[], np.ndarray]
    ) -> Written | None:
        if view.kind != "linear":
            raise ValueError(f"PEFT has Lily for linear weights only, and this is of the kind {view.kind!r}.")
        group = f"group/{shape_name(view.n_in, view.n_out)}"
        block = int(arrays.get("frozen/a", 0))
        a = arrays["a"] if method.stride == 1 else arrays[f"{group}/a"][block]
        tensors = {_A: a.T, _B: arrays[f"{group}/b"].reshape(-1, view.n_out), _ROUTER: arrays["router"].T}
        return Written(tensors, _Facts(method, (view.n_in, view.n_out), block), view.n_out)

    def config(self, facts: Mapping[str, _Facts]) -> dict[str, Any]:
        method = next(iter(facts.values())).method
        alike = collections.defaultdict(list)
        for name in sorted(facts, key=_natural):
            alike[name.rpartition(".")[2], facts[name].shape].append(facts[name])
        wanted = lambda fact: dataclasses.replace(fact.method, group=method.group) == method
        for (suffix, _), members in alike.items():
            one = {fact.method.group for fact in members}
            blocks = [members[i - i % method.stride].block == fact.block for i, fact in enumerate(members)]
            apart = len({fact.block for fact in members}) == -(-len(members) // method.stride)
            if len(one) > 1 or (method.stride > 1 and not (all(blocks) and apart)):
                raise ValueError(
                    f"PEFT's Lily shares among all modules called {suffix!r} of one shape, in their order, and here "
                    "they share otherwise. Give them one group, and nothing else to it."
                )
        if not all(map(wanted, facts.values())):
            found = sorted({str(fact.method) for fact in facts.values()})
            raise ValueError(f"A LILY file says one thing of all its modules, and here are {found}.")
        return {"r": method.rank, "num_B": method.experts, "scaling": method.scale, "stride_A": method.stride}
