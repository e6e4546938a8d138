r"""Maestro: a weight as a product of full width, trained so that its columns come in the order of their importance, and
cut where they stop to matter.

Maestro: Uncovering Low-Rank Structures via Trainable Decomposition. Horvath et al., 2023.
https://arxiv.org/abs/2308.14929

.. math::  y = x\, (A_{:b} B_{:b}), \qquad A = P S^{1/2}, \quad B = S^{1/2} Q^\top \text{ at the start}

.. math::  \text{penalty} = \lambda \sum_{k=1}^{R} \Bigl( \| A_{:, k:} \|_F + \| B_{k:, :} \|_F \Bigr), \qquad
           \text{importance}_k = \| A_{:, k:} \|_F\, \| B_{k:, :} \|_F

A [in, R], B [R, out] trained in the place of the weight W [in, out], R = min(in, out) unless less is asked for;
P S Q^T are the singular triples of W, so the output starts as the model's, or the best of rank R. Trained:
R (in + out) a matrix, less as it shrinks.

A step of training draws one matrix and one width b of all there are (ordered dropout), and runs the model with that
matrix cut to its first b columns, the others whole; the loss of the whole model may be added::

    context = maestro.widths(adapted, key)
    cut = task_loss(apply(adapted.bind(trainable, context), x), y)
    loss = cut + task_loss(apply(adapted.bind(trainable), x), y) + 5e-3 * maestro.penalty(adapted, trainable)

After an epoch, ``maestro.shrink(adapted)`` masks the columns from where the importance falls below a threshold, and
``jlora.repack`` drops them. ``jlora.merge`` multiplies out what is left: with more than in out / (in + out) columns,
that is the smaller.

* For a linear map of isotropic inputs what is learned is its SVD, in order, as the paper proves: a test here.
* Verified against the authors' code: formula, penalty, importance, the default lambda of 5e-3 and threshold of 1e-5.
  There the pairs (matrix, width) are gone through in a random order; here each step draws one of all, which is the same
  on average. ``every=True`` cuts all matrices at once, as their independent sampler does.
* The norms of the penalty are of sums of squares and 1e-12, for a norm has no gradient at zero.

When to use it: for a smaller model, of ranks that training finds. It costs 1 to 2 times full training until it shrinks.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from jlora.factors import Factors
from jlora.linalg import truncated_svd
from jlora.methods.base import Method, Site, check_rank, require, sharded_as, unsharded
from jlora.weight import Context, Dot, Params

if TYPE_CHECKING:
    from jlora.adapt import Adapted


@dataclasses.dataclass(frozen=True)
class Maestro(Method):
    """Trainable decomposition. The formula and shapes are at the top of this file.

    Parameters of a leaf: trainable ``Factors(a [*stack, in, R], b [*stack, R, out])``, frozen ``"mask"`` [*stack, R], 1
    for the columns in use. The value ``"widths"`` of a context, {path: [*stack]}, is b; all of them without it.

    Attributes:
      rank: R; None for min(in, out).
    """

    rank: int | None = None

    sliceable = frozenset({"in", "out"})
    replaces = True

    def __post_init__(self):
        require(
            self.rank is None or (isinstance(self.rank, int) and self.rank > 0),
            f"Maestro(rank={self.rank!r}): the largest width is a positive integer, or None for min(in, out).",
        )

    def width(self, n_in: int, n_out: int) -> int:
        """R of a matrix."""
        return min(n_in, n_out) if self.rank is None else self.rank

    def check(self, site: Site) -> str | None:
        return None if self.rank is None else check_rank(self.rank, site)

    def init(self, key: Any, w: Float[Array, "in out"], site: Site, dtype: Any) -> Params:
        u, s, vh = truncated_svd(unsharded(w), self.width(*w.shape), key=key)
        root = jnp.sqrt(s)
        pair = Factors((u * root).astype(dtype), (root[:, None] * vh).astype(dtype))
        return Params(pair, {"mask": jnp.ones(s.shape, dtype)})

    def count(self, site: Site) -> int:
        _, n_in, n_out = site.canonical_shape
        return site.stack * self.width(n_in, n_out) * (n_in + n_out)

    def dims(self, p: Params) -> Params:
        return Params(Factors("in rank", "rank out"), {"mask": "rank"})

    def enter(self, path: str, site: Site, p: Params, values: dict[str, Any]) -> tuple[Params, dict[str, Any]]:
        widths = values.get("widths", {})
        if path in widths:
            width = jnp.asarray(widths[path])
            stack, mask = site.canonical_shape[0], p.frozen["mask"]
            require(width.shape == stack, f"{path!r}: widths of the shape {stack} are wanted; got {width.shape}.")
            within = jnp.arange(mask.shape[-1]) < width[..., None]
            p = p._replace(frozen={"mask": mask * within})
        return p, {name: value for name, value in values.items() if name != "widths"}

    def pair(self, p: Params) -> Factors:
        return Factors(p.trainable.a * p.frozen["mask"], p.trainable.b)

    # The pair is in the place of the weight and not added to it: these are no ``factors``.

    def weight(self, w: Float[Array, "in out"], p: Params) -> Float[Array, "in out"]:
        return sharded_as(w, self.pair(p).product().astype(w.dtype))

    def forward(self, dot: Dot, x: Array, w: Array, p: Params, ctx: Context) -> tuple[Array, Any]:
        pair = dot.per_matrix(lambda w, p: self.pair(p), w, p)
        y = dot.outer(dot.inner(x, pair.a), pair.b)
        return (y.astype(w.dtype) if dot.kind == "lookup" else y), None

    def forward_transposed(self, dot: Dot, x: Array, wt: Float[Array, "out in"], p: Params, ctx: Context) -> Array:
        swapped = self.pair(p).swap()
        return dot.outer(dot.inner(x, swapped.a), swapped.b)

    def live(self, p: Params) -> Array:
        return p.frozen["mask"]

    def cut(self, p: Params, ranks: tuple[int, ...]) -> tuple[Maestro, Params]:
        return Maestro(p.frozen["mask"].shape[-1]), p

    def describe(self) -> dict[str, str]:
        return {"rank": "full" if self.rank is None else f"<={self.rank}"}


def widths(adapted: Adapted, key: Key[Array, ""], *, every: bool = False) -> dict[str, Any]:
    """A context for ``bind`` in which one matrix, drawn with its width of all there are, is cut to it.

    Args:
      every: cut every matrix to a width of its own instead.
    """
    sites = _sites(adapted)
    sizes = {path: adapted.frozen[path]["mask"].shape[-1] for path in sites}
    if every:
        keys = jax.random.split(key, len(sites))
        of = lambda key, path: jax.random.randint(key, sites[path].canonical_shape[0], 1, sizes[path] + 1)
        return {"widths": {path: of(key, path) for key, path in zip(keys, sites, strict=True)}}
    place = jax.random.randint(key, (), 0, sum(sites[path].stack * sizes[path] for path in sites))
    found = {}
    for path, site in sites.items():
        matrix, width = place // sizes[path], place % sizes[path] + 1
        here = (place >= 0) & (jnp.arange(site.stack) == matrix)
        found[path] = jnp.where(here, width, sizes[path]).reshape(site.canonical_shape[0])
        place = place - site.stack * sizes[path]
    return {"widths": found}


def penalty(adapted: Adapted, trainable: Any) -> Float[Array, ""]:
    """The hierarchical group lasso of all matrices, without lambda: for a loss.

    Args:
      adapted: for which leaves they are.
      trainable: its trainable parameters, to differentiate with respect to.
    """
    return sum(jnp.sum(norms) for path in _sites(adapted) for norms in _tails(trainable[path]))


def shrink(adapted: Adapted, threshold: float = 1e-5) -> Adapted:
    """The columns masked from where the importance is below the threshold on. Outside of ``jit``, ``jlora.repack`` then
    gives smaller arrays, and the optimizer's state with them."""
    trainable, frozen = dict(adapted.trainable), dict(adapted.frozen)
    for path in _sites(adapted):
        pair, mask = trainable[path], frozen[path]["mask"]
        a, b = _tails(pair)
        if not isinstance(a, jax.core.Tracer) and not np.all(np.isfinite(a * b)):
            raise ValueError(f"{path!r}: the importance of its columns is not finite. Has the training diverged?")
        mask = mask * (a * b >= threshold)
        trainable[path] = Factors(pair.a * mask[..., None, :], pair.b * mask[..., None], pair.scale)
        frozen[path] = {"mask": mask}
    return adapted.replace(trainable=trainable, frozen=frozen)


def _tails(pair: Factors) -> tuple[Float[Array, "*stack R"], Float[Array, "*stack R"]]:
    """The norms of A and B from every column or row on."""
    tail = lambda squares: jnp.sqrt(jnp.flip(jnp.cumsum(jnp.flip(squares, -1), -1), -1) + 1e-12)
    return tail(jnp.sum(jnp.square(pair.a), -2)), tail(jnp.sum(jnp.square(pair.b), -1))


def _sites(adapted: Adapted) -> dict[str, Site]:
    sites = {path: site for path, site in adapted.sites.items() if isinstance(site.method, Maestro)}
    if not sites:
        raise ValueError(f"No leaf is adapted by Maestro: {sorted({s.method.name for s in adapted.sites.values()})}.")
    return sites
