r"""Changes of a convolution's kernel that use its axes: ConvLoRA, CP-LoRA and FLoRA's Tucker form.

LoRA: Low-Rank Adaptation of Large Language Models. Hu et al., 2021. https://arxiv.org/abs/2106.09685 (the convolutions
of its code, known as ConvLoRA)
LoRA-based methods on Unet for transfer learning in Subarachnoid Hematoma Segmentation (CP-LoRA, convDoRA, CP-DoRA).
Minoccheri et al., 2025. https://arxiv.org/abs/2508.01772
FLoRA: Low-Rank Core Space for N-dimension. Si et al., 2024. https://arxiv.org/abs/2405.14739

.. math::  y = x * (K + s\,\Delta), \qquad s = \alpha / r \quad (\text{TuckerLoRA: } s = \alpha)

K [h, w, in, out] frozen; one to three window axes, in any layout. ``in`` counts the features that one group of a
grouped convolution sees.

==========  ===============================================  =============================  ==========================
method      change at [h, w, i, o]                           trained                        start
==========  ===============================================  =============================  ==========================
ConvLoRA    A [in w, r h] and B [r h, out h]: A B, viewed    r h (in w + out h)             A uniform, B = 0
            as the kernel (see below)
CPLoRA      sum_p c[h, p] d[w, p] a[i, p] b[p, o]            r (h + w + in + out)           b = 0, the others uniform
TuckerLoRA  sum_jklq G[j, k, l, q] c[h, j] d[w, k] a[i, l]   r0 in + r1 out + r2 (h + w)    G = 0, the others normal
            b[q, o]                                          + r0 r1 r2^2
==========  ===============================================  =============================  ==========================

The other convolution methods are made of these and of ``LoRA``, whose pair is a convolution with r outputs and a 1x1
one: LoRA-C is ``LoRA``, DoRA-C ``DoRA``; convDoRA and CP-DoRA are ``DoRA(method=ConvLoRA(...))`` and
``DoRA(method=CPLoRA(...))``. On a matrix, a window of size 1, ConvLoRA and CPLoRA are LoRA, and TuckerLoRA is FLoRA.

* CPLoRA and TuckerLoRA run as a 1x1 convolution to the rank, the window on those few features (each on its own for CP,
  mixed for Tucker) and a 1x1 convolution to the outputs. For a window of K places and an image of T they cost
  2 T r (in + K + out) and 2 T (r0 in + K r0 r1 + r1 out) FLOPs where LoRA has 2 T r (K in + out). Where large strides
  make one convolution with r outputs cheaper, that runs.
* CPLoRA starts so that the products of its factors have the deviation of LoRA's A. Its authors' code is not published:
  start and scale are derived, not checked.
* TuckerLoRA is FLoRA's code in shapes, scale and start. There a grouped convolution fails, and every token gets the
  same change from an embedding; here both are adapted like any other weight.
* ConvLoRA keeps the view of its authors' code, so that its numbers fit: with B' = lora_B [out h, r h] and A' = lora_A
  [r h, in w], the kernel [out, in, h, w] has the entries of B' A' in the order of memory. The h rows of B' for each o
  belong to h stretches of the features, not to places of the window. Our ``a`` is A' transposed, ``b`` at (m, o)
  their row o h + m. The code wants square windows; here h is the first window axis, and w stands for the others.
* Its rank as a matrix is up to r h^2. It runs as that many factors where those are cheaper than the gradient of a whole
  kernel; else the kernel is formed, and formed again for the gradient. The dropout of the code does nothing; here it
  acts on the branch's input.
* With feature groups each group applies the same change to its own inputs, as ``LoRA`` does. ConvLoRA's code has one A
  over the inputs of all groups.

When to use them: CPLoRA for the smallest adapters of a convolution and the cheapest branch; large ranks are cheap, and
its paper finds that they pay. TuckerLoRA for more freedom at nearly that price. ConvLoRA where its tensors are given.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jlora.factors import Factors
from jlora.methods.base import Method, Site, dropout, require, sharded_as
from jlora.weight import Context, Dot, Params


def input_axes(site: Site) -> tuple[list[int], int]:
    """(sizes, which of them holds the features) of the axes that the forms treat each on its own: a convolution's
    inputs. A matrix has one, whatever axes it is made of."""
    if site.axes.kind == "conv":
        return [site.shape[axis] for axis in site.axes.inputs], site.features_axis
    return [site.canonical_shape[1]], 0


@dataclasses.dataclass(frozen=True)
class KernelLoRA(Method):
    """The family; its members are below. The formulas and shapes are at the top of this file.

    Attributes:
      rank: r.
      alpha: numerator of the scale.
      dropout: rate, as for LoRA.
    """

    rank: int = 8
    alpha: float = 16.0
    _: dataclasses.KW_ONLY
    dropout: float = 0.0

    sliceable = frozenset({"out"})

    def __post_init__(self):
        require(
            isinstance(self.rank, int) and self.rank > 0,
            f"{self.name}(rank={self.rank!r}): the rank is a positive integer, 2 to 64 as a rule.",
        )
        require(0.0 <= self.dropout < 1.0, f"{self.name}(dropout={self.dropout}): a rate in [0, 1) is wanted.")

    @property
    def scale(self) -> float:
        return float(self.alpha / self.rank)

    def describe(self) -> dict[str, str]:
        return {"rank": str(self.rank), "scale": f"{self.scale:g}"}


@dataclasses.dataclass(frozen=True)
class ConvLoRA(KernelLoRA):
    """A product of two matrices, viewed as the kernel. See the top of this file.

    Parameters of a leaf: trainable ``{"a": [*stack, w0, in, w1, r h], "b": [*stack, h0, r h, h1, out]}``. The first
    window axis has size h0 h1, the others w0 w1: w1 and h1 are 1 where the window comes before the features (HWIO), w0
    and h0 where it comes after them (OIHW).
    """

    def check(self, site: Site) -> str | None:
        sizes, at = input_axes(site)
        if 0 < at < len(sizes) - 1:
            return "the window lies on both sides of the features, and ConvLoRA wants it on one; CPLoRA takes any"
        most = min(sizes[at], site.canonical_shape[2])
        if self.rank > most:
            return f"rank {self.rank} is above min(features, out) = {most}; choose a rank of at most {most}"

    def shapes(self, site: Site) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of ``a`` and ``b`` for one matrix."""
        sizes, at = input_axes(site)
        first, *others = [size for axis, size in enumerate(sizes) if axis != at] or [1]
        (h0, h1), (w0, w1) = ((n, 1) if at else (1, n) for n in (first, math.prod(others)))
        r = self.rank * first
        return (w0, sizes[at], w1, r), (h0, r, h1, site.canonical_shape[2])

    def init(self, key: Any, w: Array, site: Site, dtype: Any) -> Params:
        shape_a, shape_b = self.shapes(site)
        if site.axes.kind == "embedding":
            return Params({"a": jnp.zeros(shape_a, dtype), "b": jax.random.normal(key, shape_b, dtype)})
        bound = math.prod(shape_a[:3]) ** -0.5
        return Params({"a": jax.random.uniform(key, shape_a, dtype, -bound, bound), "b": jnp.zeros(shape_b, dtype)})

    def count(self, site: Site) -> int:
        return site.stack * sum(map(math.prod, self.shapes(site)))

    def dims(self, p: Params) -> Params:
        (*_, w0, _, w1, _), (*_, h0, _, h1, _) = p.trainable["a"].shape, p.trainable["b"].shape
        features = "in" if w0 * w1 * h0 * h1 == 1 else "_"
        return Params({"a": f"_ {features} _ rank", "b": "_ rank _ out"})

    def parts(self, p: Params) -> tuple[Float[Array, "c r"], Float[Array, "h r out"]]:
        """A and B in the order of the authors' code: c = (feature, other window axes)."""
        a, b = p.trainable["a"], p.trainable["b"]
        (w0, features, w1, r), (h0, _, h1, n_out) = a.shape, b.shape
        return a.swapaxes(0, 1).reshape(features * w0 * w1, r), b.swapaxes(1, 2).reshape(h0 * h1, r, n_out)

    def rows(self, m: Float[Array, "h c k"], p: Params) -> Float[Array, "in k"]:
        """A kernel [h, c, k], which in the order of memory is [features, window, k], in the order of this leaf's."""
        (w0, features, *_), h0 = p.trainable["a"].shape, p.trainable["b"].shape[0]
        m = m.reshape(features, -1, m.shape[-1])
        return (m if w0 * h0 == 1 else m.swapaxes(0, 1)).reshape(-1, m.shape[-1])

    def factors(self, w: Float[Array, "in out"], p: Params) -> Factors:
        a, b = self.parts(p)
        h, r, n_out = b.shape
        columns = jnp.einsum("cr,hm->hcmr", a, jnp.eye(h, dtype=a.dtype)).reshape(h, -1, h * r)
        return Factors(self.rows(columns, p), b.reshape(h * r, n_out), self.scale)

    def weight(self, w: Float[Array, "in out"], p: Params) -> Float[Array, "in out"]:
        a, b = self.parts(p)
        if len(b) == 1:
            return super().weight(w, p)
        change = self.scale * self.rows(jnp.einsum("cr,hro->hco", a, b), p)
        return (w + sharded_as(w, change)).astype(w.dtype)

    def forward(self, dot: Dot, x: Array, w: Array, p: Params, ctx: Context) -> tuple[Array, Any]:
        if dot.kind == "conv" and ctx.key is None:
            if 3 * self.factors(w, p).rank * sum(w.shape) > math.prod(w.shape):
                return jax.checkpoint(lambda x, w, p: dot(x, self.weight(w, p)))(x, w, p), None
        return super().forward(dot, x, w, p, ctx)


class _Staged(KernelLoRA):
    """The forms with a factor for each input axis, ``p.trainable["a"]``."""

    def stages(self, p: Params, at: int) -> tuple[Float[Array, "features n"], Float[Array, "*window q r"]]:
        """What narrows the features, the input axis ``at``, and the kernel on the n narrowed ones: in groups of q."""
        raise NotImplementedError(f"{type(self).__name__} does not define stages.")

    def forward(self, dot: Dot, x: Array, w: Array, p: Params, ctx: Context) -> tuple[Array, Any]:
        h = None
        if dot.kind == "conv" and dot.features_axis is not None:
            h = dot.staged(dropout(x, self.dropout, ctx.key), *self.stages(p, dot.features_axis))
        if h is None:
            return super().forward(dot, x, w, p, ctx)
        return dot(x, w) + dot.outer(h * self.scale, p.trainable["b"]), None


def _dims_of_each(a: tuple[Array, ...]) -> tuple[str, ...]:
    return ("in rank",) if len(a) == 1 else ("_ rank",) * len(a)


@dataclasses.dataclass(frozen=True)
class CPLoRA(_Staged):
    """A sum of r products of vectors, one for each axis of the kernel. See the top of this file.

    Parameters of a leaf: trainable ``{"a": ([*stack, size, r] for each input axis, as the leaf has them),
    "b": [*stack, r, out]}``.
    """

    def check(self, site: Site) -> str | None:
        sizes = [*input_axes(site)[0], site.canonical_shape[2]]
        most = math.prod(sizes) // max(sizes)
        if self.rank > most:
            shape = " x ".join(map(str, sizes))
            return f"rank {self.rank} is above {most}, the most that {shape} can need; choose a rank of at most {most}"

    def init(self, key: Any, w: Array, site: Site, dtype: Any) -> Params:
        (sizes, at), shape_b = input_axes(site), (self.rank, w.shape[1])
        if site.axes.kind == "embedding":
            return Params({"a": (jnp.zeros((*sizes, self.rank), dtype),), "b": jax.random.normal(key, shape_b, dtype)})
        a = []
        for axis, size in enumerate(sizes):
            bound = (size if axis == at else size / 3) ** -0.5  # the window's factors have a variance of 1 / size
            key_of_axis = jax.random.fold_in(key, axis)
            a.append(jax.random.uniform(key_of_axis, (size, self.rank), dtype, -bound, bound))
        return Params({"a": tuple(a), "b": jnp.zeros(shape_b, dtype)})

    def count(self, site: Site) -> int:
        return site.stack * self.rank * (sum(input_axes(site)[0]) + site.canonical_shape[2])

    def dims(self, p: Params) -> Params:
        return Params({"a": _dims_of_each(p.trainable["a"]), "b": "rank out"})

    def factors(self, w: Float[Array, "in out"], p: Params) -> Factors:
        return Factors(_columns(p.trainable["a"]).reshape(-1, self.rank), p.trainable["b"], self.scale)

    def stages(self, p: Params, at: int) -> tuple[Array, Array]:
        a = p.trainable["a"]
        return a[at], _columns((*a[:at], *a[at + 1 :]))[..., None, :]


def _columns(a: tuple[Float[Array, "_ r"], ...]) -> Float[Array, "*sizes r"]:
    """The outer products of the matrices' columns, column by column."""
    product = a[0]
    for part in a[1:]:
        product = product[..., None, :] * part
    return product


@dataclasses.dataclass(frozen=True)
class TuckerLoRA(_Staged):
    """A small core, multiplied by a matrix along each axis: FLoRA on convolutions. See the top of this file.

    Parameters of a leaf: trainable ``{"a": ([*stack, size, its rank] for each input axis, as the leaf has them),
    "core": [*stack, rank of each input axis ..., r1], "b": [*stack, r1, out]}``.

    Attributes:
      rank: r0, of the input features.
      alpha: the scale itself, not divided by a rank.
      rank_out: r1, of the outputs; by default r0.
      rank_window: r2, of each window axis, or the axis's size where that is smaller.
    """

    alpha: float = 1.0
    rank_out: int | None = None
    rank_window: int = 2

    def __post_init__(self):
        super().__post_init__()
        for name in ("rank_out", "rank_window"):
            rank = getattr(self, name)
            require(
                rank is None or (isinstance(rank, int) and rank > 0),
                f"TuckerLoRA({name}={rank!r}): a positive integer is wanted.",
            )

    @property
    def scale(self) -> float:
        return float(self.alpha)

    @property
    def ranks(self) -> tuple[int, int]:
        """r0 and r1."""
        return self.rank, self.rank if self.rank_out is None else self.rank_out

    def shapes(self, site: Site) -> list[tuple[int, int]]:
        """(size, rank) of each input axis and of the outputs, for one matrix."""
        (sizes, at), (r0, r1) = input_axes(site), self.ranks
        each = [(size, r0 if axis == at else min(self.rank_window, size)) for axis, size in enumerate(sizes)]
        return [*each, (site.canonical_shape[2], r1)]

    def check(self, site: Site) -> str | None:
        (sizes, at), n_out = input_axes(site), site.canonical_shape[2]
        for rank, size, name in zip(self.ranks, (sizes[at], n_out), ("the input features", "out"), strict=True):
            if rank > size:
                return f"rank {rank} is above {name} = {size}; choose a rank of at most {size}"

    def init(self, key: Any, w: Array, site: Site, dtype: Any) -> Params:
        shapes = self.shapes(site)
        keys = jax.random.split(key, len(shapes))
        normal = lambda key, shape: (0.5 / shape[1]) ** 0.5 * jax.random.normal(key, shape, dtype)
        *a, b = (normal(key, shape) for key, shape in zip(keys, shapes, strict=True))
        return Params({"a": tuple(a), "core": jnp.zeros([rank for _, rank in shapes], dtype), "b": b.T})

    def count(self, site: Site) -> int:
        shapes = self.shapes(site)
        return site.stack * (sum(map(math.prod, shapes)) + math.prod(rank for _, rank in shapes))

    def dims(self, p: Params) -> Params:
        a = p.trainable["a"]
        return Params({"a": _dims_of_each(a), "core": "rank " * (len(a) + 1), "b": "rank out"})

    def factors(self, w: Float[Array, "in out"], p: Params) -> Factors:
        core = _stretched(p.trainable["core"], p.trainable["a"])
        return Factors(core.reshape(-1, core.shape[-1]), p.trainable["b"], self.scale)

    def stages(self, p: Params, at: int) -> tuple[Array, Array]:
        a, core = p.trainable["a"], jnp.moveaxis(p.trainable["core"], at, -2)
        return a[at], _stretched(core, (*a[:at], *a[at + 1 :]))

    def describe(self) -> dict[str, str]:
        return {"rank": "x".join(map(str, dict.fromkeys(self.ranks))), "scale": f"{self.scale:g}"}


def _stretched(core: Array, parts: tuple[Float[Array, "size rank"], ...]) -> Array:
    """The first axes of the core, multiplied by a matrix each."""
    for axis, part in enumerate(parts):
        core = jnp.moveaxis(jnp.tensordot(part, core, axes=(1, axis)), 0, axis)
    return core
