r"""PELA: a product of two smaller matrices in the place of a weight.

PELA: Learning Parameter-Efficient Models with Low-Rank Approximation. Guo et al., 2023.
https://arxiv.org/abs/2310.10700

.. math::  y = (x A) B, \qquad A = U_r S_r^{1/2}, \quad B = S_r^{1/2} V_r^\top \text{ at the start}

A [in, r], B [r, out] trained; U_r S_r V_r^T are the leading singular triples of W [in, out], which the product does not
use. r = floor(in out / (c (in + out))) for a compression ratio c: the weight's parameters shrink by c or a little more.
Trained: r (in + out) a matrix.

* The output starts displaced, by what the best matrix of rank r leaves of W: the squares of the singular values beyond
  the r-th. Where c is so small that r is min(in, out), nothing is left.
* The weight itself is still in ``adapted.base``, the teacher of PELA's training, whose loss is that of the task and

.. math::  \frac{\alpha}{L} \sum_{l=1}^{L} \mathrm{mean}\,(F_l - F^0_l)^2 + \beta\,\mathrm{mean}\,(Z - Z^0)^2
    + \frac{\gamma}{M} \sum_{m=1}^{M} \bigl(\max_{io} |A_m B_m - W_m|_{io} - \epsilon\bigr)^2

  F_l the features of ``adapted.bind(trainable)`` and F^0_l of ``adapted.base`` where the model hands them out, of L
  layers, Z the logits: ``distillation`` is the mean of both. The last term, over the M matrices, is ``perturbation``.
  The authors have alpha 1 and beta 0, gamma 0 with epsilon 1e-3 for DeiT, 1 with 0 for Swin::

      loss = task + distillation(features, teachers_features) + gamma * perturbation(adapted, trainable)

* ``jlora.factorize`` gives the small model without the teacher.
* The authors' code passes over layers of fewer than 10 outputs, heads among them, and over names given to it: here
  that is for ``targets`` and ``exclude``. It decomposes with full matrices, to the same result.

When to use it: not as an adapter. It makes a smaller and faster model of a large one, to be trained for a while on the
large one's features and then fine-tuned, fully or with an adapter on ``jlora.merge`` of it.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from jlora import paths
from jlora.factors import Factors
from jlora.linalg import truncated_svd
from jlora.methods.base import Method, Site, require, sharded_as, unsharded
from jlora.storage import is_stored, one_by_one
from jlora.weight import Context, Dot, Params

if TYPE_CHECKING:
    from jlora.adapt import Adapted

_ROWS = 256  # of a product, at a time


@dataclasses.dataclass(frozen=True)
class PELA(Method):
    """A pair of factors instead of a weight. The formula is at the top of this file.

    Parameters of a leaf: trainable ``Factors(a [*stack, in, r], b [*stack, r, out])``.

    Attributes:
      ratio: c. 2 to 3 as a rule; the larger, the smaller the model.
    """

    ratio: float = 2.0

    sliceable = frozenset({"in", "out"})
    replaces = True

    def __post_init__(self):
        require(self.ratio > 0, f"PELA(ratio={self.ratio!r}): a positive number is wanted, 2 to 3 as a rule.")

    def rank(self, n_in: int, n_out: int) -> int:
        return min(int(n_in * n_out // (self.ratio * (n_in + n_out))), n_in, n_out)

    def check(self, site: Site) -> str | None:
        _, n_in, n_out = site.canonical_shape
        if self.rank(n_in, n_out) == 0:
            most = n_in * n_out / (n_in + n_out)
            return (
                f"a ratio of {self.ratio:g} leaves no rank of {n_in} x {n_out}; the ratio is at most {most:.3g} there"
            )

    def init(self, key: Any, w: Float[Array, "in out"], site: Site, dtype: Any) -> Params:
        u, s, vh = truncated_svd(unsharded(w), self.rank(*w.shape), key=key)
        root = jnp.sqrt(s)
        return Params(Factors((u * root).astype(dtype), (root[:, None] * vh).astype(dtype)))

    def count(self, site: Site) -> int:
        _, n_in, n_out = site.canonical_shape
        return site.stack * self.rank(n_in, n_out) * (n_in + n_out)

    def dims(self, p: Params) -> Params:
        return Params(Factors("in rank", "rank out"))

    # The pair is in the place of the weight and not added to it: these are no ``factors``.

    def weight(self, w: Float[Array, "in out"], p: Params) -> Float[Array, "in out"]:
        return sharded_as(w, p.trainable.product().astype(w.dtype))

    def forward(self, dot: Dot, x: Array, w: Array, p: Params, ctx: Context) -> tuple[Array, Any]:
        y = dot.outer(dot.inner(x, p.trainable.a), p.trainable.b)
        return (y.astype(w.dtype) if dot.kind == "lookup" else y), None

    def forward_transposed(self, dot: Dot, x: Array, wt: Float[Array, "out in"], p: Params, ctx: Context) -> Array:
        swapped = p.trainable.swap()
        return dot.outer(dot.inner(x, swapped.a), swapped.b)

    def describe(self) -> dict[str, str]:
        return {"rank": f"1/{self.ratio:g} of the size"}


def distillation(student: PyTree, teacher: PyTree) -> Float[Array, ""]:
    """The mean over features of their mean squared difference, for a loss.

    >>> loss = task + alpha * distillation(features, teachers_features) + beta * distillation(logits, teachers_logits)

    Args:
      student, teacher: arrays, or equal trees of them, of one shape each. The teacher's carry no gradient.
    """
    if jax.tree.map(jnp.shape, student) != jax.tree.map(jnp.shape, teacher):
        raise ValueError(
            f"Equal features are wanted: the student's have the shapes {jax.tree.map(jnp.shape, student)}, the "
            f"teacher's {jax.tree.map(jnp.shape, teacher)}."
        )
    wide = lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32))
    difference = lambda s, t: jnp.mean(jnp.square(wide(s) - wide(jax.lax.stop_gradient(t))))
    return jnp.stack(jax.tree.leaves(jax.tree.map(difference, student, teacher))).mean()


def perturbation(adapted: Adapted, trainable: Any, eps: float = 1e-3) -> Float[Array, ""]:
    """The mean over PELA's matrices of (max |A B - W| - eps)^2, for a loss.

    The products are formed some rows at a time and kept nowhere: the gradient goes to the row of A and the column of B
    of the largest entry alone, the first of several.

    Args:
      adapted: with the weights, so what ``jlora.adapt`` and not what ``jlora.factorize`` made.
      trainable: its trainable parameters, to differentiate with respect to.
      eps: how far the largest entry may be off.
    """
    leaves = dict(paths.flatten(adapted.base)[0])
    errors = []
    for path, site in adapted.sites.items():
        if not isinstance(site.method, PELA):
            continue
        leaf = leaves[path]
        require(
            any(part.size for part in jax.tree.leaves(leaf)),
            f"{path!r} is gone: jlora.factorize keeps no weights, and jlora.adapt(params, PELA(...)) does.",
        )
        w = leaf if is_stored(leaf) else site.axes.to_canonical(leaf)
        each = one_by_one(lambda wf: _largest(wf[0], wf[1]), site.canonical_shape[0])((w, trainable[path]))
        errors.append(each.ravel())
    require(len(errors) > 0, "perturbation(adapted, ...): no leaf is adapted by PELA.")
    return jnp.square(jnp.concatenate(errors) - eps).mean()


def _largest(w: Any, f: Factors) -> Float[Array, ""]:
    """max |A B - W| of one matrix."""
    w = w.matrix() if is_stored(w) else w
    w = jax.lax.stop_gradient(w).astype(jnp.promote_types(w.dtype, f.a.dtype))
    a, b = jax.lax.stop_gradient((f.scale * f.a, f.b))

    def row(of: tuple[Array, Array]) -> tuple[Array, Array]:
        error = jnp.abs(of[0] @ b - of[1])
        return error.max(), error.argmax()

    largest, column = jax.lax.map(row, (a, w), batch_size=min(_ROWS, len(a)))
    i = largest.argmax()
    o = column[i]
    return jnp.abs(f.scale * f.a[i] @ f.b[:, o] - w[i, o])
