r"""SoKA: the leading terms of the weight as a sum of Kronecker products are trained.

Singular Value Decomposition on Kronecker Adaptation for Large Language Model. Chong and Qu, 2025.
https://arxiv.org/abs/2506.15251

.. math::
    W' = W + \sum_{k=1}^{K} \bigl(U_k \otimes V_k - U_k^0 \otimes V_k^0\bigr), \qquad
    \sum_k U_k^0 \otimes V_k^0 \approx W

W [in, out] frozen; U_k [i1, o1] and V_k [i2, o2] trained, with in = i1 i2 and out = o1 o2; their starts U^0 and V^0
frozen. Trained: K (i1 o1 + i2 o2) a matrix.

* The start is the best approximation of W by K Kronecker products (Van Loan and Pitsianis, 1993): W is seen as
  [i1, i2, o1, o2], reordered to [i1 o1, i2 o2], and the leading singular triples of that are the U_k and V_k, the
  square root of the singular value in each. The principal part is trained as in PiSSA, and the rest of W stays.
* The starting sum is subtracted, and W stays as it is: the output starts as the base's. That doubles the terms that
  run.
* No product is formed where a matrix multiplies x: x is seen as [..., i1, i2], and U and V act on an axis each, at
  4 K (i1 i2 o1 + o1 i2 o2) FLOPs a token, or the like with V first. Where that is above 2 in out, and for convolutions
  and ragged products, the change is formed, and formed again for the gradient.
* ``terms_for`` gives K from the spectrum by the paper's two criteria, outside of jit: the fewest terms that hold a
  share of the squared singular values, or those up to the elbow, whichever are fewer.
* Read were summaries of the paper, which has no code: the sum of Kronecker products, its decomposition and the two
  criteria are the paper's. What is decomposed (W here, the only matrix there is at the start), where the singular
  values go, the sizes, the share and how the criteria combine are derived.

When to use it: LoKr's sizes with a start from the weight. 64 x 64 by 64 x 64 for a weight of 4096 x 4096: 8192 numbers
a term.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from jlora.linalg import rank_from_spectrum, truncated_svd
from jlora.methods.base import Method, Site, require, sharded_as, unsharded
from jlora.methods.lokr import factorization
from jlora.weight import Context, Dot, Params


@dataclasses.dataclass(frozen=True)
class SoKA(Method):
    """Singular value decomposition on Kronecker adaptation. The formula and shapes are at the top of this file.

    Parameters of a leaf: trainable ``{"u": [*stack, K, i1, o1], "v": [*stack, K, i2, o2]}``; frozen ones of the same
    names and shapes, the start.

    Attributes:
      terms: K.
      factor: i1 and o1, where they divide, or -1 for sizes closest to each other, as for LoKr.
    """

    terms: int = 2
    _: dataclasses.KW_ONLY
    factor: int = -1

    def __post_init__(self):
        require(
            isinstance(self.terms, int) and self.terms > 0,
            f"SoKA(terms={self.terms!r}): a positive number of terms is wanted, 1 to 16 as a rule.",
        )
        require(
            isinstance(self.factor, int) and (self.factor == -1 or self.factor > 0),
            f"SoKA(factor={self.factor!r}): a positive integer is wanted, or -1 for sizes close to each other.",
        )

    def split(self, n_in: int, n_out: int) -> tuple[int, int, int, int]:
        """(i1, i2, o1, o2)."""
        return *factorization(n_in, self.factor), *factorization(n_out, self.factor)

    def check(self, site: Site) -> str | None:
        if site.axes.kind == "embedding":
            return "SoKA splits the inputs in two, and those of an embedding are tokens; use LoRA or LoKr for this leaf"
        i1, i2, o1, o2 = self.split(*site.canonical_shape[1:])
        most = min(i1 * o1, i2 * o2)
        if self.terms > most:
            return f"{self.terms} terms are above the {most} that {i1}x{o1} by {i2}x{o2} has; choose at most {most}"

    def init(self, key: Any, w: Array, site: Site, dtype: Any) -> Params:
        i1, i2, o1, o2 = self.split(*w.shape)
        u, s, vh = truncated_svd(_rearranged(unsharded(w), i1, o1), self.terms, key=key)
        u, v = (u * jnp.sqrt(s)).T.reshape(-1, i1, o1), (jnp.sqrt(s)[:, None] * vh).reshape(-1, i2, o2)
        start = {"u": u.astype(dtype), "v": v.astype(dtype)}
        return Params(start, dict(start))

    def count(self, site: Site) -> int:
        i1, i2, o1, o2 = self.split(*site.canonical_shape[1:])
        return site.stack * self.terms * (i1 * o1 + i2 * o2)

    def dims(self, p: Params) -> Params:
        names = {"u": "rank _ _", "v": "rank _ _"}
        return Params(names, names)

    def pairs(self, p: Params) -> list[tuple[Float[Array, "K i1 o1"], Float[Array, "K i2 o2"]]]:
        """(U, V), and those of the start with the sign of V turned. Apart: the start has no gradient."""
        u, v = p.trainable["u"], p.trainable["v"]
        return [(u, v), (p.frozen["u"].astype(u.dtype), -p.frozen["v"].astype(v.dtype))]

    def weight(self, w: Float[Array, "in out"], p: Params) -> Float[Array, "in out"]:
        change = sum(jnp.einsum("kml,knp->mnlp", u, v) for u, v in self.pairs(p)).reshape(w.shape)
        return w + sharded_as(w, change.astype(w.dtype))

    def forward(self, dot: Dot, x: Array, w: Array, p: Params, ctx: Context) -> tuple[Array, Any]:
        if dot.kind == "linear" and 2 * self.terms * _cost(*self.split(*w.shape)) <= math.prod(w.shape):
            return dot(x, w) + sum(_branch(dot, x, u, v) for u, v in self.pairs(p)), None
        return jax.checkpoint(lambda x, w, p: dot(x, dot.per_matrix(self.weight, w, p)))(x, w, p), None

    def forward_transposed(self, dot: Dot, x: Array, wt: Float[Array, "out in"], p: Params, ctx: Context) -> Array:
        i1, i2, o1, o2 = self.split(*wt.shape[::-1])
        if 2 * self.terms * _cost(o1, o2, i1, i2) <= math.prod(wt.shape):
            return dot(x, wt) + sum(_branch(dot, x, u.mT, v.mT) for u, v in self.pairs(p))
        return jax.checkpoint(lambda x, wt, p: dot(x, self.weight(wt.T, p).T))(x, wt, p)

    def describe(self) -> dict[str, str]:
        return {"rank": f"{self.terms} terms"}


def _rearranged(w: Array, i1: int, o1: int) -> Array:
    """[in, out] as [i1 o1, i2 o2]: then a Kronecker product is an outer one."""
    n_in, n_out = w.shape
    return w.reshape(i1, n_in // i1, o1, n_out // o1).transpose(0, 2, 1, 3).reshape(i1 * o1, -1)


def _cost(i1: int, i2: int, o1: int, o2: int) -> int:
    """Multiplications of a row of x by one term."""
    return min(o1 * i2 * (i1 + o2), i1 * o2 * (i2 + o1))


def _branch(dot: Dot, x: Array, u: Float[Array, "K i1 o1"], v: Float[Array, "K i2 o2"]) -> Array:
    """x (sum_k U_k kron V_k)."""
    *rows, features = jax.typeof(x).sharding.spec
    x = x if features is None else jax.reshard(x, PartitionSpec(*rows, None))  # the two axes would cut it anew
    (_, i1, o1), (_, i2, o2) = u.shape, v.shape
    h = x.reshape(*x.shape[:-1], i1, i2)
    if o1 * i2 * (i1 + o2) <= i1 * o2 * (i2 + o1):
        h = dot.einsum("...mn,kml->...kln", h, u)
        h = dot.einsum("...kln,knp->...lp", h.astype(x.dtype), v)
    else:
        h = dot.einsum("...mn,knp->...kmp", h, v)
        h = dot.einsum("...kmp,kml->...lp", h.astype(x.dtype), u)
    return h.reshape(*x.shape[:-1], -1)


def terms_for(w: Float[Array, "in out"], share: float = 0.9, *, factor: int = -1) -> int:
    """How many terms to train of a weight: the fewest that hold ``share`` of its squared singular values (as a sum of
    Kronecker products), or those before the elbow of the spectrum, the point farthest below the line from its first
    value to its last, whichever are fewer. Runs on the host, on the whole spectrum.

    >>> jlora.SoKA(terms=terms_for(params["q"]["kernel"]))
    """
    require(0.0 < share <= 1.0, f"terms_for(share={share}): a share in (0, 1] is wanted.")
    i1, _, o1, _ = SoKA(factor=factor).split(*w.shape)
    s = np.linalg.svd(np.asarray(_rearranged(jnp.asarray(w), i1, o1), np.float64), compute_uv=False)
    return rank_from_spectrum(s, share, elbow=True)
