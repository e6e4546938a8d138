r"""PaCA: a few rows of the weight itself are trained, those of inputs drawn at random.

PaCA: Partial Connection Adaptation for Efficient Fine-Tuning. Woo et al., 2025. https://arxiv.org/abs/2503.01905

.. math::  W'_{k_j :} = s\,P_{j:}, \qquad j = 1 \ldots r, \qquad s = \alpha / r, \qquad W' = W \text{ elsewhere}

W [in, out] frozen; P [r, out] trained; the r different rows k frozen. Trained: r out a matrix, about half of LoRA's. P
starts at W[k] / s, so the output starts as the base's, and its gradient is s times the rows k of the gradient of W.

* The authors write P into W once a step and multiply by the result; here y = x W + x[..., k] (s P - W[k]), which is
  the same. It costs 4 T r out FLOPs for T tokens on top of PaCA's own 2 T r out, which is little (r / in of the frozen
  model's), where a W' of its own would be one more [in, out] array a layer to write and to keep for the backward pass.
  The paper's point holds: of the input, nothing but x[..., k], [T, r], is kept for the gradient.
* As a pair it is LoRA of rank r whose A picks inputs, and exports so exactly. Merging sets the rows.
* With s other than 1 a step of Adam moves the rows s times as far, one of SGD s^2 times. The default is s = 1.
* For other than random rows (the authors' code names the gradient's and the weight's largest) replace the frozen
  ``rows``, sorted, and with them P by W[rows] / s.

When to use it: for the shortest step and the least memory of activations; as the rows are drawn, it wants more of them
than LoRA wants ranks.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from jlora.factors import Factors
from jlora.methods.base import Method, Site, require, unsharded
from jlora.weight import Context, Dot, Params


@dataclasses.dataclass(frozen=True)
class PaCA(Method):
    """Partial connection adaptation. The formula and shapes are at the top of this file.

    Parameters of a leaf: trainable ``{"p": [*stack, r, out]}``, frozen ``{"rows": [*stack, r]}``, int32, in order.

    Attributes:
      rank: r, the number of trained rows.
      alpha: numerator of the scale.
    """

    rank: int = 8
    alpha: float = 8.0

    sliceable = frozenset({"out"})

    def __post_init__(self):
        require(
            isinstance(self.rank, int) and self.rank > 0,
            f"PaCA(rank={self.rank!r}): a positive number of rows is wanted, 8 to 64 as a rule.",
        )
        require(self.alpha != 0, "PaCA(alpha=0): the rows are divided by the scale alpha / rank.")

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def check(self, site: Site) -> str | None:
        if site.axes.kind == "embedding":
            return (
                "PaCA trains rows drawn at random, and those of an embedding are tokens; choose them: TrainableTokens"
            )
        n_in = site.canonical_shape[1]
        if self.rank > n_in:
            return f"rank {self.rank} is above in = {n_in}; choose a rank of at most {n_in}"

    def init(self, key: Any, w: Array, site: Site, dtype: Any) -> Params:
        rows = jnp.sort(jax.random.permutation(key, w.shape[0])[: self.rank]).astype(jnp.int32)
        return Params({"p": unsharded(w)[rows].astype(dtype) / self.scale}, {"rows": rows})

    def count(self, site: Site) -> int:
        return site.stack * self.rank * site.canonical_shape[2]

    def dims(self, p: Params) -> Params:
        return Params({"p": "rank out"}, {"rows": "rank"})

    def change(self, w: Float[Array, "in out"], p: Params) -> Float[Array, "r out"]:
        """s P - W[k]."""
        rows = _take(w, p.frozen["rows"], 0)
        return self.scale * _as_columns_of(w, p.trainable["p"]) - rows.astype(p.trainable["p"].dtype)

    def factors(self, w: Float[Array, "in out"], p: Params) -> Factors:
        b = self.change(w, p)
        picks = p.frozen["rows"] == jnp.arange(w.shape[0], dtype=jnp.int32)[:, None]
        return Factors(picks.astype(b.dtype), b)

    def weight(self, w: Float[Array, "in out"], p: Params) -> Float[Array, "in out"]:
        rows = self.scale * _as_columns_of(w, p.trainable["p"])
        spec = jax.typeof(w).sharding.spec
        sharding = None if all(axis is None for axis in spec) else PartitionSpec(*spec)
        return w.at[p.frozen["rows"]].set(
            rows.astype(w.dtype), indices_are_sorted=True, unique_indices=True, out_sharding=sharding
        )

    def forward(self, dot: Dot, x: Array, w: Array, p: Params, ctx: Context) -> tuple[Array, Any]:
        if dot.kind != "linear" or not dot.features_last(x):
            return super().forward(dot, x, w, p, ctx)
        return dot(x, w) + dot.outer(_take(x, p.frozen["rows"], x.ndim - 1), self.change(w, p)), None

    def describe(self) -> dict[str, str]:
        return {"rank": str(self.rank), "scale": f"{self.scale:g}"}


def _take(x: Array, rows: Array, axis: int) -> Array:
    """The given entries of an axis, in order and none twice. The other axes stay sharded as their types say."""
    spec = [entry if i != axis else None for i, entry in enumerate(jax.typeof(x).sharding.spec)]
    sharding = None if all(entry is None for entry in jax.typeof(x).sharding.spec) else PartitionSpec(*spec)
    at = (slice(None),) * axis + (rows,)
    return x.at[at].get(indices_are_sorted=True, unique_indices=True, mode="promise_in_bounds", out_sharding=sharding)


def _as_columns_of(w: Array, rows: Float[Array, "r out"]) -> Float[Array, "r out"]:
    """``rows`` sharded along out as ``w`` is by its type."""
    n_out = jax.typeof(w).sharding.spec[1]
    return rows if n_out is None else jax.reshard(rows, PartitionSpec(None, n_out))
