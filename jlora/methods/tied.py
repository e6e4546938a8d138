r"""Tied-LoRA: one pair of factors for all layers, scaled by two vectors of each.

Tied-LoRA: Enhancing parameter efficiency of LoRA with weight tying. Renduchintala, Konuk and Kuchaiev, 2023.
https://arxiv.org/abs/2311.09578

.. math::  y = x W + s\,\bigl((\mathrm{drop}(x) A) \odot u\bigr) B \odot v, \qquad s = \alpha / r

W [in, out] frozen; A [in, r] and B [r, out] shared by all adapted matrices of the same shape; u [r] and v [out] of each
matrix. Of the four, those named in ``trained`` are. Trained, if all are: r (in + out) once for each shape, r + out a
matrix.

* A starts uniform in +-1/sqrt(in), u and v at 1 and B at 0, so the output starts as the base's. Where B is not trained
  it is random like A (in +-1/sqrt(r)) and v starts at 0 instead; with A and B both frozen this is VeRA.
* The paper ties one kind of projection. Here whatever has the same shape and the same group is tied: rules with groups
  of their own keep, say, the query and the output projection apart.
* The gradients of A and B are sums over the layers: with plain SGD they want a smaller rate.

When to use it: between LoRA and VeRA in what is stored, at the cost of LoRA of rank r to run.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jlora.factors import Factors
from jlora.methods.base import Method, Site, check_rank, require
from jlora.weight import Params


def shape_name(n_in: int, n_out: int) -> str:
    """The key of what matrices of one shape share."""
    return f"{n_in}x{n_out}"


@dataclasses.dataclass(frozen=True)
class TiedLoRA(Method):
    """Low-rank adaptation with factors tied over layers. The formula and shapes are at the top of this file.

    Parameters of a leaf: ``{"u": [*stack, r], "v": [*stack, out]}``; of the group: ``{"a": {"8x16": [8, r], ...},
    "b": {"8x16": [r, 16], ...}}``. Each of the four is trainable if it is in ``trained`` and frozen if not.

    Attributes:
      rank: r.
      alpha: numerator of the scale.
      trained: which of "a", "b", "u" and "v", as a string or several: "abuv" by default, "uv" is VeRA.
      dropout: rate, as for LoRA.
      group: name of the shared factors.
    """

    rank: int = 8
    alpha: float = 16.0
    _: dataclasses.KW_ONLY
    trained: str = "abuv"
    dropout: float = 0.0
    group: str = "tied_lora"

    def __post_init__(self):
        require(
            isinstance(self.rank, int) and self.rank > 0,
            f"TiedLoRA(rank={self.rank!r}): the rank is a positive integer, 4 to 64 as a rule.",
        )
        require(0.0 <= self.dropout < 1.0, f"TiedLoRA(dropout={self.dropout}): a rate in [0, 1) is wanted.")
        object.__setattr__(self, "trained", "".join(sorted(set(self.trained))))
        require(
            set(self.trained) <= set("abuv") and bool(set(self.trained) & set("bv")),
            f"TiedLoRA(trained={self.trained!r}): letters of 'abuv' are wanted, b or v among them.",
        )

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def check(self, site: Site) -> str | None:
        return check_rank(self.rank, site)

    def split(self, parts: dict[str, Any]) -> Params:
        """Trainable and frozen of what is keyed by the four letters."""
        trainable = {name: part for name, part in parts.items() if name in self.trained}
        frozen = {name: part for name, part in parts.items() if name not in self.trained}
        return Params(trainable, frozen or None)

    def init(self, key: Any, w: Array, site: Site, dtype: Any) -> Params:
        v = jnp.ones if "b" in self.trained else jnp.zeros
        return self.split({"u": jnp.ones((self.rank,), dtype), "v": v((w.shape[1],), dtype)})

    def init_shared(self, key: Any, sites: dict[str, Site], dtype: Any) -> Params:
        shapes = sorted({site.canonical_shape[1:] for site in sites.values()})
        uniform = lambda key, shape: jax.random.uniform(key, shape, dtype, -(shape[0] ** -0.5), shape[0] ** -0.5)
        parts: dict[str, dict[str, Array]] = {"a": {}, "b": {}}
        for n_in, n_out in shapes:
            key_a, key_b = jax.random.split(jax.random.fold_in(jax.random.fold_in(key, n_in), n_out))
            name, shape = shape_name(n_in, n_out), (self.rank, n_out)
            parts["a"][name] = uniform(key_a, (n_in, self.rank))
            parts["b"][name] = jnp.zeros(shape, dtype) if "b" in self.trained else uniform(key_b, shape)
        return self.split(parts)

    def count(self, site: Site) -> int:
        own = {"u": self.rank, "v": site.canonical_shape[2]}
        return site.stack * sum(n for name, n in own.items() if name in self.trained)

    def count_shared(self, sites: dict[str, Site]) -> int:
        shapes = {site.canonical_shape[1:] for site in sites.values()}
        sides = [i for i, name in enumerate("ab") if name in self.trained]
        return self.rank * sum(shape[i] for shape in shapes for i in sides)

    def dims(self, p: Params) -> Params:
        own = self.split({"u": "rank", "v": "out"})
        if p.frozen is None:
            own = own._replace(frozen=None)
        # Of the shapes that are shared, one is this weight's: "in" and "out" would not be those of the others.
        return own._replace(shared=jax.tree.map(lambda leaf: "_ _", p.shared))

    def factors(self, w: Array, p: Params) -> Factors:
        own = {**p.trainable, **(p.frozen or {})}
        u, v, name = own["u"], own["v"], shape_name(*w.shape)
        return Factors(p.shared["a"][name].astype(u.dtype) * u, p.shared["b"][name].astype(v.dtype) * v, self.scale)

    def describe(self) -> dict[str, str]:
        return {"rank": str(self.rank), "scale": f"{self.scale:g}"}
