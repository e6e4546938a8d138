"""A model with its parameters bound, as losses see it."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import PyTree


@dataclasses.dataclass(frozen=True)
class Call:
    """Inputs -> outputs.

    Attributes:
      apply: the lifted model.
      params: what is trained, bound to its base.
      base: the base alone; None where nothing is known beside ``params``.
    """

    apply: Callable
    params: PyTree
    base: PyTree | None = None

    def __call__(self, *inputs: Any, **options: Any) -> Any:
        return self.apply({"params": self.params}, *inputs, **options)

    def reference(self, *inputs: Any) -> Any:
        """Outputs of the model as it was before training: of the base, without gradients. No second model is kept."""
        params = self.params if self.base is None else self.base
        return jax.lax.stop_gradient(self.apply({"params": params}, *inputs))
