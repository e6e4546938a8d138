r"""DoRA: low-rank changes for the directions of a weight's columns, a trained magnitude for their lengths.

DoRA: Weight-Decomposed Low-Rank Adaptation. Liu et al., 2024. https://arxiv.org/abs/2402.09353

.. math::  W' = (W + s A B)\,\mathrm{diag}(g), \qquad g_o = m_o / \|W_{:o} + s (AB)_{:o}\|_2

W [in, out] frozen, A [in, r], B [r, out], m [out] trained; g [out]. Trained: r (in + out) + out a matrix. The pair is
LoRA's, or with ``method`` what any method makes that adds a pair of factors to the weight (over VeRA it is the paper's
DVoRA); trained then: what that method trains, and out.

* The norm is detached from the gradient (paper, section 4.3), in merging and for second derivatives too.
* It costs no [in, out] temporary. Expanding the square,
  ||W_o + s (AB)_o||^2 = ||W_o||^2 + 2 s ((W^T A) * B^T)_o + s^2 diag(B^T (A^T A) B)_o,
  which takes two [out, r] and one [r, r] matrix. Computed in float32, or wider if the weight is. With the ranks of LoRA
  that is no more work than forming A B; with those of VeRA, close to the sizes of the weight, up to twice as much.
* m starts as the norm of W's columns, so the output starts as the base's. Over a method that does not start there
  itself (VB-LoRA, say) the columns start with the lengths of the base's and with other directions.
* Dropout acts on the branch's input only. PEFT's training path also runs the term (g - 1) x W on the dropped input
  (the authors' code, too); without dropout the two are the same.

When to use it: small ranks, where it often beats LoRA at the same count; it costs about 2 in out r FLOPs a step more
for the norm. A change of all columns' lengths is not of low rank: it merges, but exports to plain LoRA only truncated.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jlora.factors import Factors
from jlora.methods.base import Method, Site, require
from jlora.methods.lora import LoRA
from jlora.weight import Context, Dot, Params


def column_norms(w: Float[Array, "in out"], f: Factors) -> Float[Array, " out"]:
    """Euclidean norms of the columns of ``w + scale * a @ b``, without forming it. At least float32."""
    wide = jnp.promote_types(jnp.promote_types(w.dtype, f.a.dtype), jnp.float32)
    a, b = f.a.astype(wide), f.b.astype(wide)
    dot = lambda u, v, axes: jax.lax.dot_general(
        u, v, (axes, ((), ())), preferred_element_type=wide, precision=jax.lax.Precision.HIGHEST
    )
    square = jnp.sum(jnp.square(w.astype(wide)), axis=0)  # fused by XLA into one pass over w
    cross = jnp.sum(dot(w, a, ((0,), (0,))) * b.T, axis=1)
    gram = jnp.sum((dot(a, a, ((0,), (0,))) @ b) * b, axis=0)
    norm2 = square + 2 * f.scale * cross + f.scale**2 * gram
    return jnp.sqrt(jnp.maximum(norm2, jnp.finfo(wide).tiny))


@dataclasses.dataclass(frozen=True)
class DoRA(LoRA):
    """Weight-decomposed low-rank adaptation. The formula and shapes are at the top of this file.

    >>> jlora.DoRA(rank=8, alpha=16)
    >>> jlora.DoRA(method=jlora.VeRA(rank=256))

    Parameters of a leaf: trainable ``{"factors": those of the method, "magnitude": [*stack, out]}``; frozen and shared
    ones as the method has them. Options as for ``LoRA``, and:

    Attributes:
      method: what gives the pair, in the place of LoRA and its options. A ``dropout`` given beside it is the method's.
    """

    _: dataclasses.KW_ONLY
    method: Method | None = None

    takes_start = True

    def __post_init__(self):
        if self.method is None:
            return super().__post_init__()
        inner = self.method
        require(isinstance(inner, Method), f"DoRA(method={inner!r}): a method like jlora.VeRA(256) is wanted.")
        own = {field.name for field in dataclasses.fields(LoRA) if getattr(self, field.name) != field.default}
        require(
            own <= {"dropout", "lookup_only"},
            f"DoRA(method={inner}) has no {', '.join(sorted(own))} of its own: give it to {inner.name}.",
        )
        require(
            type(inner).factors is not Method.factors and type(inner).output_gain is Method.output_gain,
            f"DoRA(method={inner}): a method that adds a pair of factors to the weight is wanted, like LoRA, VeRA or "
            f"LoRAXS; {inner.name} changes it in another way.",
        )
        require(
            not inner.needs,
            f"DoRA(method={inner}): what starts from data is not taken here; of LoRA it is DoRA(rank, start=...).",
        )
        require(
            not (inner.model_key or inner.draws),
            f"DoRA(method={inner}): {inner.name} draws what it adds, and the norm would be of something else.",
        )
        if self.dropout != inner.dropout and self.dropout:
            object.__setattr__(self, "method", dataclasses.replace(inner, dropout=self.dropout))
        object.__setattr__(self, "dropout", self.method.dropout)
        object.__setattr__(self, "lookup_only", self.lookup_only or inner.lookup_only)

    @property
    def inner(self) -> Method:
        """The method of the pair."""
        if self.method is not None:
            return self.method
        return LoRA(**{field.name: getattr(self, field.name) for field in dataclasses.fields(LoRA)})

    @property
    def sliceable(self) -> frozenset[str]:
        return self.inner.sliceable & {"out"}  # a slice along `in` has other column norms

    @property
    def group(self) -> str | None:
        return self.inner.group

    def _inner_sites(self, sites: dict[str, Site]) -> dict[str, Site]:
        return {path: dataclasses.replace(site, method=self.inner) for path, site in sites.items()}

    def _inner_params(self, p: Params) -> Params:
        return p if p.trainable is None else p._replace(trainable=p.trainable["factors"])

    def check(self, site: Site) -> str | None:
        return self.inner.check(site)

    @property
    def needs(self) -> tuple[str, ...]:
        return self.inner.needs

    def init(self, key: Any, w: Array, site: Site, dtype: Any, stats: Any = None) -> Params:
        given = {"stats": stats} if self.needs else {}
        inner = self.inner.init(key, w, site, dtype, **given)
        # LoRA's product is zero at the start. (Folding a product of zeros into the sum is also what XLA of jaxlib
        # 0.10.2 miscompiles on CPU, into a read of memory that nobody wrote.)
        magnitude = jnp.linalg.norm(w.astype(dtype), axis=0)
        return inner._replace(trainable={"factors": inner.trainable, "magnitude": magnitude})

    def init_stack(self, p: Params, site: Site, dtype: Any) -> Params:
        inner = self.inner.init_stack(self._inner_params(p), site, dtype)
        return inner._replace(trainable=p.trainable | {"factors": inner.trainable})

    def init_shared(self, key: Any, sites: dict[str, Site], dtype: Any) -> Params:
        return self.inner.init_shared(key, self._inner_sites(sites), dtype)

    def init_members(self, key: Any, sites: dict[str, Site], dtype: Any) -> dict[str, dict[str, Array]]:
        return self.inner.init_members(key, self._inner_sites(sites), dtype)

    def count(self, site: Site) -> int:
        return self.inner.count(site) + site.stack * site.canonical_shape[2]

    def count_shared(self, sites: dict[str, Site]) -> int:
        return self.inner.count_shared(self._inner_sites(sites))

    def dims(self, p: Params) -> Params:
        inner = self.inner.dims(self._inner_params(p))
        return inner._replace(trainable={"factors": inner.trainable, "magnitude": "out"})

    def factors(self, w: Array, p: Params) -> Factors:
        pair = self.inner.factors(w, self._inner_params(p))
        if pair is None:
            raise ValueError(
                f"{self}: at {w.shape[0]} x {w.shape[1]} {self.inner.name} forms its change of the weight and has no "
                "pair of factors, and DoRA takes the norm of one. Lower its rank, or leave this weight out."
            )
        return pair

    def output_gain(self, w: Float[Array, "in out"], p: Params) -> Float[Array, " out"]:
        norms = jax.lax.stop_gradient(column_norms(w, self.factors(w, p)))
        return p.trainable["magnitude"].astype(norms.dtype) / norms

    def is_branch(self, keyed: bool) -> bool:
        return self.inner.is_branch(keyed)

    def forward(self, dot: Dot, x: Array, w: Array, p: Params, ctx: Context) -> tuple[Array, Any]:
        y, aux = self.inner.forward(dot, x, w, self._inner_params(p), ctx)
        return dot.per_output(y, dot.per_matrix(self.output_gain, w, p)), aux

    def forward_transposed(self, dot: Dot, x: Array, wt: Float[Array, "out in"], p: Params, ctx: Context) -> Array:
        x = x * self.output_gain(wt.T, p).astype(x.dtype)
        return self.inner.forward_transposed(dot, x, wt, self._inner_params(p), ctx)

    def project(self, p: Params) -> Any:
        return p.trainable | {"factors": self.inner.project(self._inner_params(p))}

    def describe(self) -> dict[str, str]:
        return self.inner.describe()
