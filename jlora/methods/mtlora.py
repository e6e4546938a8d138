r"""MTLoRA: one branch for the features that all tasks share, and one for each task.

MTLoRA: A Low-Rank Adaptation Approach for Efficient Multi-Task Learning. Agiza, Neseem and Reda, 2024.
https://arxiv.org/abs/2403.20320

W [in, out] frozen; A_0 [in, r], B_0 [r, out] of the shared branch and A_t [in, r_t], B_t [r_t, out] of each task
trained, each pair with LoRA's start. Trained: (r + sum of r_t) (in + out) a matrix, and with ``train_scales`` a number
a branch.

.. math::  y_0 = x_0 W + s_0\,(x_0 A_0) B_0, \qquad  y_t = x_0 W + s_t\,(x_t A_t) B_t
    \quad (\text{matrixv2: } {} + s_0\,(x_0 A_0) B_0)

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
their fourth mode, "addition", is left out: it adds a normalized sum of whole outputs with their biases, which a weight
does not see.

When to use it: one backbone for many dense tasks, each with a head of its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from jlora.factors import Factors
from jlora.methods.base import Site, dropout, require
from jlora.methods.branches import Branches, Strength, pick
from jlora.weight import Context, Dot, Params

_SHARED, _SCALES = "shared", "scales"


@dataclasses.dataclass(frozen=True)
class MTLoRA(Branches):
    """Shared and task-specific branches. The formula and shapes are at the top of this file.

    Parameters of a leaf: trainable ``{"shared": Factors, task: Factors, ...}``, with ``train_scales`` also ``{"scales":
    {"shared": [*stack], task: [*stack], ...}}``.

    Attributes:
      rank: r, of the shared branch.
      tasks: their names.
      task_rank: r_t, one for all tasks or one for each.
      scale, task_scale: s_0 and s_t.
      mode: "matrix", or "matrixv2": the shared branch is part of the task streams, too.
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
            len({*self.tasks, _SHARED, _SCALES}) == n + 2,
            f"MTLoRA(tasks={self.tasks}): every task has a name of its own, and none is {_SHARED!r} or {_SCALES!r}.",
        )
        require(
            isinstance(self.task_rank, int) or len(self.task_rank) == n,
            f"MTLoRA(task_rank={self.task_rank}): one rank, or one for each of {n} tasks.",
        )
        require(
            self.mode in ("matrix", "matrixv2"),
            f"MTLoRA(mode={self.mode!r}): 'matrix' or 'matrixv2' is wanted. The authors' 'lora_only' is tasks=(), and "
            "their 'addition' is not here.",
        )
        self.require_ranks()

    @property
    def ranks(self) -> dict[str, int]:
        each = (self.task_rank,) * len(self.tasks) if isinstance(self.task_rank, int) else self.task_rank
        return {_SHARED: self.rank} | dict(zip(self.tasks, each, strict=True))

    def starting_scale(self, name: str) -> float:
        return float(self.scale if name == _SHARED else self.task_scale)

    def scale_of(self, name: str) -> float:
        return 1.0 if self.train_scales else self.starting_scale(name)

    def strengths(self, values: Mapping[str, Any]) -> dict[str, Strength]:
        task = values.get("task")
        if task is None or not self.tasks:
            return {_SHARED: 1.0}
        return ({_SHARED: 1.0} if self.mode == "matrixv2" else {}) | pick(task, self.tasks, "task")

    def init(self, key: Any, w: Array, site: Site, dtype: Any) -> Params:
        pairs = super().init(key, w, site, dtype).trainable
        if not self.train_scales:
            return Params(pairs)
        return Params(pairs | {_SCALES: {name: jnp.asarray(self.starting_scale(name), dtype) for name in self.ranks}})

    def count(self, site: Site) -> int:
        return super().count(site) + self.train_scales * site.stack * len(self.ranks)

    def dims(self, p: Params) -> Params:
        pairs = super().dims(p).trainable
        return Params(pairs | {_SCALES: dict.fromkeys(self.ranks, "")} if self.train_scales else pairs)

    def pair(self, name: str, p: Params) -> Factors:
        f = super().pair(name, p)
        if not self.train_scales:
            return f
        return Factors(f.a, f.b * p.trainable[_SCALES][name][..., None, None].astype(f.b.dtype), f.scale)

    def forward(self, dot: Dot, x: Array, w: Array, p: Params, ctx: Context) -> tuple[Array, Any]:
        if not self.tasks or not (ctx.values or {}).get("streams"):
            return super().forward(dot, x, w, p, ctx)
        n = 1 + len(self.tasks)
        if dot.kind != "linear" or x.ndim < 2 or x.shape[0] % n:
            raise ValueError(
                f"MTLoRA was bound with streams=True and is used in a {dot.kind} product of an activation {x.shape}. "
                f"[{n} * batch, ..., features] is wanted: the shared stream's examples first, then those of the "
                f"{n - 1} tasks. Repeat the inputs, jnp.tile(x, ({n}, 1, ...)), or bind one task."
            )
        streams = jnp.split(dropout(x, self.dropout, ctx.key), n)
        pairs = [self.pair(name, p) for name in self.ranks]
        changes = [dot.outer(dot.inner(x, f.a) * f.scale, f.b) for x, f in zip(streams, pairs, strict=True)]
        if self.mode == "matrixv2":
            changes = [changes[0]] + [changes[0] + change for change in changes[1:]]
        base = dot(x[: x.shape[0] // n], w)
        return jnp.concatenate([base + change for change in changes]), None

    def weight_in(self, w: Array, p: Params, values: Mapping[str, Any]) -> Array:
        if self.tasks and values.get("streams"):
            raise ValueError("MTLoRA was bound with streams=True: each stream has a weight of its own.")
        return super().weight_in(w, p, values)
