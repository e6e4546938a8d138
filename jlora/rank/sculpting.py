r"""How much of each weight Sculpting Subspaces keeps.

Sculpting Subspaces: Constrained Full Fine-Tuning in LLMs for Continual Learning. Nayak et al., 2025.
https://arxiv.org/abs/2504.07097

.. math::  I = \mathrm{mean}_t \cos(x_t, x_t W), \qquad
           \frac{k}{\min(\mathrm{in}, \mathrm{out})} = \rho_{\min} + \frac{I}{\bar I} (\rho_{\max} - \rho_{\min})

x_t are the inputs that a weight W [in, out] meets on data of the task to come, \bar I the mean of I over the weights, k
the number of singular directions that ``OSF`` freezes. A weight that hardly turns its inputs does little to them, and
is held to more of what it is.

* Verified against the authors' notebook, where this rule stands, and not against the paper: the values 0.1 and 0.8 of
  the two shares are the paper's as remembered.
* A cosine wants as many inputs as outputs; as in the notebook, the first of the longer of the two are taken.
* The matrices of a stacked leaf have one k, that of the one that keeps most.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from jlora.adapt import adapt
from jlora.lift import lift
from jlora.methods.base import Method, Site, require
from jlora.methods.osf import OSF
from jlora.paths import Pattern
from jlora.weight import Axes, Context, Dot, Params


def sculpting(
    fn: Callable,
    params: PyTree,
    args: Sequence[Any],
    targets: Pattern | Sequence[Pattern] = "all-linear",
    *,
    least: float = 0.1,
    most: float = 0.8,
    exclude: Pattern | Sequence[Pattern] = (),
    usage: Mapping[str, Any] | None = None,
    axes: Mapping[Pattern, Axes] | None = None,
) -> dict[str, OSF]:
    """Rules for a task of ``OSF``: how many directions of each weight stay, by how it turns its inputs.

    >>> for batch, train in tasks:  # one after the other
    ...     rules = jlora.rank.sculpting(model, params, (batch,))
    ...     adapted = jlora.adapt(params, rules, fn=model, args=(batch,), key=key)
    ...     params = jlora.merge(train(adapted))

    Args:
      fn: the model's function, not lifted; ``fn(params, *args)`` is run once, on data of the task to come.
      least, most: the shares rho_min and rho_max. Of a weight of mean importance, ``most`` is kept.
      targets, exclude, usage, axes: as for ``jlora.adapt``.
    """
    require(0.0 <= least <= most < 1.0, f"sculpting(least={least}, most={most}): two shares, least <= most < 1.")
    watched = adapt(
        params, _Turn(), targets, exclude=exclude, fn=fn, args=args, usage=usage, axes=axes, key=jax.random.key(0)
    )
    _, seen = lift(fn, aux=True)(watched.bind(), *args)
    unseen = [path for path in watched.sites if path not in seen]
    require(not unseen, f"{', '.join(unseen)}: the model takes no product with the whole of it on these data.")
    found = {path: np.mean([np.asarray(use, np.float64) for use in seen[path]], axis=0) for path in watched.sites}
    mean = np.mean(np.concatenate([np.ravel(each) for each in found.values()]))
    require(bool(np.isfinite(mean)), "The inputs or outputs of these weights are not finite.")
    require(mean > 0, f"The mean cosine of inputs and outputs is {mean:.2g}: without a positive one there is no rule.")
    rules = {}
    for path, site in watched.sites.items():
        _, n_in, n_out = site.canonical_shape
        m = min(n_in, n_out)
        share = least + float(np.max(found[path])) / mean * (most - least)
        rules[path] = OSF(int(np.clip(int(share * m), 1, m - 1)))
    return rules


@dataclasses.dataclass(frozen=True)
class _Turn(Method):
    """Changes nothing, and reports the mean cosine of inputs and outputs."""

    def init(self, key: Any, w: Any, site: Site, dtype: Any) -> Params:
        return Params({})

    def dims(self, p: Params) -> Params:
        return Params({})

    def weight(self, w: Any, p: Params) -> Any:
        return w

    def forward(self, dot: Dot, x: Any, w: Any, p: Params, ctx: Context) -> tuple[Any, Any]:
        y = dot(x, w)
        if not dot.features_last(x):
            return y, None
        m = min(x.shape[-1], y.shape[-1])
        a, b = (each[..., :m].astype(jnp.promote_types(each.dtype, jnp.float32)) for each in (x, y))
        norms = jnp.linalg.norm(a, axis=-1) * jnp.linalg.norm(b, axis=-1)
        cosine = jnp.sum(a * b, axis=-1) / jnp.where(norms > 0, norms, 1)
        return y, jnp.mean(cosine)

    def forward_transposed(self, dot: Dot, x: Any, wt: Any, p: Params, ctx: Context) -> Any:
        return dot(x, wt)
