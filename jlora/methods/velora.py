r"""VeLoRA: LoRA that keeps, of its input, one number for each group of features until the backward pass.

VeLoRA: Memory Efficient Training using Rank-1 Sub-Token Projections. Miles et al., 2024.
https://arxiv.org/abs/2405.17991

.. math::  h = \mathrm{drop}(x) A, \quad y = x W + s\, h B, \qquad
           z_{tg} = \langle \mathrm{drop}(x)_{t(g)}, v \rangle, \quad
           \nabla A_{(g)} \approx \lambda\, v\, \bigl(\textstyle\sum_t z_{tg} \bar h_t\bigr)

x [T, in] is cut into G groups of d = ceil(in / G) features (the last one padded by zeros), x_(g) [T, d], and so are the
rows of A [in, r]; v [d] has norm 1, z [T, G], and hbar [T, r] is the gradient of h. W [in, out] frozen, B [r, out].
Trained: r (in + out) a matrix, with LoRA's start, scale s and result: only **the gradient of A is another one**, that
of an input of which each group is its projection on v. Those of B and of x are exact.

* v is the mean of all groups of all tokens, normalized, of each batch anew (``direction="average"``, the default and
  PEFT's), or a frozen vector, random at the start (``"fixed"``; PEFT's ``random``). PEFT's ``batch_average_once`` sets
  the latter from the first batch; files with it are read.
* Stored for the backward pass are T G numbers in the place of T in; what the frozen part of the model stores anyway
  (the input of a nonlinearity, say) does not go away. A's gradient costs T G r products in the place of T in r.
* Convolutions and experts have LoRA's exact gradient here: the paper has no groups for them.

Read in PEFT's code, whose recorded gradients are reproduced.

When to use it: where activations are what fills the memory, and checkpointing costs too much time.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jlora.methods.base import Site, contract, dropout, require, unsharded
from jlora.methods.lora import LoRA
from jlora.weight import Context, Dot, Params


@dataclasses.dataclass(frozen=True)
class VeLoRA(LoRA):
    """LoRA with compressed activations. The formula and shapes are at the top of this file; the rest is LoRA's.

    Parameters of a leaf: trainable ``Factors(a [*stack, in, r], b [*stack, r, out])``; with ``direction="fixed"``
    frozen ``{"direction": [*stack, d]}``.

    Attributes:
      groups: G. More is closer to the exact gradient, and at ``in`` it is exact.
      gain: lambda.
      direction: what v is, "average" or "fixed".
    """

    _: dataclasses.KW_ONLY
    groups: int = 64
    gain: float = 1.0
    direction: str = "average"

    def __post_init__(self):
        super().__post_init__()
        require(self.groups > 0, f"VeLoRA(groups={self.groups}): a positive number is wanted.")
        require(self.gain > 0, f"VeLoRA(gain={self.gain}): a positive number is wanted.")
        require(
            self.direction in ("average", "fixed"),
            f"VeLoRA(direction={self.direction!r}): 'average' or 'fixed' is wanted.",
        )
        require(not self.varies, "VeLoRA has no ranks and alphas: take LoRA, or a tree with the layers apart.")

    def check(self, site: Site) -> str | None:
        n_in = site.canonical_shape[1]
        if site.axes.kind == "embedding":
            return "a lookup has no activations to compress; use LoRA"
        if self.groups > n_in:
            return f"{self.groups} groups of {n_in} features; choose at most {n_in}"
        return super().check(site)

    def init(self, key: Any, w: Array, site: Site, dtype: Any) -> Params:
        p = super().init(key, w, site, dtype)
        if self.direction == "average":
            return p
        v = jax.random.normal(jax.random.fold_in(key, 1), (-(-w.shape[0] // self.groups),), dtype)
        return p._replace(frozen={"direction": _normalized(v)})

    def dims(self, p: Params) -> Params:
        return super().dims(p)._replace(frozen={"direction": "_"} if self.direction == "fixed" else None)

    # A slice of the inputs has other groups.
    sliceable = frozenset({"out"})

    def forward(self, dot: Dot, x: Array, w: Array, p: Params, ctx: Context) -> tuple[Array, Any]:
        if dot.kind != "linear":
            return super().forward(dot, x, w, p, ctx)
        f, dropped = p.trainable, dropout(x, self.dropout, ctx.key)
        seen = jax.lax.stop_gradient(dropped)
        v = (p.frozen["direction"] if p.frozen else _average(seen, self.groups)).astype(x.dtype)
        # Zero, with the gradient that A is to have: of all that it multiplies only z is kept.
        moved = (f.a - jax.lax.stop_gradient(f.a)).astype(x.dtype)
        along = jnp.einsum("gdr,d->gr", _groups(unsharded(moved), self.groups), self.gain * v)
        h = dot.inner(dropped, jax.lax.stop_gradient(f.a)) + contract(_compressed(seen, v, self.groups), along)
        return dot(x, w) + dot.outer(h * f.scale, f.b), None


def _groups(rows: Float[Array, "in *r"], groups: int) -> Float[Array, "groups d *r"]:
    size = -(-rows.shape[0] // groups)
    pad = [(0, groups * size - rows.shape[0])] + [(0, 0)] * (rows.ndim - 1)
    return jnp.pad(rows, pad).reshape(groups, size, *rows.shape[1:])


def _average(x: Float[Array, "*t in"], groups: int) -> Float[Array, " d"]:
    features = jnp.mean(x, axis=tuple(range(x.ndim - 1)), dtype=jnp.promote_types(x.dtype, jnp.float32))
    return _normalized(_groups(unsharded(features), groups).mean(0))


def _normalized(v: Float[Array, " d"]) -> Float[Array, " d"]:
    v = jnp.where(jnp.any(v != 0), v, jnp.ones_like(v))
    return v / jnp.linalg.norm(v)


def _compressed(x: Float[Array, "*t in"], v: Float[Array, " d"], groups: int) -> Float[Array, "*t groups"]:
    """z."""
    *tokens, n_in = x.shape
    if n_in == groups * v.shape[0] and jax.typeof(x).sharding.spec[-1] is None:
        return jnp.matmul(x.reshape(*tokens, groups, v.shape[0]), v)
    # A product with a matrix that has v in the diagonal of its blocks: groups that do not come out even, or whose
    # features lie on several devices, would have to be moved.
    blocks = jnp.kron(jnp.eye(groups, dtype=v.dtype), v[:, None])
    return contract(x, blocks[:n_in])
