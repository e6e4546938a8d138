r"""Int8: a byte a weight, and the largest magnitude of every output.

LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale. Dettmers et al., 2022. https://arxiv.org/abs/2208.07339

.. math::  W_{io} \approx s_o q_{io}, \qquad s_o = \max_i |W_{io}| / 127, \qquad q_{io} = \mathrm{round}(W_{io} / s_o)

W [in, out], q of 8 bits [out, in], s [out] float32; of an embedding s has an entry for every row that is looked up. It
takes 8 + 32 / in bits a weight. Rounding is to the nearest, ties to the even number. Of the paper this is the storage:
products are in the activations' dtype, and there are no columns apart for outliers.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jlora.quant.leaf import Quantized, over


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("codes", "scale"),
    meta_fields=("layout", "of_shape", "dtype"),
)
@dataclasses.dataclass(frozen=True, repr=False)
class Int8(Quantized):
    """A weight in 8 bits. The formula is at the top of this file.

    Attributes:
      codes: q, by PyTorch's rows.
      scale: s.
    """

    codes: Int[Array, "*stack rows columns"] | None = None
    scale: Float[Array, "*stack rows"] | None = None

    @property
    def stack_shape(self) -> tuple[int, ...]:
        return self.codes.shape[:-2]

    def encode(self, w: Float[Array, "in out"]) -> Int8:
        rows = self.to_rows(w).astype(self.wide)
        largest = jnp.max(jnp.abs(rows), axis=-1)
        codes = jnp.round(rows * over(127.0, largest)[:, None]).astype(jnp.int8)
        return dataclasses.replace(self, codes=codes, scale=(largest / 127.0).astype(jnp.float32))

    def matrix(self) -> Float[Array, "in out"]:
        return self.from_rows(self.codes.astype(self.wide) * self.scale[:, None])

    def rows(self, take: Callable[[Array], Array]) -> Array | None:
        if self.layout.kind != "embedding":
            return None
        return jax.lax.stop_gradient(
            (take(self.codes) * take(self.scale)[..., None].astype(self.wide)).astype(self.dtype)
        )
