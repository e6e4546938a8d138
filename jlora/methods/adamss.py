r"""AdaMSS: the outputs of a weight are sorted into groups that are alike, and each group has a small pair of its own.

AdaMSS: Adaptive Multi-Subspace Approach for Parameter-Efficient Fine-Tuning. Zheng et al., 2025.
https://openreview.net/forum?id=8ZdWmpYxT0

.. math::  \Delta W_{:, o} = P\, A_{k(o)}\, b_o, \qquad W \approx P\, \Sigma\, Q^\top

W [in, out]; P [in, R] its first R left singular vectors, k(o) in 1 ... K the group of output o, both frozen; A_k [R, r]
and b_o [r] trained. Trained: K R r + r out a matrix.

* The groups are clusters of the rows of Q [out, R], as they are, by ten rounds of k-means. The first centre is the
  longest row, every next the one farthest from those before: nothing is drawn.
* A_k starts as the first r principal directions of its group's rows of Q, orthonormal, and b at 0: the output starts as
  the base's.
* It runs as one pair of rank K r, [P A_1 ... P A_K] and the b_o each in the rows of its group: at K = 5 and r = 1 it
  costs what LoRA of rank 5 costs, and it exports to plain LoRA of that rank exactly.
* The paper stops training the less important groups as it goes on, by gradients; this is the variant that keeps all,
  PEFT's default. A group of fewer than r outputs has r directions here, fewer there. PEFT's bias is one more input and
  changes, too; here it stays.
* PEFT's files are neither read nor written: the groups are not in them. PEFT clusters the base anew when it reads one,
  from random numbers of two libraries, so nobody else can know which outputs a file speaks of. Merge there.

When to use it: fewer trained numbers than LoRA's of the same rank, R in place of ``in`` to a direction.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jlora.factors import Factors
from jlora.methods.base import Method, Site, require, unsharded
from jlora.weight import Params

_ROUNDS = 10


@dataclasses.dataclass(frozen=True)
class AdaMSS(Method):
    """Multi-subspace adaptation. The formula and shapes are at the top of this file.

    Parameters of a leaf: trainable ``{"a": [*stack, K, R, r], "b": [*stack, out, r]}``, frozen ``{"basis": [*stack, in,
    R], "group_of": [*stack, out]}``, P and k, int32, from 0.

    Attributes:
      rank: R, how many singular vectors stand for the inputs; all where a matrix has fewer.
      subspaces: K, how many groups of outputs there are.
      subspace_rank: r, of every group's own pair. 1 to 4.
    """

    rank: int = 100
    _: dataclasses.KW_ONLY
    subspaces: int = 5
    subspace_rank: int = 1

    sliceable = frozenset({"in", "out"})

    def __post_init__(self):
        for field in ("rank", "subspaces", "subspace_rank"):
            value = getattr(self, field)
            require(isinstance(value, int) and value > 0, f"AdaMSS({field}={value!r}): a positive integer is wanted.")
        require(
            self.subspace_rank <= self.rank,
            f"AdaMSS(subspace_rank={self.subspace_rank}) is above rank={self.rank}; choose at most that.",
        )

    def check(self, site: Site) -> str | None:
        n_out = site.canonical_shape[2]
        if self.subspaces > n_out:
            return f"{n_out} outputs make no {self.subspaces} groups; choose at most {n_out} subspaces"
        most = min(self.rank, *site.canonical_shape[1:])
        if self.subspace_rank > most:
            return f"subspace_rank={self.subspace_rank} is above the {most} singular vectors; choose at most {most}"
        return None

    def init(self, key: Any, w: Array, site: Site, dtype: Any) -> Params:
        wide = jnp.promote_types(dtype, jnp.float32)
        with jax.default_matmul_precision("highest"):
            u, _, vh = jnp.linalg.svd(unsharded(w).astype(wide), full_matrices=False)
            rows = vh[: self.rank].T
            group_of = clusters(rows, self.subspaces)
            own = jnp.arange(self.subspaces)[:, None] == group_of
            # The principal directions of a group's rows are eigenvectors of what they sum up to, the last the largest.
            _, z = jnp.linalg.eigh(jnp.einsum("or,ko,os->krs", rows, own.astype(wide), rows))
        a = z[:, :, ::-1][:, :, : self.subspace_rank].astype(dtype)
        b = jnp.zeros((w.shape[1], self.subspace_rank), dtype)
        return Params({"a": a, "b": b}, {"basis": u[:, : self.rank].astype(dtype), "group_of": group_of})

    def count(self, site: Site) -> int:
        _, n_in, n_out = site.canonical_shape
        return site.stack * self.subspace_rank * (self.subspaces * min(self.rank, n_in, n_out) + n_out)

    def dims(self, p: Params) -> Params:
        return Params({"a": "_ _ rank", "b": "out rank"}, {"basis": "in _", "group_of": "out"})

    def factors(self, w: Float[Array, "in out"], p: Params) -> Factors:
        a, b = p.trainable["a"], p.trainable["b"]
        k, r = a.shape[0], a.shape[2]
        own = jnp.arange(k)[:, None] == p.frozen["group_of"]
        # The pair is a sum over few singular vectors: cheap, and not where precision should be lost.
        directions = jnp.einsum(
            "iR,kRr->ikr", p.frozen["basis"].astype(a.dtype), a, precision=jax.lax.Precision.HIGHEST
        )
        b = jnp.where(own[:, None, :], b.T, jnp.zeros((), b.dtype))
        return Factors(directions.reshape(-1, k * r), b.reshape(k * r, -1))

    def describe(self) -> dict[str, str]:
        return {"rank": f"{self.subspaces} x {self.subspace_rank}"}


def clusters(rows: Float[Array, "n R"], count: int) -> Int[Array, " n"]:
    """The number of each row's cluster, by k-means from a start that is not drawn."""
    lengths = jnp.sum(jnp.square(rows), axis=1)
    apart = lambda c: lengths[:, None] - 2 * rows @ c.T + jnp.sum(jnp.square(c), axis=1)  # [n, centres]
    first = jnp.argmax(lengths)
    centres = jnp.zeros((count, rows.shape[1]), rows.dtype).at[0].set(rows[first])

    def choose(i: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        centres, nearest = carry
        new = rows[jnp.argmax(nearest)]
        return centres.at[i].set(new), jnp.minimum(nearest, apart(new[None])[:, 0])

    centres, _ = jax.lax.fori_loop(1, count, choose, (centres, apart(centres[:1])[:, 0]))

    def step(_: Array, centres: Array) -> Array:
        own = (jnp.argmin(apart(centres), axis=1)[None] == jnp.arange(count)[:, None]).astype(rows.dtype)
        members = jnp.sum(own, axis=1, keepdims=True)
        return jnp.where(members > 0, own @ rows / jnp.maximum(members, 1), centres)

    return jnp.argmin(apart(jax.lax.fori_loop(0, _ROUNDS, step, centres)), axis=1).astype(jnp.int32)
