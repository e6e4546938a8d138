r"""LISA: the optimizer of a few layers at a time, drawn anew every so many steps.

LISA: Layerwise Importance Sampling for Memory-Efficient Large Language Model Fine-Tuning. Pan et al., 2024.
https://arxiv.org/abs/2403.17919
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from jlora import paths
from jlora.optim.moments import fields
from jlora.optim.projection import Pattern
from jlora.optim.quantized import is_blocks

LAYERS = "**/{layer,layers}/**"


class LisaState(NamedTuple):
    """The state of ``lisa``. Where a leaf belongs to the other part, there is ``optax.MaskedNode()``."""

    count: Int[Array, ""]  # steps taken
    active: Int[Array, " gamma"]  # the layers that move
    layers: PyTree  # the inner state of those: [gamma, ...]; of all, [L, ...], where it persists
    rest: PyTree  # of every other leaf


def lisa(
    inner: optax.GradientTransformation,
    active: int = 2,
    *,
    layers: Pattern = LAYERS,
    interval: int = 20,
    rest: optax.GradientTransformation | None = None,
    weights: Sequence[float] | None = None,
    moments: str = "reset",
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""An optimizer that moves gamma of L stacked layers, others every T steps, and always what is outside of them.

    At steps 0, T, 2T, ... the layers I_t are drawn without replacement, each with a probability that goes with its
    weight p (by adding Gumbel noise to log p and taking the gamma largest). Then

    .. math::  \Delta W_l = \mathrm{inner}(G)_l \;\; (l \in I_t), \qquad \Delta W_l = 0 \;\; (l \notin I_t)

    with neither decay nor momentum where a layer does not move. State: the inner one of gamma / L of the layers, and of
    all the rest. Shapes do not change and nothing is recompiled.

    For fine-tuning all of a model where the moments do not fit and a low-rank update is not wanted. The gradient of all
    layers is still formed; ``layerwise`` forms that of one at a time.

    Args:
      inner: the optimizer. Of the layers it sees trees of arrays [gamma, ...].
      active: gamma; at L it is the inner optimizer.
      layers: a pattern for the leaves that are stacks [L, ...] of the layers, all of the same L.
      interval: T.
      rest: the optimizer of what is not in the layers: embedding, head, last norm. None: the inner one too.
      weights: p, L numbers of any sum. None: all the same.
      moments: "reset" begins the inner state of layers anew when they are drawn, with its count of steps, but not the
        counts of schedules; "persist" keeps every layer's moments, L layers of them, and goes on where they were.
      seed: of the drawing, which follows from it and the step: all hosts and a run that is resumed draw the same.

    >>> tx = jlora.optim.lisa(optax.adamw(2e-5), active=2, layers="layers/**")

    The authors' callback was read. There, moments persist, as memory allows, since torch skips what has no gradient;
    its step counts persist with them, where here the counts of "persist" go on in every step.
    """
    for name, value in (("active", active), ("interval", interval)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(
                f"{name} is a whole number of at least 1, known before tracing; got {value!r}. Under "
                f'optax.inject_hyperparams, list it: static_args=("active", "interval", "seed").'
            )
    if moments not in ("reset", "persist"):
        raise ValueError(f'moments={moments!r}: "reset" or "persist" is wanted.')
    inner = optax.with_extra_args_support(inner)
    other = inner if rest is None else optax.with_extra_args_support(rest)
    p = None if weights is None else np.asarray(weights, np.float64)
    if p is not None and not (p.ndim == 1 and np.all(np.isfinite(p)) and np.all(p >= 0) and (p > 0).sum() >= active):
        raise ValueError(f"weights: at least {active} positive numbers and no negative one are wanted, got {weights}.")

    def parts(tree: PyTree) -> tuple[PyTree, PyTree, int]:
        """The stacks, the rest, and L."""
        leaves, treedef = jax.tree_util.tree_flatten_with_path(tree)
        inside = [paths.matches(layers, paths.path_of(keys), leaf) for keys, leaf in leaves]
        only = lambda wanted: treedef.unflatten(
            [leaf if is_in == wanted else optax.MaskedNode() for is_in, (_, leaf) in zip(inside, leaves, strict=True)]
        )
        sizes = {jnp.shape(leaf)[:1] for is_in, (_, leaf) in zip(inside, leaves, strict=True) if is_in}
        if leaves and (len(sizes) != 1 or sizes == {()}):
            found = [f"{paths.path_of(keys)} {jnp.shape(leaf)}" for keys, leaf in leaves]
            raise ValueError(
                f"lisa wants the layers stacked, as leaves [L, ...] of one L; {paths.describe(layers)} matches leaves "
                f"that begin with {sorted(sizes) or 'nothing: none'}. Leaves: {', '.join(found[:8])}."
            )
        n = sizes.pop()[0] if sizes else 0
        if leaves and (active > n or (p is not None and len(p) != n)):
            wanted = f"active is {active}" if active > n else f"there are {len(p)} weights"
            raise ValueError(f"{wanted}, of {n} layers.")
        return only(True), only(False), n

    def draw(n: int, count: Array) -> Int[Array, " gamma"]:
        key = jax.random.fold_in(jax.random.key(seed), count // interval)
        return drawn(key, np.ones(n) if p is None else p, active) if n else jnp.zeros(active, jnp.int32)

    def init(params: PyTree) -> LisaState:
        stacks, others, n = parts(params)
        if moments == "reset":
            stacks = jax.tree.map(lambda x: x[:active], stacks)
        count, state = jnp.zeros((), jnp.int32), inner.init(stacks)
        if moments == "persist" and any(map(is_blocks, jax.tree.leaves(state, is_leaf=is_blocks))):
            raise ValueError('moments="persist" does not go with quantized_state: moments="reset" is wanted.')
        return LisaState(count, draw(n, count), state, other.init(others))

    def update(
        updates: PyTree, state: LisaState, params: PyTree | None = None, **extra_args: Any
    ) -> tuple[PyTree, LisaState]:
        stacks, others, n = parts(updates)
        given, given_others, _ = (None, None, n) if params is None else parts(params)
        chosen = draw(n, state.count)
        taken, w = (jax.tree.map(lambda x: _take(x, chosen), tree) for tree in (stacks, given))
        if moments == "reset":
            like = taken if w is None else w
            renewed = lambda: _renewed(inner, state.layers, inner.init(like))
            own = jax.lax.cond(state.count % interval == 0, renewed, lambda: state.layers)
            out, kept = inner.update(taken, own, w, **extra_args)
        else:
            of_layer = _in_fields(inner, n)
            own = jax.tree_util.tree_map_with_path(
                lambda keys, x: _take(x, chosen) if of_layer(keys, x) else x, state.layers
            )
            out, new = inner.update(taken, own, w, **extra_args)
            kept = jax.tree_util.tree_map_with_path(
                lambda keys, x, y: _put(x, y, chosen) if of_layer(keys, x) else y, state.layers, new
            )
        out = jax.tree.map(lambda x, u: _put(jnp.zeros_like(x), u, chosen), stacks, out)
        out_others, rest_state = other.update(others, state.rest, given_others, **extra_args)
        masked = lambda x: isinstance(x, optax.MaskedNode)
        whole = jax.tree.map(lambda a, b: b if masked(a) else a, out, out_others, is_leaf=masked)
        return whole, LisaState(optax.safe_increment(state.count), chosen, kept, rest_state)

    return optax.GradientTransformationExtraArgs(init, update)


def drawn(key: PRNGKeyArray, weights: Float[Array, " layers"], active: int) -> Int[Array, " active"]:
    """Without replacement, each next one with a probability that goes with its weight; in rising order."""
    logits = jnp.log(jnp.asarray(weights, jnp.float32))
    noisy = logits + jax.random.gumbel(key, logits.shape)
    return jnp.sort(jax.lax.top_k(noisy, active)[1]).astype(jnp.int32)


def _take(x: Array, index: Int[Array, " k"]) -> Array:
    """Rows of the first axis, one by one: that leaves the others sharded as they are."""
    return jnp.stack([jax.lax.dynamic_index_in_dim(x, i, 0, keepdims=False) for i in index])


def _put(x: Array, rows: Array, index: Int[Array, " k"]) -> Array:
    for row, i in zip(rows, index, strict=True):
        x = jax.lax.dynamic_update_index_in_dim(x, row.astype(x.dtype), i, 0)
    return x


def _renewed(inner: optax.GradientTransformation, old: PyTree, new: PyTree) -> PyTree:
    """The state with its moments, and the counts beside them, as at the start; other counts, of schedules, go on."""
    known = fields(inner)
    beside = {field[:-1] for field in known}
    own = lambda keys: keys[:-1] in beside or any(keys[: len(field)] == field for field in known)
    return jax.tree_util.tree_map_with_path(lambda keys, a, b: b.astype(a.dtype) if own(keys) else a, old, new)


def _in_fields(inner: optax.GradientTransformation, n: int) -> Callable[[tuple, Array], bool]:
    known = fields(inner)
    return lambda keys, x: x.shape[:1] == (n,) and any(keys[: len(field)] == field for field in known)
