r"""ALLoRA: LoRA whose gradients shrink, output by output, as what it has added grows.

ALLoRA: Adaptive Learning Rate Mitigates LoRA Fatal Flaws. Huang and Balestriero, 2024.
https://arxiv.org/abs/2410.09692

.. math::  y = x W + s\,(x A) B, \qquad c_j = \bigl(\|s (A B)_{:j}\|_2 + 1 / \eta^2\bigr)^{-1/2}, \qquad
           \nabla A = s\, G\, \mathrm{diag}(c)\, B^\top, \quad \nabla B = s\, A^\top G\, \mathrm{diag}(c)

x [T, in], W [in, out] frozen, A [in, r], B [r, out] with LoRA's start, c [out]; G [in, out] = x^T ybar is the gradient
by the weight, which nobody forms, and ybar [T, out] that of the output. Trained: r (in + out) a matrix. The output is
LoRA's and so is the gradient of x: only **the gradients of A and B are others**, as if ybar were multiplied by c before
it reaches them. c is a constant in them, of the factors as they are.

* At the start, A B = 0, gradients are eta times those of LoRA; where a column has grown they fall with the root of its
  norm. eta takes the place of alpha: s is 1 unless alpha is given. The paper has neither scale nor dropout.
* c depends on A B alone. Norms come of A^T A: 2 r^2 (in + out) FLOPs. A second product of ybar with B, which x's
  gradient does not share, is 2 T r out; the forward pass costs LoRA's, where it is compiled: the same two products
  stand there twice and XLA keeps one. Used transposed, as a tied head, they are computed twice.
* Adam divides most of a channel's factor out again; how the paper pairs the two is not known here.

The formula was read in a third-party code that cites section 4.2 of the paper, and eta = 2 is such codes' choice; the
authors publish none that was found. ``jlora.optim.allora_approx`` comes near it from outside, for methods with pairs.

When to use it: short runs with gradient descent or momentum, where LoRA's B is slow to leave zero.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jlora.factors import Factors
from jlora.methods.base import contract, dropout, require
from jlora.methods.lora import LoRA
from jlora.weight import Context, Dot, Params


@dataclasses.dataclass(frozen=True)
class ALLoRA(LoRA):
    """LoRA with an adaptive learning rate. The formula and shapes are at the top of this file; the rest is LoRA's.

    Parameters of a leaf: trainable ``Factors(a [*stack, in, r], b [*stack, r, out])``.

    Attributes:
      alpha: numerator of the scale; None, the default, is for s = 1.
      eta: how much larger gradients are at the start. Raising it raises the rate of small changes only.
    """

    alpha: float | None = None
    _: dataclasses.KW_ONLY
    eta: float = 2.0

    def __post_init__(self):
        super().__post_init__()
        require(self.eta > 0, f"ALLoRA(eta={self.eta}): a positive number is wanted.")
        require(not self.varies, "ALLoRA has no ranks and alphas: take LoRA, or a tree with the layers apart.")

    def scale_of(self, rank: int, alpha: float | None = None) -> float:
        return 1.0 if self.alpha is None else super().scale_of(rank, alpha)

    def as_lora(self) -> LoRA:
        """What it is in use and in files: only training tells them apart."""
        own = {field.name: getattr(self, field.name) for field in dataclasses.fields(LoRA)}
        return LoRA(**own if self.alpha is not None else own | {"alpha": float(self.rank), "rslora": False})

    # A slice of the inputs has other norms.
    sliceable = frozenset({"out"})

    def rates(self, w: Float[Array, "in out"], p: Params) -> Float[Array, " out"]:
        """c."""
        f = self.factors(w, p)
        wide = jnp.promote_types(f.a.dtype, jnp.float32)
        a, b = jax.lax.stop_gradient((f.a.astype(wide), f.b.astype(wide)))
        with jax.default_matmul_precision("highest"):
            square = jnp.sum(contract(contract(a.T, a), b) * b, axis=0)
        return 1 / jnp.sqrt(abs(f.scale) * jnp.sqrt(jnp.maximum(square, 0)) + 1 / self.eta**2)

    def weight(self, w: Float[Array, "in out"], p: Params) -> Float[Array, "in out"]:
        f = self.factors(w, p)
        change = f.scale * (f.a.astype(w.dtype) @ f.b.astype(w.dtype))
        return w + jax.lax.stop_gradient(change) + self.rates(w, p).astype(w.dtype) * _gradient_only(change)

    def forward(self, dot: Dot, x: Array, w: Array, p: Params, ctx: Context) -> tuple[Array, Any]:
        f, rates = dot.per_matrix(self.factors, w, p), dot.per_matrix(self.rates, w, p)
        seen = x if dot.kind == "lookup" else dropout(x, self.dropout, ctx.key)
        learnt = _branch(dot, jax.lax.stop_gradient(seen), f)
        y = dot(x, w) + _branch(dot, seen, jax.lax.stop_gradient(f))
        return y + dot.per_output(_gradient_only(learnt), rates), None

    def forward_transposed(self, dot: Dot, x: Array, wt: Float[Array, "out in"], p: Params, ctx: Context) -> Array:
        f, rates = self.factors(wt.T, p).swap(), self.rates(wt.T, p)
        learnt = _branch(dot, jax.lax.stop_gradient(x * rates.astype(x.dtype)), f)
        return dot(x, wt) + _branch(dot, x, jax.lax.stop_gradient(f)) + _gradient_only(learnt)


def _branch(dot: Dot, x: Array, f: Factors) -> Array:
    return dot.outer(dot.inner(x, f.a) * f.scale, f.b)


def _gradient_only(y: Array) -> Array:
    """Zero, with the gradient of ``y``."""
    return y - jax.lax.stop_gradient(y)
