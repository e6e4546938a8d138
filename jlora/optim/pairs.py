r"""Walking over the pairs of factors in a tree, for optimizers that treat the two factors of a pair together.

A pair is a node ``jlora.Factors``: that of LoRA itself, one of several in a dict, or one beside a magnitude, stacked or
not. Whatever the tree is made of otherwise, a rule sees one pair at a time, both factors tall and all stack axes in
front, as a ``Pair``:

.. math::  W = W_0 + s\,a\,b^\top, \qquad g_a = s\,G\,b, \qquad g_b = s\,G^\top a

a [*stack, in, r] is A, b [*stack, out, r] is the transpose of B, and G [*stack, in, out] the gradient of the loss by W,
which nobody forms. The two factors are then each other's mirror image, and a rule is written once. G exists in this
sense wherever the loss depends on the factors by their product alone: for LoRA, DoRA and most others, with dropout too;
not for SoRA, whose gate stands between them, nor where one factor is also used elsewhere.

Everything is computed in at least float32 at the highest matmul precision. On meshes with explicit sharding the long
axes stay where they are, the r x r matrices are whole on every device, and what comes out lies as what went in.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, PyTree

from jlora.factors import Factors

_PRECISION = jax.lax.Precision.HIGHEST


class Pair(NamedTuple):
    """A pair and its gradients as a rule sees them."""

    a: Float[Array, "*stack in r"]
    b: Float[Array, "*stack out r"]
    grad_a: Float[Array, "*stack in r"]
    grad_b: Float[Array, "*stack out r"]
    scale: float


class Tall(NamedTuple):
    """Something that is shaped as the factors of a pair are, as a rule sees it."""

    a: Float[Array, "*stack in r"]
    b: Float[Array, "*stack out r"]


def is_pair(node: Any) -> bool:
    return isinstance(node, Factors)


def roles(params: PyTree) -> PyTree:
    """The labels "a", "b" and "other", in the shape of a tree: for ``optax.partition`` and masks.

    >>> optax.partition({"a": optax.adamw(1e-4), "b": optax.adamw(1e-3), "other": optax.sgd(0.1)}, roles)
    """
    label = lambda node: Factors("a", "b", node.scale) if is_pair(node) else "other"
    return jax.tree.map(label, params, is_leaf=is_pair)


def outside_pairs(params: PyTree) -> PyTree:
    """A mask, for ``optax.masked``: True for the leaves that belong to no pair."""
    return jax.tree.map(lambda role: role == "other", roles(params))


class PairTree:
    """The pairs of a tree of parameters.

    Raises ``ValueError`` for a tree that has leaves and no pair, and for a pair of which one factor is missing. A tree
    without leaves, as optax makes some, is fine. A pair whose factors are both masked is left alone.
    """

    def __init__(self, params: PyTree, name: str):
        """``name``: of the transformation, for the messages."""
        if params is None:
            raise ValueError(f"{name} wants the parameters: tx.update(grads, state, params).")
        self._nodes, self._treedef = jax.tree.flatten(params, is_leaf=is_pair)
        self._where = []
        for i, node in enumerate(self._nodes):
            if not is_pair(node):
                continue
            missing = [not jax.tree.leaves(leaf) for leaf in (node.a, node.b)]
            if any(missing) and not all(missing):
                paths = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_pair)[0]
                raise ValueError(
                    f"{name} got one factor of the pair at {jax.tree_util.keystr(paths[i][0])} without the other, "
                    f"`{'b' if missing[0] else 'a'}` without `{'a' if missing[0] else 'b'}`: optax.masked or "
                    "optax.partition gave them different labels. Give both the same one."
                )
            if not any(missing):
                self._where.append(i)
        if not self._where and jax.tree.leaves(params):
            raise ValueError(
                f"{name} finds no pair of factors among the parameters: it is for the trainable tree of methods with "
                "pairs, like jlora.LoRA. For other parameters, and for trees of which only some leaves matter, take a "
                "transformation that sees single leaves, or optax.partition."
            )

    def __bool__(self) -> bool:
        return bool(self._where)

    @property
    def empty(self) -> bool:
        """Whether there are no leaves at all: what ``optax.tree_map_params`` shows to ``init``, for one."""
        return not self._nodes

    @property
    def factors(self) -> list[Factors]:
        """The pairs as they stand in the tree."""
        return [self._nodes[i] for i in self._where]

    def nodes(self, tree: PyTree) -> list[Any]:
        """What another tree, of gradients or of state, has in the places of the pairs."""
        nodes = self._treedef.flatten_up_to(tree)
        return [nodes[i] for i in self._where]

    def pairs(self, updates: PyTree) -> list[Pair]:
        """The pairs and their gradients, tall."""
        grads = self.tall(updates)
        return [Pair(*_tall(f, f), g.a, g.b, float(f.scale)) for f, g in zip(self.factors, grads, strict=True)]

    def tall(self, tree: PyTree) -> list[Tall]:
        """What another tree of ``Factors`` has in the places of the pairs, tall."""
        return [_tall(node, f) for node, f in zip(self.nodes(tree), self.factors, strict=True)]

    def updated(self, updates: PyTree, talls: Iterable[Tall]) -> PyTree:
        """``updates`` with other values for the pairs, in the types that it had."""
        nodes = self._treedef.flatten_up_to(updates)
        for i, tall in zip(self._where, talls, strict=True):
            nodes[i] = _lying(tall, nodes[i])
        return self._treedef.unflatten(nodes)

    def state(self, values: Iterable[Any]) -> PyTree:
        """A tree with these in the places of the pairs and nothing (``optax.MaskedNode``) in the others."""
        nodes = [optax.MaskedNode()] * len(self._nodes)
        for i, value in zip(self._where, values, strict=True):
            nodes[i] = value
        return self._treedef.unflatten(nodes)

    def lying(self, talls: Iterable[Tall]) -> PyTree:
        """A state shaped and sharded as the pairs are, in at least float32."""
        likes = [jax.tree.map(lambda leaf: leaf.astype(wide(leaf)), f) for f in self.factors]
        return self.state(_lying(tall, f) for tall, f in zip(talls, likes, strict=True))

    def zeros(self) -> PyTree:
        """The same, of zeros."""
        return self.state(jax.tree.map(lambda leaf: jnp.zeros_like(leaf, wide(leaf)), f) for f in self.factors)

    def replaced(self, tree: PyTree, values: Iterable[Any]) -> PyTree:
        """Another tree of the same shape with these in the places of the pairs."""
        nodes = self._treedef.flatten_up_to(tree)
        for i, value in zip(self._where, values, strict=True):
            nodes[i] = value
        return self._treedef.unflatten(nodes)


def by_pair(name: str, rule: Callable[[Pair], Tall]) -> optax.GradientTransformation:
    """``rule`` in the place of the gradients of every pair; what is in no pair passes. No state."""

    def init(params: PyTree) -> optax.EmptyState:
        PairTree(params, name)
        return optax.EmptyState()

    def update(
        updates: PyTree, state: optax.EmptyState, params: PyTree | None = None
    ) -> tuple[PyTree, optax.EmptyState]:
        tree = PairTree(params, name)
        return tree.updated(updates, map(rule, tree.pairs(updates))), state

    return optax.GradientTransformation(init, update)


def with_others(
    direction: optax.GradientTransformation,
    learning_rate: optax.ScalarOrSchedule,
    weight_decay: float | Array,
    other: optax.GradientTransformation | None,
) -> optax.GradientTransformationExtraArgs:
    """An optimizer of a direction for pairs and one for what is in none."""
    return optax.chain(
        direction,
        optax.masked(optax.scale_by_adam() if other is None else other, outside_pairs),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    )


def wide(x: Array) -> Any:
    """The type to compute in."""
    return jnp.promote_types(x.dtype, jnp.float32)


def _spec(x: Array) -> tuple:
    return tuple(jax.typeof(x).sharding.spec)


def _laid(x: Array, spec: tuple) -> Array:
    """``x`` sharded so, where types say how arrays are sharded (explicit sharding); the same elsewhere."""
    return x if _spec(x) == spec else jax.reshard(x, PartitionSpec(*spec))


def _tall(node: Factors, like: Factors) -> Tall:
    """With the stack axes of both sharded alike and the rank whole."""
    (*stack_a, n_in, _), (*stack_b, _, n_out) = _spec(like.a), _spec(like.b)
    stack = stack_a if stack_a == stack_b else [None] * len(stack_a)
    a, b = node.a.astype(wide(node.a)), node.b.astype(wide(node.b)).swapaxes(-1, -2)
    return Tall(_laid(a, (*stack, n_in, None)), _laid(b, (*stack, n_out, None)))


def _lying(tall: Tall, like: Factors) -> Factors:
    """The inverse, in the types and shardings of ``like``."""
    a = _laid(tall.a.astype(like.a.dtype), _spec(like.a))
    return Factors(a, _laid(tall.b.swapaxes(-1, -2).astype(like.b.dtype), _spec(like.b)), like.scale)


# Products. Tall times small shards by itself; contractions of a long axis have to say where their results lie.


def inner(x: Float[Array, "*stack n r"], y: Float[Array, "*stack n q"]) -> Float[Array, "*stack r q"]:
    """x^T y, whole on every device but for the stack."""
    *stack, n, _ = _spec(x)
    sharding = None if n is None else PartitionSpec(*stack, None, None)
    return jnp.einsum("...nr,...nq->...rq", x, y, precision=_PRECISION, out_sharding=sharding)


def outer(x: Float[Array, "*stack m r"], y: Float[Array, "*stack n r"]) -> Float[Array, "*stack m n"]:
    """x y^T."""
    return jnp.einsum("...mr,...nr->...mn", x, y, precision=_PRECISION)


def across(w: Float[Array, "*stack m n"], y: Float[Array, "*stack n r"]) -> Float[Array, "*stack m r"]:
    """w y, for a matrix that lies as ``outer`` leaves it."""
    *stack, m, n = _spec(w)
    sharding = None if n is None else PartitionSpec(*stack, m, None)
    return jnp.einsum("...mn,...nr->...mr", w, y, precision=_PRECISION, out_sharding=sharding)


def times(x: Float[Array, "*stack n r"], k: Float[Array, "*stack r q"]) -> Float[Array, "*stack n q"]:
    """x k, for small k."""
    return jnp.matmul(x, k, precision=_PRECISION)


def transposed(x: Float[Array, "*stack m n"]) -> Float[Array, "*stack n m"]:
    return x.swapaxes(-1, -2)


@dataclasses.dataclass(frozen=True)
class Spectrum:
    """The eigendecomposition of the Gram matrix x^T x of a tall matrix."""

    values: Float[Array, "*stack r"]  # not negative; below the cut-off, zero
    vectors: Float[Array, "*stack r r"]

    @classmethod
    def of(cls, x: Float[Array, "*stack n r"]) -> Spectrum:
        values, vectors = jnp.linalg.eigh(inner(x, x))
        return cls(jnp.where(live(values), values, 0), vectors)

    @classmethod
    def twice(cls, x: Float[Array, "*stack n r"]) -> Spectrum:
        """The same, with more digits of the small values: of x in the basis of the first, whose Gram matrix is nearly
        diagonal and has them by themselves, not beside the rounding of the large ones."""
        first = cls.of(x)
        second = cls.of(times(x, first.vectors))
        return cls(second.values, times(first.vectors, second.vectors))

    def reciprocal(self, damping: float | Array = 0.0) -> Float[Array, "*stack r"]:
        """1 / (value + damping); without damping the pseudo-inverse: 0 for 0."""
        damped = self.values + damping
        return jnp.where(damped > 0, 1 / jnp.where(damped > 0, damped, 1), 0).astype(self.values.dtype)

    def inverse(self, damping: float | Array = 0.0, relative: bool = False) -> Float[Array, "*stack r r"]:
        """(x^T x + damping I)^-1. ``relative``: the damping is a share of the mean eigenvalue."""
        if relative:
            damping = damping * self.values.mean(-1, keepdims=True)
        return times(self.vectors * self.reciprocal(damping)[..., None, :], transposed(self.vectors))


def live(values: Float[Array, "*stack r"]) -> Bool[Array, "*stack r"]:
    """Which eigenvalues of a Gram matrix are more than the rounding of the largest."""
    return values > 10 * jnp.finfo(values.dtype).eps * values.max(-1, keepdims=True)


def orthonormal(x: Float[Array, "*stack n r"]) -> tuple[Float[Array, "*stack n r"], Float[Array, "*stack r r"]]:
    """q and k with q = x k, the columns of q orthonormal, or zero beyond the rank of x; k is a pseudo-inverse of the
    triangle of a QR decomposition, in another basis. Of Gram matrices alone, hence in place where x is sharded; twice,
    since one round squares the condition of x."""

    def once(x: Array) -> tuple[Array, Array]:
        gram = Spectrum.of(x)
        k = gram.vectors * jnp.sqrt(gram.reciprocal())[..., None, :]
        return times(x, k), k

    q, first = once(x)
    q, second = once(q)
    return q, times(first, second)


def norm2(x: Array) -> Float[Array, ""]:
    return jnp.sum(jnp.square(x))
