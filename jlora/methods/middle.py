r"""A small dense matrix between two factors: LoRA-XS, LoRA-SB, SLoRA, NLoRA, IntTune and, on matrices, FLoRA.

LoRA-XS: Low-Rank Adaptation with Extremely Small Number of Parameters. Bałazy et al., 2024.
https://arxiv.org/abs/2405.17604
Initialization using Update Approximation is a Silver Bullet for Extremely Efficient Low-Rank Fine-Tuning (LoRA-SB).
Ponkshe et al., 2024. https://arxiv.org/abs/2411.19557
NLoRA: Nyström-Initiated Low-Rank Adaptation for Large Language Models (SLoRA, NLoRA, IntTune). Guo et al., 2025.
https://arxiv.org/abs/2502.14482
FLoRA: Low-Rank Core Space for N-dimension. Si et al., 2024. https://arxiv.org/abs/2405.14739

.. math::  y = x W + s\,\bigl((\mathrm{drop}(x) A) M\bigr) B, \qquad s = \alpha / r

W [in, out] frozen, A [in, r], M [r, r], B [r, out]; for FLoRA A [in, r0], M [r0, r1], B [r1, out] and s = alpha.

========  ==============  ======================  ===================  ==============================================
method    trained         count                   A, B                 M at the start
========  ==============  ======================  ===================  ==============================================
LoRAXS    M               r^2                     U S, V^T of W        0
LoRA-SB   M               r^2                     U, V^T of an update  S / s, so that the start is the update
IntTune   M               r^2                     W[:, :r], W[:r]      W[:r, :r]
NLoRA     A, M, B         r (in + out) + r^2      W[:, :r], W[:r]      W[:r, :r]
SLoRA     A, M, B         r (in + out) + r^2      uniform, 0           uniform
FLoRA     A, M, B         r0 in + r1 out + r0 r1  normal, normal       0
========  ==============  ======================  ===================  ==============================================

* With A and B frozen, the gradient of M is s A^T G B^T, G that of the weight: no matrix of a factor's size is formed in
  the backward pass. Merging folds M into a factor, exactly: a plain LoRA of rank r (min(r0, r1) for FLoRA).
* LoRA-XS starts M from noise of deviation 1e-5 in the authors' code. Here it starts at 0, and the output as the base's,
  unless ``start_std`` says otherwise: the gradient at 0 is not 0.
* NLoRA and IntTune start away from 0, and in the authors' code the output starts displaced. Here the starting product
  is subtracted, s (A M B - A0 M0 B0), unless ``residual=False``. That is free with A and B frozen; for NLoRA it doubles
  the rank that runs, and keeps A0 and M0 B0 frozen. The code takes the block W[:r, :r] where the paper's Nyström
  formula has its pseudo-inverse: ``start="nystrom_pinv"`` is the formula. It is exact for W of rank r, and for a W
  without structure several times as large as W: the block is ill-conditioned.
* LoRA-SB's factors come from an estimate D of the first update, -lr * sign(gradient) summed over some batches; the
  output starts displaced by D's best approximation of rank r, by design::

      rules = jlora.LoRAXS(rank=64, alpha=64, start=jlora.init.LoRASB(learning_rate=1e-4))
      stats = jlora.calibrate(loss_fn, params, batches, rules)
      adapted = jlora.adapt(params, rules, stats=stats, key=key)

  With ``start="update"`` the leaves that are adapted are themselves such estimates, and ``replace(base=params)`` puts
  the parameters under them.

When to use them: LoRA-XS and LoRA-SB where adapters are many or sent around, hundreds of times smaller than LoRA at
nearly its speed. SLoRA and NLoRA for LoRA's count and a little more. FLoRA where in and out want different ranks.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jlora.factors import Factors
from jlora.linalg import truncated_svd
from jlora.methods.base import Method, Site, Start, check_rank, dropout, require, unsharded
from jlora.methods.lora import LoRA
from jlora.weight import Context, Dot, Params

_STARTS = ("svd", "random", "update", "slora", "nystrom_reference", "nystrom_pinv", "flora")


@dataclasses.dataclass(frozen=True)
class MiddleLoRA(Method):
    """The family; its members below differ in the defaults. The formula and shapes are at the top of this file.

    Parameters of a leaf: ``{"a": [*stack, in, r], "middle": [*stack, r, r], "b": [*stack, r, out]}``, all trainable or
    only the middle, the rest frozen. With a start to subtract, also frozen ``{"start": [*stack, r, r]}``, or the
    ``Factors`` of the starting product where all are trained.

    Attributes:
      rank: r.
      alpha: numerator of the scale alpha / r.
      dropout: rate, as for LoRA.
      train: "middle" or "all".
      start: "svd": the leading singular triples of W; "random": A uniform in +-1/sqrt(in), B in +-1/sqrt(r); "update":
        the leaf is itself an update to approximate (LoRA-SB); "slora": A as before, B zero, M uniform in +-1/sqrt(r);
        "nystrom_reference", "nystrom_pinv": blocks of W; "flora": A and B normal, of variance 1/(2 r). Or
        ``jlora.init.LoRASB``, which forms the update from what ``jlora.calibrate`` found.
      start_std: deviation of M at the start, for those that start it at zero.
      residual: subtract the product that a Nyström start has, so that the output starts as the base's.
    """

    rank: int = 8
    alpha: float = 16.0
    _: dataclasses.KW_ONLY
    dropout: float = 0.0
    train: str = "middle"
    start: str | Start = "svd"
    start_std: float = 0.0
    residual: bool = True

    sliceable = frozenset({"in", "out"})

    def __post_init__(self):
        for rank in self.ranks:
            require(
                isinstance(rank, int) and rank > 0,
                f"{self.name}: the rank is a positive integer, 8 to 64 as a rule; got {rank!r}.",
            )
        require(0.0 <= self.dropout < 1.0, f"{self.name}(dropout={self.dropout}): a rate in [0, 1) is wanted.")
        require(self.train in ("middle", "all"), f"{self.name}(train={self.train!r}): 'middle' or 'all' is wanted.")
        require(
            self.start in _STARTS or hasattr(self.start, "parts"),
            f"{self.name}(start={self.start!r}): one of {', '.join(_STARTS)} is wanted, or jlora.init.LoRASB.",
        )
        require(
            isinstance(self.start, str) or (self.train == "middle" and self.ranks == (self.rank, self.rank)),
            f"{self.name}(start={self.start}): that start is for a square middle that is trained alone, as LoRAXS's.",
        )
        require(
            self.start != "slora" or self.train == "all",
            f"{self.name}(start='slora', train='middle'): B starts at zero and would stay there; start='random' has "
            "factors for a middle that is trained alone.",
        )

    @property
    def ranks(self) -> tuple[int, int]:
        """The two sizes of M."""
        return self.rank, self.rank

    @property
    def scale(self) -> float:
        return float(self.alpha / self.rank)

    @property
    def subtracts(self) -> bool:
        return self.residual and isinstance(self.start, str) and self.start.startswith("nystrom")

    @property
    def needs(self) -> tuple[str, ...]:
        return () if isinstance(self.start, str) else self.start.needs

    def check(self, site: Site) -> str | None:
        return check_rank(self.rank, site)

    def check_stats(self, site: Site, stats: Any) -> str | None:
        return self.start.check_stats(self.rank, site, stats)

    def starting_parts(
        self, key: Any, w: Float[Array, "in out"], site: Site, dtype: Any, stats: Any = None
    ) -> tuple[Array, Array, Array]:
        """A, M and B."""
        if self.needs:
            return self.start.parts(key, self.rank, self.scale, stats)
        (n_in, n_out), (r0, r1) = w.shape, self.ranks
        key_a, key_b, key_m = jax.random.split(key, 3)
        uniform = lambda key, shape, fan: jax.random.uniform(key, shape, dtype, -(fan**-0.5), fan**-0.5)
        noise = self.start_std * jax.random.normal(key_m, (r0, r1), dtype)
        match self.start:
            case "svd":
                u, s, vh = truncated_svd(unsharded(w), r0, key=key_a)
                return u * s, noise, vh
            case "update":
                u, s, vh = truncated_svd(unsharded(w), r0, key=key_a)
                return u, jnp.diag(s / self.scale), vh
            case "random":
                return uniform(key_a, (n_in, r0), n_in), noise, uniform(key_b, (r1, n_out), r1)
            case "slora":
                pair = LoRA(r0).init(key_a, w, site, dtype).trainable
                return pair.a, uniform(key_m, (r0, r1), r1), pair.b
            case "flora":
                normal = lambda key, shape, rank: (0.5 / rank) ** 0.5 * jax.random.normal(key, shape, dtype)
                return normal(key_a, (n_in, r0), r0), noise, normal(key_b, (r1, n_out), r1)
        w = unsharded(w).astype(dtype)
        block = w[:r0, :r0]
        if self.start == "nystrom_pinv":
            block = jnp.linalg.pinv(block.astype(jnp.promote_types(dtype, jnp.float32)))
        return w[:, :r0], block, w[:r0]

    def init(self, key: Any, w: Array, site: Site, dtype: Any, stats: Any = None) -> Params:
        a, middle, b = (part.astype(dtype) for part in self.starting_parts(key, w, site, dtype, stats))
        pair, core = {"a": a, "b": b}, {"middle": middle}
        if self.train == "middle":
            return Params(core, pair | {"start": middle} if self.subtracts else pair)
        return Params(pair | core, {"start": Factors(a, middle @ b)} if self.subtracts else None)

    def count(self, site: Site) -> int:
        _, n_in, n_out = site.canonical_shape
        r0, r1 = self.ranks
        return site.stack * (r0 * r1 + (self.train == "all") * (r0 * n_in + r1 * n_out))

    def dims(self, p: Params) -> Params:
        pair, core = {"a": "in rank", "b": "rank out"}, {"middle": "rank rank"}
        if self.train == "middle":
            return Params(core, pair | {"start": "rank rank"} if self.subtracts else pair)
        return Params(pair | core, {"start": Factors("in rank", "rank out")} if self.subtracts else None)

    def parts(self, p: Params) -> tuple[Array, Array, Array]:
        """A, M (less its start, where only M is trained) and B."""
        of = p.trainable if self.train == "all" else p.frozen
        middle = p.trainable["middle"]
        if self.subtracts and self.train == "middle":
            middle = middle - p.frozen["start"].astype(middle.dtype)
        return of["a"], middle, of["b"]

    def factors(self, w: Array, p: Params) -> Factors:
        a, middle, b = self.parts(p)
        r0, r1 = middle.shape
        if r0 < r1 or (r0 == r1 and b.shape[-1] < a.shape[0]):  # the lower rank, then the smaller product
            pair = Factors(a, middle.astype(b.dtype) @ b, self.scale)
        else:
            pair = Factors(a @ middle.astype(a.dtype), b, self.scale)
        if not (self.subtracts and self.train == "all"):
            return pair
        start = jax.tree.map(lambda leaf: leaf.astype(middle.dtype), p.frozen["start"])
        return Factors(
            jnp.concatenate([pair.a, -start.a], axis=1), jnp.concatenate([pair.b, start.b], axis=0), self.scale
        )

    def forward(self, dot: Dot, x: Array, w: Array, p: Params, ctx: Context) -> tuple[Array, Any]:
        if self.train == "all" or dot.kind != "linear":
            return super().forward(dot, x, w, p, ctx)
        a, middle, b = self.parts(p)
        h = dot.inner(dropout(x, self.dropout, ctx.key), a)
        return dot(x, w) + dot.outer(h @ (self.scale * middle).astype(h.dtype), b), None

    def describe(self) -> dict[str, str]:
        return {"rank": "x".join(map(str, dict.fromkeys(self.ranks))), "scale": f"{self.scale:g}"}


@dataclasses.dataclass(frozen=True)
class LoRAXS(MiddleLoRA):
    """Only M is trained, between frozen factors; ``start="update"`` is LoRA-SB. See the top of this file."""


@dataclasses.dataclass(frozen=True)
class SLoRA(MiddleLoRA):
    """LoRA with a trained matrix between the factors. See the top of this file."""

    _: dataclasses.KW_ONLY
    train: str = "all"
    start: str = "slora"


@dataclasses.dataclass(frozen=True)
class NLoRA(MiddleLoRA):
    """SLoRA that starts at blocks of the weight. See the top of this file."""

    _: dataclasses.KW_ONLY
    train: str = "all"
    start: str = "nystrom_reference"


@dataclasses.dataclass(frozen=True)
class IntTune(MiddleLoRA):
    """The middle matrix of NLoRA alone is trained. See the top of this file."""

    _: dataclasses.KW_ONLY
    start: str = "nystrom_reference"


@dataclasses.dataclass(frozen=True)
class FLoRA(MiddleLoRA):
    """A core of r0 x r1 between a factor for the inputs and one for the outputs. See the top of this file.

    A convolution's window counts as inputs here; a core with axes for the window is another method.

    Attributes:
      alpha: the scale itself, not divided by a rank.
      rank_out: r1; by default r0, which is ``rank``.
    """

    alpha: float = 1.0
    rank_out: int | None = None
    _: dataclasses.KW_ONLY
    train: str = "all"
    start: str = "flora"

    @property
    def ranks(self) -> tuple[int, int]:
        return self.rank, self.rank if self.rank_out is None else self.rank_out

    @property
    def scale(self) -> float:
        return float(self.alpha)

    def check(self, site: Site) -> str | None:
        _, n_in, n_out = site.canonical_shape
        for rank, size, name in zip(self.ranks, (n_in, n_out), ("in", "out"), strict=True):
            if rank > size:
                return f"rank {rank} is above {name} = {size}; choose a rank of at most {size}"
        return None
