r"""Lily: layers share the second factors of their pairs, and each mixes them anew for every batch.

Low-Rank Interconnected Adaptation across Layers. Zhong et al., 2024. https://arxiv.org/abs/2407.09946

.. math::  y = x W + s\, (x A)\, \bar B, \qquad \bar B = \sum_e \pi_e B_e, \qquad
           \pi = \operatorname{mean}_t \operatorname{softmax}(x_t A R)

x [..., in], W [in, out] frozen, A [in, r], R [r, n] and B_e [r, out], e = 1 ... n, trained; the mean is over all the
rows x_t that meet the weight. R belongs to a matrix. The B belong to all matrices of a group that have the same shape;
A belongs to a matrix, or with a ``stride`` above 1 to so many consecutive ones of the same shape. Trained: r n a
matrix; for the N matrices of a shape together, r in N / stride (rounded up) and n r out.

* A and R start uniform in +-1/sqrt(in) and +-1/sqrt(r), B = 0: the output starts as the base's.
* The mixture is one for the whole batch, as in the authors' code and PEFT: it costs no more than LoRA, but a row's
  output depends on the rows beside it, padding included, and so on how a batch is split. Nothing can be merged.
* The authors' adapters beside an MLP have a ReLU behind A; PEFT's and this have none.
* PEFT's groups are the modules of one name and shape; here ``group`` names what shares: one rule for each kind of
  projection, with a name each.
* Convolutions and the ragged products of experts have no one batch for the mean, and are refused.

When to use it: few pairs of a large rank in place of many of a small one, where layers are alike and batches are large.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jlora.methods.base import Method, Site, require
from jlora.methods.tied import shape_name
from jlora.weight import Context, Dot, Params


@dataclasses.dataclass(frozen=True)
class Lily(Method):
    """Interconnected low-rank adaptation. The formula and shapes are at the top of this file.

    Parameters of a leaf: trainable ``{"a": [*stack, in, r], "router": [*stack, r, n]}``; of the group: trainable
    ``{"8x16": {"b": [n, r, out]}, ...}`` for each shape. With a stride above 1 the group has the A, ``"a": [N / stride,
    in, r]``, and a leaf has their numbers, frozen ``{"a": [*stack]}``.

    Attributes:
      rank: r, two to four times as large as LoRA's.
      experts: n, how many B there are to mix; at least 2. The order of the number of layers over 2 to 4, as a rule.
      scale: s.
      stride: how many consecutive matrices share an A.
      group: name of what shares.
    """

    rank: int = 32
    _: dataclasses.KW_ONLY
    experts: int = 2
    scale: float = 1.0
    stride: int = 1
    group: str = "lily"

    mergeable = False

    def __post_init__(self):
        for field, least in (("rank", 1), ("experts", 2), ("stride", 1)):
            value = getattr(self, field)
            require(
                isinstance(value, int) and value >= least,
                f"Lily({field}={value!r}): an integer of at least {least} is wanted.",
            )

    def check(self, site: Site) -> str | None:
        if site.axes.kind != "linear":
            return (
                "Lily's mixture is one for all rows that enter a product, which a weight of kind "
                f"{site.axes.kind!r} does not have; use LoRA for this leaf"
            )
        return None

    def blocks(self, sites: dict[str, Site]) -> dict[tuple[int, int], int]:
        """How many A there are for each shape."""
        sizes: dict[tuple[int, int], int] = {}
        for site in sites.values():
            shape = site.canonical_shape[1:]
            sizes[shape] = sizes.get(shape, 0) + site.stack
        return {shape: -(-n // self.stride) for shape, n in sizes.items()}

    def _uniform(self, key: Any, shape: tuple[int, ...], dtype: Any) -> Array:
        bound = shape[-2] ** -0.5
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    def init(self, key: Any, w: Array, site: Site, dtype: Any) -> Params:
        key_a, key_router = jax.random.split(key)
        own = {"router": self._uniform(key_router, (self.rank, self.experts), dtype)}
        if self.stride == 1:
            own["a"] = self._uniform(key_a, (w.shape[0], self.rank), dtype)
        return Params(trainable=own)

    def init_shared(self, key: Any, sites: dict[str, Site], dtype: Any) -> Params:
        shared = {}
        for (n_in, n_out), n in self.blocks(sites).items():
            here = {"b": jnp.zeros((self.experts, self.rank, n_out), dtype)}
            if self.stride > 1:
                own = jax.random.fold_in(jax.random.fold_in(key, n_in), n_out)
                here["a"] = self._uniform(own, (n, n_in, self.rank), dtype)
            shared[shape_name(n_in, n_out)] = here
        return Params(trainable=shared)

    def init_members(self, key: Any, sites: dict[str, Site], dtype: Any) -> dict[str, dict[str, Array]]:
        if self.stride == 1:
            return {}
        seen: dict[tuple[int, int], int] = {}
        out = {}
        for path, site in sites.items():
            stack, *shape = site.canonical_shape
            start = seen.get(tuple(shape), 0)
            seen[tuple(shape)] = start + site.stack
            out[path] = {"a": ((start + jnp.arange(site.stack)) // self.stride).astype(jnp.int32).reshape(stack)}
        return out

    def count(self, site: Site) -> int:
        own = site.canonical_shape[1] if self.stride == 1 else 0
        return site.stack * self.rank * (self.experts + own)

    def count_shared(self, sites: dict[str, Site]) -> int:
        return sum(
            self.rank * (self.experts * n_out + (n * n_in if self.stride > 1 else 0))
            for (n_in, n_out), n in self.blocks(sites).items()
        )

    def dims(self, p: Params) -> Params:
        names = {"a": "in rank", "router": "rank _"}
        return Params(
            trainable=p.trainable and {name: names[name] for name in p.trainable},
            frozen=None if p.frozen is None else {"a": ""},
            shared=jax.tree.map(lambda leaf: "_ _ _", p.shared),
        )

    def forward(self, dot: Dot, x: Array, w: Array, p: Params, ctx: Context) -> tuple[Array, Any]:
        if dot.kind == "ragged":
            raise ValueError(
                "Lily's mixture is one for all rows of a batch, and in a ragged product every expert has its own. Use "
                "LoRA for the experts."
            )
        shared = p.shared[shape_name(*w.shape)]
        a = p.trainable["a"] if self.stride == 1 else shared["a"][p.frozen["a"]]
        h = dot.inner(x, a)
        logits = dot.mix(h, p.trainable["router"])
        wide = jnp.promote_types(logits.dtype, jnp.float32)  # a mean over many rows
        mixture = jnp.mean(jax.nn.softmax(logits.astype(wide)), axis=tuple(range(logits.ndim - 1)))
        b = jnp.einsum("e,ero->ro", mixture, shared["b"].astype(wide))
        y = dot(x, w)
        return y + dot.outer(h * self.scale, b).astype(y.dtype), None

    def describe(self) -> dict[str, str]:
        return {"rank": str(self.rank), "scale": f"{self.scale:g}"}
