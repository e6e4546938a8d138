"""`--rank-schedule`: ranks that change while a run trains, by the allocators of `jlora.rank`.

What an allocator remembers, and the masks that it writes into the adapters, lie beside the optimizer's state: they are
saved with it and come back with it. Arrays keep their shapes and nothing compiles anew; the adapter that a run leaves
holds the ranks that are in use.
"""

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import PyTree

import jlora
from jlora import rank
from jlora.rank import Allocator
from jlora.train import distributed
from jlora.train.config import TrainOptions, UserError, check_options, literal_options
from jlora.weight import Params


@dataclasses.dataclass(frozen=True)
class Kind:
    """How one of them is made.

    Attributes:
      method: of the adapters that it is for.
      shares: of the steps of the run, for arguments that are numbers of steps.
      orthogonality: the weight of `jlora.rank.orthogonality` in the loss.
    """

    make: Callable[..., Allocator]
    method: str
    shares: Mapping[str, float] = dataclasses.field(default_factory=dict)
    orthogonality: float = 0.0


SCHEDULES = {
    "adalora": Kind(rank.adalora, "adalora", {"total_steps": 1.0, "warmup_steps": 0.1, "final_steps": 1 / 3}, 0.1),
    "increlora": Kind(rank.increlora, "adalora", {"warmup_steps": 0.1}, 0.1),
    "triadapt": Kind(rank.triadapt, "triadapt_lora", {"steps": 1.0, "warmup_steps": 0.1}),
    "diffora": Kind(rank.diffora, "adalora", {"total_steps": 0.5}),
    "squeeze": Kind(rank.squeeze, "lora"),
}
_WEIGHT = "orthogonality"


class Ranked(NamedTuple):
    """In the place of an optimizer's state."""

    optimizer: PyTree
    allocator: PyTree
    frozen: PyTree  # of the adapters: what the allocator writes


class Schedule(NamedTuple):
    """An allocator, and the weight of the penalty that it wants."""

    allocator: Allocator
    orthogonality: float = 0.0

    def begin(self, adapted: "jlora.Adapted", init: Callable[[PyTree], PyTree]) -> tuple[PyTree, Ranked]:
        """The trainable parameters at step 0 and, with the `init` of an optimizer, the state beside them."""
        state, adapted = self.allocator.init(adapted)
        # Copies, for a step donates them: what is frozen is elsewhere, too, and an allocator may hold one array twice.
        mine = jax.tree.map(jnp.copy, (state, adapted.frozen))
        return adapted.trainable, Ranked(init(adapted.trainable), *mine)

    def update(
        self, optimizer: optax.GradientTransformation, grads: PyTree, state: Ranked, adapted: "jlora.Adapted", step: Any
    ) -> tuple[PyTree, Ranked]:
        """The optimizer's step, with the penalty in its gradients, and then the allocator's; `step` counts from 0."""
        if self.orthogonality:
            penalty = lambda trainable: self.orthogonality * rank.orthogonality(adapted.replace(trainable=trainable))
            grads = jax.tree.map(jnp.add, grads, jax.grad(penalty)(adapted.trainable))
        updates, optimizer_state = optimizer.update(grads, state.optimizer, adapted.trainable)
        adapted = adapted.replace(trainable=optax.apply_updates(adapted.trainable, updates))
        allocator_state, adapted = self.allocator.update(state.allocator, adapted, grads, step)
        return adapted.trainable, Ranked(optimizer_state, allocator_state, adapted.frozen)


def present(adapted: "jlora.Adapted", opt_state: PyTree) -> "jlora.Adapted":
    """The adapters with the ranks that a state says are in use."""
    return adapted.replace(frozen=opt_state.frozen) if isinstance(opt_state, Ranked) else adapted


def make(options: TrainOptions, method: str) -> Schedule | None:
    """What `--rank-schedule` names; `options` have been resolved, `method` is that of the adapters."""
    name, flag = options.rank_schedule, "--rank-schedule-options"
    if name == "none":
        if options.rank_schedule_options:
            raise UserError(f"{flag} is for --rank-schedule, and there is none")
        return None
    kind = SCHEDULES[name]
    if method != kind.method:
        raise UserError(f"--rank-schedule {name} is of --method {kind.method}, got {method}")
    given = literal_options(flag, options.rank_schedule_options)
    known = [parameter for parameter in inspect.signature(kind.make).parameters if parameter != "key"]
    known += [_WEIGHT] if kind.orthogonality else []
    check_options(f"--rank-schedule {name}", given, known, flag)
    weight = given.pop(_WEIGHT, kind.orthogonality)
    if not isinstance(weight, int | float) or weight < 0:
        raise UserError(f"{flag} {_WEIGHT} is a weight of 0 or above, got {weight!r}")
    arguments = {argument: int(share * options.steps) for argument, share in kind.shares.items()} | given
    if arguments.get("lottery"):
        arguments["key"] = jax.random.key(options.seed)
    if name == "squeeze" and "stages" not in arguments:
        raise UserError(f"--rank-schedule squeeze wants {flag} 'stages=[(STEP, RANK), ...]', ranks from each step on")
    try:
        return Schedule(kind.make(**arguments), weight)
    except (ValueError, TypeError) as error:
        raise UserError(f"--rank-schedule {name}: {error}") from error


def describe(adapted: "jlora.Adapted") -> str:
    """How many ranks are in use, of all that the adapters hold."""
    found, total = 0, 0
    for path, site in adapted.sites.items():
        if not site.method.whole_leaf:
            own = distributed.to_host((adapted.trainable[path], adapted.frozen.get(path)))
            live = np.asarray(site.method.live(Params(*own)))
            found, total = found + np.count_nonzero(live), total + live.size
    return f"ranks in use: {found:,} of {total:,}"
