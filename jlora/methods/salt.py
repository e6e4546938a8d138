r"""SALT: the large singular values of the weight are scaled and shifted, the rest gets a low-rank change.

SALT: Singular Value Adaptation with Low-Rank Transformation. Elsayed et al., 2025. https://arxiv.org/abs/2503.16055

.. math::
    W' = U \begin{pmatrix} \mathrm{diag}(a \odot \sigma_1 + b) & 0 \\ 0 & \mathrm{diag}(\sigma_2) + X Y \end{pmatrix}
    V^\top

W [in, out] = U diag(sigma) V^T frozen, d = min(in, out); a [k], b [k] for the k largest singular values sigma_1; X
[d - k, r] and Y [r, d - k] for the others. Trained: 2 k + 2 r (d - k) a matrix.

* The change is a pair of factors of rank k + r, [U_1 diag((a - 1) sigma_1 + b) | U_2 X] and [V_1^T ; Y V_2^T], added to
  the weight as it is: it runs as LoRA of that rank, and 2 r (d - k) (in + out) FLOPs a step make it. U and V are kept,
  frozen, of the size of the weight each where it is square.
* a starts at 1, b and Y at 0, X uniform in +-1/sqrt(d - k), so the output starts as the base's. (Of the authors' two
  versions one starts X and Y from noise, off the base; the other has X wider, in +-sqrt(6 / r).)
* The authors' code passes the middle matrix through a ReLU: it is no part of the formula, sets half of X Y to zero and,
  where Y starts at 0, stops the gradient of all that is not on the diagonal. Left out.
* Their penalty on the change's norm has the weight 0 in the configuration that they ship. Left out.

When to use it: models whose leading directions fit the task and whose sizes of them do not, as with medical images. It
needs the singular value decomposition of every weight at the start.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jlora.factors import Factors
from jlora.linalg import truncated_svd
from jlora.methods.base import Method, Site, at_most, require, unsharded
from jlora.weight import Params


@dataclasses.dataclass(frozen=True)
class SALT(Method):
    """Singular value adaptation with low-rank transformation. The formula and shapes are at the top of this file.

    Parameters of a leaf: trainable ``{"scale": [*stack, k], "shift": [*stack, k], "x": [*stack, d - k, r], "y":
    [*stack, r, d - k]}``; frozen ``{"u": [*stack, in, d], "s": [*stack, k], "vh": [*stack, d, out]}``.

    Attributes:
      rank: r, of the change of the rest.
      top: k, how many singular values are scaled and shifted.
    """

    rank: int = 4
    _: dataclasses.KW_ONLY
    top: int = 64

    sliceable = frozenset({"in", "out"})

    def __post_init__(self):
        for field in ("rank", "top"):
            value = getattr(self, field)
            require(isinstance(value, int) and value > 0, f"SALT({field}={value!r}): a positive integer is wanted.")

    def check(self, site: Site) -> str | None:
        size = min(site.canonical_shape[1:])
        if self.top >= size:
            return f"top={self.top} leaves none of the {size} singular values for X Y; {at_most(size - 1, 'top')}"
        if self.rank > size - self.top:
            most = size - self.top
            return f"rank {self.rank} is above the {most} singular values beside the top {self.top}; {at_most(most)}"

    def init(self, key: Any, w: Array, site: Site, dtype: Any) -> Params:
        size, k = min(w.shape), self.top
        u, s, vh = (part.astype(dtype) for part in truncated_svd(unsharded(w), size))
        bound = (size - k) ** -0.5
        own = {
            "scale": jnp.ones((k,), dtype),
            "shift": jnp.zeros((k,), dtype),
            "x": jax.random.uniform(key, (size - k, self.rank), dtype, -bound, bound),
            "y": jnp.zeros((self.rank, size - k), dtype),
        }
        return Params(own, {"u": u, "s": s[:k], "vh": vh})

    def count(self, site: Site) -> int:
        size = min(site.canonical_shape[1:])
        return site.stack * (2 * self.top + 2 * self.rank * (size - self.top))

    def dims(self, p: Params) -> Params:
        own = {"scale": "_", "shift": "_", "x": "_ rank", "y": "rank _"}
        return Params(own, {"u": "in _", "s": "_", "vh": "_ out"})

    def factors(self, w: Float[Array, "in out"], p: Params) -> Factors:
        scale, shift, x, y = (p.trainable[name] for name in ("scale", "shift", "x", "y"))
        u, s, vh = (p.frozen[name].astype(x.dtype) for name in ("u", "s", "vh"))
        k = self.top
        a = jnp.concatenate([u[:, :k] * ((scale - 1) * s + shift), u[:, k:] @ x], axis=1)
        return Factors(a, jnp.concatenate([vh[:k], y @ vh[k:]], axis=0))

    def describe(self) -> dict[str, str]:
        return {"rank": f"{self.top}+{self.rank}"}
