r"""Bottleneck adapters: a small network behind a weight, with a residual connection around it.

Parameter-Efficient Transfer Learning for NLP. Houlsby et al., 2019. https://arxiv.org/abs/1902.00751
AdapterFusion: Non-Destructive Task Composition for Transfer Learning. Pfeiffer et al., 2020.
https://arxiv.org/abs/2005.00247
Small Models, Big Impact: Efficient Corpus and Graph-Based Adaptation of Small Multilingual Language Models for
Low-Resource Languages. Gurgurov et al., 2025. https://arxiv.org/abs/2502.10140

.. math::  y_0 = x W, \qquad y = y_0 + s\,\bigl(\mathrm{act}(y_0 D + d)\,U + u\bigr)

x [..., in], W [in, out] frozen; D [out, r], d [r], U [r, out], u [out] trained, r = out / reduction. Trained:
2 r out + r + out a matrix.

The papers put adapters behind a block, this one stands behind a weight's product: before the layer's bias b, and before
the residual stream is added. What that means:

* Houlsby's placement (behind the attention's output projection and behind the MLP's second layer, each before its
  residual sum) is these two weights as targets. The adapter there sees y_0 + b. That is the same family of functions:
  (y_0 + b) D + d = y_0 D + (b D + d), and the residual connection carries b along.
* Pfeiffer's placement is the MLP's second layer alone. In models that normalize behind the sum (BERT) its adapter sees
  LayerNorm(y_0 + b + residual stream); this one sees y_0 and does not reproduce that. Without such a norm
  (``original_ln_before`` off in the adapters library) the two agree as above.
* Dropout of the block comes behind the adapter, not before it.

Starts: "zero" (D uniform in +-1/sqrt(out), U = 0: the output starts as the base's) or "bert" (D and U normal of
deviation 0.02, the library's default: close to the base). Biases are 0. Its other options (a gate averaged over the
tokens of a sequence, norms of its own, hypercomplex layers) are left out. Checked against the library's code.

It is not linear in y_0, so it does not merge, and the leaf may be neither sliced nor used transposed. A convolution has
it at every position, over all its output features.

When to use it: to compare with the adapter literature, and where a task wants a nonlinearity behind a layer. It costs
4 T r out FLOPs a forward pass and is there at inference, too.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jlora.methods.base import Method, Site, require
from jlora.weight import Context, Dot, Params

ACTIVATIONS = {"relu": jax.nn.relu, "gelu": jax.nn.gelu, "silu": jax.nn.silu, "tanh": jnp.tanh}


def init_net(key: Any, n_in: int, width: int, n_out: int, start: str, dtype: Any) -> dict[str, Array]:
    """The parameters of two layers with biases, from n_in features over ``width`` to n_out."""
    key_down, key_up = jax.random.split(key)
    if start == "bert":
        down = 0.02 * jax.random.normal(key_down, (n_in, width), dtype)
        up = 0.02 * jax.random.normal(key_up, (width, n_out), dtype)
    else:
        down = jax.random.uniform(key_down, (n_in, width), dtype, -(n_in**-0.5), n_in**-0.5)
        up = jnp.zeros((width, n_out), dtype)
    return {"down": down, "down_bias": jnp.zeros(width, dtype), "up": up, "up_bias": jnp.zeros(n_out, dtype)}


def width_of(n: int, reduction: float) -> int:
    return max(1, int(n // reduction))


@dataclasses.dataclass(frozen=True)
class Bottleneck(Method):
    """Sequential bottleneck adapter. The formula and shapes are at the top of this file.

    Parameters of a leaf: trainable ``{"down": [*stack, out, r], "down_bias": [*stack, r], "up": [*stack, r, out],
    "up_bias": [*stack, out]}``.

    Attributes:
      reduction: r is the outputs divided by this, rounded down, and at least 1.
      activation: "relu", "gelu", "silu" or "tanh".
      scale: s.
      start: "zero" or "bert".
    """

    reduction: float = 16
    _: dataclasses.KW_ONLY
    activation: str = "relu"
    scale: float = 1.0
    start: str = "zero"

    mergeable = False

    def __post_init__(self):
        require(self.reduction >= 1, f"Bottleneck(reduction={self.reduction}): at least 1 is wanted, 16 as a rule.")
        require(
            self.activation in ACTIVATIONS,
            f"Bottleneck(activation={self.activation!r}): one of {', '.join(map(repr, ACTIVATIONS))} is wanted.",
        )
        require(self.start in ("zero", "bert"), f"Bottleneck(start={self.start!r}): 'zero' or 'bert' is wanted.")

    def check(self, site: Site) -> str | None:
        if site.axes.kind == "embedding":
            return "a bottleneck adapter has no counterpart at an output head that shares the table; use Invertible"
        return None

    def init(self, key: Any, w: Array, site: Site, dtype: Any) -> Params:
        n_out = w.shape[1]
        return Params(trainable=init_net(key, n_out, width_of(n_out, self.reduction), n_out, self.start, dtype))

    def count(self, site: Site) -> int:
        n_out = site.canonical_shape[2]
        width = width_of(n_out, self.reduction)
        return site.stack * (2 * width * n_out + width + n_out)

    def dims(self, p: Params) -> Params:
        return Params(trainable={"down": "out rank", "down_bias": "rank", "up": "rank out", "up_bias": "out"})

    def forward(self, dot: Dot, x: Array, w: Array, p: Params, ctx: Context) -> tuple[Array, Any]:
        p, y = p.trainable, dot(x, w)
        h = dot.mix(y, p["down"])
        h = ACTIVATIONS[self.activation](h + dot.along(h, p["down_bias"]))
        return y + self.scale * (dot.mix(h, p["up"]) + dot.along(y, p["up_bias"])), None

    def describe(self) -> dict[str, str]:
        return {"rank": f"out/{self.reduction:g}", "scale": f"{self.scale:g}"}
