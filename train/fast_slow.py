r"""Two adapters that chase each other over preferences, and one out of the winners of several domains.

Online DPO: Online Direct Preference Optimization with Fast-Slow Chasing. Qi et al., 2024.
https://arxiv.org/abs/2406.05534

    l(m) = -mean log sigmoid(h_m),    l_FS = -mean log sigmoid(h_F - h_S),
    L_F = l(F) + alpha l_FS,    L_S = l(S) - alpha l_FS

h is the margin of DPO (`jlora.train.tasks.dpo`): of the fast adapter F and of the slow one S, two of the same kind on
one frozen base, which differ in their learning rates. In l_FS each sees the other's margins as constants, or the two
terms would cancel: F is drawn ahead of S, and S after F, with gradients of the size of alpha where those of DPO have
faded. Every `interval` steps the one of smaller l becomes the fast one. For domains one after another (COFS-DPO), each
leaves its fast adapter behind, and what is used is

    W + sum_k c_k s A_k B_k,    sum c = 1

with the c that do best on a few kept preferences of all of them.

**What is not known to be the paper's**: no code of the authors was found, and the losses are from summaries and from
one reimplementation for images. The form of L_F and L_S, alpha, how roles change hands, and how c is found are such;
that h_F - h_S is clipped is ours: without a bound L_S falls without end, as S runs ahead of F.

When to use it: preferences that arrive as a stream, where DPO alone saturates. Both adapters go through the model in
one pass, the base's weights are there once, the reference's pass is shared.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, PyTree

import jlora
from jlora.methods import LoRA
from jlora.train.call import Call
from jlora.train.tasks.base import Batch
from jlora.train.tasks.dpo import DPO, dpo_loss


class FastSlow(NamedTuple):
    """Both adapters, and what is known of them. Leaves of trees are stacked [2, ...]."""

    trainable: PyTree
    opt_state: PyTree
    fast: Int[Array, ""]  # which of the two is the fast one
    losses: Float[Array, " 2"]  # l, summed over the steps since roles were given out
    count: Int[Array, ""]  # steps taken

    def module(self, which: int | Array) -> PyTree:
        """The trainable parameters of one: `state.module(state.fast)`."""
        return jax.tree.map(lambda leaf: leaf[which], self.trainable)


def start(trainable: PyTree, direction: optax.GradientTransformation) -> FastSlow:
    """Two equal adapters, the first of them the fast one."""
    both = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), trainable)
    zero = lambda: jnp.zeros((), jnp.int32)  # each a buffer of its own: the step donates them
    return FastSlow(both, jax.vmap(direction.init)(both), zero(), jnp.zeros(2), zero())


def chasing_losses(
    margins: Float[Array, "2 b"], fast: Int[Array, ""], alpha: float, smoothing: float = 0.0, limit: float = 10.0
) -> tuple[Float[Array, "2 b"], Float[Array, "2 b"]]:
    """(L, l) of both adapters for each pair. Of L, each one's gradient is by its own margin alone."""
    sign = jnp.where(jnp.arange(2) == fast, 1.0, -1.0)[:, None]
    ahead = jnp.clip(sign * (margins - jax.lax.stop_gradient(margins[::-1])), -limit, limit)  # h_F - h_S, twice
    own = dpo_loss(margins, smoothing)
    return own - sign * alpha * jax.nn.log_sigmoid(ahead), own


def make_step(
    apply: Callable,
    task: DPO,
    direction: optax.GradientTransformation,
    rates: tuple[float, float],
    alpha: float = 0.1,
    limit: float = 10.0,
    interval: int = 50,
) -> Callable:
    """The compiled step: (state, fixed, batch, key) -> (state, metrics).

    Args:
      apply: the lifted model.
      task: has beta and what else belongs to DPO.
      direction: of updates, without the learning rate: `optax.scale_by_adam()`.
      rates: the learning rates of the fast and of the slow adapter.
      alpha: weight of l_FS; at 0 they are two runs of DPO.
      limit: of h_F - h_S, beyond which l_FS has no gradient.
      interval: steps after which roles are given out anew.

    `fixed` is the Adapted without its trainable part, `batch` one of `jlora.train.data.batches` of the task's rows. An
    adapter whose gradient is not finite stays as it is.
    """

    def losses(both: PyTree, fixed: jlora.Adapted, batch: Batch, keys: Array, fast: Array):
        def rewards(trainable: PyTree, key: Array) -> tuple[Array, Array]:
            return task.rewards(Call(apply, fixed.bind(trainable, context={"key": key}), fixed.base), batch)

        found, (pairs, _) = jax.vmap(rewards)(both, keys)
        margins = found[..., 0] - found[..., 1]
        mean = lambda each: jnp.sum(each * pairs, axis=1) / jnp.maximum(jnp.sum(pairs), 1.0)
        chasing, own = map(mean, chasing_losses(margins, fast, alpha, task.smoothing, limit))
        return jnp.sum(chasing), (own, mean(margins))

    def step(state: FastSlow, fixed: jlora.Adapted, batch: Batch, key: Array) -> tuple[FastSlow, dict[str, Array]]:
        keys = jax.random.split(jax.random.fold_in(key, state.count))
        grads, (own, margins) = jax.grad(losses, has_aux=True)(state.trainable, fixed, batch, keys, state.fast)
        of_role = jnp.where(jnp.arange(2) == state.fast, *rates)

        def move(trainable: PyTree, opt_state: PyTree, grads: PyTree, rate: Array) -> tuple[PyTree, PyTree]:
            updates, after = direction.update(grads, opt_state, trainable)
            moved = optax.apply_updates(trainable, optax.tree.scale(-rate, updates))
            return _where(jnp.isfinite(optax.tree.norm(grads)), (moved, after), (trainable, opt_state))

        trainable, opt_state = jax.vmap(move)(state.trainable, state.opt_state, grads, of_role)
        sums, count = state.losses + own, state.count + 1
        again = count % interval == 0
        fast = jnp.where(again, jnp.argmin(sums).astype(jnp.int32), state.fast)
        state = FastSlow(trainable, opt_state, fast, jnp.where(again, 0.0, sums), count)
        return state, {"loss": own, "reward_margin": margins, "fast": fast}

    return jax.jit(step, donate_argnums=0)


def combine(
    adapted: jlora.Adapted, modules: Sequence[PyTree], coefficients: Sequence[float] | Float[Array, " k"]
) -> jlora.Adapted:
    """LoRA of the sum of k changes, each times its coefficient, exactly: factors stand side by side, of rank k r.

    Args:
      adapted: of the modules' kind.
      modules: trainable parameters, like `adapted.trainable`: those of `FastSlow.module`.
      coefficients: c. May be traced.
    """
    alike = lambda method: type(method) is LoRA and not (method.subtracts or method.varies)
    others = [path for path, site in adapted.sites.items() if not alike(site.method)]
    if others:
        raise ValueError(
            f"combine is for leaves with plain LoRA, that starts at zero and has one rank, and {others[0]!r} has "
            f"{adapted.sites[others[0]].method}."
        )
    if len(modules) != len(coefficients):
        raise ValueError(f"combine got {len(modules)} modules and {len(coefficients)} coefficients.")

    def side_by_side(*pairs: jlora.Factors) -> jlora.Factors:
        a = jnp.concatenate([c * pair.a for c, pair in zip(coefficients, pairs, strict=True)], axis=-1)
        return jlora.Factors(a, jnp.concatenate([pair.b for pair in pairs], axis=-2), pairs[0].scale)

    is_pair = lambda node: isinstance(node, jlora.Factors)
    trainable = jax.tree.map(side_by_side, *modules, is_leaf=is_pair)
    sites = {path: _wider(site, len(modules)) for path, site in adapted.sites.items()}
    return adapted.replace(trainable=trainable, _sites=tuple(sites.items()))


def fit_coefficients(
    adapted: jlora.Adapted,
    modules: Sequence[PyTree],
    loss: Callable[[jlora.Adapted], Float[Array, ""]],
    steps: int = 100,
    rate: float = 0.1,
) -> Float[Array, " k"]:
    """The coefficients, positive and of sum 1, that make `loss(combine(adapted, modules, c))` small: by Adam on their
    logits, from equal ones. `loss` is over the preferences that were kept of each domain."""
    tx = optax.adam(rate)

    @jax.jit
    def fit(modules: Sequence[PyTree], base: PyTree) -> Array:
        combined = lambda logits: combine(adapted.replace(base=base), modules, jax.nn.softmax(logits))

        def step(carry: tuple[Array, Any], _: None) -> tuple[tuple[Array, Any], None]:
            logits, state = carry
            updates, state = tx.update(jax.grad(lambda logits: loss(combined(logits)))(logits), state)
            return (optax.apply_updates(logits, updates), state), None

        logits = jnp.zeros(len(modules))
        (logits, _), _ = jax.lax.scan(step, (logits, tx.init(logits)), None, length=steps)
        return jax.nn.softmax(logits)

    return fit(tuple(modules), adapted.base)


def _wider(site: Any, times: int) -> Any:
    method = site.method
    share = times**0.5 if method.rslora else times
    return dataclasses.replace(
        site, method=dataclasses.replace(method, rank=times * method.rank, alpha=share * method.alpha)
    )


def _where(condition: Bool[Array, ""], new: PyTree, old: PyTree) -> PyTree:
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), new, old)
