r"""NOBLE: a nonlinear low-rank branch beside a weight, for good.

NOBLE: Accelerating Transformers with Nonlinear Low-Rank Branches. 2026. https://arxiv.org/abs/2603.06492

.. math::  y = x W + \phi(x A) B, \qquad
           \text{CosNet: } \phi(h) = \cos\bigl(w_2 \odot (\cos(w_1 \odot h + p_1)\,M) + p_2\bigr)

x [..., in], W [in, out], A [in, r], B [r, out]; of CosNet w1, p1, w2, p2 [r] and M [r, r]. phi may be a plain
activation instead. Trained beside W: r (in + out) a matrix, and r^2 + 4 r for CosNet.

The branch does not merge: it is a part of the architecture, and W is trained with it, from scratch. Differentiate with
respect to the base as well; nothing else changes::

    def loss(params, trainable):
        return objective(apply(adapted.replace(base=params).bind(trainable), batch))

    grads = jax.grad(loss, (0, 1))(adapted.base, adapted.trainable)

and give ``adapted.replace(base=..., trainable=...)`` the updated ones. With the base left alone it is a nonlinear
adapter; with ``activation="relu"`` the parallel adapter of He et al. (2022), without biases.

* Verified from the paper's abstract: the formula, CosNet's two cosines with learned frequencies and phases and the
  projection between them, and that Mixup and CutMix undo the gain. No code was found. The start is ours: A uniform in
  +-1/sqrt(in), B = 0 (the output starts as the plain model's), M orthogonal, frequencies 1, phases uniform in +-pi (at
  phase 0 a cosine of something small has hardly a gradient).
* phi runs in float32 or wider: a cosine's argument has to be. Leave the frequencies and phases out of weight decay.
* With feature groups, a convolution's groups share A and phi, each on its own inputs.
* The leaf may be sliced along its outputs. Used transposed, or sliced along its inputs, it has no meaning.

When to use it: pretraining, where the paper reports fewer steps to a loss for a few percent of parameters and time.
r = 64 is usual.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jlora.methods.base import Method, Site, check_rank, require
from jlora.weight import Context, Dot, Params

ACTIVATIONS = {"relu": jax.nn.relu, "gelu": jax.nn.gelu, "silu": jax.nn.silu, "tanh": jnp.tanh, "cos": jnp.cos}


@dataclasses.dataclass(frozen=True)
class NOBLE(Method):
    """Nonlinear low-rank branch. The formula and shapes are at the top of this file.

    Parameters of a leaf: trainable ``{"down": [*stack, in, r], "up": [*stack, r, out]}`` (two arrays and no
    ``Factors``: their product is not what is added), and for CosNet ``"cosnet": {"frequency1", "phase1", "frequency2",
    "phase2": [*stack, r], "mix": [*stack, r, r]}``.

    Attributes:
      rank: r.
      activation: phi: "cosnet", "relu", "gelu", "silu", "tanh" or "cos".
      frequency: where CosNet's frequencies start. Larger ones bend more.
      phase: the phases start uniform in plus and minus this.
    """

    rank: int = 64
    _: dataclasses.KW_ONLY
    activation: str = "cosnet"
    frequency: float = 1.0
    phase: float = math.pi

    mergeable = False
    sliceable = frozenset({"out"})

    def __post_init__(self):
        require(
            isinstance(self.rank, int) and self.rank > 0,
            f"NOBLE(rank={self.rank!r}): the rank is a positive integer, 16 to 256 as a rule.",
        )
        require(
            self.activation in ("cosnet", *ACTIVATIONS),
            f"NOBLE(activation={self.activation!r}): one of 'cosnet', {', '.join(map(repr, ACTIVATIONS))} is wanted.",
        )

    def check(self, site: Site) -> str | None:
        if site.axes.kind == "embedding":
            return "NOBLE is for products: a looked up row has no input to bend; use LoRA for this leaf"
        return check_rank(self.rank, site)

    def init(self, key: Any, w: Array, site: Site, dtype: Any) -> Params:
        n_in, n_out = w.shape
        down, mix, phase1, phase2 = jax.random.split(key, 4)
        uniform = lambda key, shape, bound: jax.random.uniform(key, shape, dtype, -bound, bound)
        p = {"down": uniform(down, (n_in, self.rank), n_in**-0.5), "up": jnp.zeros((self.rank, n_out), dtype)}
        if self.activation == "cosnet":
            p["cosnet"] = {
                "frequency1": jnp.full(self.rank, self.frequency, dtype),
                "phase1": uniform(phase1, (self.rank,), self.phase),
                "mix": jax.random.orthogonal(mix, self.rank, dtype=dtype),
                "frequency2": jnp.full(self.rank, self.frequency, dtype),
                "phase2": uniform(phase2, (self.rank,), self.phase),
            }
        return Params(trainable=p)

    def count(self, site: Site) -> int:
        _, n_in, n_out = site.canonical_shape
        own = self.rank**2 + 4 * self.rank if self.activation == "cosnet" else 0
        return site.stack * (self.rank * (n_in + n_out) + own)

    def dims(self, p: Params) -> Params:
        dims = {"down": "in rank", "up": "rank out"}
        if self.activation == "cosnet":
            vector = dict.fromkeys(("frequency1", "phase1", "frequency2", "phase2"), "rank")
            dims["cosnet"] = vector | {"mix": "rank rank"}
        return Params(trainable=dims)

    def phi(self, dot: Dot, h: Array, p: Params) -> Array:
        """The nonlinearity, in float32 or wider."""
        h = h.astype(jnp.promote_types(h.dtype, jnp.float32))
        if self.activation != "cosnet":
            return ACTIVATIONS[self.activation](h)
        c = p.trainable["cosnet"]
        wave = lambda h, i: jnp.cos(h * dot.along(h, c[f"frequency{i}"]) + dot.along(h, c[f"phase{i}"]))
        return wave(dot.mix(wave(h, 1), c["mix"]), 2)

    def forward(self, dot: Dot, x: Array, w: Array, p: Params, ctx: Context) -> tuple[Array, Any]:
        y, h = dot(x, w), dot.inner(x, p.trainable["down"])
        return y + dot.outer(self.phi(dot, h, p).astype(h.dtype), p.trainable["up"]).astype(y.dtype), None

    def describe(self) -> dict[str, str]:
        return {"rank": str(self.rank), "scale": self.activation}
