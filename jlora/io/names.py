"""What PyTorch calls the leaves of a tree."""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from jlora import paths
from jlora.io.layouts import KERNELS, TABLES
from jlora.storage import is_stored
from jlora.weight import Axes

# Segments of a name that a layer's (or an expert's) number follows.
CONTAINERS = ("layers", "layer", "h", "blocks", "block", "experts", "stages")
_WEIGHTS = (*KERNELS, *TABLES, "weight", "scale")
_PARAMS = dict.fromkeys(_WEIGHTS, "weight") | {"bias": "bias", "b": "bias"}
_NUMBERED = re.compile(rf"({'|'.join(CONTAINERS)})_(\d+)")
# Modules that make the logits. A decoder without one ties its head to the embedding.
_HEADS = ("lm_head", "embed_out", "output_layer", "score", "classifier", "qa_outputs", "head", "decoder")

Names = Callable[[str], str | None]


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a PyTorch parameter is in the tree: a leaf, and for a stacked leaf the index of the layer."""

    module: str
    param: str
    path: str
    index: tuple[int, ...]

    @property
    def name(self) -> str:
        return f"{self.module}.{self.param}" if self.module else self.param

    @property
    def target(self) -> str:
        """The name by which a config's patterns know it: the module's, or a bare parameter's own."""
        return self.name if self.bare else self.module

    @property
    def bare(self) -> bool:
        """A parameter of a module of many, such as the fused kernels of experts: no ``weight`` and no ``bias``."""
        return self.param not in ("weight", "bias")


class Tree:
    """The leaves of a tree under their PyTorch names.

    By default ``model/layers/0/mlp/up_proj/kernel`` is ``model.layers.0.mlp.up_proj.weight``, and a stacked
    ``model/layers/mlp/up_proj/kernel`` [L, in, out] is L such parameters: the number goes after the segment that is
    called ``layers``, ``h``, ``block``, ... and has none yet. ``params/`` at the front is dropped, ``layers_0`` is read
    as ``layers/0``.

    Args:
      names: path -> module name, to replace those rules; ``*`` stands for the number of a stacked leaf. None: the leaf
        has no counterpart.
      axes, usage: as for ``jlora.adapt``.
      known: path -> axes, beside them.
    """

    def __init__(
        self,
        params: Any,
        names: Names | None = None,
        axes: Mapping[paths.Pattern, Axes] | None = None,
        usage: Mapping[str, Any] | None = None,
        known: Mapping[str, Axes] | None = None,
    ):
        named, self.treedef = paths.flatten(params)
        self.leaves = dict(named)
        self._axes, self._usage, self._known = list((axes or {}).items()), usage, known or {}
        self.places: dict[str, Place] = {}
        self.by_path: dict[str, list[Place]] = {}
        for path, leaf in named:
            if not hasattr(leaf, "shape"):
                continue
            self.by_path[path] = list(self._places(path, leaf, names))
            for place in self.by_path[path]:
                if place.name in self.places:
                    first = self.places[place.name].path
                    raise ValueError(f"The leaves {first!r} and {path!r} are both called {place.name!r}: pass names=.")
                self.places[place.name] = place

    def _places(self, path: str, leaf: Any, names: Names | None):
        *segments, last = re.split(r"[/.]", path)
        if names is None:
            segments = segments[1:] if segments[:1] == ["params"] else segments
            numbered = ((s, _NUMBERED.fullmatch(s)) for s in segments)
            segments = [part for s, match in numbered for part in (match.groups() if match else (s,))]
        else:
            module = names(path)
            if module is None:
                return
            segments = module.split(".")
        open_ends = [i + 1 for i, s in enumerate(segments[:-1]) if s in CONTAINERS and not _number(segments[i + 1])]
        stars = [i for i, s in enumerate(segments) if s == "*"]
        if stars:
            open_ends = stars
        elif not self._stacked(path, leaf, len(open_ends)):
            open_ends = []
        given = self.given(path)
        # Haiku's kernels are called so, and many a module's parameter of experts [E, in, out].
        experts = last == "w" and leaf.ndim - len(open_ends) == 3 and (given is None or given.kind != "conv")
        param = last if experts else _PARAMS.get(last, last)
        stack = (given.stack if given is not None else range(leaf.ndim))[: len(open_ends)]
        for index in np.ndindex(*(leaf.shape[axis] for axis in stack)):
            numbers = dict(zip(open_ends, index, strict=True))
            filled: list[str] = []
            for i, segment in enumerate(segments):
                filled += [str(numbers[i])] if i in numbers else []
                filled += [] if segment == "*" else [segment]
            yield Place(".".join(filled), param, path, index)

    def _stacked(self, path: str, leaf: Any, n: int) -> bool:
        """Whether the leaf holds a parameter for each number that is missing from its name."""
        given = self.given(path)
        if given is not None:
            return len(given.stack) >= n
        last = re.split(r"[/.]", path)[-1]
        return leaf.ndim > n + (last in (*KERNELS, *TABLES))

    def given(self, path: str) -> Axes | None:
        """The axes of a leaf, as given or traced."""
        if path in self._known:
            return self._known[path]
        leaf = self.leaves[path]
        if is_stored(leaf):
            return leaf.axes
        for pattern, axes in self._axes:
            if paths.matches(pattern, path, leaf) and len((*axes.stack, *axes.inputs, *axes.outputs)) == leaf.ndim:
                return axes
        found = None if self._usage is None else self._usage.get(path)
        return None if found is None else found.axes

    def last(self, path: str) -> str:
        """The leaf's own name."""
        return re.split(r"[/.]", path)[-1]

    def slice_shape(self, place: Place) -> tuple[int, ...]:
        """The shape of one layer of a leaf."""
        return tuple(self.leaves[place.path].shape[len(place.index) :])

    def modules(self) -> set[str]:
        return {place.module for place in self.places.values()}

    def matrices(self) -> list[Place]:
        """The parameters that PEFT could adapt through their module."""
        return [p for p in self.places.values() if p.param == "weight" and len(self.slice_shape(p)) >= 2]

    def bare(self, module: str) -> list[Place]:
        return [place for place in self.places.values() if place.module == module and place.bare]

    def tied(self, path: str) -> bool:
        """Whether a table is the output head as well: as traced, else because the tree has no head of its own."""
        found = None if self._usage is None else self._usage.get(path)
        if found is not None:
            return "linear" in found.kinds
        return not any(module.rpartition(".")[2] in _HEADS for module in self.modules())


def _number(segment: str) -> bool:
    return segment.isdigit() or segment == "*"
