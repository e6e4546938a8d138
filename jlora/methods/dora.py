r"""DoRA: LoRA for the directions of a weight's columns, a trained magnitude for their lengths.

DoRA: Weight-Decomposed Low-Rank Adaptation. Liu et al., 2024. https://arxiv.org/abs/2402.09353

.. math::  W' = (W + s A B)\,\mathrm{diag}(g), \qquad g_o = m_o / \|W_{:o} + s (AB)_{:o}\|_2

W [in, out] frozen, A [in, r], B [r, out], m [out] trained; g [out]. Trained: r (in + out) + out a matrix.

* The norm is detached from the gradient (paper, section 4.3), in merging and for second derivatives too.
* It costs no [in, out] temporary. Expanding the square,
  ||W_o + s (AB)_o||^2 = ||W_o||^2 + 2 s ((W^T A) * B^T)_o + s^2 diag(B^T (A^T A) B)_o,
  which takes two [out, r] and one [r, r] matrix. Computed in float32, or wider if the weight is.
* m starts as the norm of the columns, so the output starts as the base's.
* Dropout acts on the branch's input only. PEFT's training path also runs the term (g - 1) x W on the dropped input
  (the authors' code, too); without dropout the two are the same.

When to use it: small ranks, where it often beats LoRA at the same count; it costs about 2 in out r FLOPs a step more
for the norm. A change of all columns' lengths is not of low rank: it merges, but exports to plain LoRA only truncated.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jlora.factors import Factors
from jlora.methods.base import Site
from jlora.methods.lora import LoRA
from jlora.weight import Params


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

    Parameters of a leaf: trainable ``{"factors": Factors, "magnitude": [*stack, out]}``. Options as for ``LoRA``.
    """

    sliceable = frozenset({"out"})  # a slice along `in` has other column norms

    def init(self, key: Any, w: Array, site: Site, dtype: Any) -> Params:
        pair = super().init(key, w, site, dtype).trainable
        # The product is zero at the start. (Folding a product of zeros into the sum is also what XLA of jaxlib 0.10.2
        # miscompiles on CPU, into a read of memory that nobody wrote.)
        magnitude = jnp.linalg.norm(w.astype(dtype), axis=0)
        return Params(trainable={"factors": pair, "magnitude": magnitude})

    def init_stack(self, p: Params, site: Site, dtype: Any) -> Params:
        inner = super().init_stack(p._replace(trainable=p.trainable["factors"]), site, dtype)
        return inner._replace(trainable=p.trainable | {"factors": inner.trainable})

    def count(self, site: Site) -> int:
        return super().count(site) + site.stack * site.canonical_shape[2]

    def dims(self, p: Params) -> Params:
        inner = super().dims(p._replace(trainable=p.trainable["factors"]))
        return inner._replace(trainable={"factors": inner.trainable, "magnitude": "out"})

    def factors(self, w: Array, p: Params) -> Factors:
        return super().factors(w, p._replace(trainable=p.trainable["factors"]))

    def output_gain(self, w: Float[Array, "in out"], p: Params) -> Float[Array, " out"]:
        norms = jax.lax.stop_gradient(column_norms(w, self.factors(w, p)))
        return p.trainable["magnitude"].astype(norms.dtype) / norms
