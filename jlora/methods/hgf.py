r"""HGF: a ternary weight, and beside it a gated low-rank correction in full precision.

Hybrid Gated Flow (HGF): Stabilizing 1.58-bit LLMs via Selective Low-Rank Correction. Trejo Pizzo, 2026.
https://arxiv.org/abs/2602.05269
The Era of 1-bit LLMs: All Large Language Models are in 1.58 Bits (BitNet b1.58). Ma et al., 2024.
https://arxiv.org/abs/2402.17764

.. math::
  y = q(x)\,T(W) + \tanh(g)\,(x A) B, \qquad
  T(W) = \gamma\,\mathrm{clip}\bigl(\mathrm{round}(W / \gamma), -1, 1\bigr), \quad \gamma = \mathrm{mean} |W|

  q(x) = \mathrm{round}(x / \delta)\,\delta, \quad \delta = \max |x| / 127 \text{ of each token}

x [..., in], W [in, out], A [in, r], B [r, out], and the gate g, a number or [out]. Trained: r (in + out) + 1 a matrix,
or + out. Rounding has the derivative of the identity (straight through), for x and for W.

* From the paper's abstract and summaries: the two streams, the ternary weight, learned gates that end near 0.1, a
  memory of 12 to 15% beside the ternary weight. T and q are BitNet's. Ours, since no code was found: tanh, its start at
  0.1 (at 0, with B = 0, nothing would move), where A and B start (A uniform in +-1/sqrt(in), B = 0). The paper warms
  the gate up, penalizes and freezes it: the gate is ``adapted.trainable[path]["gate"]``, for a loss or a mask.
* By design the output does not start as the base's but as BitNet's.
* The base is full precision and made ternary in every step: this trains such a model, it does not store one. With the
  base frozen it is a low-rank adapter of a ternary model; the paper trains W, too: differentiate with respect to the
  base as well, ``apply(adapted.replace(base=params).bind(trainable), batch)``.
* T(W) is one temporary of W's size, formed again for the gradient rather than kept. gamma is of the whole matrix.
* ``activation_bits=None`` leaves x as it is. Then there is an effective weight, T(W) + tanh(g) A B, and it merges, into
  full precision and not into three values. With q it does not merge.

When to use it: research on ternary models. To run a trained model in 4 bits, quantize the base and use LoRA.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jlora.factors import Factors
from jlora.methods.base import Method, Site, check_rank, laid_as, require
from jlora.weight import Context, Dot, Params


def straight_through(x: Array, rounded: Array) -> Array:
    """``rounded``, with the derivative of x."""
    return jax.lax.stop_gradient(rounded) + (x - jax.lax.stop_gradient(x))  # adds an exact 0


def ternary(w: Float[Array, "in out"]) -> Float[Array, "in out"]:
    """T(W): -gamma, 0 or gamma, straight through. Computed in float32 or wider."""
    wide = w.astype(jnp.promote_types(w.dtype, jnp.float32))
    gamma = jnp.maximum(jnp.mean(jnp.abs(wide)), jnp.finfo(wide.dtype).tiny)
    return straight_through(w, (gamma * jnp.clip(jnp.round(wide / gamma), -1, 1)).astype(w.dtype))


def quantize(x: Float[Array, "*t in"], bits: int) -> Float[Array, "*t in"]:
    """q(x): each token on 2^bits - 1 levels between its largest entry's size and minus that, straight through."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    largest = jnp.max(jnp.abs(wide), axis=-1, keepdims=True)
    delta = jnp.maximum(largest, jnp.finfo(wide.dtype).tiny * 2**bits) / (2 ** (bits - 1) - 1)
    return straight_through(x, (jnp.round(wide / delta) * delta).astype(x.dtype))


@dataclasses.dataclass(frozen=True)
class HGF(Method):
    """Hybrid gated flow. The formula and shapes are at the top of this file.

    Parameters of a leaf: trainable ``{"factors": Factors(a [*stack, in, r], b [*stack, r, out]), "gate": [*stack]}``,
    or ``[*stack, out]``.

    Attributes:
      rank: r.
      gate: "scalar", one for a matrix, or "channel", one for each output.
      gate_start: where g starts; not 0.
      activation_bits: 8 as in BitNet, or None to leave the activations alone.
    """

    rank: int = 16
    _: dataclasses.KW_ONLY
    gate: str = "scalar"
    gate_start: float = 0.1
    activation_bits: int | None = 8

    def __post_init__(self):
        require(
            isinstance(self.rank, int) and self.rank > 0,
            f"HGF(rank={self.rank!r}): the rank is a positive integer, 8 to 64 as a rule.",
        )
        require(self.gate in ("scalar", "channel"), f"HGF(gate={self.gate!r}): 'scalar' or 'channel' is wanted.")
        require(self.gate_start != 0, "HGF(gate_start=0): with B = 0 neither would ever move; 0.1 is a good start.")
        require(
            self.activation_bits is None or (isinstance(self.activation_bits, int) and self.activation_bits > 1),
            f"HGF(activation_bits={self.activation_bits!r}): None or an integer of at least 2 is wanted, 8 as a rule.",
        )

    @property
    def mergeable(self) -> bool:
        return self.activation_bits is None

    def check(self, site: Site) -> str | None:
        if site.axes.kind == "embedding":
            return "a ternary table of single looked up rows gains nothing; leave embeddings out, as BitNet does"
        if site.axes.kind == "conv" and self.activation_bits is not None:
            return "tokens of a convolution have no largest entry of their own; use HGF(activation_bits=None)"
        return check_rank(self.rank, site)

    def init(self, key: Any, w: Array, site: Site, dtype: Any) -> Params:
        n_in, n_out = w.shape
        a = jax.random.uniform(key, (n_in, self.rank), dtype, -(n_in**-0.5), n_in**-0.5)
        gate = jnp.full(() if self.gate == "scalar" else (n_out,), self.gate_start, dtype)
        return Params(trainable={"factors": Factors(a, jnp.zeros((self.rank, n_out), dtype)), "gate": gate})

    def count(self, site: Site) -> int:
        _, n_in, n_out = site.canonical_shape
        return site.stack * (self.rank * (n_in + n_out) + (1 if self.gate == "scalar" else n_out))

    def dims(self, p: Params) -> Params:
        return Params(
            trainable={"factors": Factors("in rank", "rank out"), "gate": "" if self.gate == "scalar" else "out"}
        )

    def correction(self, w: Float[Array, "in out"], p: Params) -> Factors:
        """What is added to T(W). (Not ``factors``: those would be added to W.)"""
        f = p.trainable["factors"]
        return Factors(f.a, f.b * jnp.tanh(p.trainable["gate"]), f.scale)

    def weight(self, w: Float[Array, "in out"], p: Params) -> Float[Array, "in out"]:
        if not self.mergeable:
            return super().weight(w, p)
        f = self.correction(w, p)
        a, b = laid_as(w, f.a.astype(w.dtype), f.b.astype(w.dtype))
        return ternary(w) + f.scale * (a @ b)

    def forward(self, dot: Dot, x: Array, w: Array, p: Params, ctx: Context) -> tuple[Array, Any]:
        f = dot.per_matrix(self.correction, w, p)
        rounded = x if self.activation_bits is None else quantize(x, self.activation_bits)
        y = jax.checkpoint(lambda x, w: dot(x, dot.per_matrix(lambda w, p: ternary(w), w, p)))(rounded, w)
        return y + dot.outer(dot.inner(x, f.a) * f.scale, f.b).astype(y.dtype), None

    def forward_transposed(self, dot: Dot, x: Array, wt: Float[Array, "out in"], p: Params, ctx: Context) -> Array:
        f = self.correction(wt.T, p).swap()
        rounded = x if self.activation_bits is None else quantize(x, self.activation_bits)
        y = jax.checkpoint(lambda x, wt: dot(x, ternary(wt)))(rounded, wt)
        return y + dot.outer(dot.inner(x, f.a) * f.scale, f.b).astype(y.dtype)

    def describe(self) -> dict[str, str]:
        return {"rank": str(self.rank), "scale": f"{self.gate} gate"}
