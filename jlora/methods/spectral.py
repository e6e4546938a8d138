r"""A small matrix of few numbers between the leading singular vectors of a weight: TinyLoRA and PSOFT.

TinyLoRA: Learning to Reason in 13 Parameters. Morris et al., 2026. https://arxiv.org/abs/2602.04118
PSOFT: Efficient Orthogonal Fine-Tuning with Principal Subspace Adaptation. Wu et al., 2025.
https://arxiv.org/abs/2505.11235

.. math::  y = x W + \bigl((\mathrm{drop}(x) A) M\bigr) B

W [in, out] frozen, with leading singular triples U [in, r], S [r], V^T [r, out]; A [in, r] and B [r, out] made of them,
frozen; M [r, r] is not stored, it is made of what is trained.

========  ====================  ===============  ==========================================  ==========================
method    A                     B                M                                           trained
========  ====================  ===============  ==========================================  ==========================
TinyLoRA  U sqrt(S)             sqrt(S) V^T      sum_i v_i P_i                               v [u], with or without
                                                                                             others of its group
PSOFT     U                     S V^T            diag(g) R diag(h) - I,                      q [r (r - 1) / 2], and
                                                 R = (I - Q)(I + Q)^-1                       g, h [r] (the two gains)
========  ====================  ===============  ==========================================  ==========================

P_i [r, r] are random, normal of deviation 1 / sqrt(r), frozen; Q is skew-symmetric, with q above its diagonal.

* v and q start at 0 and the gains at 1, so M starts at 0 and the output as the base's. No gradient has the size of a
  factor: that of M is A^T G B^T, G that of the weight.
* TinyLoRA shares v between matrices: all that have one ``group``, of any shape, and all layers of a stacked leaf then.
  Each keeps its own A, B and P_i.
* PSOFT turns W within its leading subspace and keeps the angles there, U R S V^T, as far as the gains let it. Without
  dropout its scale alpha / r cancels: PEFT divides S by it and multiplies the result, so there is none here.
* ``neumann``: R as a polynomial, I - 2 Q + 2 Q^2 - ... with the last of k powers taken once: no solve, and orthogonal
  only as far as Q is small.
* Singular vectors have no sign, and M is in their basis: an adapter only has its meaning together with its A and B.

When to use them: TinyLoRA for a handful of numbers (13 in the paper, trained with reinforcement learning); PSOFT to
keep the geometry of a weight like OFT, at a cost that does not grow with the layer.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jlora.factors import Factors
from jlora.linalg import truncated_svd
from jlora.methods.base import Method, Site, check_rank, dropout, require, unsharded
from jlora.methods.oft import cayley, cayley_neumann, skew
from jlora.weight import Context, Dot, Params


@dataclasses.dataclass(frozen=True)
class _Spectral(Method):
    """What both have: the frozen pair, and a product that goes through r features. ``middle`` is theirs."""

    sliceable = frozenset({"in", "out"})

    def __post_init__(self):
        require(
            isinstance(self.rank, int) and self.rank > 0,
            f"{self.name}(rank={self.rank!r}): the rank is a positive integer.",
        )
        require(0.0 <= self.dropout < 1.0, f"{self.name}(dropout={self.dropout}): a rate in [0, 1) is wanted.")

    def middle(self, p: Params) -> Float[Array, "r r"]:
        raise NotImplementedError

    def check(self, site: Site) -> str | None:
        return check_rank(self.rank, site)

    def factors(self, w: Array, p: Params) -> Factors:
        a, b, middle = p.frozen["a"], p.frozen["b"], self.middle(p)
        if b.shape[1] < a.shape[0]:
            return Factors(a, middle @ b.astype(middle.dtype))
        return Factors(a.astype(middle.dtype) @ middle, b)

    def forward(self, dot: Dot, x: Array, w: Array, p: Params, ctx: Context) -> tuple[Array, Any]:
        if dot.kind != "linear":
            return super().forward(dot, x, w, p, ctx)
        h = dot.inner(dropout(x, self.dropout, ctx.key), p.frozen["a"])
        return dot(x, w) + dot.outer(h @ self.middle(p).astype(h.dtype), p.frozen["b"]), None

    def describe(self) -> dict[str, str]:
        return {"rank": str(self.rank), "scale": "1"}


@dataclasses.dataclass(frozen=True)
class TinyLoRA(_Spectral):
    """A vector of u numbers, spread over the middle by random matrices. See the top of this file.

    Parameters of a leaf: trainable ``{"v": [*stack, u]}``, or of the group, if it has one: trainable ``{"v": [u]}``;
    frozen ``{"a": [*stack, in, r], "b": [*stack, r, out], "p": [*stack, u, r, r]}``.

    Attributes:
      rank: r, small: more only makes the same u numbers speak of more directions.
      size: u, the numbers trained.
      group: None for a v of each matrix; a name for one v for all that have it.
      dropout: rate, as for LoRA.
    """

    rank: int = 2
    size: int = 64
    _: dataclasses.KW_ONLY
    group: str | None = None
    dropout: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        require(
            isinstance(self.size, int) and self.size > 0,
            f"TinyLoRA(size={self.size!r}): a positive integer is wanted, 1 to 64 as a rule.",
        )

    def init(self, key: Any, w: Array, site: Site, dtype: Any) -> Params:
        u, s, vh = truncated_svd(unsharded(w), self.rank, key=key)
        root, scale = jnp.sqrt(s), self.rank**-0.5
        p = scale * jax.random.normal(key, (self.size, self.rank, self.rank), dtype)
        frozen = {"a": (u * root).astype(dtype), "b": (root[:, None] * vh).astype(dtype), "p": p}
        return Params({"v": jnp.zeros((self.size,), dtype)} if self.group is None else None, frozen)

    def init_shared(self, key: Any, sites: dict[str, Site], dtype: Any) -> Params:
        return Params({"v": jnp.zeros((self.size,), dtype)})

    def count(self, site: Site) -> int:
        return site.stack * self.size if self.group is None else 0

    def count_shared(self, sites: dict[str, Site]) -> int:
        return self.size if self.group is not None else 0

    def dims(self, p: Params) -> Params:
        v, frozen = {"v": "_"}, {"a": "in rank", "b": "rank out", "p": "_ rank rank"}
        return Params(v, frozen) if self.group is None else Params(None, frozen, v)

    def middle(self, p: Params) -> Float[Array, "r r"]:
        v = (p.trainable if self.group is None else p.shared)["v"]
        return jnp.einsum("u,uij->ij", v, p.frozen["p"].astype(v.dtype))


@dataclasses.dataclass(frozen=True)
class PSOFT(_Spectral):
    """A rotation of the leading subspace, with gains on both of its sides. See the top of this file.

    Parameters of a leaf: trainable ``{"q": [*stack, r (r - 1) / 2], "gain_in": [*stack, r], "gain_out": [*stack, r]}``,
    frozen ``{"a": [*stack, in, r], "b": [*stack, r, out]}``. Without ``orthogonal`` q is R itself, [*stack, r, r].

    Attributes:
      rank: r, of the subspace. It costs r^2 / 2 numbers, so it can be larger than LoRA's.
      dropout: rate, as for LoRA.
      orthogonal: R is a rotation. Without, any matrix, and the count r^2.
      gain_in, gain_out: whether g and h are there. Without both the rotation is strict.
      neumann: the number of terms of a polynomial for the inverse (5 in PEFT), or None for the exact rotation.
      bound: with ``neumann``: Q is scaled down to this Frobenius norm where it is larger, or None. Its gradient goes
        through the scaling.
      symmetric: sqrt(S) on both sides, A = U sqrt(S): the gains and R then act in other proportions.
    """

    rank: int = 32
    _: dataclasses.KW_ONLY
    dropout: float = 0.0
    orthogonal: bool = True
    gain_in: bool = True
    gain_out: bool = True
    neumann: int | None = None
    bound: float | None = None
    symmetric: bool = False

    def __post_init__(self):
        super().__post_init__()
        require(
            self.neumann is None or (isinstance(self.neumann, int) and self.neumann >= 2),
            f"PSOFT(neumann={self.neumann!r}): an integer of at least 2 is wanted.",
        )
        require(
            self.bound is None or (self.bound > 0 and self.neumann is not None),
            f"PSOFT(bound={self.bound!r}, neumann={self.neumann!r}): a positive number is wanted, beside neumann.",
        )

    def init(self, key: Any, w: Array, site: Site, dtype: Any) -> Params:
        u, s, vh = truncated_svd(unsharded(w), self.rank, key=key)
        left, right = (jnp.sqrt(s), jnp.sqrt(s)) if self.symmetric else (jnp.ones_like(s), s)
        k = self.rank * (self.rank - 1) // 2
        own = {"q": jnp.zeros((k,), dtype) if self.orthogonal else jnp.eye(self.rank, dtype=dtype)}
        own |= {gain: jnp.ones((self.rank,), dtype) for gain in self.gains}
        return Params(own, {"a": (u * left).astype(dtype), "b": (right[:, None] * vh).astype(dtype)})

    @property
    def gains(self) -> tuple[str, ...]:
        return tuple(gain for gain in ("gain_in", "gain_out") if getattr(self, gain))

    def count(self, site: Site) -> int:
        k = self.rank * (self.rank - 1) // 2 if self.orthogonal else self.rank**2
        return site.stack * (k + len(self.gains) * self.rank)

    def dims(self, p: Params) -> Params:
        own = {"q": "_" if self.orthogonal else "rank rank"} | dict.fromkeys(self.gains, "rank")
        return Params(own, {"a": "in rank", "b": "rank out"})

    def middle(self, p: Params) -> Float[Array, "r r"]:
        q = p.trainable["q"]
        q = q.astype(jnp.promote_types(q.dtype, jnp.float32))
        rotation = self.rotation(q) if self.orthogonal else q
        if self.gain_in:
            rotation = p.trainable["gain_in"].astype(q.dtype)[:, None] * rotation
        if self.gain_out:
            rotation = rotation * p.trainable["gain_out"].astype(q.dtype)
        return rotation - jnp.eye(self.rank, dtype=q.dtype)

    def rotation(self, q: Float[Array, " k"]) -> Float[Array, "r r"]:
        if self.neumann is None:
            return cayley(skew(q, self.rank))
        if self.bound is not None:
            norm = jnp.sqrt(jnp.maximum(2.0 * jnp.sum(jnp.square(q)), self.bound**2))
            q = q * (self.bound / norm)
        return cayley_neumann(-skew(q, self.rank), self.neumann)
