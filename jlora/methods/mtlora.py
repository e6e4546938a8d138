r"""MTLoRA: one branch for the features that all tasks share, and one for each task.

MTLoRA: A Low-Rank Adaptation Approach for Efficient Multi-Task Learning. Agiza, Neseem and Reda, 2024.
https://arxiv.org/abs/2403.20320

W [in, out] frozen; A_0 [in, r], B_0 [r, out] of the shared branch and A_t [in, r_t], B_t [r_t, out] of each task
trained, each pair with LoRA's start. Trained: (r + sum of r_t) (in + out) a matrix, and with ``train_scales`` a number
a branch.

.. math::  y_0 = x_0 W + s_0\,(x_0 A_0) B_0, \qquad  y_t = x_0 W + s_t\,(x_t A_t) B_t
    \quad (\text{matrixv2: } {} + s_0\,(x_0 A_0) B_0)

In the mode "addition" there is no shared pair; the shared stream takes the sum of all tasks' outputs instead, in a
layer norm with a gain [out] of ones and a bias [out] of zeros at the start, both trained. Trained: (sum of r_t) (in +
out) + 2 out a matrix.

.. math::  y_0 = x_0 W + \mathrm{LayerNorm}\bigl(\textstyle\sum_t y_t\bigr)

x_0 is the shared stream and x_t the stream of task t, which is x_0 until the first weight with tasks. The base product
is always that of the shared stream, and the scales are plain multipliers, not divided by a rank; both as in the
authors' code. There are three ways to run it:

* without a context: y_0, also what ``merge`` uses;
* ``bind(context={"task": t})``, a name or a number as in ``branches.py``: the model computes y_t with x_t in place of
  x_0 everywhere. The authors' y_t as long as weights with tasks do not follow each other;
* ``bind(context={"streams": True})``: all streams at once. The first axis of every activation holds first the examples
  of the shared stream, then those of the first task, and so on: (1 + tasks) times as many, ``jnp.tile`` of the inputs
  at the model's entry. The base product is computed once, for x_0, and what is not adapted sees every stream by itself.

Weights with ``tasks=()`` have the shared branch alone and treat all streams alike; the authors give tasks to the last
weights of each stage. Departures: dropout falls on the task streams, too (theirs are dropped only where they are x_0);
and a layer's bias, which a weight does not see, is no part of the sum in the norm of "addition", to which theirs adds
it once for each task. Their mode "lora_only" is ``tasks=()``.

"addition" acts on activations: y_0 is no product with a weight, does not merge, and does not start as the base's. A
task is a plain LoRA in every mode: ``jlora.rank.choose(adapted, {"task": t})``. Without a context, all x_t are x_0.

When to use it: one backbone for many dense tasks, each with a head of its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jlora.factors import Factors
from jlora.methods.base import Site, dropout, require
from jlora.methods.branches import Branches, Strength, pick
from jlora.weight import Context, Dot, Params

_SHARED, _SCALES, _NORM = "shared", "scales", "layer_norm"
_EPSILON = 1e-5  # of the norm, as in the authors' code


@dataclasses.dataclass(frozen=True)
class MTLoRA(Branches):
    """Shared and task-specific branches. The formula and shapes are at the top of this file.

    Parameters of a leaf: trainable ``{"shared": Factors, task: Factors, ...}``, with ``train_scales`` also ``{"scales":
    {"shared": [*stack], task: [*stack], ...}}``. In the mode "addition" no "shared", and ``{"layer_norm": {"gain":
    [*stack, out], "bias": [*stack, out]}}``.

    Attributes:
      rank: r, of the shared branch, where there is one.
      tasks: their names.
      task_rank: r_t, one for all tasks or one for each.
      scale, task_scale: s_0 and s_t.
      mode: "matrix"; "matrixv2": the shared branch is part of the task streams, too; "addition": see above.
      train_scales: train the scales.
      dropout: rate, as for LoRA.
    """

    rank: int = 16
    tasks: tuple[str, ...] = ()
    _: dataclasses.KW_ONLY
    task_rank: int | tuple[int, ...] = 4
    scale: float = 2.0
    task_scale: float = 2.0
    mode: str = "matrix"
    train_scales: bool = False
    dropout: float = 0.0

    def __post_init__(self):
        object.__setattr__(self, "tasks", tuple(self.tasks))
        if not isinstance(self.task_rank, int):
            object.__setattr__(self, "task_rank", tuple(self.task_rank))
        n = len(self.tasks)
        require(
            len({*self.tasks, _SHARED, _SCALES, _NORM}) == n + 3,
            f"MTLoRA(tasks={self.tasks}): every task has a name of its own, and none is {_SHARED!r}, {_SCALES!r} or "
            f"{_NORM!r}.",
        )
        require(
            isinstance(self.task_rank, int) or len(self.task_rank) == n,
            f"MTLoRA(task_rank={self.task_rank}): one rank, or one for each of {n} tasks.",
        )
        require(
            self.mode in ("matrix", "matrixv2", "addition"),
            f"MTLoRA(mode={self.mode!r}): 'matrix', 'matrixv2' or 'addition' is wanted. The authors' 'lora_only' is "
            "tasks=().",
        )
        require(
            self.mode != "addition" or n > 0,
            "MTLoRA(mode='addition') sums the outputs of tasks, and there are none: name them, tasks=('depth', ...).",
        )
        self.require_ranks()

    @property
    def mergeable(self) -> bool:
        return self.mode != "addition"

    @property
    def ranks(self) -> dict[str, int]:
        each = (self.task_rank,) * len(self.tasks) if isinstance(self.task_rank, int) else self.task_rank
        shared = {} if self.mode == "addition" else {_SHARED: self.rank}
        return shared | dict(zip(self.tasks, each, strict=True))

    def check(self, site: Site) -> str | None:
        if self.mode == "addition" and site.axes.kind != "linear":
            return (
                f"MTLoRA(mode='addition') normalizes the outputs of a matrix product, and this is of the kind "
                f"{site.axes.kind!r}; mode='matrix' adapts it"
            )
        return super().check(site)

    def starting_scale(self, name: str) -> float:
        return float(self.scale if name == _SHARED else self.task_scale)

    def scale_of(self, name: str) -> float:
        return 1.0 if self.train_scales else self.starting_scale(name)

    def strengths(self, values: Mapping[str, Any]) -> dict[str, Strength]:
        task = values.get("task")
        if self.mode == "addition" and task is None:
            raise ValueError(
                "MTLoRA(mode='addition') normalizes the shared stream, which no weight and no pair does; "
                f"choose a task, context={{'task': {self.tasks[0]!r}}}."
            )
        if task is None or not self.tasks:
            return {_SHARED: 1.0}
        return ({_SHARED: 1.0} if self.mode == "matrixv2" else {}) | pick(task, self.tasks, "task")

    def init(self, key: Any, w: Array, site: Site, dtype: Any) -> Params:
        own = super().init(key, w, site, dtype).trainable
        if self.train_scales:
            own[_SCALES] = {name: jnp.asarray(self.starting_scale(name), dtype) for name in self.ranks}
        if self.mode == "addition":
            own[_NORM] = {"gain": jnp.ones(w.shape[1], dtype), "bias": jnp.zeros(w.shape[1], dtype)}
        return Params(own)

    def count(self, site: Site) -> int:
        each = self.train_scales * len(self.ranks) + (self.mode == "addition") * 2 * site.canonical_shape[2]
        return super().count(site) + site.stack * each

    def dims(self, p: Params) -> Params:
        own = super().dims(p).trainable
        if self.train_scales:
            own[_SCALES] = dict.fromkeys(self.ranks, "")
        if self.mode == "addition":
            own[_NORM] = {"gain": "out", "bias": "out"}
        return Params(own)

    def pair(self, name: str, p: Params) -> Factors:
        f = super().pair(name, p)
        if not self.train_scales:
            return f
        return Factors(f.a, f.b * p.trainable[_SCALES][name][..., None, None].astype(f.b.dtype), f.scale)

    def forward(self, dot: Dot, x: Array, w: Array, p: Params, ctx: Context) -> tuple[Array, Any]:
        values = ctx.values or {}
        if self.tasks and values.get("streams"):
            return self._streams(dot, x, w, p, ctx), None
        if self.mode == "addition" and values.get("task") is None:
            base = dot(x, w)
            x, f = dropout(x, self.dropout, ctx.key), self.joined(p, dict.fromkeys(self.tasks, 1.0))
            total = len(self.tasks) * base + dot.outer(dot.inner(x, f.a) * f.scale, f.b)
            return base + self._normalized(dot, total, p), None
        return super().forward(dot, x, w, p, ctx)

    def _normalized(self, dot: Dot, y: Float[Array, "*n out"], p: Params) -> Float[Array, "*n out"]:
        wide = y.astype(jnp.promote_types(y.dtype, jnp.float32))
        centred = wide - wide.mean(-1, keepdims=True)
        unit = centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + _EPSILON)
        norm = p.trainable[_NORM]
        return (dot.along(wide, norm["gain"]) * unit + dot.along(wide, norm["bias"])).astype(y.dtype)

    def _streams(self, dot: Dot, x: Array, w: Array, p: Params, ctx: Context) -> Array:
        n = 1 + len(self.tasks)
        if dot.kind != "linear" or x.ndim < 2 or x.shape[0] % n:
            raise ValueError(
                f"MTLoRA was bound with streams=True and is used in a {dot.kind} product of an activation {x.shape}. "
                f"[{n} * batch, ..., features] is wanted: the shared stream's examples first, then those of the "
                f"{n - 1} tasks. Repeat the inputs, jnp.tile(x, ({n}, 1, ...)), or bind one task."
            )
        streams = dict(zip((_SHARED, *self.tasks), jnp.split(dropout(x, self.dropout, ctx.key), n), strict=True))
        pairs = {name: self.pair(name, p) for name in self.ranks}
        changes = {name: dot.outer(dot.inner(streams[name], f.a) * f.scale, f.b) for name, f in pairs.items()}
        base = dot(x[: x.shape[0] // n], w)
        tasks = [base + changes[name] for name in self.tasks]
        if self.mode == "addition":
            return jnp.concatenate([base + self._normalized(dot, sum(tasks), p), *tasks])
        if self.mode == "matrixv2":
            tasks = [changes[_SHARED] + y for y in tasks]
        return jnp.concatenate([base + changes[_SHARED], *tasks])

    def weight_in(self, w: Array, p: Params, values: Mapping[str, Any]) -> Array:
        if self.tasks and values.get("streams"):
            raise ValueError("MTLoRA was bound with streams=True: each stream has a weight of its own.")
        return super().weight_in(w, p, values)
