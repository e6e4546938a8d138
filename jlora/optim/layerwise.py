r"""Steps that hold the gradient of one layer at a time.

For a model that is a scan over one block,

.. math::  x_0 = \mathrm{embed}(\theta), \qquad x_{l+1} = \mathrm{block}(W_l, x_l), \qquad
           \mathcal{L} = \mathrm{head}(\theta, x_L),

the backward pass goes from the last layer to the first, and layer l is updated as soon as its gradient is there:

.. math::  (G_l, \bar x_l) = \mathrm{vjp}(\mathrm{block})(\bar x_{l+1}), \qquad W_l \leftarrow W_l + \mathrm{inner}(G_l)

so that G_l is dropped before G_{l-1} is made. Kept are the inputs x_l of all layers; the inside of a block is computed
again, as by ``jax.checkpoint`` around it. This is the per-layer update of GaLore (https://arxiv.org/abs/2403.03507) and
of LOMO (https://arxiv.org/abs/2306.09782), which PyTorch does by hooks: with a projected state the gradient of all
layers is the largest thing left beside the weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree

from jlora import paths


class LayerwiseState(NamedTuple):
    """The states of all layers, every leaf [L, ...], counts too; and that of the other parameters."""

    layers: PyTree
    rest: PyTree


class Figures(NamedTuple):
    """What a step reports."""

    loss: Float[Array, ""]
    grad_norm: Float[Array, ""]  # of all parameters, before clipping


class Layerwise(NamedTuple):
    """``init(params) -> state`` and ``step(params, state, batch) -> (params, state, figures)``."""

    init: Callable[[PyTree], LayerwiseState]
    step: Callable[[PyTree, LayerwiseState, Any], tuple[PyTree, LayerwiseState, Figures]]


def layerwise(
    inner: optax.GradientTransformation,
    *,
    embed: Callable[[PyTree, Any], PyTree],
    block: Callable[[PyTree, PyTree, Any, Array], PyTree],
    head: Callable[[PyTree, PyTree, Any], Float[Array, ""]],
    layers: str = "layers",
    rest: optax.GradientTransformation | None = None,
    clip_norm: float | None = None,
) -> Layerwise:
    """A training step of any optax transformation, one layer at a time. It is the ordinary step, to rounding.

    Args:
      inner: the optimizer of the layers. It sees one layer, a tree without the leading axis: what it computes from
        several parameters together, it computes from those of one layer. ``optax.clip_by_global_norm`` in it clips the
        gradient of each layer.
      embed: ``(rest, batch) -> x``, where ``rest`` is the parameters with None in the place of the layers.
      block: ``(layer, x, batch, i) -> x``: one layer of the stack, its number i, the same type of x. What else it wants
        (positions, masks, frozen weights to be indexed by i) belongs in the batch; x is of floats.
      head: ``(rest, x, batch) -> loss``.
      layers: path of the subtree of ``params`` whose leaves are stacks [L, ...].
      rest: the optimizer of all else, ``inner`` if None.
      clip_norm: clip by the global norm. The norm is known when the last gradient is, and by then there are none left:
        so there is a second backward pass, which takes about twice as long. None: one pass; the norm is reported.

    Returns:
      A pair of functions. The step is to be compiled with its first two arguments donated: layers are replaced where
      they lie.

    >>> tx = jlora.optim.layerwise(optax.adamw(1e-3), embed=embed, block=block, head=head, layers="model/layers")
    >>> state = tx.init(params)
    >>> step = jax.jit(tx.step, donate_argnums=(0, 1))
    >>> params, state, figures = step(params, state, batch)

    Not to be had: gradients summed over several passes (``optax.MultiSteps`` keeps a whole one), and a skipped step
    when some gradient is not finite (``optax.apply_if_finite`` in ``inner`` skips layers).
    """
    inner = optax.with_extra_args_support(inner)
    other = inner if rest is None else optax.with_extra_args_support(rest)

    def init(params: PyTree) -> LayerwiseState:
        stack, others, _ = _split(params, layers)
        return LayerwiseState(jax.vmap(inner.init)(stack), other.init(others))

    def step(params: PyTree, state: LayerwiseState, batch: Any) -> tuple[PyTree, LayerwiseState, Figures]:
        stack, others, join = _split(params, layers)
        n = jax.tree.leaves(stack)[0].shape[0]
        x, back_embed = jax.vjp(lambda others: embed(others, batch), others)

        def forward(x: PyTree, at: tuple[PyTree, Array]) -> tuple[PyTree, PyTree]:
            return block(at[0], x, batch, at[1]), x

        x, inputs = jax.lax.scan(forward, x, (stack, jnp.arange(n)))
        loss, back_head = jax.vjp(lambda others, x: head(others, x, batch), others, x)
        of_head, last = back_head(jnp.ones_like(loss))

        def backward(visit: Callable, carry: PyTree) -> tuple[PyTree, PyTree]:
            """``carry = visit(carry, layer, i, gradient)`` from the last layer to the first, the stack being the first
            of what is carried; and the gradient of the rest."""

            def one(j: Array, at: tuple) -> tuple:
                (carry, dx), i = at, n - 1 - j
                layer = _at(carry[0], i)
                _, back = jax.vjp(lambda layer, x: block(layer, x, batch, i), layer, _at(inputs, i))
                g, dx = back(dx)
                return visit(carry, layer, i, g), dx

            carry, dx = jax.lax.fori_loop(0, n, one, (carry, last))
            return carry, jax.tree.map(jnp.add, of_head, *back_embed(dx))

        factor, zero = 1.0, jnp.zeros((), jnp.result_type(jnp.float32, *jax.tree.leaves(params)))
        if clip_norm is not None:
            square = lambda carry, layer, i, g: (carry[0], carry[1] + _square(g))
            (stack, total), g_rest = backward(square, (stack, zero))
            norm = jnp.sqrt(total + _square(g_rest))
            factor = clip_norm / jnp.maximum(norm, clip_norm)
        scaled = lambda g: jax.tree.map(lambda x: (x * factor).astype(x.dtype), g)

        def changed(g: PyTree, state: PyTree, layer: PyTree) -> tuple[PyTree, PyTree]:
            updates, state = inner.update(scaled(g), state, layer)
            return optax.apply_updates(layer, updates), state

        def change(carry: tuple, layer: PyTree, i: Array, g: PyTree) -> tuple:
            stack, states, total = carry
            # A condition that always holds: without it XLA reads a layer of the stacks again while it writes the next
            # array of it, for which it copies whole stacks in every iteration.
            new = jax.lax.cond(i >= 0, changed, lambda g, state, layer: (layer, state), g, _at(states, i), layer)
            return _put(stack, new[0], i), _put(states, new[1], i), total + _square(g)

        (stack, states, total), g_rest = backward(change, (stack, state.layers, zero))
        updates, rest_state = other.update(scaled(g_rest), state.rest, others)
        figures = Figures(loss, jnp.sqrt(total + _square(g_rest)))
        return join(stack, optax.apply_updates(others, updates)), LayerwiseState(states, rest_state), figures

    return Layerwise(init, step)


def _split(params: PyTree, at: str) -> tuple[PyTree, PyTree, Callable[[PyTree, PyTree], PyTree]]:
    """The subtree at a path; the tree with None there; and how they are put together again."""
    here = lambda keys, _: paths.path_of(keys) == at
    leaves, treedef = jax.tree_util.tree_flatten_with_path(params, is_leaf=here, is_leaf_takes_path=True)
    names = [paths.path_of(keys) for keys, _ in leaves]
    if at not in names:
        raise ValueError(f"layers={at!r} is no path of the parameters. Nearest: {paths.nearest(at, names)}.")
    place = names.index(at)
    stack = leaves[place][1]
    sizes = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(stack)}
    if len(sizes) != 1 or sizes == {()}:
        raise ValueError(f"The leaves of {at!r} are to be stacks [L, ...] of one L; they begin with {sorted(sizes)}.")
    only = treedef.unflatten([None if i == place else leaf for i, (_, leaf) in enumerate(leaves)])

    def join(stack: PyTree, rest: PyTree) -> PyTree:
        others = jax.tree.leaves(rest)
        return treedef.unflatten([*others[:place], stack, *others[place:]])

    return stack, only, join


def _at(tree: PyTree, i: Array) -> PyTree:
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, 0, keepdims=False), tree)


def _put(tree: PyTree, row: PyTree, i: Array) -> PyTree:
    return jax.tree.map(lambda x, y: jax.lax.dynamic_update_index_in_dim(x, y.astype(x.dtype), i, 0), tree, row)


def _square(tree: PyTree) -> Float[Array, ""]:
    wide = lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return sum(jnp.sum(jnp.square(wide(x))) for x in jax.tree.leaves(tree))
