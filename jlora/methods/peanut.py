r"""PEANuT: the update is a small network applied to the weight itself.

PEANuT: Parameter-Efficient Adaptation with Weight-aware Neural Tweakers (earlier: NEAT). Zhong et al., 2024.
https://arxiv.org/abs/2410.01870

.. math::  \Delta W = s\,f(W)\,B, \qquad f = \text{rows of } \sigma(W A) \text{ through d encoders and d decoders}

W [in, out] frozen, A [out, r], B [r, out], encoders E_j and decoders D_j [r, r] trained, sigma elementwise. With
h_0 = sigma(W A), h_j = sigma(h_{j-1} E_j) for j = 1..d, g_d = h_d, g_{j-1} = sigma(g_j D_{d-j+1}) + h_{j-1}:
f(W) = g_0 [in, r]. Trained: 2 r out + 2 d r^2 a matrix.

* The update is a pair, f(W) and B, of rank r: it runs, merges and exports as plain LoRA does. Making f(W) costs
  2 in out r FLOPs a step in the forward pass, and as many in the backward pass, whatever the number of tokens.
* A, E and D are uniform in +-1/sqrt(fan in), B starts at 0, so the output starts as the base's.
* Each row of W goes through the network for itself: an embedding's looked-up rows are enough, and a slice of the inputs
  is the method of the slice.
* It wants W wherever it runs: an exported adapter follows its base.

When to use it: at LoRA's cost and fewer parameters where out < in, if a nonlinear update that sees the weight is worth
the try; depth 1 to 5 is what the paper varies.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jlora.factors import Factors
from jlora.methods.base import Method, Site, check_rank, contract, require
from jlora.weight import Context, Dot, Params

ACTIVATIONS = {
    "relu": jax.nn.relu,
    "tanh": jnp.tanh,
    "sigmoid": jax.nn.sigmoid,
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "softplus": jax.nn.softplus,
    "sin": jnp.sin,
    "linear": lambda x: x,
}


@dataclasses.dataclass(frozen=True)
class PEANuT(Method):
    """A weight-aware neural tweaker. The formula and shapes are at the top of this file.

    Parameters of a leaf: trainable ``{"a": [*stack, out, r], "b": [*stack, r, out]}``, with depth d also
    ``{"encoders": [*stack, d, r, r], "decoders": [*stack, d, r, r]}``.

    Attributes:
      rank: r, the width of the network.
      depth: d.
      activation: sigma: relu, tanh, sigmoid, silu, gelu, gelu_tanh, softplus, sin or linear.
      scale: s.
    """

    rank: int = 32
    _: dataclasses.KW_ONLY
    depth: int = 0
    activation: str = "relu"
    scale: float = 1.0

    sliceable = frozenset({"in"})

    def __post_init__(self):
        for field, least in (("rank", 1), ("depth", 0)):
            value = getattr(self, field)
            require(
                isinstance(value, int) and value >= least,
                f"PEANuT({field}={value!r}): an integer of at least {least} is wanted.",
            )
        require(
            self.activation in ACTIVATIONS,
            f"PEANuT(activation={self.activation!r}): one of {', '.join(ACTIVATIONS)} is wanted.",
        )

    def check(self, site: Site) -> str | None:
        return check_rank(self.rank, site)

    def init(self, key: Any, w: Array, site: Site, dtype: Any) -> Params:
        n_out, r, d = w.shape[1], self.rank, self.depth
        uniform = lambda key, *shape: jax.random.uniform(key, shape, dtype, -(shape[-2] ** -0.5), shape[-2] ** -0.5)
        keys = jax.random.split(key, 3)
        own = {"a": uniform(keys[0], n_out, r), "b": jnp.zeros((r, n_out), dtype)}
        if d:
            own |= {"encoders": uniform(keys[1], d, r, r), "decoders": uniform(keys[2], d, r, r)}
        return Params(trainable=own)

    def count(self, site: Site) -> int:
        return site.stack * 2 * (self.rank * site.canonical_shape[2] + self.depth * self.rank**2)

    def dims(self, p: Params) -> Params:
        own = {"a": "out rank", "b": "rank out"}
        return Params(trainable=own | ({"encoders": "_ _ _", "decoders": "_ _ _"} if self.depth else {}))

    def network(self, rows: Float[Array, "*n out"], p: Params) -> Float[Array, "*n r"]:
        """f of rows of the weight, in the parameters' dtype."""
        act, a = ACTIVATIONS[self.activation], p.trainable["a"]
        h = act(contract(rows.astype(a.dtype), a))
        if not self.depth:
            return h
        skipped = []
        for encoder in p.trainable["encoders"]:
            skipped.append(h)
            h = act(h @ encoder)
        for decoder in p.trainable["decoders"]:
            h = act(h @ decoder) + skipped.pop()
        return h

    def factors(self, w: Float[Array, "in out"], p: Params) -> Factors:
        return Factors(self.network(w, p), p.trainable["b"], self.scale)

    def forward(self, dot: Dot, x: Array, w: Array, p: Params, ctx: Context) -> tuple[Array, Any]:
        if dot.kind != "lookup":
            return super().forward(dot, x, w, p, ctx)
        rows = dot(x, w)
        b = p.trainable["b"]
        return rows + (self.scale * (self.network(rows, p) @ b)).astype(rows.dtype), None

    def describe(self) -> dict[str, str]:
        return {"rank": str(self.rank), "scale": f"{self.scale:g}"}
