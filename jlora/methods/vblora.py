r"""VB-LoRA: every piece of every factor is a mixture of a few vectors from one bank.

VB-LoRA: Extreme Parameter Efficient Fine-Tuning with Vector Banks. Li, Han and Ji, 2024. https://arxiv.org/abs/2405.15179

.. math::  y = x W + (\mathrm{drop}(x) A) B, \qquad
           A_{:j} = [u(l^A_{j1}), \dots, u(l^A_{j, in/v})], \quad B_{j:} = [u(l^B_{j1}), \dots, u(l^B_{j, out/v})]

.. math::  u(l) = \sum_{i \in \mathrm{top}_k(l)} \mathrm{softmax}(l_{\mathrm{top}_k})_i \, V_i

W [in, out] frozen; the bank V [h, v] trained, one for the whole model; logits l^A [r, in / v, h] and
l^B [r, out / v, h] trained. There is no alpha / r. Trained: r h (in + out) / v a matrix and h v once; what has to be
stored of a matrix are the k places and k - 1 weights of each piece, r k (in + out) / v of both.

* It does not start as the base: V is uniform in +-0.02 and the logits are normal with deviation 0.1, so the entries of
  A B are of the size r 0.02^2 at first. Starting at V = 0 instead would leave nothing to learn from.
* Logits outside the top k have no gradient; they come in when those inside fall below them.
* The softmax is over the kept logits alone, as in PEFT and the authors' code.

When to use it: many adapters to store, each of the size of the bank. The factors cost 2 h r (in + out) FLOPs to put
together, as much as LoRA of rank r on h more tokens; beyond that it is LoRA of rank r. The authors give the logits ten
times the learning rate of the bank.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jlora.factors import Factors
from jlora.methods.base import Method, Site, require
from jlora.weight import Params


def mixtures(logits: Float[Array, "r n h"], bank: Float[Array, "h v"], topk: int) -> Float[Array, "r nv"]:
    """The pieces u, those of a row side by side. A product with the whole bank rather than a gather of rows: h is
    small, its gradient is a product, too, and both stay where the logits are on a mesh (a sort does not)."""
    left, kept = jax.lax.stop_gradient(logits), jnp.zeros(logits.shape, bool)
    places = jnp.arange(logits.shape[-1])
    for _ in range(topk):
        ties = left == jnp.max(left, axis=-1, keepdims=True)
        largest = places == jnp.min(jnp.where(ties, places, places.size), axis=-1, keepdims=True)  # the first of them
        left, kept = jnp.where(largest, -jnp.inf, left), kept | largest
    weights = jax.nn.softmax(jnp.where(kept, logits, -jnp.inf))
    pieces = jnp.einsum("rnh,hv->rnv", weights, bank.astype(logits.dtype), precision=jax.lax.Precision.HIGHEST)
    return pieces.reshape(logits.shape[0], -1)


@dataclasses.dataclass(frozen=True)
class VBLoRA(Method):
    """Low-rank adaptation from a vector bank. The formula and shapes are at the top of this file.

    Parameters of a leaf: trainable ``{"a": [*stack, r, in / v, h], "b": [*stack, r, out / v, h]}``, the logits; of the
    group: trainable ``{"bank": [h, v]}``.

    Attributes:
      rank: r.
      num_vectors: h, how many vectors the bank has.
      vector_length: v, their length. It divides in and out of every adapted matrix.
      topk: k, how many vectors a piece is mixed of.
      dropout: rate, as for LoRA.
      init_bank: bound of the uniform start of the bank.
      init_logits: standard deviation of the logits' start.
      store_topk: whether PEFT files hold the kept vectors' places and weights only. They are small, and training
        cannot go on from them as if nothing had happened: what was not kept can no longer come in.
      group: name of the bank. Rules of different lengths need two names.
    """

    rank: int = 4
    _: dataclasses.KW_ONLY
    num_vectors: int = 256
    vector_length: int = 256
    topk: int = 2
    dropout: float = 0.0
    init_bank: float = 0.02
    init_logits: float = 0.1
    store_topk: bool = False
    group: str = "vblora"

    def __post_init__(self):
        for field in ("rank", "num_vectors", "vector_length"):
            value = getattr(self, field)
            require(isinstance(value, int) and value > 0, f"VBLoRA({field}={value!r}): a positive integer is wanted.")
        require(
            isinstance(self.topk, int) and 0 < self.topk <= self.num_vectors,
            f"VBLoRA(topk={self.topk!r}, num_vectors={self.num_vectors}): 1 to num_vectors is wanted, 2 as a rule.",
        )
        require(0.0 <= self.dropout < 1.0, f"VBLoRA(dropout={self.dropout}): a rate in [0, 1) is wanted.")

    def check(self, site: Site) -> str | None:
        _, n_in, n_out = site.canonical_shape
        if n_in % self.vector_length or n_out % self.vector_length:
            fits = [v for v in range(1, min(n_in, n_out) + 1) if n_in % v == 0 == n_out % v]
            nearest = min(fits, key=lambda v: (abs(v - self.vector_length), -v))
            return (
                f"vector_length {self.vector_length} does not divide in = {n_in} and out = {n_out}; the nearest that "
                f"does is {nearest}"
            )
        return None

    def init(self, key: Any, w: Array, site: Site, dtype: Any) -> Params:
        normal = lambda key, n: (
            self.init_logits * jax.random.normal(key, (self.rank, n // self.vector_length, self.num_vectors), dtype)
        )
        key_a, key_b = jax.random.split(key)
        return Params(trainable={"a": normal(key_a, w.shape[0]), "b": normal(key_b, w.shape[1])})

    def init_shared(self, key: Any, sites: dict[str, Site], dtype: Any) -> Params:
        shape = self.num_vectors, self.vector_length
        return Params(trainable={"bank": jax.random.uniform(key, shape, dtype, -self.init_bank, self.init_bank)})

    def count(self, site: Site) -> int:
        _, n_in, n_out = site.canonical_shape
        return site.stack * self.rank * self.num_vectors * (n_in + n_out) // self.vector_length

    def count_shared(self, sites: dict[str, Site]) -> int:
        return self.num_vectors * self.vector_length

    def dims(self, p: Params) -> Params:
        return Params(trainable={"a": "rank _ _", "b": "rank _ _"}, shared={"bank": "_ _"})

    def factors(self, w: Array, p: Params) -> Factors:
        bank = p.shared["bank"]
        a, b = (mixtures(p.trainable[name], bank, self.topk) for name in ("a", "b"))
        return Factors(a.T, b)

    def describe(self) -> dict[str, str]:
        return {"rank": str(self.rank), "scale": "1"}
