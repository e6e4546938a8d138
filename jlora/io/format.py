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


class Written(NamedTuple):
    """One matrix on its way to a file: its tensors by suffix, what the config must say about it, and its outputs."""

    tensors: Tensors
    facts: Any
    n_out: int


class Format(abc.ABC):
    """Names, layouts and config fields of one ``peft_type``.

    ``read`` and ``write`` see one matrix at a time, in the numpy arrays of the file (PyTorch's layouts, keyed by the
    suffix that follows the module's name) on one side and in the method's parameters (canonical, keyed by their path
    within the trainable tree) on the other. Stacking, naming, biases and full copies are the caller's business.

    Class attributes:
      peft_type: as in the config.
      methods: the methods it writes.
      suffixes: of its tensors.
      shared: names of the tensors that belong to the whole model.
      offset: suffix of a vector that is added to a module's output, times the scale, or None.
      fields: the config fields it reads.
      inert: config fields that say how training began or how it is done and do not change what the tensors mean.
    """

    peft_type: ClassVar[str]
    methods: ClassVar[tuple[type[Method], ...]]
    suffixes: ClassVar[tuple[str, ...]]
    shared: ClassVar[tuple[str, ...]] = ()
    offset: ClassVar[str | None] = None
    fields: ClassVar[frozenset[str]]
    inert: ClassVar[frozenset[str]] = frozenset()

    @property
    def own_biases(self) -> str:
        """The value of ``bias`` for training the biases of the adapted modules."""
        return f"{self.peft_type.lower()}_only"

    # Reading.

    def check(self, config: Config) -> str | None:
        """Which value of a field it reads it cannot honour, and what to do; None if it can all."""
        return None

    @abc.abstractmethod
    def hint(self, shapes: Mapping[str, Sequence[int]]) -> Hint:
        """What the shapes of a module's tensors tell of its matrix."""

    @abc.abstractmethod
    def shapes(self, config: Config, name: str, view: View) -> dict[str, tuple[int, ...]]:
        """The tensors of a module, and their shapes, as the config and the matrix want them."""

    @abc.abstractmethod
    def method(self, config: Config, names: Sequence[str | None], tied: bool) -> Method:
        """The method of a leaf that holds these modules; None for a layer that is not adapted."""

    @abc.abstractmethod
    def read(self, view: View, tensors: Tensors) -> Arrays:
        """The trainable parameters of one matrix."""

    def absent(self, method: Method, weight: Callable[[], np.ndarray]) -> Arrays:
        """The parameters of a layer that is not adapted, where not zero. ``weight()`` is its base [in, out]."""
        return {}

    def scale(self, config: Config, name: str) -> float:
        """What multiplies the ``offset`` of a module."""
        return 1.0

    def read_shared(self, config: Config, views: Sequence[View], tensors: Tensors) -> dict[str, Arrays]:
        """The frozen parameters of the methods' groups. A ValueError says what does not fit."""
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

    def write_shared(self, methods: Sequence[Method], frozen: Mapping[str, Arrays]) -> Tensors:
        """The tensors of the whole model."""
        return {}

    @abc.abstractmethod
    def config(self, facts: Mapping[str, Any]) -> dict[str, Any]:
        """The config fields, from what ``write`` said of each module."""
