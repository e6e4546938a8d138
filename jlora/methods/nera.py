r"""NeRA: a branch whose inputs go through learned splines, one for each input and hidden feature.

Dressing the Imagination: A Dataset for AI-Powered Translation of Text into Fashion Outfits and A Novel NeRA Adapter for
Enhanced Feature Adaptation. Deshmukh et al., 2024. https://arxiv.org/abs/2411.13901

.. math::  y = x W + s\,z B, \qquad z_j = \sum_i \sum_k C_{ikj}\,\mathrm{hat}(g_i x_i - t_{ik}), \quad
           \mathrm{hat}(u) = \max(0, 1 - |u|)

x [..., in], W [in, out] frozen; t [in, K] the knots, C [in, K, r], g [in], B [r, out] and the number s trained.
Trained: in K (r + 1) + in + r out + 1 a matrix, about K times LoRA's.

* Verified against the authors' code: the formula, all shapes, K equally spaced knots in [-3, 3] for each input, g = 1,
  B uniform in +-1/sqrt(r), s trained. There C starts normal of deviation 1e-3, which is close to the base; here it
  starts at 0 (``deviation``), which is the base.
* s starts at 1. The code's default is 1e-3 and its configuration file says 64, for r = 64.
* The hats are 1 wide on either side whatever K is: with 8 knots up to 3 of them overlap, and an input beyond 4 in size
  moves nothing.
* One knot at a time, formed again for the gradient: no [tokens, in, K] temporary. K products of x's size with [in, r].
* The kink of a hat has derivative 0, as ``jnp.abs`` and ``jax.nn.relu`` have.

It does not merge. The leaf may be sliced along its outputs.

When to use it: where a task bends what the features mean, and a LoRA of larger rank does not help. It is the dearest
branch here, in parameters and time.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jlora.methods.base import Method, Site, check_rank, require
from jlora.weight import Context, Dot, Params


@dataclasses.dataclass(frozen=True)
class NeRA(Method):
    """Nonlinear low-rank adaptation by splines. The formula and shapes are at the top of this file.

    Parameters of a leaf: trainable ``{"knots": [*stack, in, K], "coefficients": [*stack, in, K, r], "gain": [*stack,
    in], "up": [*stack, r, out], "scale": [*stack]}``.

    Attributes:
      rank: r.
      knots: K, for each input.
      scale: where s starts.
      deviation: of the coefficients at the start; the authors' 1e-3 does not start exactly as the base.
    """

    rank: int = 16
    _: dataclasses.KW_ONLY
    knots: int = 8
    scale: float = 1.0
    deviation: float = 0.0

    mergeable = False
    sliceable = frozenset({"out"})

    def __post_init__(self):
        require(
            isinstance(self.rank, int) and self.rank > 0,
            f"NeRA(rank={self.rank!r}): the rank is a positive integer, 4 to 64 as a rule.",
        )
        require(
            isinstance(self.knots, int) and self.knots > 1,
            f"NeRA(knots={self.knots!r}): an integer of at least 2 is wanted, 8 as a rule.",
        )

    def check(self, site: Site) -> str | None:
        if site.axes.kind != "linear":
            return f"NeRA bends the inputs of a product, and this leaf is of kind {site.axes.kind!r}; use LoRA for it"
        return check_rank(self.rank, site)

    def init(self, key: Any, w: Array, site: Site, dtype: Any) -> Params:
        n_in, n_out = w.shape
        key_c, key_b = jax.random.split(key)
        bound = self.rank**-0.5
        return Params(
            trainable={
                "knots": jnp.tile(jnp.linspace(-3.0, 3.0, self.knots, dtype=dtype), (n_in, 1)),
                "coefficients": self.deviation * jax.random.normal(key_c, (n_in, self.knots, self.rank), dtype),
                "gain": jnp.ones(n_in, dtype),
                "up": jax.random.uniform(key_b, (self.rank, n_out), dtype, -bound, bound),
                "scale": jnp.asarray(self.scale, dtype),
            }
        )

    def count(self, site: Site) -> int:
        _, n_in, n_out = site.canonical_shape
        return site.stack * (n_in * self.knots * (self.rank + 1) + n_in + self.rank * n_out + 1)

    def dims(self, p: Params) -> Params:
        return Params(
            trainable={"knots": "in _", "coefficients": "in _ rank", "gain": "in", "up": "rank out", "scale": ""}
        )

    def forward(self, dot: Dot, x: Array, w: Array, p: Params, ctx: Context) -> tuple[Array, Any]:
        p, y = p.trainable, dot(x, w)

        @jax.checkpoint
        def of_one_knot(x: Array, gain: Array, knots: Array, coefficients: Array) -> Array:
            wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
            from_knot = wide * dot.along(wide, gain) - dot.along(wide, knots)
            return dot.inner(jax.nn.relu(1 - jnp.abs(from_knot)).astype(x.dtype), coefficients)

        knots = range(self.knots)
        z = sum(of_one_knot(x, p["gain"], p["knots"][..., k], p["coefficients"][..., k, :]) for k in knots)
        return y + dot.outer(z, p["up"] * p["scale"][..., None, None]).astype(y.dtype), None

    def describe(self) -> dict[str, str]:
        return {"rank": f"{self.rank} of {self.knots} knots"}
