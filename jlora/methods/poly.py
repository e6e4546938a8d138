r"""Poly: an inventory of skills for many tasks; each task mixes the parameters of the skills into a pair of its own.

Polytropon: Combining Modular Skills in Multitask Learning. Ponti et al., 2022. https://arxiv.org/abs/2202.13914
MHR: Multi-Head Adapter Routing for Cross-Task Generalization. Caccia et al., 2022. https://arxiv.org/abs/2211.03831

.. math::  y = x W + \tfrac1r\,(x A_t) B_t, \quad A_t = \Bigl[\sum_k g_{tqk} A_{qk}\Bigr]_q, \quad
           B_t = \Bigl[\sum_k g_{tqk} B_{qk}\Bigr]_q, \quad g_{tqk} = \sigma(z_{tqk}) / \sum_l \sigma(z_{tql})

W [in, out] frozen. For each of S splits q and K skills k: A_qk [in / S, r], B_qk [r, out / S], trained; the splits of
A_t [in, r] lie below, those of B_t [r, out] beside each other. z [tasks, S, K] trained. Trained:
K r (in + out) + tasks S K a matrix. S = 1 is Polytropon; more is MHR, where every split is routed by itself.

* Which task an example is of is said by ``adapted.bind(context={"task_ids": ids})``: an integer, or an array [batch],
  the first axis of the activations. Without it all are of ``task``, and so is what merging gives.
* A and B are mixed apart, so skills meet each other in the product: it is no mixture of K pairs. Per example it runs
  through all K r features, x A_qk for all q and k, then g, and the same way out: no factor is formed for an example.
* Bound with a key, sigma(z) is drawn, relaxed Bernoulli variables at temperature 1 for each example, as in training
  in the papers' code; without, it is the mean's sigmoid, as in evaluation.
* A is uniform in +-1/sqrt(in / S), B at zero, so the output starts as the base's; z is uniform in +-0.001.

When to use it: many related tasks with few examples each, known by number.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jlora.factors import Factors
from jlora.methods.base import Method, Site, check_rank, require
from jlora.weight import Context, Dot, Params


@dataclasses.dataclass(frozen=True)
class Poly(Method):
    """Skills mixed by task. The formula and shapes are at the top of this file.

    Parameters of a leaf: trainable ``{"a": [*stack, in, K, r], "b": [*stack, K, r, out], "logits": [*stack, tasks, S,
    K]}``; the splits follow one another along in and out.

    Attributes:
      rank: r of every skill.
      tasks: how many there are.
      skills: K; fewer than the tasks, so that they share.
      splits: S, which divides in and out.
      task: the task of examples of which nothing is said, and of the merged weight.
    """

    rank: int = 8
    tasks: int = 1
    _: dataclasses.KW_ONLY
    skills: int = 4
    splits: int = 1
    task: int = 0

    draws = True

    def __post_init__(self):
        for field in ("rank", "tasks", "skills", "splits"):
            value = getattr(self, field)
            require(isinstance(value, int) and value > 0, f"Poly({field}={value!r}): a positive integer is wanted.")
        require(
            0 <= self.task < self.tasks,
            f"Poly(tasks={self.tasks}, task={self.task}): the task is one of 0 to {self.tasks - 1}.",
        )

    @property
    def sliceable(self) -> frozenset[str]:
        return frozenset({"in", "out"} if self.splits == 1 else ())  # else a slice would shift the splits

    def check(self, site: Site) -> str | None:
        _, n_in, n_out = site.canonical_shape
        if n_in % self.splits or n_out % self.splits:
            fits = [s for s in range(1, min(n_in, n_out) + 1) if n_in % s == n_out % s == 0]
            nearest = min(fits, key=lambda s: abs(s - self.splits))
            return f"splits={self.splits} does not divide both in = {n_in} and out = {n_out}; {nearest} does"
        return check_rank(self.rank, site)

    def init(self, key: Any, w: Array, site: Site, dtype: Any) -> Params:
        (n_in, n_out), r = w.shape, self.rank
        key_a, key_z = jax.random.split(key)
        uniform = lambda key, shape, bound: jax.random.uniform(key, shape, dtype, -bound, bound)
        return Params(
            trainable={
                "a": uniform(key_a, (n_in, self.skills, r), (self.splits / n_in) ** 0.5),
                "b": jnp.zeros((self.skills, r, n_out), dtype),
                "logits": uniform(key_z, (self.tasks, self.splits, self.skills), 1e-3),
            }
        )

    def count(self, site: Site) -> int:
        _, n_in, n_out = site.canonical_shape
        return site.stack * self.skills * (self.rank * (n_in + n_out) + self.tasks * self.splits)

    def dims(self, p: Params) -> Params:
        return Params(trainable={"a": "in _ rank", "b": "_ rank out", "logits": "_ _ _"})

    def gates(self, p: Params, task: Any, key: Any = None) -> Float[Array, "*task S K"]:
        """g of a task or of an array of them; zero for a number that is no task."""
        z = jnp.take(p.trainable["logits"], task, axis=0, mode="clip")
        if key is not None:
            z = z + jax.random.logistic(key, z.shape, z.dtype)
        g = jax.nn.sigmoid(z)
        known = (jnp.asarray(task) >= 0) & (jnp.asarray(task) < self.tasks)
        return jnp.where(known[..., None, None], g / jnp.sum(g, axis=-1, keepdims=True), 0.0)

    def pair(self, p: Params, gates: Float[Array, "S K"]) -> Factors:
        """A_t and B_t for one task."""
        a, b = p.trainable["a"], p.trainable["b"]
        g_in, g_out = (jnp.repeat(gates, n // self.splits, axis=0) for n in (a.shape[0], b.shape[-1]))
        return Factors(jnp.sum(g_in[:, :, None] * a, axis=1), jnp.sum(g_out.T[:, None] * b, axis=0), 1 / self.rank)

    def factors(self, w: Array, p: Params) -> Factors:
        return self.pair(p, self.gates(p, self.task))

    def _task(self, ctx: Context) -> Any:
        return (ctx.values or {}).get("task_ids", self.task)

    def forward(self, dot: Dot, x: Array, w: Array, p: Params, ctx: Context) -> tuple[Array, Any]:
        task = self._task(ctx)
        if jnp.ndim(task) == 0:
            f = dot.per_matrix(lambda w, p: self.pair(p, self.gates(p, task, ctx.key)), w, p)
            return dot.factored(x, w, f, ctx), None
        if not dot.features_last(x) or x.ndim < 2 or jnp.shape(task) != x.shape[:1]:
            raise ValueError(
                f"Poly: task_ids {jnp.shape(task)} say the tasks of the first axis of the activations, and here is a "
                f"product ({dot.kind}) with activations {x.shape}. One integer for all of them works everywhere."
            )
        split = lambda array, axis: array.reshape(*array.shape[:axis], self.splits, -1, *array.shape[axis + 1 :])
        g, a, b = self.gates(p, task, ctx.key).astype(x.dtype), split(p.trainable["a"], 0), split(p.trainable["b"], 2)
        h = dot.einsum("...qd,qdkr->...qkr", split(x, x.ndim - 1), a).astype(x.dtype)
        h = jnp.einsum("n...qkr,nqk->n...r", h, g) / self.rank
        y = dot.einsum("...qkr,krqd->...qd", jnp.einsum("n...r,nqk->n...qkr", h, g), b)
        base = dot(x, w)
        return base + y.reshape(base.shape).astype(base.dtype), None

    def forward_transposed(self, dot: Dot, x: Array, wt: Float[Array, "out in"], p: Params, ctx: Context) -> Array:
        task = self._task(ctx)
        if jnp.ndim(task):
            raise ValueError("Poly: a tied head takes one integer as task_ids, not one for each example.")
        return dot.factored(x, wt, self.pair(p, self.gates(p, task, ctx.key)).swap(), ctx)

    def describe(self) -> dict[str, str]:
        return {"rank": f"{self.skills}x{self.rank}", "scale": f"{1 / self.rank:g}"}
