r"""Trainable tokens: some rows of an embedding are trained, the others are not.

.. math::  W'_{v:} = R_{k:} \text{ if } v \text{ is the } k\text{-th index, else } W_{v:}

W [in, out] the table (in the vocabulary) frozen, R [n, out] trained. Trained: n out a table. PEFT's
``trainable_token_indices`` and its method of the same name,
https://huggingface.co/docs/peft/package_reference/trainable_tokens.

* R starts as the rows that it replaces.
* Lookups and a tied head both see the new rows. Neither forms a second table: a lookup takes its rows from one of the
  two, the head computes n logits twice. The row numbers are part of the configuration, not parameters.
* On a matrix that is multiplied, these are the weights of some of its inputs.

When to use it: new tokens (of a dialogue format, say), or a few that mean something else now, beside adapters on the
rest.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jlora.methods.base import Method, Site, require, unsharded
from jlora.weight import Context, Dot, Params


@dataclasses.dataclass(frozen=True)
class TrainableTokens(Method):
    """Training of some rows. The formula and shapes are at the top of this file.

    Parameters of a leaf: trainable ``{"rows": [*stack, n, out]}``.

    Attributes:
      indices: the row numbers, each once, in the order of ``rows``.
    """

    indices: tuple[int, ...]

    sliceable = frozenset({"out"})

    def __post_init__(self):
        indices = tuple(map(int, self.indices))
        object.__setattr__(self, "indices", indices)
        require(len(indices) > 0, "TrainableTokens(indices=()): at least one row number is wanted.")
        require(
            min(indices) >= 0 and len(set(indices)) == len(indices),
            f"TrainableTokens(indices={indices}): row numbers are not negative, and each is named once.",
        )

    def check(self, site: Site) -> str | None:
        n_in = site.canonical_shape[1]
        if max(self.indices) >= n_in:
            return f"index {max(self.indices)} is beyond the {n_in} rows; the last is {n_in - 1}"
        return None

    def init(self, key: Any, w: Array, site: Site, dtype: Any) -> Params:
        return Params(trainable={"rows": unsharded(w)[self._at].astype(dtype)})

    @property
    def _at(self) -> np.ndarray:
        return np.asarray(self.indices)

    def count(self, site: Site) -> int:
        return site.stack * len(self.indices) * site.canonical_shape[2]

    def dims(self, p: Params) -> Params:
        return Params(trainable={"rows": "_ out"})

    def weight(self, w: Float[Array, "in out"], p: Params) -> Float[Array, "in out"]:
        new = unsharded(w).at[self._at].set(unsharded(p.trainable["rows"]).astype(w.dtype))
        sharding = jax.typeof(w).sharding
        return new if jax.typeof(new).sharding == sharding else jax.reshard(new, sharding)

    def forward(self, dot: Dot, x: Array, w: Array, p: Params, ctx: Context) -> tuple[Array, Any]:
        rows = p.trainable["rows"]
        if dot.kind == "lookup":
            # The place in `rows` of every row of the table, from 1, is looked up as the model looks up the table: ids
            # out of bounds go where they went.
            each = jnp.arange(1, len(self.indices) + 1, dtype=jnp.int32)
            places = jnp.zeros((w.shape[0], 1), jnp.int32).at[self._at, 0].set(each)
            place, y = dot.inner(x, places), dot(x, w)
            return jnp.where(place > 0, rows.astype(y.dtype)[place[..., 0] - 1], y), None
        if dot.kind != "linear":
            return dot(x, dot.per_matrix(self.weight, w, p)), None
        chosen = self._chosen(w.shape[0])
        some = x[..., self._at] if _whole(x) else dot.inner(x, chosen)
        others = jnp.where(chosen.any(axis=1), jnp.zeros((), x.dtype), x)
        return dot(others, w) + dot.outer(some, rows), None

    def forward_transposed(self, dot: Dot, x: Array, wt: Float[Array, "out in"], p: Params, ctx: Context) -> Array:
        y, rows = dot(x, wt), p.trainable["rows"]
        if _whole(x):
            return y.at[..., self._at].set(dot.outer(x, rows.T))
        chosen = self._chosen(wt.shape[1])
        return jnp.where(chosen.any(axis=1), dot.outer(dot.inner(x, rows.T), chosen.T), y)

    def _chosen(self, n_in: int) -> Array:
        """[in, n], one where the row is the one of the column's index."""
        return jnp.arange(n_in)[:, None] == self._at

    def describe(self) -> dict[str, str]:
        return {"rank": f"{len(self.indices)} rows"}


def _whole(x: Array) -> bool:
    """Whether parts of x can be taken and replaced: no axis is sharded by its type."""
    return all(entry is None for entry in jax.typeof(x).sharding.spec)
