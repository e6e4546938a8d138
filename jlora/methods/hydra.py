r"""Hydra: a low-rank branch beside a weight and another one behind it.

Hydra: Multi-head Low-rank Adaptation for Parameter Efficient Fine-tuning. Kim et al., 2023.
https://arxiv.org/abs/2309.06922

.. math::  y_0 = x W, \qquad y = y_0 + s\,(x A_p) B_p + s\,(y_0 A_s) B_s

x [..., in], W [in, out] frozen; A_p [in, r], B_p [r, out] and A_s [out, q], B_s [q, out] trained. Trained:
r (in + out) + 2 q out a matrix.

* It merges exactly: W' = W + s (A_p B_p + W A_s B_s), and as a pair of plain LoRA it has rank r + q. That pair holds
  W A_s, an [in, q] product with the weight, so it is formed for merging and for convolutions only: behind the weight
  q numbers a token are enough.
* A_p and A_s are uniform in +-1/sqrt(in) and +-1/sqrt(out), B_p = B_s = 0 (as in the authors' language models; their
  vision models start from Xavier's bounds, with s = 0.1): the output starts as the base's. An embedding has A_p = 0 and
  B_p normal of deviation 1, as LoRA's.
* The sequential branch of the paper sees y_0 + bias, this one y_0: a layer's bias is a leaf of its own.
  ``Follow(group=path of the weight, method=the same Hydra)`` on the bias makes it the paper's,
  b' = b + s (b A_s) B_s. A bias inside of the branches, which the vision models have, merges into b as well:
  train b (``Full``) for that.
* With feature groups, a convolution's sequential branch mixes the columns of the kernel, as the merged one does.
* The authors' code merges the attention projection with the MLP's weight and bias in the place of its own. Each weight
  has its own here.

When to use it: output projections and the second layer of an MLP, where the paper has it: the sequential branch works
on features that the model already has. With q = 0 it is LoRA, with r = 0 a linear adapter behind the layer.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jlora.factors import Factors
from jlora.methods.base import Method, Site, check_rank, dropout, laid_as, require
from jlora.weight import Context, Dot, Params


@dataclasses.dataclass(frozen=True)
class Hydra(Method):
    """Parallel and sequential low-rank adaptation. The formula and shapes are at the top of this file.

    Parameters of a leaf: trainable ``{"parallel": Factors(a [*stack, in, r], b [*stack, r, out]), "sequential":
    Factors(a [*stack, out, q], b [*stack, q, out])}``, without a branch of rank 0.

    Attributes:
      rank: r, of the parallel branch.
      sequential: q, of the sequential branch; by default r.
      scale: s, as it is: not divided by a rank.
      dropout: rate, on the r and q features between the factors. Active exactly when the tree was bound with a key.
    """

    rank: int = 8
    _: dataclasses.KW_ONLY
    sequential: int | None = None
    scale: float = 1.0
    dropout: float = 0.0

    sliceable = frozenset({"in"})  # the sequential branch sees all outputs

    def __post_init__(self):
        ranks = self.ranks
        require(
            all(isinstance(r, int) and r >= 0 for r in ranks) and max(ranks) > 0,
            f"Hydra(rank={ranks[0]!r}, sequential={ranks[1]!r}): ranks are integers, at least one of them not "
            "0, 2 to 64 as a rule.",
        )
        require(0.0 <= self.dropout < 1.0, f"Hydra(dropout={self.dropout}): a rate in [0, 1) is wanted.")

    @property
    def ranks(self) -> tuple[int, int]:
        """r and q."""
        return self.rank, self.rank if self.sequential is None else self.sequential

    def check(self, site: Site) -> str | None:
        n_out, q = site.canonical_shape[2], self.ranks[1]
        if q > n_out:
            return f"sequential rank {q} is above the {n_out} outputs; choose at most {n_out}"
        return check_rank(self.rank, site)

    def init(self, key: Any, w: Array, site: Site, dtype: Any) -> Params:
        (n_in, n_out), (r, q) = w.shape, self.ranks
        keys, p = jax.random.split(key), {}
        uniform = lambda key, n, r: jax.random.uniform(key, (n, r), dtype, -(n**-0.5), n**-0.5)
        if r and site.axes.kind == "embedding":
            b = jax.random.normal(keys[0], (r, n_out), dtype)
            p["parallel"] = Factors(jnp.zeros((n_in, r), dtype), b, self.scale)
        elif r:
            p["parallel"] = Factors(uniform(keys[0], n_in, r), jnp.zeros((r, n_out), dtype), self.scale)
        if q:
            p["sequential"] = Factors(uniform(keys[1], n_out, q), jnp.zeros((q, n_out), dtype), self.scale)
        return Params(trainable=p)

    def count(self, site: Site) -> int:
        (_, n_in, n_out), (r, q) = site.canonical_shape, self.ranks
        return site.stack * (r * (n_in + n_out) + 2 * q * n_out)

    def dims(self, p: Params) -> Params:
        names = {"parallel": ("in rank", "rank out"), "sequential": ("out rank", "rank out")}
        return Params(trainable={branch: Factors(*names[branch], f.scale) for branch, f in p.trainable.items()})

    def factors(self, w: Float[Array, "in out"], p: Params) -> Factors:
        pairs = []
        if "parallel" in p.trainable:
            pairs.append(laid_as(w, p.trainable["parallel"].a, p.trainable["parallel"].b))
        if "sequential" in p.trainable:
            f = p.trainable["sequential"]
            behind = jnp.matmul(w, f.a.astype(w.dtype), preferred_element_type=jnp.promote_types(w.dtype, f.a.dtype))
            pairs.append(laid_as(w, behind, f.b))
        a, b = (jnp.concatenate(parts, axis) for parts, axis in zip(zip(*pairs, strict=True), (1, 0), strict=True))
        return Factors(a, b, self.scale)

    def follow(self, b: Float[Array, "1 out"], p: Params) -> Float[Array, "1 out"]:
        f = p.trainable.get("sequential")
        return b if f is None else b + f.scale * (b @ f.a.astype(b.dtype)) @ f.b.astype(b.dtype)

    def forward(self, dot: Dot, x: Array, w: Array, p: Params, ctx: Context) -> tuple[Array, Any]:
        drops = ctx.key is not None and self.dropout > 0.0
        keys = jax.random.split(ctx.key) if drops else (None, None)
        through = lambda h, f, key: dot.outer(dropout(h, self.dropout, key) * f.scale, f.b)
        base = y = dot(x, w)
        if dot.kind == "conv":
            f = self.factors(w, p)
            return y + through(dot.inner(x, f.a), f, keys[0]), None
        if "parallel" in p.trainable:
            f = p.trainable["parallel"]
            y = y + through(dot.inner(x, f.a), f, keys[0])
        if "sequential" in p.trainable:
            f = p.trainable["sequential"]
            y = y + through(dot.mix(base, f.a), f, keys[1])
        return y.astype(base.dtype), None

    def forward_transposed(self, dot: Dot, x: Array, wt: Float[Array, "out in"], p: Params, ctx: Context) -> Array:
        behind = x
        if "sequential" in p.trainable:
            f = p.trainable["sequential"].swap()
            behind = x + dot.mix(dot.mix(x, f.a) * f.scale, f.b)
        y = dot(behind, wt)
        if "parallel" in p.trainable:
            f = p.trainable["parallel"].swap()
            y = y + dot.outer(dot.inner(x, f.a) * f.scale, f.b)
        return y

    def describe(self) -> dict[str, str]:
        return {"rank": "+".join(map(str, self.ranks)), "scale": f"{self.scale:g}"}
