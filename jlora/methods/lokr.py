r"""LoKr: a change of weight that is the Kronecker product of two small matrices.

KronA: Parameter Efficient Tuning with Kronecker Adapter. Edalati et al., 2022. https://arxiv.org/abs/2212.10650
LoKr, as in LyCORIS: Navigating Text-To-Image Customization. Yeh et al., 2023. https://arxiv.org/abs/2309.14859

.. math::  y = x W + s\, x (W_1 \otimes W_2), \qquad s = \alpha / r, \qquad W_2 = A_2 B_2

x [..., in], W [in, out] frozen; W_1 [i1, o1] and W_2 [i2, o2] with in = i1 i2 and out = o1 o2; A_2 [i2, r] and
B_2 [r, o2]. W_2 is trained whole where r >= max(i2, o2) / 2. W_1 is trained whole, or with ``decompose_both`` as
A_1 [i1, r] and B_1 [r, o1] where r < max(i1, o1) / 2. Trained: i1 o1 + i2 o2, or the sizes of the pairs instead.

The product is not formed where a matrix multiplies x: x is seen as [..., i1, i2], and W_1 and W_2 (or their
pairs) act on an axis each, the ones that shrink it first. A lookup takes the Kronecker product of two looked up rows.
A convolution's and a ragged product's change is formed, [in, out], and formed again for the gradient.

* i1 and i2 are the factors of ``in`` closest to each other, the smaller one first, o1 and o2 those of ``out``. With
  ``factor`` the first of each is that number where it divides, else the largest divisor up to it. A prime size leaves
  1 x itself.
* W_1 (or B_1) starts at 0, the others uniform in +-1/sqrt(inputs of the factor). ``zero="second"`` starts W_2 (or A_2)
  at 0 instead, as LyCORIS does.
* The window of a convolution belongs to W_2: [window, i2, o2], and i1 i2 are its features. With ``effective_conv`` a
  W_2 that is not whole has a Tucker form: A_2 is ``A[(window, f), k] = sum_j T[window, j, k] U[f, j]`` of a core T with
  r^2 entries for each place of the window and U [i2, r]. Trained for it then: r (i2 + o2) + r^2 window. Windows of size
  1 have no core.
* The scale is alpha / r always, as in PEFT; LyCORIS has 1 where both are whole. PEFT's dropouts of output rows and of
  whole modules are not here.

When to use it: the smallest adapters that still have a high rank (that of W_1 times that of W_2): thousands of numbers
for a matrix of millions.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from jlora.methods.base import Method, Site, require
from jlora.weight import Context, Dot, Params


def factorization(size: int, factor: int = -1) -> tuple[int, int]:
    """Two numbers whose product is ``size``.

    >>> factorization(128), factorization(127), factorization(128, 4), factorization(15, 4)
    ((8, 16), (1, 127), (4, 32), (3, 5))
    """
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    limit = math.isqrt(size) if factor < 0 else min(math.isqrt(size), factor)
    first = next(m for m in range(limit, 0, -1) if size % m == 0)
    return first, size // first


@dataclasses.dataclass(frozen=True)
class LoKr(Method):
    """Low-rank Kronecker product. The formula and shapes are at the top of this file.

    Parameters of a leaf: trainable ``"w1": [*stack, i1, o1]`` or ``"a1": [*stack, i1, r], "b1": [*stack, r, o1]``, and
    ``"w2": [*stack, i2, o2]`` or ``"a2": [*stack, i2, r], "b2": [*stack, r, o2]``. For a convolution i2 in w2 and a2
    stands for three axes, [before, i2, after]: the parts of the window on either side of the features. In Tucker form
    ``"a2"`` is [i2, r], beside the core ``"t2": [*stack, before, r, after, r]``.

    Attributes:
      rank: r of W_2. A large one, 10000 say, trains W_2 whole.
      alpha: numerator of the scale.
      decompose_both: give W_1 a rank, too.
      factor: of both sizes, or -1.
      zero: "first" or "second": the factor that starts at zero.
      effective_conv: the Tucker form for convolutions.
    """

    rank: int = 8
    alpha: float = 8.0
    _: dataclasses.KW_ONLY
    decompose_both: bool = False
    factor: int = -1
    zero: str = "first"
    effective_conv: bool = False

    def __post_init__(self):
        require(
            isinstance(self.rank, int) and self.rank > 0,
            f"LoKr(rank={self.rank!r}): the rank is a positive integer, 4 to 64 as a rule.",
        )
        require(
            isinstance(self.factor, int) and (self.factor == -1 or self.factor > 0),
            f"LoKr(factor={self.factor!r}): a positive integer is wanted, or -1 for sizes close to each other.",
        )
        require(self.zero in ("first", "second"), f"LoKr(zero={self.zero!r}): 'first' or 'second' is wanted.")

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def split(self, n_in: int, n_out: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """((i1, i2), (o1, o2))."""
        return factorization(n_in, self.factor), factorization(n_out, self.factor)

    def whole(self, n_in: int, n_out: int) -> tuple[bool, bool]:
        """Whether W_1 and W_2 are trained whole."""
        (i1, i2), (o1, o2) = self.split(n_in, n_out)
        return not (self.decompose_both and 2 * self.rank < max(i1, o1)), 2 * self.rank >= max(i2, o2)

    def shapes(self, site: Site) -> dict[str, tuple[int, ...]]:
        """Of the parameters of one matrix."""
        (_, n_in, n_out), r = site.canonical_shape, self.rank
        before, n_in, after = site.window if site.axes.kind == "conv" else (1, n_in, 1)
        (i1, i2), (o1, o2) = self.split(n_in, n_out)
        first, second = self.whole(n_in, n_out)
        inputs = (before, i2, after) if site.axes.kind == "conv" else (i2,)
        one = {"w1": (i1, o1)} if first else {"a1": (i1, r), "b1": (r, o1)}
        if second:
            return one | {"w2": (*inputs, o2)}
        if self.effective_conv and before * after > 1:
            return one | {"a2": (i2, r), "b2": (r, o2), "t2": (before, r, after, r)}
        return one | {"a2": (*inputs, r), "b2": (r, o2)}

    def init(self, key: Any, w: Array, site: Site, dtype: Any) -> Params:
        zero = {"w1", "b1"} if self.zero == "first" else {"w2", "a2"}
        out, shapes = {}, self.shapes(site)
        for i, (name, shape) in enumerate(shapes.items()):
            looked_up = site.axes.kind == "embedding" and not name.startswith("b")
            fan = shape[-1] if name == "b2" and "t2" in shapes else math.prod(shape[:-1])  # as PEFT has it
            bound = 1.0 if looked_up else fan**-0.5
            uniform = jax.random.uniform(jax.random.fold_in(key, i), shape, dtype, -bound, bound)
            out[name] = jnp.zeros(shape, dtype) if name in zero else uniform
        return Params(out)

    def count(self, site: Site) -> int:
        return site.stack * sum(math.prod(shape) for shape in self.shapes(site).values())

    def dims(self, p: Params) -> Params:
        window = {"w2": "_ _ _ _", "a2": "_ _ _ rank"}
        matrix = {"w1": "_ _", "w2": "_ _", "a1": "_ rank", "a2": "_ rank", "b1": "rank _", "b2": "rank _"}
        matrix["t2"] = "_ rank _ rank"
        conv = {name: self._is_window(p) and name in window for name in p.trainable}
        return Params({name: window[name] if conv[name] else matrix[name] for name in p.trainable})

    def _is_window(self, p: Params) -> bool:
        """Whether W_2 or A_2, of one matrix or stacked, has the axes of a convolution's window."""
        t = p.trainable
        second = t["w2"] if "w2" in t else t["a2"]
        return second.ndim == (t["w1"] if "w1" in t else t["a1"]).ndim + 2

    def pieces(self, p: Params) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
        """The matrices whose product is W_1, and those whose product is W_2, the Tucker form multiplied out."""
        t = p.trainable
        one, two = ((t[f"w{i}"],) if f"w{i}" in t else (t[f"a{i}"], t[f"b{i}"]) for i in (1, 2))
        if "t2" in t:
            two = jnp.einsum("pjqk,nj->pnqk", t["t2"], two[0]), two[1]
        return one, two

    def weight(self, w: Array, p: Params) -> Array:
        w1, w2 = (pieces[0] if len(pieces) == 1 else pieces[0] @ pieces[1] for pieces in self.pieces(p))
        if w2.ndim > w1.ndim:
            delta = jnp.einsum("ml,pnqk->pmnqlk", w1, w2)
        else:
            delta = jnp.einsum("ml,nk->mnlk", w1, w2)
        return (w + self.scale * delta.reshape(w.shape)).astype(w.dtype)

    def forward(self, dot: Dot, x: Array, w: Array, p: Params, ctx: Context) -> tuple[Array, Any]:
        if dot.kind == "linear":
            return self._branch(dot, x, dot(x, w), *self.pieces(p)), None
        if dot.kind == "lookup":
            y = dot(x, w)
            return y + (self.scale * self._rows(dot, x, p)).reshape(y.shape).astype(y.dtype), None
        return jax.checkpoint(lambda x, w, p: dot(x, dot.per_matrix(self.weight, w, p)))(x, w, p), None

    def forward_transposed(self, dot: Dot, x: Array, wt: Float[Array, "out in"], p: Params, ctx: Context) -> Array:
        first, second = ([piece.T for piece in reversed(pieces)] for pieces in self.pieces(p))
        return self._branch(dot, x, dot(x, wt), first, second)

    def _branch(self, dot: Dot, x: Array, y: Array, first: Any, second: Any) -> Array:
        """y + s x (W_1 kron W_2), the product of the pieces of each."""
        *rows, features = jax.typeof(x).sharding.spec
        x = x if features is None else jax.reshard(x, PartitionSpec(*rows, None))  # the two axes would cut it anew
        h = x.reshape(*x.shape[:-1], first[0].shape[0], second[0].shape[0])
        times = lambda h, piece: dot.einsum("...n,nk->...k", h.astype(x.dtype), piece)
        swapped = lambda h, piece: times(h.swapaxes(-2, -1), piece).swapaxes(-2, -1)
        one = [(swapped, piece) for piece in first]
        two = [(times, piece) for piece in second]
        (i1, i2), (o1, o2) = h.shape[-2:], (first[-1].shape[1], second[-1].shape[1])
        if len(two) > 1:
            steps = [two[0], *one, two[1]]
        else:
            steps = two + one if i1 * o2 * (i2 + o1) <= i2 * o1 * (i1 + o2) else one + two
        for act, piece in steps:
            h = act(h, piece)
        return y + (self.scale * h.reshape(*x.shape[:-1], -1)).astype(y.dtype)

    def _rows(self, dot: Dot, ids: Array, p: Params) -> Float[Array, "... o1 o2"]:
        """Rows of W_1 kron W_2. A row that is not there is not there in W_1 or, where ids are clipped, the last one in
        both."""
        first, second = self.pieces(p)
        i1, i2 = first[0].shape[0], second[0].shape[0]
        number = ids // i2
        rows = lambda ids, pieces: (
            dot.inner(ids, pieces[0]) if len(pieces) == 1 else dot.outer(dot.inner(ids, pieces[0]), pieces[1])
        )
        u, v = rows(number, first), rows(ids - jnp.clip(number, 0, i1 - 1) * i2, second)
        return u[..., :, None] * v[..., None, :]

    def describe(self) -> dict[str, str]:
        return {"rank": str(self.rank), "scale": f"{self.scale:g}"}
