"""The training loop: one compiled step, held-out loss, checkpoints, orderly stops.

The base is an argument of every compiled function, never a closed-over constant; trainable parameters and optimizer
state are donated to the step. Everything random in step n comes from fold_in(key, n), so a resumed run repeats it.
"""

import dataclasses
import math
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import PyTree

from jlora.train import distributed, ranks
from jlora.train.call import Call
from jlora.train.checkpoint import Checkpoints
from jlora.train.config import RunError
from jlora.train.metrics import next_token_loss
from jlora.train.report import Reporter, figures_line
from jlora.train.run import RunDirectory


class Interrupted(Exception):
    """SIGINT or SIGTERM arrived; `step` is the last finished one, and it is saved."""

    def __init__(self, signum: int, step: int):
        self.signum, self.step = signum, step


def make_train_step(
    apply: Callable,
    optimizer: optax.GradientTransformation,
    loss: Callable = next_token_loss,
    shardings: tuple[PyTree, PyTree] | None = None,
    rank_schedule: ranks.Schedule | None = None,
) -> Callable:
    """The compiled step: (trainable, opt_state, fixed, batch, key, step) -> (trainable, opt_state, metrics).

    `fixed` is the Adapted without its trainable part; `batch` holds [k, b, ...] arrays for k accumulated passes.
    `loss(call, batch, key)` gives the summed loss of a pass and what to divide it by, such as the scored tokens; `call`
    is the model with its parameters bound. The loss of a step is the quotient of the sums over all passes, hence the
    same as that of one pass over k * b rows. `shardings` are those of trainable and opt_state, where they lie on a
    mesh: they stay there. With a `rank_schedule` the opt_state is its `Ranked`.
    """

    def summed_loss(trainable, fixed, batch, key):
        params = fixed.bind(trainable, context={"key": key})
        return loss(Call(apply, params, fixed.base), batch, key)

    value_and_grad = jax.value_and_grad(summed_loss, has_aux=True)

    def step_fn(trainable, opt_state, fixed, batch, key, step):
        passes, fixed = batch["mask"].shape[0], ranks.present(fixed, opt_state)
        keys = jax.random.split(jax.random.fold_in(key, step), passes)

        def one_pass(sums, part):
            (nll, tokens), grads = value_and_grad(trainable, fixed, *part)
            return jax.tree.map(jnp.add, sums, (nll, tokens, grads)), None

        if passes == 1:
            first = jax.tree.map(lambda x: x[0], (batch, keys))
            (nll, tokens), grads = value_and_grad(trainable, fixed, *first)
        else:
            zeros = (jnp.zeros(()), jnp.zeros(()), jax.tree.map(jnp.zeros_like, trainable))
            (nll, tokens, grads), _ = jax.lax.scan(one_pass, zeros, (batch, keys))
        count = jnp.maximum(tokens, 1.0)
        grads = jax.tree.map(lambda g: (g / count).astype(g.dtype), grads)
        metrics = {"loss": nll / count, "grad_norm": optax.tree.norm(grads)}
        if rank_schedule is not None:
            adapted = fixed.replace(trainable=trainable)
            return *rank_schedule.update(optimizer, grads, opt_state, adapted, step - 1), metrics
        updates, opt_state = optimizer.update(grads, opt_state, trainable)
        return optax.apply_updates(trainable, updates), opt_state, metrics

    out_shardings = None if shardings is None else (*shardings, None)
    return jax.jit(step_fn, donate_argnums=(0, 1), out_shardings=out_shardings)


class StopSignals:
    """While active, the first SIGINT or SIGTERM is only noted; the second one acts as usual.

    Several processes must stop at the same step, wherever the signal arrives: it counts, as `agreed`, when all of them
    know of it.
    """

    def __init__(self):
        self.received: int | None = None
        self.agreed: int | None = None
        self._asked: Any = 0
        self._previous: dict[int, Any] = {}

    def __enter__(self):
        for signum in (signal.SIGINT, signal.SIGTERM):
            self._previous[signum] = signal.signal(signum, self._note)
        return self

    def __exit__(self, *_):
        self._restore()

    def _restore(self):
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)
        self._previous = {}

    def _note(self, signum, frame):
        self.received = signum
        self._restore()

    def look(self) -> int | None:
        """The signal that has come, if one has; to be called at the end of every step.

        Of several processes it tells what was known at the step before: that number is there when the step is, and
        nobody waits for it.
        """
        asked, self._asked = self._asked, distributed.largest(self.received or 0)
        self.agreed = int(self._asked if jax.process_count() == 1 else asked) or self.agreed
        return self.agreed

    def poll(self) -> None:
        """Raise `StopRequested` when a signal has come."""
        self.agreed = int(distributed.largest(self.received or 0)) or self.agreed
        if self.agreed:
            raise StopRequested


@dataclasses.dataclass
class TrainState:
    """What training changes. Everything else of a run follows from its configuration."""

    step: int
    trainable: PyTree
    opt_state: PyTree
    key: jax.Array

    def arrays(self) -> dict[str, PyTree]:
        """The part of it that a checkpoint stores as arrays."""
        return {"trainable": self.trainable, "opt_state": self.opt_state, "key": jax.random.key_data(self.key)}

    def adapted(self, start: PyTree) -> PyTree:
        """The adapters as they are now; `start` is the Adapted that training started from."""
        return ranks.present(start.replace(trainable=self.trainable), self.opt_state)

    @classmethod
    def from_arrays(cls, step: int, arrays: dict[str, PyTree]) -> "TrainState":
        return cls(step, arrays["trainable"], arrays["opt_state"], jax.random.wrap_key_data(arrays["key"]))


class StopRequested(Exception):
    """Raised by `StopSignals.poll` to leave a long computation that has nothing to save."""


@dataclasses.dataclass
class Loop:
    """Everything training needs besides its state."""

    fixed: PyTree  # Adapted with an empty trainable part
    train_step: Callable
    task: Any  # of jlora.train.tasks
    evaluate: Callable[[TrainState], dict[str, Any]]  # held-out figures; polls `signals`
    schedule: optax.Schedule
    batches: Iterator[dict[str, np.ndarray]]  # of data.batches
    accumulation: int
    steps: int
    log_every: int
    eval_every: int
    checkpoint_every: int
    run: RunDirectory
    checkpoints: Checkpoints
    reporter: Reporter
    signals: StopSignals

    def train(self, state: TrainState) -> TrainState:
        """Take the remaining steps. Ends with a checkpoint of the last step, finished on disk."""
        if state.step < self.steps:
            self.reporter.say("compiling the training step")
        self._window: list[tuple[int, PyTree]] = []  # steps taken whose metrics were not looked at yet
        self._clock: float | None = None  # set after the first step: compiling it is no measure of speed
        try:
            while state.step < self.steps:
                state = self._advance(state)
            self.checkpoints.wait()
        finally:
            self.reporter.stop()
        return state

    def _advance(self, state: TrainState) -> TrainState:
        step = state.step + 1
        parts = [next(self.batches) for _ in range(self.accumulation)]
        batch = self.task.trim(jax.tree.map(lambda *arrays: np.stack(arrays), *parts))
        trainable, opt_state, metrics = self.train_step(
            state.trainable, state.opt_state, self.fixed, self.task.place(batch, 1), state.key, np.int32(step)
        )
        state = TrainState(step, trainable, opt_state, state.key)
        if self._clock is None:
            jax.block_until_ready(metrics)
            self.reporter.start(step, self.steps)
            self._clock, self._units = time.monotonic(), 0
        else:
            self._units += self.task.size(batch)
        self._window.append((step, metrics))
        # Look one step back, so that the device is never idle while the host waits for a number.
        self._check_finite(self._window[-2:-1])
        self.reporter.tick(step)

        last = step == self.steps
        evaluating = last or _due(step, self.eval_every)
        saving = last or _due(step, self.checkpoint_every)
        stopping = self.signals.look()
        if evaluating or saving or stopping or _due(step, self.log_every):
            self._log()
        eval_nll = self._evaluate(state) if evaluating else None
        stopping = self.signals.agreed  # it may have come during the evaluation
        if saving or stopping:
            metric = eval_nll if eval_nll is not None and math.isfinite(eval_nll) else None
            self.checkpoints.save(step, state.arrays(), self.batches.get_state(), metric)
        if stopping:
            self.checkpoints.wait()
            raise Interrupted(stopping, step)
        if evaluating or saving:
            self._clock = time.monotonic()  # tokens/s is that of training alone
        return state

    def _log(self) -> None:
        """Wait for the steps taken since the last call, check them, write down their mean."""
        self._check_finite(self._window)
        seconds = time.monotonic() - self._clock
        losses, norms = ([float(m[name]) for _, m in self._window] for name in ("loss", "grad_norm"))
        step = self._window[-1][0]
        loss, speed = sum(losses) / len(losses), self._units / seconds if self._units else None
        record = {
            "step": step,
            "loss": loss,
            "grad_norm": sum(norms) / len(norms),
            "learning_rate": float(self.schedule(step - 1)),
            f"{self.task.unit}_per_second": speed and round(speed, 1),
        }
        self.run.append_metrics(record)
        self.reporter.update(step, loss, speed)
        self._window, self._units, self._clock = [], 0, time.monotonic()

    def _check_finite(self, window: list[tuple[int, PyTree]]) -> None:
        for step, metrics in window:
            for name in ("loss", "grad_norm"):
                value = float(metrics[name])
                if not math.isfinite(value):
                    kept = self.checkpoints.steps()
                    rest = f"the checkpoint of step {kept[-1]} is kept" if kept else "there was no checkpoint yet"
                    what = "loss" if name == "loss" else "gradient norm"
                    raise RunError(f"{what} is {value} at step {step}: stopped, {rest}. Try a lower --learning-rate.")

    def _evaluate(self, state: TrainState) -> float | None:
        try:
            figures = self.evaluate(state)
        except StopRequested:
            return None
        self.run.append_metrics({"step": state.step, **figures})
        self.reporter.say(f"step {state.step}: {figures_line(figures)}")
        return figures[self.task.loss_key]


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
