r"""LoHa: a change of weight that is the elementwise product of two low-rank matrices.

FedPara: Low-Rank Hadamard Product for Communication-Efficient Federated Learning. Hyeon-Woo, Ye-Bin and Oh, 2021.
https://arxiv.org/abs/2108.06098
LoHa, as in LyCORIS: Navigating Text-To-Image Customization. Yeh et al., 2023. https://arxiv.org/abs/2309.14859

.. math::  y = x W + s\, x \bigl((A_1 B_1) \odot (A_2 B_2)\bigr), \qquad s = \alpha / r

x [..., in], W [in, out] frozen, A_1, A_2 [in, r] and B_1, B_2 [r, out] trained. Trained: 2 r (in + out) a matrix.

The change has rank r^2 as a rule. It is the product of one pair of factors, made of the columns of the A and the rows
of the B two by two,

.. math::  a_{i,(pq)} = (A_1)_{ip} (A_2)_{iq}, \qquad b_{(pq),o} = (B_1)_{po} (B_2)_{qo},

and runs as such, at the cost of LoRA of rank r^2, as long as 3 r^2 (in + out) <= in out. Above that it costs fewer
FLOPs to form the change, one [in, out] temporary a layer, which is formed again for the gradient rather than kept. A
lookup forms neither: it takes the product of the two looked up rows.

* A_1 starts uniform in +-1/sqrt(in), the B in +-1/sqrt(r), and A_2 = 0. Rows of an embedding are not summed over: its
  A_1 starts in +-1.
* A convolution's matrices are [window * features, r]. With ``effective_conv`` each is a Tucker form: its column
  ``A[(window, f), i] = sum_j T[window, j, i] U[f, j]`` of a core T with r^2 entries for each place of the window and U
  [features, r]. Trained then: 2 r (features + out) + 2 r^2 window. Windows of size 1 have no core.
* PEFT's dropouts of output rows and of whole modules are not here. Its hand-written gradient of the Tucker form is
  wrong for B (version 0.21.2 takes the core of the other product); ours is the derivative.

When to use it: a change of high rank at LoRA's count of twice the rank; for image models and their convolutions. r = 8
has rank 64, and runs like it.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jlora.factors import Factors
from jlora.methods.base import Method, Site, check_rank, laid_as, require
from jlora.weight import Context, Dot, Params


@dataclasses.dataclass(frozen=True)
class LoHa(Method):
    """Low-rank Hadamard product. The formula and shapes are at the top of this file.

    Parameters of a leaf: trainable ``{"a1", "a2": [*stack, in, r], "b1", "b2": [*stack, r, out]}``; in Tucker form
    ``a1`` and ``a2`` are [features, r], beside the cores ``"t1", "t2": [before, r, after, r]``, where before and after
    are the parts of the window on either side of the features.

    Attributes:
      rank: r of each of the two products.
      alpha: numerator of the scale.
      effective_conv: the Tucker form for convolutions.
    """

    rank: int = 8
    alpha: float = 8.0
    _: dataclasses.KW_ONLY
    effective_conv: bool = False

    def __post_init__(self):
        require(
            isinstance(self.rank, int) and self.rank > 0,
            f"LoHa(rank={self.rank!r}): the rank is a positive integer, 2 to 16 as a rule.",
        )

    @property
    def sliceable(self) -> frozenset[str]:
        return frozenset({"out"} if self.effective_conv else {"in", "out"})

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def tucker(self, site: Site) -> bool:
        """Whether a leaf is adapted in Tucker form."""
        if not self.effective_conv or site.axes.kind != "conv":
            return False
        before, _, after = site.window
        return before * after > 1

    def check(self, site: Site) -> str | None:
        return check_rank(self.rank, site)

    def init(self, key: Any, w: Array, site: Site, dtype: Any) -> Params:
        (n_in, n_out), r = w.shape, self.rank
        keys = jax.random.split(key, 5)
        uniform = lambda key, shape, fan: jax.random.uniform(key, shape, dtype, -(fan**-0.5), fan**-0.5)
        if self.tucker(site):
            before, features, after = site.window
            core = before, r, after, r
            fan = r * before * after
            cores = {"t1": uniform(keys[3], core, fan), "t2": uniform(keys[4], core, fan)}
            n_in, fan_b = features, n_out
        else:
            cores, fan_b = {}, r
        a1 = uniform(keys[0], (n_in, r), 1 if site.axes.kind == "embedding" else n_in)
        b1, b2 = (uniform(key, (r, n_out), fan_b) for key in keys[1:3])
        return Params(trainable={"a1": a1, "b1": b1, "a2": jnp.zeros((n_in, r), dtype), "b2": b2} | cores)

    def count(self, site: Site) -> int:
        _, n_in, n_out = site.canonical_shape
        cores = 0
        if self.tucker(site):
            before, n_in, after = site.window
            cores = self.rank**2 * before * after
        return site.stack * 2 * (self.rank * (n_in + n_out) + cores)

    def dims(self, p: Params) -> Params:
        pair = {"b1": "rank out", "b2": "rank out"}
        if "t1" in p.trainable:
            return Params(pair | {"a1": "_ rank", "a2": "_ rank", "t1": "_ rank _ rank", "t2": "_ rank _ rank"})
        return Params(pair | {"a1": "in rank", "a2": "in rank"})

    def pairs(self, p: Params) -> tuple[Array, Array, Array, Array]:
        """(A_1, B_1, A_2, B_2), the Tucker forms multiplied out."""
        t = p.trainable
        a1, a2 = (self._down(t[f"a{i}"], t.get(f"t{i}")) for i in (1, 2))
        return a1, t["b1"], a2, t["b2"]

    def _down(self, a: Array, core: Array | None) -> Float[Array, "in r"]:
        if core is None:
            return a
        return jnp.einsum("pjqi,fj->pfqi", core, a).reshape(-1, core.shape[-1])

    def factors(self, w: Array, p: Params) -> Factors | None:
        if 3 * self.rank**2 * sum(w.shape) > math.prod(w.shape):
            return None
        a1, b1, a2, b2 = self.pairs(p)
        a = (a1[:, :, None] * a2[:, None, :]).reshape(a1.shape[0], -1)
        b = (b1[:, None, :] * b2[None, :, :]).reshape(-1, b1.shape[1])
        return Factors(a, b, self.scale)

    def weight(self, w: Array, p: Params) -> Array:
        a1, b1, a2, b2 = self.pairs(p)  # in their own dtype: a product of two sums is where bfloat16 would hurt
        (a1, b1), (a2, b2) = laid_as(w, a1, b1), laid_as(w, a2, b2)
        return (w + self.scale * (a1 @ b1) * (a2 @ b2)).astype(w.dtype)

    def forward(self, dot: Dot, x: Array, w: Array, p: Params, ctx: Context) -> tuple[Array, Any]:
        if dot.kind == "lookup":
            a1, b1, a2, b2 = self.pairs(p)
            row = dot.outer(dot.inner(x, a1), b1) * dot.outer(dot.inner(x, a2), b2)
            return dot(x, w) + (self.scale * row).astype(w.dtype), None
        f = dot.per_matrix(self.factors, w, p)
        if f is not None:
            return dot.factored(x, w, f, ctx), None
        return jax.checkpoint(lambda x, w, p: dot(x, dot.per_matrix(self.weight, w, p)))(x, w, p), None

    def forward_transposed(self, dot: Dot, x: Array, wt: Array, p: Params, ctx: Context) -> Array:
        f = self.factors(wt.T, p)
        if f is not None:
            return dot.factored(x, wt, f.swap(), ctx)
        return jax.checkpoint(lambda x, wt, p: dot(x, self.weight(wt.T, p).T))(x, wt, p)

    def describe(self) -> dict[str, str]:
        return {"rank": str(self.rank), "scale": f"{self.scale:g}"}
