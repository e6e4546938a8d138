r"""OSF: everything of a weight but its strongest singular directions is trained, and only orthogonally to those.

Sculpting Subspaces: Constrained Full Fine-Tuning in LLMs for Continual Learning. Nayak et al., 2025.
https://arxiv.org/abs/2504.07097

.. math::  W' = A_h S_h B_h + \Pi_A(A)\, \mathrm{diag}(s)\, \Pi_B(B), \qquad
           \Pi_A(A) = A - A_h A_h^\top A, \quad \Pi_B(B) = B - B B_h^\top B_h

W = U S V^T by singular values, [in, out], m = min(in, out): A_h [in, k], S_h [k] and B_h [k, out] are its first k
triples, frozen; A [in, m - k], s [m - k] and B [m - k, out] start as the others, and are trained. So the output starts
as the base's. Trained: (m - k) (in + out + 1) a matrix, which may be more than in out: this is full fine-tuning.

* The strongest directions carry what a model has learned: W' maps the span of A_h on that of B_h as W does, whatever
  is trained. After a task, merge and ``adapt`` again, and the new task is held off from what matters by then.
  ``jlora.rank.sculpting`` gives each weight a k of its own for a task, as the paper does.
* The constraint is part of the formula, so it holds under every optimizer, and gradients are projected by themselves;
  ``project`` moves the parameters themselves to where they count. Without ``constrained``, as in PEFT, only gradients
  are projected, and Adam, momentum and weight decay leave the subspace: PEFT's files are read as that.
* It runs as W plus a pair of rank 2 (m - k), [A - A_0, A_0] [s B; s B - s_0 B_0], where A_0, s_0 and B_0 are the start:
  nothing is decomposed again, W keeps its own precision, and the pair starts at zero exactly. Where it would cost more
  FLOPs than W itself, which is the case at PEFT's k = m / 2, the weight is formed, and formed again for the gradient.
* On the shorter side of W, A_h or B_h is the complement of A_0 or B_0 and not kept.

When to use it: tasks one after the other, without forgetting. It takes memory for more than a second weight, and the
optimizer's for that: not for a single task.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jlora.factors import Factors
from jlora.methods.base import Method, Site, at_most, laid_as, require, unsharded
from jlora.weight import Context, Dot, Params


@dataclasses.dataclass(frozen=True)
class OSF(Method):
    """Orthogonal subspace fine-tuning. The formula and shapes are at the top of this file.

    Parameters of a leaf: trainable ``{"a": [*stack, in, m - k], "s": [*stack, m - k], "b": [*stack, m - k, out]}``;
    frozen ``{"a0", "s0", "b0"}``, where they started, and, where in and out differ, ``"high"``, the directions that are
    kept on the longer side, [*stack, in, k] or [*stack, k, out].

    Attributes:
      kept: k, how many singular directions stay: a number, or a share of m. A larger one forgets and learns less.
      constrained: hold the parameters to the complement of what is kept, and not only their gradients.
    """

    kept: int | float = 0.5
    _: dataclasses.KW_ONLY
    constrained: bool = True

    def __post_init__(self):
        share = isinstance(self.kept, float) and 0.0 < self.kept < 1.0
        require(
            share or (isinstance(self.kept, int) and self.kept > 0),
            f"OSF(kept={self.kept!r}): a positive integer is wanted, or a share between 0 and 1, 0.5 as a rule.",
        )

    def kept_of(self, n_in: int, n_out: int) -> int:
        """k of a matrix."""
        return self.kept if isinstance(self.kept, int) else int(min(n_in, n_out) * self.kept)

    def check(self, site: Site) -> str | None:
        _, n_in, n_out = site.canonical_shape
        if self.kept_of(n_in, n_out) >= min(n_in, n_out):
            most = min(n_in, n_out) - 1
            of = f"kept={self.kept} leaves none of the {most + 1} singular directions to train"
            return f"{of}; {at_most(most, 'kept')}"
        return None

    def init(self, key: Any, w: Array, site: Site, dtype: Any) -> Params:
        return self.decomposed(unsharded(w).astype(dtype))

    def decomposed(self, w: Float[Array, "in out"]) -> Params:
        """The start, for a weight."""
        with jax.default_matmul_precision("highest"):
            u, s, vh = jnp.linalg.svd(w, full_matrices=False)
        k = self.kept_of(*w.shape)
        low = {"a": u[:, k:], "s": s[k:], "b": vh[k:]}
        frozen = {f"{name}0": leaf for name, leaf in low.items()}
        if w.shape[0] != w.shape[1]:
            frozen["high"] = u[:, :k] if w.shape[0] > w.shape[1] else vh[:k]
        return Params(low, frozen)

    def count(self, site: Site) -> int:
        _, n_in, n_out = site.canonical_shape
        return site.stack * (min(n_in, n_out) - self.kept_of(n_in, n_out)) * (n_in + n_out + 1)

    def dims(self, p: Params) -> Params:
        low = {"a": "in rank", "s": "rank", "b": "rank out"}
        frozen = {f"{name}0": names for name, names in low.items()}
        if "high" in p.frozen:
            frozen["high"] = "in _" if self._longer_in(p) else "_ out"
        return Params(low, frozen)

    def _longer_in(self, p: Params) -> bool:
        return p.trainable["a"].shape[-2] > p.trainable["b"].shape[-1]

    def project(self, p: Params) -> Any:
        if not self.constrained:
            return p.trainable
        moves = self._projected
        for _ in range(p.trainable["s"].ndim - 1):
            moves = jax.vmap(moves)
        return p.trainable | {
            name: p.frozen[f"{name}0"] + move for name, move in moves(p._replace(shared=None)).items()
        }

    def _projected(self, p: Params) -> dict[str, Array]:
        """How far A and B have moved orthogonally to what is kept."""
        start = {name: p.frozen[f"{name}0"].astype(p.trainable[name].dtype) for name in "ab"}
        a, b = (p.trainable[name] - start[name] for name in "ab")
        high_in, high_out = p.frozen.get("high"), None
        if high_in is not None and not self._longer_in(p):
            high_in, high_out = None, high_in.T
        return {"a": _complement(a, start["a"], high_in), "b": _complement(b.T, start["b"].T, high_out).T}

    def moves(self, p: Params) -> dict[str, Array]:
        """How far A and B of the formula have moved. Unconstrained, as far as the parameters, with their gradients
        projected."""
        projected = self._projected(p)
        if self.constrained:
            return projected
        free = {name: p.trainable[name] - p.frozen[f"{name}0"].astype(p.trainable[name].dtype) for name in projected}
        return {name: to + jax.lax.stop_gradient(free[name] - to) for name, to in projected.items()}

    def pairs(self, p: Params) -> tuple[Array, Array, Array, Array]:
        """The two products that are added to W. With A = A_0 + dA, (dA) (s B) + A_0 (s B - s_0 B_0): exactly 0 at the
        start."""
        moves, s = self.moves(p), p.trainable["s"][:, None]
        a0, b0, s0 = (p.frozen[name].astype(s.dtype) for name in ("a0", "b0", "s0"))
        b = s * (b0 + moves["b"])
        return moves["a"], b, a0, b - s0[:, None] * b0

    def pair(self, w: Float[Array, "in out"], p: Params) -> Factors:
        """The two as one, at any rank."""
        a1, b1, a2, b2 = self.pairs(p)
        return Factors(jnp.concatenate([a1, a2], axis=1), jnp.concatenate([b1, b2], axis=0))

    def factors(self, w: Float[Array, "in out"], p: Params) -> Factors | None:
        return self.pair(w, p) if 2 * p.trainable["s"].shape[-1] * sum(w.shape) <= math.prod(w.shape) else None

    def weight(self, w: Float[Array, "in out"], p: Params) -> Float[Array, "in out"]:
        a1, b1, a2, b2 = self.pairs(p)
        (a1, b1), (a2, b2) = laid_as(w, a1, b1), laid_as(w, a2, b2)
        mul = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
        return (w + mul(a1, b1) + mul(a2, b2)).astype(w.dtype)

    def forward(self, dot: Dot, x: Array, w: Array, p: Params, ctx: Context) -> tuple[Array, Any]:
        f = dot.per_matrix(self.pair if dot.kind == "lookup" else self.factors, w, p)
        if f is not None:
            return dot.factored(x, w, f, ctx), None
        return jax.checkpoint(lambda x, w, p: dot(x, dot.per_matrix(self.weight, w, p)))(x, w, p), None

    def forward_transposed(self, dot: Dot, x: Array, wt: Float[Array, "out in"], p: Params, ctx: Context) -> Array:
        f = self.factors(wt.T, p)
        if f is not None:
            return dot.factored(x, wt, f.swap(), ctx)
        return jax.checkpoint(lambda x, wt, p: dot(x, self.weight(wt.T, p).T))(x, wt, p)

    def describe(self) -> dict[str, str]:
        return {"rank": f"all but {self.kept}"}


def _complement(
    a: Float[Array, "n j"], low: Float[Array, "n j"], high: Float[Array, "n k"] | None
) -> Float[Array, "n j"]:
    """The columns of a without what they have along the kept directions: those are given, or all that is not low."""
    mul = lambda x, y: jnp.matmul(x, y, precision=jax.lax.Precision.HIGHEST)
    if high is None:
        low = low.astype(a.dtype)
        return mul(low, mul(low.T, a))
    high = high.astype(a.dtype)
    return a - mul(high, mul(high.T, a))
