"""What one ``peft_type`` is on disk. A new one is a file like ``vera.py`` and an entry in ``formats.py``."""

import abc
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np

from jlora.io.layouts import Hint, View
from jlora.methods import Method

Config = Mapping[str, Any]
Tensors = dict[str, np.ndarray]
Arrays = dict[str, np.ndarray]

HEAD = r"(?:base_model\.(?:model\.)?)?"  # of a tensor's key, before the name of its module, as a regular expression


class Written(NamedTuple):
    """One matrix on its way to a file: its tensors by suffix, what the config must say about it, and its outputs."""

    tensors: Tensors
    facts: Any
    n_out: int


def one_method(facts: Mapping[str, Method], peft_type: str) -> Method:
    """The method of all modules, for a config that has no fields by which they could differ."""
    methods = set(facts.values())
    if len(methods) > 1:
        raise ValueError(
            f"A {peft_type} file says one thing of all its modules, and here are {sorted(map(str, methods))}: save "
            "them one at a time, or merge (jlora.merge)."
        )
    return methods.pop()


def all_layers(names: Sequence[str | None], method: Method) -> Method:
    """``method``, if every layer of its leaf is adapted. For methods whose zeros would learn."""
    if None in names:
        here = next(name for name in names if name is not None)
        raise ValueError(
            f"{here} has an adapter and {names.count(None)} of the {len(names)} layers that are stacked with it have "
            f"none; {method.name} cannot leave some out. Use a tree that holds the layers apart."
        )
    return method


class Format(abc.ABC):
    """Names, layouts and config fields of one ``peft_type``.

    ``read`` and ``write`` see one matrix at a time, in the numpy arrays of the file (PyTorch's layouts, keyed by the
    suffix that follows the module's name) on one side and in the method's parameters (canonical, keyed by their path
    within the trainable tree, those of the frozen tree with ``frozen/`` before it) on the other. Stacking, naming,
    biases and full copies are the caller's business.

    Class attributes:
      peft_type: as in the config.
      methods: the methods it writes.
      suffixes: of its tensors.
      shared: names of the tensors that belong to the whole model. Copies of them below modules are passed over.
      offset: suffix of a vector that is added to a module's output, times the scale, or None.
      fields: the config fields it reads.
      inert: config fields that say how training began or how it is done and do not change what the tensors mean.
      lookups_only: of a table that is the output head, too, PEFT adapts the lookups only.
      copies_tables: PEFT writes the whole table of an adapted embedding, too.
      beside_tokens: its files may hold trained rows of embeddings as well (``tokens.py``).
      lacks: of "bias" and "fan_in_fan_out", the fields that its config does not have.
      needs: packages without which its files are refused.
    """

    peft_type: ClassVar[str]
    methods: ClassVar[tuple[type[Method], ...]]
    suffixes: ClassVar[tuple[str, ...]]
    shared: ClassVar[tuple[str, ...]] = ()
    offset: ClassVar[str | None] = None
    fields: ClassVar[frozenset[str]]
    inert: ClassVar[frozenset[str]] = frozenset()
    lacks: ClassVar[frozenset[str]] = frozenset()
    needs: ClassVar[tuple[str, ...]] = ()
    lookups_only: ClassVar[bool] = True
    copies_tables: ClassVar[bool] = True
    beside_tokens: ClassVar[bool] = False

    @property
    def own_biases(self) -> str:
        """The value of ``bias`` for training the biases of the adapted modules."""
        return f"{self.peft_type.lower()}_only"

    def follows(self, method: Method) -> bool:
        """Whether PEFT does to a module's bias what this method does to its outputs: ``Follow``."""
        return False

    def for_bias(self, tensors: Tensors) -> list[str]:
        """Of a module's tensors, by suffix, those that are for its bias alone and do something to it."""
        return []

    # Reading.

    def settle(self, config: Config, tensors: Tensors) -> Config:
        """The config as the tensors of the file, by key, show it to be."""
        return config

    def check(self, config: Config) -> str | None:
        """Which value of a field it reads it cannot honour, and what to do; None if it can all."""
        return None

    def complete(self, config: Config, tensors: Tensors, modules: Callable[[], dict[str, tuple[int, int]]]) -> Tensors:
        """The tensors of the file and those that it leaves out because they follow from the rest. ``modules()`` gives
        (in, out) of what the config targets. A ValueError says what does not fit."""
        return tensors

    @abc.abstractmethod
    def hint(self, shapes: Mapping[str, Sequence[int]]) -> Hint:
        """What the shapes of a module's tensors tell of its matrix."""

    @abc.abstractmethod
    def shapes(self, config: Config, name: str, view: View) -> dict[str, tuple[int, ...]]:
        """The tensors of a module, and their shapes, as the config and the matrix want them."""

    def reason(self, view: View, shapes: Mapping[str, Sequence[int]]) -> str | None:
        """Why tensors of these shapes, which are not the wanted ones, are not read; None where that is not known."""
        return None

    @abc.abstractmethod
    def method(self, config: Config, names: Sequence[str | None], tied: bool) -> Method:
        """The method of a leaf that holds these modules; None for a layer that is not adapted."""

    @abc.abstractmethod
    def read(self, view: View, tensors: Tensors) -> Arrays:
        """The trainable parameters of one matrix, and those frozen ones that ``init_stack`` does not make. Of what is
        the group's and each of its modules has a copy of, ``group/`` and its path in the group."""

    def absent(self, method: Method, weight: Callable[[], np.ndarray]) -> Arrays:
        """The parameters of a layer that is not adapted, where not zero. ``weight()`` is its base [in, out]."""
        return {}

    def derived(self, method: Method, weight: Callable[[], np.ndarray], arrays: Arrays) -> Arrays:
        """The frozen parameters of an adapted layer that the file leaves out because they follow from its base weight
        [in, out] and from what was read."""
        return {}

    def scale(self, config: Config, name: str) -> float:
        """What multiplies the ``offset`` of a module."""
        return 1.0

    def read_shared(self, config: Config, views: Sequence[View], tensors: Tensors) -> dict[str, Arrays]:
        """The parameters of the methods' groups, trainable and frozen, by their paths. A ValueError says what does not
        fit."""
        return {}

    # Writing.

    @abc.abstractmethod
    def write(
        self, method: Method, layer: int | None, view: View, arrays: Arrays, weight: Callable[[], np.ndarray]
    ) -> Written | None:
        """One matrix, the ``layer``-th of a stacked leaf. None if it is not adapted."""

    def offset_scale(self, facts: Any) -> float | None:
        """What multiplies the ``offset`` of a module that was written; None if PEFT has none for such a module."""
        return None

    def write_shared(self, methods: Sequence[Method], groups: Mapping[str, Arrays]) -> Tensors:
        """The tensors of the whole model, from the parameters of the groups."""
        return {}

    def finish(self, config: dict[str, Any], tensors: Tensors) -> tuple[dict[str, Any], Tensors]:
        """The config and the tensors, by key, as the file is to have them: the inverse of ``complete``."""
        return config, tensors

    @abc.abstractmethod
    def config(self, facts: Mapping[str, Any]) -> dict[str, Any]:
        """The config fields, from what ``write`` said of each module."""
