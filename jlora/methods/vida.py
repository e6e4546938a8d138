r"""ViDA: a low-rank and a high-rank branch that share the work at test time, by how uncertain the model is.

ViDA: Homeostatic Visual Domain Adapter for Continual Test Time Adaptation. Liu et al., 2023.
https://arxiv.org/abs/2306.04344

.. math::  y = x W + \lambda_1\,(x A_1) B_1 + \lambda_2\,(x A_2) B_2

W [in, out] frozen; A_1 [in, r_1], B_1 [r_1, out] and A_2 [in, r_2], B_2 [r_2, out] trained, with r_1 small (what
domains share) and r_2 large (what is a domain's own). Trained: (r_1 + r_2) (in + out) a matrix. A_k starts normal with
deviation 1 / r_k^2 and B_k = 0 (for an embedding as LoRA), so the output starts as the base's. There is no alpha.

``bind(context={"strengths": (l1, l2)})`` sets the two numbers, or an array [2], or two arrays [batch]; without it both
are 1, which is what ``merge`` uses.

Around it, one step on a batch without labels::

    views = jax.vmap(lambda x: apply(teacher_params, x))(augmented)     # [views, batch, classes]
    context = {"strengths": vida.strengths(vida.uncertainty(views), threshold)}
    target = teacher(batch)                                             # this is also the prediction
    loss = lambda trainable: vida.consistency(student(trainable, batch), target)     # a step of any optimizer
    teacher = vida.teacher_update(teacher, student)
    student = vida.restore(key, student, source, probability)

In the authors' code the high-rank strength is never set (an elif that is never reached): what ran there was (l1, 1).

When to use it: a stream of test batches whose domain keeps changing, without labels. For anything else, LoRA.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from jlora.factors import Factors
from jlora.methods.base import Site, require
from jlora.methods.branches import Branches, Strength


@dataclasses.dataclass(frozen=True)
class ViDA(Branches):
    """A low-rank and a high-rank branch. The formula and shapes are at the top of this file.

    Parameters of a leaf: trainable ``{"low": Factors, "high": Factors}``.

    Attributes:
      rank: r_1.
      high_rank: r_2.
      dropout: rate, as for LoRA.
    """

    rank: int = 1
    high_rank: int = 128
    _: dataclasses.KW_ONLY
    dropout: float = 0.0

    def __post_init__(self):
        self.require_ranks()

    @property
    def ranks(self) -> dict[str, int]:
        return {"low": self.rank, "high": self.high_rank}

    def strengths(self, values: Mapping[str, Any]) -> dict[str, Strength]:
        given = values.get("strengths")
        if given is None:
            return {"low": 1.0, "high": 1.0}
        require(
            len(given) == 2, f"context['strengths'] holds two, of the low rank and of the high one; got {len(given)}."
        )
        return {"low": given[0], "high": given[1]}

    def init_pair(self, name: str, key: Any, w: Array, site: Site, dtype: Any) -> Factors:
        start, rank = super().init_pair(name, key, w, site, dtype), self.ranks[name]
        if site.axes.kind == "embedding":
            return start
        return Factors(jax.random.normal(key, start.a.shape, dtype) / rank**2, start.b)


def uncertainty(logits: Float[Array, "views batch classes"]) -> Float[Array, ""]:
    """A tenth of the (unbiased) variance of the logits over augmented views of a batch, averaged."""
    return 0.1 * jnp.var(logits, axis=0, ddof=1).mean()


def strengths(
    uncertainty: float | Float[Array, ""], threshold: float = 0.2
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """(l1, l2) for an uncertainty: from the threshold on, the high rank gains what the low rank loses, below it the
    other way round. They sum to 2. The authors' command line has a threshold of 0.05."""
    shift = jnp.where(jnp.asarray(uncertainty) >= threshold, uncertainty, -uncertainty)
    return 1.0 - shift, 1.0 + shift


def consistency(logits: Float[Array, "batch classes"], teacher: Float[Array, "batch classes"]) -> Float[Array, ""]:
    """Cross-entropy of the student's prediction against the teacher's, which carries no gradient."""
    targets = jax.nn.softmax(jax.lax.stop_gradient(teacher))
    return optax.softmax_cross_entropy(logits, targets).mean()


def teacher_update(teacher: PyTree, student: PyTree, decay: float = 0.999) -> PyTree:
    """decay * teacher + (1 - decay) * student, leaf by leaf."""
    return optax.incremental_update(student, teacher, 1.0 - decay)


def restore(key: PRNGKeyArray, student: PyTree, source: PyTree, probability: float) -> PyTree:
    """The student's parameters, each entry set back to the source's with the given probability."""
    leaves, treedef = jax.tree.flatten(student)
    keys = jax.tree.unflatten(treedef, list(jax.random.split(key, len(leaves))))
    one = lambda key, p, start: jnp.where(jax.random.bernoulli(key, probability, p.shape), start, p)
    return jax.tree.map(one, keys, student, source)
