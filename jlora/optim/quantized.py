r"""Optimizer states in 8 bits: the moments of any optax transformation, block by block.

8-bit Optimizers via Block-wise Quantization. Dettmers et al., 2021. https://arxiv.org/abs/2110.02861

.. math::  M_k \approx s_b\, c_{q_k}, \qquad s_b = \max_{k \in b} |M_k|, \qquad
           q_k = \arg\min_j |M_k / s_b - c_j|

b are blocks of 256 entries along the longest axis of the moment, s float32, c [256] a table that is fine near zero:
bitsandbytes' dynamic map, with signs for first moments and without for second ones. That makes 8 + 32/256 = 8.125 bits
a number. The update itself is computed in float32: moments are decoded, updated and encoded again in each step.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PyTree

from jlora.blockwise import Dynamic, Table, blocks
from jlora.optim.moments import fields, is_second

CODES = {
    "signed": Dynamic(),
    "unsigned": Dynamic(signed=False),
    # The last is not used: as many below zero as above.
    "int8": Table(np.arange(-127, 129, dtype=np.float32) / 127),
    "int4": Table(np.arange(-7, 9, dtype=np.float32) / 7),
}


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("codes", "scales"),
    meta_fields=("code", "axis", "size", "block"),
)
@dataclasses.dataclass(frozen=True)
class Blocks:
    """An array of floats in blocks along one axis, which is counted from the end, so that any number of axes may be put
    in front (``vmap``, a stack).

    Attributes:
      codes: places in the table, of the array's shape; of "int4" two in a byte, along the axis.
      scales: the largest magnitude of each block.
      code: the table.
      axis, size: which axis, and its length.
      block: entries that share a scale.
    """

    codes: Array
    scales: Array
    code: str
    axis: int
    size: int
    block: int

    @classmethod
    def encode(cls, x: Array, code: str, axis: int, block: int) -> Blocks:
        return cls(None, None, code, axis, x.shape[axis], block).like(x)

    @property
    def shape(self) -> tuple[int, ...]:
        shape = list(self.codes.shape)
        shape[self.axis] = self.size
        return tuple(shape)

    @jax.jit
    def like(self, x: Array) -> Blocks:
        """Another array in the same format."""
        x = jnp.moveaxis(x, self.axis, -1).astype(jnp.promote_types(x.dtype, jnp.float32))
        parts = blocks(x, self.block)
        scales = jnp.max(jnp.abs(parts), axis=-1)
        parts = parts / jnp.where(scales > 0, scales, 1)[..., None]
        places = CODES[self.code].nearest(parts)
        if self.code == "unsigned":  # what is divided by does not become 0
            places = jnp.where((places == 0) & (parts > 0), jnp.uint8(1), places)
        places = _first(places.reshape(*x.shape[:-1], -1), self.size)
        if self.code == "int4":
            even, odd = jnp.moveaxis(blocks(places, 2), -1, 0)
            places = even << 4 | odd
        back = lambda y: jnp.moveaxis(y, -1, self.axis)
        return dataclasses.replace(self, codes=back(places), scales=back(scales.astype(jnp.float32)))

    @jax.jit
    def decode(self) -> Array:
        codes, scales = (jnp.moveaxis(x, self.axis, -1) for x in (self.codes, self.scales))
        if self.code == "int4":
            codes = jnp.stack([codes >> 4, codes & 15], axis=-1).reshape(*codes.shape[:-1], -1)
        values = blocks(CODES[self.code].values(_first(codes, self.size)), self.block)
        values = _first((values * scales[..., None]).reshape(*codes.shape[:-1], -1), self.size)
        return jnp.moveaxis(values, -1, self.axis)


def _first(x: Array, n: int) -> Array:
    return x if x.shape[-1] == n else x[..., :n]


def is_blocks(x: Any) -> bool:
    return isinstance(x, Blocks)


def quantized_state(
    inner: optax.GradientTransformation, *, block: int = 256, min_size: int = 4096
) -> optax.GradientTransformationExtraArgs:
    """A transformation that keeps the moments of another in 8 bits, a quarter of float32's bytes.

    What is quantized are the leaves of the state that have the place of a parameter; those called ``nu`` (and the like:
    squares, by which is divided) without signs. Of Adam that makes 2 bytes a parameter for 8.

    Around what GaLore and its relatives wrap, it quantizes the projected moments: 8-bit GaLore.

    Args:
      inner: the optimizer, ``optax.adamw(1e-3)``, say.
      block: entries that share a scale. Fewer cost more bits and round less.
      min_size: moments with fewer entries stay as they are: norms, biases. They cost nothing, and matter.

    >>> tx = jlora.optim.quantized_state(optax.adamw(1e-4))
    >>> tx = jlora.optim.galore(jlora.optim.quantized_state(optax.adamw(1e-2)), rank=128)

    The table and the block are bitsandbytes', whose code was read; its minimal size too. Departures: blocks lie along
    one axis of an array and not in its flattened order, so that the state is sharded as the weight it serves; second
    moments that are not 0 are not rounded to 0, by whose root the next step would be divided; what is updated is
    rounded once, after the step, as there.
    """
    for name, value, least in (("block", block, 1), ("min_size", min_size, 0)):
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"quantized_state({name}={value!r}): a whole number of at least {least} is wanted.")
    inner = optax.with_extra_args_support(inner)

    def init(params: PyTree) -> PyTree:
        state = inner.init(params)
        big = lambda leaf: bool(leaf.size >= min_size and leaf.ndim and jnp.issubdtype(leaf.dtype, jnp.floating))
        chosen = optax.tree_map_params(inner, big, state, transform_non_params=lambda _: False)
        known = fields(inner)

        def encoded(keys: tuple, leaf: Any, chosen: bool) -> Any:
            if not chosen:
                return leaf
            longest = max(range(leaf.ndim), key=lambda axis: (leaf.shape[axis], axis)) - leaf.ndim
            code = "unsigned" if is_second(keys, known) else "signed"
            leaf = jax.lax.optimization_barrier(leaf)  # of zeros, XLA would compute it all when it compiles
            return Blocks.encode(leaf, code, longest, min(block, leaf.shape[longest]))

        return jax.tree_util.tree_map_with_path(encoded, state, chosen)

    def update(updates: PyTree, state: PyTree, params: PyTree | None = None, **extra_args: Any) -> tuple:
        wide = jax.tree.map(lambda x: x.decode() if is_blocks(x) else x, state, is_leaf=is_blocks)
        out, new = inner.update(updates, wide, params, **extra_args)
        new = jax.tree.map(lambda old, x: old.like(x) if is_blocks(old) else x, state, new, is_leaf=is_blocks)
        return jax.tree.map(lambda u, g: u.astype(g.dtype), out, updates), new

    return optax.GradientTransformationExtraArgs(init, update)
