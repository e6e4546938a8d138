r"""Ranks by a learned policy: the rewards of AirLLM and of DR-RL, and a small policy gradient.

AirLLM: Diffusion Policy-based Adaptive LoRA for Remote Fine-Tuning of LLM over the Air. Yang et al., 2025.
https://arxiv.org/abs/2507.11515
Dynamic Rank Reinforcement Learning for Adaptive Low-Rank Multi-Head Self Attention in Large Language Models (DR-RL).
Erden, 2025.

For ``jlora.AdaLoRA``: of every matrix the first n terms are in use, n one of ``options``. The policy is one perceptron
for all matrices, from what is known of a matrix (its rank, its shares of all sensitivity |e dL/de| and of all e^2, and
``signals`` from outside, the state of a channel, say) to a probability for each option. Every ``every`` steps it learns
from the mean reward since its last choice, r, and chooses anew (REINFORCE, with a running mean as the baseline):

.. math::  \nabla_\theta \Bigl[(r - \bar r) \sum_m \ln \pi_\theta(n_m) + c \sum_m H(\pi_\theta(\cdot_m))\Bigr]

After ``total_steps`` it takes what is most probable, for good.

* The reward is the caller's: ``update(..., reward=...)``. ``airllm_reward`` is minus the task's loss and a tenth of
  the cost of sending what is in use, (32 bits for each of sum n (in + out + 1) numbers) / (capacity * latency), where
  capacity = bandwidth log2(1 + SNR); above a cost of 1 it is -10 times the cost. ``dr_rl_reward`` is the cosine of full
  and cut outputs, less 0.05 for each 10^9 FLOPs, less 0.1 times the perturbation: ``perturbation``, the root of the
  squares of the singular values between two ranks, which times the norm of V bounds what a change of rank does to the
  output of attention. ``safe`` masks the options for which that is too much.
* What is not here is the papers' machinery: AirLLM's PPO with a diffusion model that refines its actions, DR-RL's
  transformer. The rewards were taken from a description of the authors' code, and the policy is derived.

When to use it: where the price of a rank changes while one trains. Against a fixed budget, ``adalora`` needs no trials.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree

from jlora import paths
from jlora.adapt import Adapted
from jlora.methods.adalora import AdaLoRA
from jlora.methods.base import require
from jlora.rank.allocator import Allocator, costs_of, params_of, sites_of, with_params

_OWN = 3  # what is known of a matrix, beside the signals


class PolicyState(NamedTuple):
    """What the allocator remembers."""

    weights: dict[str, Array]  # of the perceptron
    opt_state: PyTree
    key: PRNGKeyArray
    choice: dict[str, Int[Array, "*stack"]]  # indices of options
    seen: dict[str, Float[Array, "*stack f"]]  # what it was made from
    safe: dict[str, Bool[Array, "*stack options"]]  # and among which
    chosen: Bool[Array, ""]  # whether it was made at all: the first one, of the highest rank, was not
    baseline: Float[Array, ""]
    rewards: Float[Array, " 2"]  # the sum since the choice, and of how many


def policy(
    options: Sequence[int],
    *,
    total_steps: int,
    every: int = 1,
    signals: int = 0,
    learning_rate: float = 1e-2,
    entropy: float = 1e-2,
    decay: float = 0.9,
    width: int = 32,
    key: PRNGKeyArray,
) -> Allocator:
    """Ranks of ``jlora.AdaLoRA`` adapters, chosen by a policy that learns. See the top of this file.

    >>> ranks = jlora.rank.policy((1, 2, 4, 8), total_steps=1000, every=5, key=jax.random.key(0))
    >>> state, adapted = ranks.update(state, adapted, grads, step, reward=-loss - 1e-5 * jlora.rank.in_use(adapted))

    Args:
      options: the ranks to choose from, rising, within the methods' own.
      total_steps: after these the choice is final.
      every: steps from one choice to the next.
      signals: how many numbers ``update`` is given as ``signals``.
      learning_rate: of the policy, by Adam.
      entropy: c, what keeps it trying.
      decay: of the baseline.
      width: of the perceptron's one hidden layer.
      key: for its start, and for choices.
    """
    options = tuple(options)
    require(
        len(options) > 1 and list(options) == sorted(set(options)) and options[0] >= 1,
        f"policy({options}): at least two ranks are wanted, from 1, rising.",
    )
    require(min(total_steps, every) >= 1, f"policy(total_steps={total_steps}, every={every}): at least 1 is wanted.")
    tx = optax.adam(learning_rate)

    def logits(weights: dict[str, Array], seen: Array, safe: Array) -> Float[Array, "*stack options"]:
        out = jnp.tanh(seen @ weights["into"] + weights["bias"]) @ weights["out"]
        return jnp.where(safe, out, -1e9)

    def look(choice: dict[str, Array], adapted: Adapted, grads: PyTree, given: Array) -> dict[str, Array]:
        """What is known of every matrix."""
        own = {path: adapted.trainable[path]["e"] for path in choice}
        size = _shares({path: jnp.square(e).sum(-1) for path, e in own.items()})
        matter = _shares({path: jnp.abs(e * grads[path]["e"]).sum(-1) for path, e in own.items()})
        out = {}
        for path, index in choice.items():
            rank = jnp.asarray(options, jnp.float32)[index] / options[-1]
            known = jnp.stack([rank, size[path], matter[path]], -1).astype(jnp.float32)
            out[path] = jnp.concatenate([known, jnp.broadcast_to(given, (*index.shape, signals))], -1)
        return out

    def masked(adapted: Adapted, choice: dict[str, Array]) -> Adapted:
        changed = {}
        for path, index in choice.items():
            p = params_of(adapted, path)
            live = jnp.arange(p.frozen["mask"].shape[-1]) < jnp.asarray(options)[index][..., None]
            changed[path] = p._replace(frozen={"mask": live.astype(p.frozen["mask"].dtype)})
        return with_params(adapted, changed)

    def init(adapted: Adapted) -> tuple[PolicyState, Adapted]:
        sites = sites_of(adapted, AdaLoRA, "policy")
        for path, site in sites.items():
            require(
                site.method.rank >= options[-1],
                f"{path!r}: an option has rank {options[-1]}, and the adapter {site.method.rank}.",
            )
        into, out, own = jax.random.split(key, 3)
        normal = lambda key, n, m: jax.random.normal(key, (n, m), jnp.float32) / n**0.5
        zeros = lambda *shape: jnp.zeros(shape, jnp.float32)
        features, last = _OWN + signals, len(options) - 1
        weights = {
            "into": normal(into, features, width),
            "bias": zeros(width),
            "out": 0.1 * normal(out, width, last + 1),
        }
        stacks = {path: site.canonical_shape[0] for path, site in sites.items()}
        choice = {path: jnp.full(stack, last) for path, stack in stacks.items()}
        seen = {path: zeros(*stack, features) for path, stack in stacks.items()}
        safe = {path: jnp.ones((*stack, last + 1), bool) for path, stack in stacks.items()}
        state = PolicyState(weights, tx.init(weights), own, choice, seen, safe, jnp.asarray(False), zeros(), zeros(2))
        return state, masked(adapted, choice)

    def update(
        state: PolicyState,
        adapted: Adapted,
        grads: PyTree,
        step: Any,
        *,
        reward: Array | float,
        signals: Sequence[Array | float] = (),
        safe: Mapping[str, Bool[Array, "*stack options"]] | None = None,
    ) -> tuple[PolicyState, Adapted]:
        step = jnp.asarray(step)
        rewards = state.rewards + jnp.stack([jnp.asarray(reward, jnp.float32), 1.0])
        mean = rewards[0] / rewards[1]

        def objective(weights: dict[str, Array]) -> Array:
            total = 0.0
            for path, seen in state.seen.items():
                log = jax.nn.log_softmax(logits(weights, seen, state.safe[path]))
                chosen = jnp.take_along_axis(log, state.choice[path][..., None], -1)
                total += (mean - state.baseline) * chosen.sum() - entropy * (jnp.exp(log) * log).sum()
            return -total

        due, over = (step % every == 0) & (step < total_steps), step == total_steps
        pick = lambda condition, a, b: jax.tree.map(lambda x, y: jnp.where(condition, x, y), a, b)
        updates, opt_state = tx.update(jax.grad(objective)(state.weights), state.opt_state)
        learnt = (optax.apply_updates(state.weights, updates), opt_state, decay * state.baseline + (1 - decay) * mean)
        weights, opt_state, baseline = pick(
            due & state.chosen, learnt, (state.weights, state.opt_state, state.baseline)
        )
        safe = {path: jnp.asarray(safe[path]) for path in state.safe} if safe is not None else state.safe
        seen = look(state.choice, adapted, grads, jnp.asarray(signals, jnp.float32))
        choice = {}
        for path, old in state.choice.items():
            values = logits(weights, seen[path], safe[path])
            drawn = jax.random.categorical(paths.fold_path(jax.random.fold_in(state.key, step), path), values)
            choice[path] = jnp.where(over, jnp.argmax(values, -1), jnp.where(due, drawn, old))
        seen, safe = pick(due, (seen, safe), (state.seen, state.safe))
        left = jnp.where(due, 0.0, rewards)
        new = PolicyState(weights, opt_state, state.key, choice, seen, safe, state.chosen | due, baseline, left)
        return new, masked(adapted, choice)

    return Allocator(init, update)


def _shares(each: dict[str, Float[Array, "*stack"]]) -> dict[str, Float[Array, "*stack"]]:
    """Of all matrices together."""
    total = sum(own.sum() for own in each.values())
    return {path: own / jnp.where(total > 0, total, 1.0) for path, own in each.items()}


def in_use(adapted: Adapted) -> Float[Array, ""]:
    """How many numbers the terms of ``AdaLoRA`` adapters in use hold: n (in + out + 1) a matrix."""
    sites = sites_of(adapted, AdaLoRA, "in_use")
    costs = costs_of(sites)
    return sum((adapted.frozen[path]["mask"] != 0).sum() * float(costs[path]) for path in sites)


def airllm_reward(
    loss: Array | float, numbers: Array | float, *, bandwidth: float, snr: Array | float, latency: float
) -> Float[Array, ""]:
    """AirLLM's reward of a step. ``numbers`` are sent, ``in_use(adapted)``, of 32 bits each; bandwidth in Hz, ``snr`` a
    ratio and not in decibel, latency in seconds."""
    cost = 32.0 * numbers / (bandwidth * jnp.log2(1.0 + snr) * latency)
    return jnp.where(cost > 1.0, -10.0 * cost, -loss - 0.1 * cost)


def dr_rl_reward(
    full: Float[Array, ...], low: Float[Array, ...], flops: Array | float, change: Array | float,
    *, weights: tuple[float, float, float] = (1.0, 0.05, 0.1),
) -> Float[Array, ""]:  # fmt: skip
    """DR-RL's reward: how alike the outputs at full and at low rank are, less what that costs and what it perturbs.
    ``change`` is ``perturbation(s, before, after)``."""
    cosine = jnp.sum(full * low) / jnp.maximum(jnp.linalg.norm(full) * jnp.linalg.norm(low), 1e-12)
    return weights[0] * cosine - weights[1] * flops / 1e9 - weights[2] * change


def perturbation(s: Float[Array, "*n k"], before: Array | int, after: Array | int) -> Float[Array, "*n"]:
    """The Frobenius norm of what changes when a matrix of singular values s, descending, is cut at another rank."""
    at = jnp.arange(s.shape[-1])
    low, high = jnp.minimum(before, after), jnp.maximum(before, after)
    return jnp.sqrt(jnp.sum(jnp.where((at >= low) & (at < high), jnp.square(s), 0.0), axis=-1))
