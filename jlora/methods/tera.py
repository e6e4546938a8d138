r"""TeRA: a change of high rank from a random tensor network, of which a few vectors are trained.

TeRA: Vector-based Random Tensor Network for High-Rank Adaptation of Large Language Models. Gu, Zhou, Iacovides and
Mandic, 2025. https://arxiv.org/abs/2509.03234

.. math::
    \Delta W_{(i_1 i_2)(j_1 j_2)} = \sum_{p q s t} (F_1)_{i_1 p} (d_1)_p\,(F_2)_{i_2 q} (d_2)_q\; G_{p q s t}\;
    (d_3)_s (H_1)_{s j_1}\,(d_4)_t (H_2)_{t j_2}

The inputs are seen as a tensor of ``modes[0]`` axes, here in = i_1 i_2, the outputs as one of ``modes[1]``. F_m
[mode, r], H_m [r, mode] and the core G [r, r, r, r] are random, frozen, and one for the whole model (of F and H each
weight uses the leading rows and columns); the vectors d_m [r] are trained. Trained: r (modes[0] + modes[1]) a matrix.

* The rank of the change is min(r^modes[0], r^modes[1]) where the sizes allow it: with two modes a side and r = 32 it is
  1024 for 128 trained numbers. With one mode a side it is VeRA without b and with a random matrix between its factors.
* No change and no pair is formed where a matrix multiplies x and r is below the modes: the factors act on one axis
  after the other, which costs about r^(modes[0] + modes[1]) multiplications a token, the core's. Where that is more
  than the in out of the weight, the effective weight is formed, once for all tokens, and formed again for the gradient.
  Convolutions and ragged products take the pair of rank min(r^modes[0], r^modes[1]).
* F, G and H are normal and keep the variance; the last d starts at 0 and the others at ``d_initial``, so the output
  starts as the base's and only the last d has a gradient there.
* The authors' code was not to be had. That vectors on a Tucker network with frozen, shared factors are trained is the
  paper's; how a size is split into modes (near to equal, ascending, row-major), one rank for all modes, sharing by
  leading rows, and the start are derived.

When to use it: the fewest trained numbers for a change of high rank.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from jlora.factors import Factors
from jlora.methods.base import Method, Site, require
from jlora.weight import Context, Dot, Params


def split(size: int, modes: int) -> tuple[int, ...]:
    """That many numbers whose product is ``size``, near to each other.

    >>> split(4096, 2), split(24, 3), split(7, 2)
    ((64, 64), (2, 3, 4), (1, 7))
    """
    if modes == 1:
        return (size,)
    first = next(m for m in range(int(size ** (1 / modes) + 1e-9), 0, -1) if size % m == 0)
    return first, *split(size // first, modes - 1)


@dataclasses.dataclass(frozen=True)
class TeRA(Method):
    """Random tensor network. The formula and shapes are at the top of this file.

    Parameters of a leaf: trainable ``{"d": [*stack, modes[0] + modes[1], r]}``; of the group: frozen ``{"core":
    [r^modes[0], r^modes[1]], "f1": [mode, r], ..., "h1": [r, mode], ...}``.

    Attributes:
      rank: r, of every mode; it may exceed their sizes.
      modes: into how many axes inputs and outputs are split.
      d_initial: where all the vectors but the last start.
      group: name of the shared network. Two TeRA rules of different rank or modes need two names.
    """

    rank: int = 32
    _: dataclasses.KW_ONLY
    modes: tuple[int, int] = (2, 2)
    d_initial: float = 1.0
    group: str = "tera"

    def __post_init__(self):
        object.__setattr__(self, "modes", tuple(self.modes))
        require(
            isinstance(self.rank, int) and self.rank > 0,
            f"TeRA(rank={self.rank!r}): the rank is a positive integer, 8 to 64 as a rule.",
        )
        require(
            len(self.modes) == 2 and all(isinstance(n, int) and n > 0 for n in self.modes),
            f"TeRA(modes={self.modes!r}): two positive integers are wanted, for inputs and outputs, like (2, 2).",
        )
        size = self.rank ** sum(self.modes)
        require(
            size <= 2**28,
            f"TeRA(rank={self.rank}, modes={self.modes}): the core would have {size:,} entries; choose a rank of at "
            f"most {math.floor(2 ** (28 / sum(self.modes)) + 1e-9)}.",
        )

    def sizes(self, n_in: int, n_out: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of the modes."""
        return split(n_in, self.modes[0]), split(n_out, self.modes[1])

    def check(self, site: Site) -> str | None:
        if site.axes.kind == "embedding":
            return "TeRA splits the inputs into axes, and those of an embedding are tokens; use VeRA for this leaf"

    def init(self, key: Any, w: Array, site: Site, dtype: Any) -> Params:
        d = jnp.full((sum(self.modes), self.rank), self.d_initial, dtype)
        return Params({"d": d.at[-1].set(0.0)})

    def init_shared(self, key: Any, sites: dict[str, Site], dtype: Any) -> Params:
        of_all = [self.sizes(*site.canonical_shape[1:]) for site in sites.values()]
        largest = [[max(sizes) for sizes in zip(*side, strict=True)] for side in zip(*of_all, strict=True)]
        r, keys = self.rank, iter(jax.random.split(key, 1 + sum(self.modes)))
        normal = lambda shape, fan: jax.random.normal(next(keys), shape, dtype) / fan**0.5
        rows, columns = (r**n for n in self.modes)
        shared = {"core": normal((rows, columns), rows)}
        shared |= {f"f{m + 1}": normal((size, r), size) for m, size in enumerate(largest[0])}
        return Params(frozen=shared | {f"h{m + 1}": normal((r, size), r) for m, size in enumerate(largest[1])})

    def count(self, site: Site) -> int:
        return site.stack * sum(self.modes) * self.rank

    def dims(self, p: Params) -> Params:
        return Params({"d": "_ rank"}, shared=None if p.shared is None else dict.fromkeys(p.shared, "_ _"))

    def pieces(self, w: Float[Array, "in out"], p: Params) -> tuple[list[Array], Array, list[Array]]:
        """The factors of the inputs [mode, r], the core, and the factors of the outputs [r, mode], with the vectors."""
        d, n = p.trainable["d"], self.modes[0]
        of_in, of_out = self.sizes(*w.shape)
        shared = {name: leaf.astype(d.dtype) for name, leaf in p.shared.items()}
        f = [shared[f"f{m + 1}"][:size] * d[m] for m, size in enumerate(of_in)]
        h = [d[n + m][:, None] * shared[f"h{m + 1}"][:, :size] for m, size in enumerate(of_out)]
        return f, shared["core"], h

    def factors(self, w: Float[Array, "in out"], p: Params) -> Factors:
        f, core, h = self.pieces(w, p)
        if self.modes[0] >= self.modes[1]:
            return Factors(_through(core.ravel(), [piece.T for piece in f]).reshape(-1, w.shape[0]).T, _kron(h))
        return Factors(_kron(f), _through(core, h))

    def weight(self, w: Float[Array, "in out"], p: Params) -> Float[Array, "in out"]:
        f, core, h = self.pieces(w, p)
        return w + _through(core.ravel(), [*(piece.T for piece in f), *h]).reshape(w.shape).astype(w.dtype)

    def forms(self, w: Float[Array, "in out"]) -> bool:
        """Whether a token costs more through the core than through the weight."""
        return self.rank ** sum(self.modes) > w.shape[0] * w.shape[1]

    def forward(self, dot: Dot, x: Array, w: Array, p: Params, ctx: Context) -> tuple[Array, Any]:
        if dot.kind != "linear":
            return super().forward(dot, x, w, p, ctx)
        if self.forms(w):
            return jax.checkpoint(lambda x, w, p: dot(x, self.weight(w, p)))(x, w, p), None
        return _branch(dot, x, dot(x, w), *self.pieces(w, p)), None

    def forward_transposed(self, dot: Dot, x: Array, wt: Float[Array, "out in"], p: Params, ctx: Context) -> Array:
        if self.forms(wt.T):
            return jax.checkpoint(lambda x, wt, p: dot(x, self.weight(wt.T, p).T))(x, wt, p)
        f, core, h = self.pieces(wt.T, p)
        return _branch(dot, x, dot(x, wt), [piece.T for piece in h], core.T, [piece.T for piece in f])

    def describe(self) -> dict[str, str]:
        return {"rank": str(self.rank ** min(self.modes)), "scale": "1"}


def _kron(pieces: list[Array]) -> Array:
    """The Kronecker product of matrices."""
    total = pieces[0]
    for piece in pieces[1:]:
        total = jnp.einsum("ab,cd->acbd", total, piece).reshape(total.shape[0] * piece.shape[0], -1)
    return total


def _through(z: Array, pieces: list[Array], einsum: Callable[..., Array] = jnp.einsum) -> Array:
    """The last axis of z, cut into modes, times a piece [before, after] for each of the first of them. The axes that a
    piece leaves come after those that are left: with a piece for each mode they are in order again."""
    tokens = z.shape[:-1]
    for piece in pieces:
        z = einsum("...ij,ir->...jr", z.reshape(*tokens, piece.shape[0], -1), piece).astype(z.dtype)
        z = z.reshape(*tokens, -1)
    return z


def _branch(dot: Dot, x: Array, y: Array, f: list[Array], core: Array, h: list[Array]) -> Array:
    """y + x (kron f) core (kron h)."""
    *rows, features = jax.typeof(x).sharding.spec
    z = x if features is None else jax.reshard(x, PartitionSpec(*rows, None))  # the modes would cut it anew
    for pieces in (f, [core], h):
        z = _through(z, pieces, dot.einsum)
    return y + z.astype(y.dtype)
