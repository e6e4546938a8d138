r"""PVeRA: VeRA whose r features are drawn from a distribution that the input sets.

PVeRA: Probabilistic Vector-Based Random Matrix Adaptation. Fillioux et al., 2025. https://arxiv.org/abs/2512.07703

.. math::  y = x W + z B \odot b, \quad z = \mu + e^{\lambda / 2} \odot \epsilon, \quad
           (\mu, \lambda) = (\mathrm{drop}(x) A) \odot d

W [in, out] frozen; A [in, 2 r] and B [r, out] frozen, the leading rows and columns of one pair A [max in, 2 r],
B [r, max out] for the whole model; d [2 r] and b [out] trained; epsilon normal, one number for each of the r features
of each token. Trained: 2 r + out a matrix.

* epsilon is drawn exactly when the tree was bound with a key; without, z is the mean mu, half of A and d plays no part,
  and PVeRA is VeRA: merging and files for plain LoRA are of that. Binding with a key at inference samples the
  distribution there too (PEFT's ``sample_at_inference``).
* The start is VeRA's: d at ``d_initial``, b at 0, so the output starts as the base's, drawn or not.

When to use it: as VeRA, where uncertainty of the output is wanted as well, from several keys.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jlora.factors import Factors
from jlora.methods.base import Site, dropout
from jlora.methods.vera import VeRA
from jlora.weight import Context, Dot, Params


@dataclasses.dataclass(frozen=True)
class PVeRA(VeRA):
    """Probabilistic VeRA. The formula and shapes are at the top of this file. Options as for ``VeRA``.

    Parameters of a leaf: trainable ``{"d": [*stack, 2 r], "b": [*stack, out]}``; of the group: frozen
    ``{"a": [max in, 2 r], "b": [r, max out]}``. The first halves of d and of a's columns are the mean's.
    """

    _: dataclasses.KW_ONLY
    group: str = "pvera"

    draws = True

    def init(self, key: Any, w: Array, site: Site, dtype: Any) -> Params:
        own = super().init(key, w, site, dtype).trainable
        return Params(trainable=own | {"d": jnp.tile(own["d"], 2)})

    def init_shared(self, key: Any, sites: dict[str, Site], dtype: Any) -> Params:
        wide = VeRA(2 * self.rank).init_shared(key, sites, dtype).frozen["a"]
        return Params(frozen=super().init_shared(key, sites, dtype).frozen | {"a": wide})

    def count(self, site: Site) -> int:
        return super().count(site) + site.stack * self.rank

    def factors(self, w: Array, p: Params) -> Factors:
        mean = p.trainable | {"d": p.trainable["d"][: self.rank]}
        return super().factors(w, p._replace(trainable=mean, shared=p.shared | {"a": p.shared["a"][:, : self.rank]}))

    def forward(self, dot: Dot, x: Array, w: Array, p: Params, ctx: Context) -> tuple[Array, Any]:
        if ctx.key is None:
            return super().forward(dot, x, w, p, ctx)

        def pair(w: Array, p: Params) -> tuple[Array, Array]:
            d, b = p.trainable["d"], p.trainable["b"]
            return p.shared["a"][: w.shape[0]].astype(d.dtype) * d, p.shared["b"][:, : w.shape[1]].astype(b.dtype) * b

        a, b = dot.per_matrix(pair, w, p)
        key_drop, key_noise = jax.random.split(ctx.key)
        x_dropped = x if dot.kind == "lookup" else dropout(x, self.dropout, key_drop)
        mean, log_variance = (dot.inner(x_dropped, part) for part in jnp.split(a, 2, axis=-1))
        noise = jax.random.normal(key_noise, mean.shape, mean.dtype)
        return dot(x, w) + dot.outer(mean + jnp.exp(0.5 * log_variance) * noise, b), None
