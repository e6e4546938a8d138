r"""Invertible adapters: a small invertible network behind an embedding, and its inverse before a tied output head.

MAD-X: An Adapter-Based Framework for Multi-Task Cross-Lingual Transfer. Pfeiffer et al., 2020.
https://arxiv.org/abs/2005.00052
NICE: Non-linear Independent Components Estimation. Dinh et al., 2014. https://arxiv.org/abs/1410.8516
Glow: Generative Flow with Invertible 1x1 Convolutions. Kingma and Dhariwal, 2018. https://arxiv.org/abs/1807.03039

.. math::
  \text{NICE:}\quad & y_1 = x_1 + F(x_2), \quad y_2 = x_2 + G(y_1) \\
  \text{GLOW:}\quad & (a, b) = F(x_2),\; y_1 = e(a) \odot x_1 + b, \quad (c, d) = G(y_1),\; y_2 = e(c) \odot x_2 + d

x1 and x2 are the halves of a row x of the table W [vocabulary, out] (x2 the longer by one, if out is odd). F and G are
two layers with biases, from n features over n / reduction to those of the other half (twice as many for GLOW), with an
activation between. e(a) = exp(clamp 0.636 arctan(a / clamp)) keeps the factors within exp(+-clamp). The inverse runs
backwards: y2 first, then y1. Trained: for NICE about out^2 / (2 reduction) numbers, 0.25 out^2 at 2.

* A lookup gives f(W[ids]); the tied head x W^T gives f^-1(x) W^T, as the library's does. An untied head is a leaf of
  its own and is left alone. On a plain weight it is f(x W).
* The second layers start at 0 (f is the identity, the output the base's), or with ``start="bert"`` normal of deviation
  0.02 as all layers of the library do: close to the identity.
* f and its inverse run in float32 or wider whatever the activations are: in bfloat16 they would not undo each other.
* The library applies f to what the whole embedding module gives, positions and norm included; this one to the rows of
  one table. Where the model adds positions to f(W[ids]), they are not mapped.
* In the library's code GLOW's first half ignores F on the way forward and its halves are cut from the wrong axis, so
  that the two directions do not match. Here they do. Its NICE was checked and is the same.

``couple`` and ``uncouple`` are f and its inverse as functions of arrays, for models that place them themselves.

When to use it: a language, or a vocabulary, that the model saw little of, beside ``Bottleneck`` in the layers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from jlora.methods.base import Method, Site, require
from jlora.methods.bottleneck import ACTIVATIONS, init_net, width_of
from jlora.weight import Context, Dot, Params

Layer = Callable[[Array, Array, Array], Array]


def dense(x: Array, w: Array, b: Array) -> Array:
    return x @ w.astype(x.dtype) + b.astype(x.dtype)


def _net(x: Array, p: dict[str, Array], activation: str, layer: Layer) -> Array:
    return layer(ACTIVATIONS[activation](layer(x, p["down"], p["down_bias"])), p["up"], p["up_bias"])


def _gain_and_shift(out: Array, clamp: float | None) -> tuple[Array | float, Array]:
    """What a net says of the other half; a net of NICE (clamp None) shifts only."""
    if clamp is None:
        return 1.0, out
    log_gain, shift = jnp.split(out, 2, axis=-1)
    return jnp.exp(clamp * 0.636 * jnp.arctan(log_gain / clamp)), shift


def couple(
    x: Float[Array, "*t out"],
    p: dict[str, dict[str, Array]],
    *,
    activation: str = "relu",
    clamp: float | None = None,
    layer: Layer = dense,
) -> Float[Array, "*t out"]:
    """f of the formula. ``p`` holds the nets ``"f"`` and ``"g"``; with a clamp it is GLOW, without NICE. ``layer(x, w,
    b)`` is x w + b."""
    x1, x2 = jnp.split(x, [x.shape[-1] // 2], axis=-1)
    gain, shift = _gain_and_shift(_net(x2, p["f"], activation, layer), clamp)
    y1 = gain * x1 + shift
    gain, shift = _gain_and_shift(_net(y1, p["g"], activation, layer), clamp)
    return jnp.concatenate([y1, gain * x2 + shift], axis=-1)


def uncouple(
    y: Float[Array, "*t out"],
    p: dict[str, dict[str, Array]],
    *,
    activation: str = "relu",
    clamp: float | None = None,
    layer: Layer = dense,
) -> Float[Array, "*t out"]:
    """The inverse of ``couple`` with the same parameters."""
    y1, y2 = jnp.split(y, [y.shape[-1] // 2], axis=-1)
    gain, shift = _gain_and_shift(_net(y1, p["g"], activation, layer), clamp)
    x2 = (y2 - shift) / gain
    gain, shift = _gain_and_shift(_net(x2, p["f"], activation, layer), clamp)
    return jnp.concatenate([(y1 - shift) / gain, x2], axis=-1)


@dataclasses.dataclass(frozen=True)
class Invertible(Method):
    """Invertible adapter of an embedding. The formula and shapes are at the top of this file.

    Parameters of a leaf: trainable ``{"f": net, "g": net}``, a net being ``{"down": [*stack, half, h], "down_bias":
    [*stack, h], "up": [*stack, h, other half], "up_bias": [*stack, other half]}``, up twice as wide for GLOW.

    Attributes:
      coupling: "nice" or "glow".
      reduction: h is the half divided by this, rounded down, and at least 1.
      activation: "relu", "gelu", "silu" or "tanh".
      clamp: of GLOW's factors.
      start: "zero" or "bert".
    """

    coupling: str = "nice"
    _: dataclasses.KW_ONLY
    reduction: float = 2
    activation: str = "relu"
    clamp: float = 5.0
    start: str = "zero"

    mergeable = False

    def __post_init__(self):
        require(
            self.coupling in ("nice", "glow"), f"Invertible(coupling={self.coupling!r}): 'nice' or 'glow' is wanted."
        )
        require(self.reduction >= 1, f"Invertible(reduction={self.reduction}): at least 1 is wanted, 2 as a rule.")
        require(
            self.activation in ACTIVATIONS,
            f"Invertible(activation={self.activation!r}): one of {', '.join(map(repr, ACTIVATIONS))} is wanted.",
        )
        require(self.clamp > 0, f"Invertible(clamp={self.clamp}): a positive number is wanted.")
        require(self.start in ("zero", "bert"), f"Invertible(start={self.start!r}): 'zero' or 'bert' is wanted.")

    def check(self, site: Site) -> str | None:
        if site.axes.kind == "conv":
            return "invertible adapters are for embeddings and products, not for convolutions; use Bottleneck"
        if site.canonical_shape[2] < 2:
            return "one output has no halves; leave it out of the targets, or use Bottleneck"
        return None

    def nets(self, n_out: int) -> dict[str, tuple[int, int, int]]:
        """The sizes of each net: in, hidden, out."""
        n1, n2 = n_out // 2, n_out - n_out // 2
        each = 2 if self.coupling == "glow" else 1
        return {"f": (n2, width_of(n2, self.reduction), each * n1), "g": (n1, width_of(n1, self.reduction), each * n2)}

    def init(self, key: Any, w: Array, site: Site, dtype: Any) -> Params:
        sizes, keys = self.nets(w.shape[1]), jax.random.split(key)
        nets = zip(sizes.items(), keys, strict=True)
        return Params(trainable={name: init_net(key, *size, self.start, dtype) for (name, size), key in nets})

    def count(self, site: Site) -> int:
        sizes = self.nets(site.canonical_shape[2]).values()
        return site.stack * sum((n_in + 1) * hidden + (hidden + 1) * n_out for n_in, hidden, n_out in sizes)

    def dims(self, p: Params) -> Params:
        net = {"down": "_ _", "down_bias": "_", "up": "_ _", "up_bias": "_"}
        return Params(trainable={"f": net, "g": net})

    def apply(self, fn: Callable, dot: Dot, x: Array, p: Params) -> Array:
        """``couple`` or ``uncouple`` on the features of x, in float32 or wider, sharded as x is by its type."""
        spec = jax.typeof(x).sharding.spec
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        if spec[-1] is not None:  # halves of an axis that is cut otherwise
            wide = jax.reshard(wide, PartitionSpec(*spec[:-1], None))
        layer = lambda h, w, b: (lambda y: y + dot.along(y, b))(dot.mix(h, w))
        clamp = self.clamp if self.coupling == "glow" else None
        y = fn(wide, p.trainable, activation=self.activation, clamp=clamp, layer=layer).astype(x.dtype)
        return y if spec[-1] is None else jax.reshard(y, spec)

    def forward(self, dot: Dot, x: Array, w: Array, p: Params, ctx: Context) -> tuple[Array, Any]:
        return self.apply(couple, dot, dot(x, w), p), None

    def forward_transposed(self, dot: Dot, x: Array, wt: Float[Array, "out in"], p: Params, ctx: Context) -> Array:
        return dot(self.apply(uncouple, dot, x, p), wt)

    def describe(self) -> dict[str, str]:
        return {"rank": f"{self.coupling} half/{self.reduction:g}"}
