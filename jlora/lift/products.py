"""What the rules for the products that consume a weight share. In these rules, and only there, a method's forward runs.

Each rule (``matrices.py``, ``ragged.py``, ``convolutions.py``, ``lookups.py``) checks that the product contracts the
whole in group (or the whole out group: a tied head, ``x @ W.T``), brings the activation to canonical form, hands the
method a ``Dot`` for this kind of product, and gives the result the shape and axis order that the equation promised.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jaxtyping import Array

from jlora.factors import Factors
from jlora.kernels.dropout import dropout
from jlora.lift.core import Run
from jlora.storage import Stored, is_far, is_stored, near
from jlora.weight import AdaptedWeight, Atom, Context, Params


@dataclasses.dataclass(frozen=True)
class Use:
    """A use of a weight, for ``usage``: the atoms contracted (or looked up), batched over, and produced."""

    kind: str
    contracted: frozenset[Atom]
    batched: frozenset[Atom]
    produced: frozenset[Atom]
    flops: float
    features: frozenset[Atom] = frozenset()  # of a convolution's window and features, the features


def atoms_of(w: AdaptedWeight, axes: Sequence[int]) -> list[Atom]:
    return [atom for axis in axes for atom in w.labels[axis]]


def observe(run: Run, w: AdaptedWeight, kind: str, contracted, batched, produced, flops, features=()) -> None:
    sets = [frozenset(atoms_of(w, axes)) for axes in (contracted, batched, produced)]
    run.observe(w, Use(kind, *sets, flops * run.repeat, frozenset(atoms_of(w, features))))


class Branch:
    """What all kinds of products share: the factored branch composed of ``inner`` and ``outer``."""

    def features_last(self, x: Array) -> bool:
        return False

    def per_matrix(self, fn: Callable, w: Array, p: Params) -> Any:
        return fn(w, p)

    def along(self, y: Array, g: Array) -> Array:
        return g.astype(y.dtype)

    def per_output(self, y: Array, g: Array) -> Array:
        return y * self.along(y, g)

    def factored(self, x: Array, w: Array, f: Factors, context: Context, rate: float = 0.0) -> Array:
        return self(x, w) + self.outer(self.inner(dropout(x, rate, context.key), f.a) * f.scale, f.b)


def near_base(call: Callable, w: AdaptedWeight, x: Array, key: Any) -> tuple[Array, Any]:
    """``call(w, x, its base for a product, its own parameters, key)``. A base in the host's memory comes to the device
    here, and once more for the backward pass."""

    def fetched(x: Array, base: Array | Stored, own: Params, key: Any) -> tuple[Array, Any]:
        here = dataclasses.replace(w, base=near(base))
        return call(here, x, here.base if is_stored(here.base) else here.canonical(), own, key)

    return (jax.checkpoint(fetched) if is_far(w.base) else fetched)(x, w.base, w.own, key)


def with_matrices(forward: Callable, x: Array, base: Any, own: Any, key: Any) -> tuple[Any, Any]:
    """``forward(x, matrices, own, key)``. What is stored gives its matrices here, and once more for the backward pass:
    between the two only what is stored is kept, or a scan over layers would keep the matrices of all of them."""
    if not any(map(is_stored, jax.tree.leaves(base, is_leaf=is_stored))):
        return forward(x, base, own, key)
    formed = lambda base: jax.tree.map(lambda w: w.canonical() if is_stored(w) else w, base, is_leaf=is_stored)
    return jax.checkpoint(lambda x, base, own, key: forward(x, formed(base), own, key))(x, base, own, key)


def consume(run: Run, w: AdaptedWeight, x: Array, forward: Callable) -> Array:
    """``forward(weight, x, its canonical form, params, context)`` of a method, once for the whole of the weight."""
    ctx = run.context(w)

    def call(w: AdaptedWeight, *operands: Any) -> tuple[Array, Any]:
        with_context = lambda x, base, own, key: forward(
            w, x, base, own._replace(shared=w.shared), dataclasses.replace(ctx, key=key)
        )
        return with_matrices(with_context, *operands)

    y, aux = near_base(call, w, x, ctx.key)
    run.report(w.path, aux)
    return y


def to_canonical(x: Array, start: int, labels: Sequence[tuple[Atom, ...]], flatten: bool) -> Array:
    """Bring the axes of x from ``start`` on, which match the labels, to the canonical order of their atoms."""
    atoms = [atom for label in labels for atom in label]
    order = sorted(atoms)
    head, tail = x.shape[:start], x.shape[start + len(labels) :]
    if atoms != order:
        x = x.reshape(*head, *(atom.size for atom in atoms), *tail)
        perm = [start + atoms.index(atom) for atom in order]
        x = x.transpose([*range(start), *perm, *range(start + len(atoms), x.ndim)])
    middle = [math.prod(atom.size for atom in atoms)] if flatten else [atom.size for atom in order]
    shape = (*head, *middle, *tail)
    return x if x.shape == shape else x.reshape(shape)


def from_canonical(y: Array, start: int, labels: Sequence[tuple[Atom, ...]], sizes: Sequence[int], n: int = 1) -> Array:
    """The inverse: ``n`` axes of y from ``start`` on become axes of the given sizes, in the order of the labels."""
    atoms = [atom for label in labels for atom in label]
    order = sorted(atoms)
    head, tail = y.shape[:start], y.shape[start + n :]
    if atoms != order:
        y = y.reshape(*head, *(atom.size for atom in order), *tail)
        perm = [start + order.index(atom) for atom in atoms]
        y = y.transpose([*range(start), *perm, *range(start + len(atoms), y.ndim)])
    shape = (*head, *sizes, *tail)
    return y if y.shape == shape else y.reshape(shape)
