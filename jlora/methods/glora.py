r"""GLoRA: a weight is scaled and shifted, and so is its bias, which the weight also feeds.

One-for-All: Generalized LoRA for Parameter-Efficient Fine-tuning. Chavan et al., 2023. https://arxiv.org/abs/2306.07967

.. math::  W' = W \odot (1 + A) + B, \qquad b' = b \odot (1 + D) + E + C W

W [in, out] and b [out] frozen; A and B [in, out], C [in], D and E [out] trained, each in one of several forms:

=========  ==========================================  ==========================  =====================
form       A and B                                     C                           D and E
=========  ==========================================  ==========================  =====================
lora       A_1 A_2 and B_1 B_2, [in, r] and [r, out]   C_1 C_2, [in, r] and [r]    -
vector     one number for each output, [out]           [in]                        [out]
constant   one number                                  -                           one number
none       0                                           0                           0
=========  ==========================================  ==========================  =====================

Trained, a matrix: 2 r (in + out), 2 out or 2 by A and B; r (in + 1) or in by C; 2 out or 2 by D and E.

* All starts at zero but one factor of each product (uniform in +-1/sqrt(in), and C_2 in +-1), so the output starts as
  the base's.
* As vectors or constants A and B act on activations, and no change of the weight is formed. As products, A is one with
  the weight of any rank: W' is formed at each step, and again for the gradient rather than kept.
* The bias of a layer is a leaf of its own. C, D and E live with the weight and act where its bias follows:
  ``Follow(group=path of the weight, method=the same GLoRA)`` on the bias; that is what PEFT's files are read as. Their
  defaults here are "none", where PEFT's are "lora" and "constant".
* The authors draw the forms at random while they train, of A and B each its own, and then search which does best in
  every layer. Here and in PEFT forms are chosen before, by rules, and A has B's. The product of A with W is one of
  entries in their code, too.

When to use it: as vectors, to rescale features at the cost of IA3 with a shift. As products, where LoRA's additive
change is too little; HiRA has the multiplicative one alone.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jlora.methods.base import Method, Site, check_rank, laid_as, require
from jlora.weight import Context, Dot, Params

_FORMS = {
    "ab": ("lora", "vector", "constant", "none"),
    "c": ("lora", "vector", "none"),
    "de": ("vector", "constant", "none"),
}


@dataclasses.dataclass(frozen=True)
class GLoRA(Method):
    """Generalized LoRA. The formula and shapes are at the top of this file.

    Parameters of a leaf, all trainable: ``{"a1", "b1": [*stack, in, r], "a2", "b2": [*stack, r, out]}``, or
    ``{"a", "b": [*stack, out]}``, or ``[*stack]``; ``{"c1": [*stack, in, r], "c2": [*stack, r]}``, or
    ``{"c": [*stack, in]}``; ``{"d", "e": [*stack, out]}``, or ``[*stack]``.

    Attributes:
      rank: r, of everything that is a product.
      ab, c, de: forms of A and B, of C, of D and E.
    """

    rank: int = 8
    _: dataclasses.KW_ONLY
    ab: str = "lora"
    c: str = "none"
    de: str = "none"

    sliceable = frozenset({"in", "out"})
    follows_weight = True

    def __post_init__(self):
        require(
            isinstance(self.rank, int) and self.rank > 0,
            f"GLoRA(rank={self.rank!r}): the rank is a positive integer, 4 to 16 as a rule.",
        )
        for field, forms in _FORMS.items():
            form = getattr(self, field)
            require(form in forms, f"GLoRA({field}={form!r}): one of {', '.join(forms)} is wanted.")
        require({self.ab, self.c, self.de} != {"none"}, "GLoRA(ab='none', c='none', de='none') would change nothing.")

    def check(self, site: Site) -> str | None:
        return check_rank(self.rank, site) if self.ab == "lora" else None

    def _shapes(self, n_in: int, n_out: int) -> dict[str, tuple[int, ...]]:
        r = self.rank
        pair = lambda names, form: dict.fromkeys(names, (n_out,) if form == "vector" else ())
        shapes = {}
        if self.ab == "lora":
            shapes |= {"a1": (n_in, r), "a2": (r, n_out), "b1": (n_in, r), "b2": (r, n_out)}
        elif self.ab != "none":
            shapes |= pair("ab", self.ab)
        if self.c != "none":
            shapes |= {"c1": (n_in, r), "c2": (r,)} if self.c == "lora" else {"c": (n_in,)}
        return shapes | (pair("de", self.de) if self.de != "none" else {})

    def init(self, key: Any, w: Array, site: Site, dtype: Any) -> Params:
        bounds = {"a1": w.shape[0] ** -0.5, "b1": w.shape[0] ** -0.5, "c2": 1.0}
        made = {}
        for i, (name, shape) in enumerate(self._shapes(*w.shape).items()):
            bound = bounds.get(name)
            uniform = lambda k, shape=shape, bound=bound: jax.random.uniform(k, shape, dtype, -bound, bound)
            made[name] = uniform(jax.random.fold_in(key, i)) if bound else jnp.zeros(shape, dtype)
        return Params(trainable=made)

    def count(self, site: Site) -> int:
        _, n_in, n_out = site.canonical_shape
        return site.stack * sum(math.prod(shape) for shape in self._shapes(n_in, n_out).values())

    def dims(self, p: Params) -> Params:
        names = dict.fromkeys(("a1", "b1", "c1"), "in rank") | dict.fromkeys(("a2", "b2"), "rank out")
        names |= {"c2": "rank", "c": "in"} | {
            name: "out" if form == "vector" else ""
            for pair, form in (("ab", self.ab), ("de", self.de))
            for name in pair
        }
        return Params(trainable={name: names[name] for name in p.trainable})

    def gain(self, w: Array, p: Params) -> Float[Array, " out"]:
        """1 + A, where it is one number for each output, or for all."""
        return jnp.broadcast_to(1 + p.trainable["a"], w.shape[1:])

    def shift(self, w: Array, p: Params) -> tuple[Float[Array, "in 1"], Float[Array, "1 out"]]:
        """B, where it is one number for each output, or for all, as a pair of factors."""
        b = p.trainable["b"]
        return jnp.ones((w.shape[0], 1), b.dtype), jnp.broadcast_to(b, (1, w.shape[1]))

    def weight(self, w: Float[Array, "in out"], p: Params) -> Float[Array, "in out"]:
        t = p.trainable
        if self.ab == "none":
            return w
        if self.ab != "lora":
            return (w * self.gain(w, p) + jnp.broadcast_to(t["b"], w.shape[1:])).astype(w.dtype)
        (a1, a2), (b1, b2) = laid_as(w, t["a1"], t["a2"]), laid_as(w, t["b1"], t["b2"])
        return (w * (1 + a1 @ a2) + b1 @ b2).astype(w.dtype)

    def follow(self, b: Float[Array, "1 out"], p: Params) -> Float[Array, "1 out"]:
        t = p.trainable
        if self.de != "none":
            b = b * (1 + t["d"]) + t["e"]
        if self.c != "none":
            c = t["c"] if self.c == "vector" else t["c1"] @ t["c2"]
            b = b + c @ t["weight"].astype(c.dtype)
        return b

    def forward(self, dot: Dot, x: Array, w: Array, p: Params, ctx: Context) -> tuple[Array, Any]:
        if self.ab == "none":
            return dot(x, w), None
        if self.ab != "lora":
            y, (ones, b) = dot.per_output(dot(x, w), dot.per_matrix(self.gain, w, p)), dot.per_matrix(self.shift, w, p)
            return y + dot.outer(dot.inner(x, ones), b).astype(y.dtype), None
        if dot.kind == "lookup":
            y, row = dot(x, w), lambda name: dot.outer(dot.inner(x, p.trainable[f"{name}1"]), p.trainable[f"{name}2"])
            return (y * (1 + row("a")) + row("b")).astype(y.dtype), None
        return jax.checkpoint(lambda x, w, p: dot(x, dot.per_matrix(self.weight, w, p)))(x, w, p), None

    def forward_transposed(self, dot: Dot, x: Array, wt: Float[Array, "out in"], p: Params, ctx: Context) -> Array:
        if self.ab == "none":
            return dot(x, wt)
        if self.ab == "lora":
            return jax.checkpoint(lambda x, wt, p: dot(x, self.weight(wt.T, p).T))(x, wt, p)
        ones, b = self.shift(wt.T, p)
        return dot(dot.per_output(x, self.gain(wt.T, p)), wt) + dot.outer(dot.inner(x, b.T), ones.T)

    def describe(self) -> dict[str, str]:
        return {"rank": str(self.rank) if self.ab == "lora" else self.ab}
