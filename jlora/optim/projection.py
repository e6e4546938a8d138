r"""Optimizers that see a gradient through a low-rank projection: what GaLore, Fira, APOLLO and DCT-AdamW share.

For a matrix leaf W [m, n] (m inputs, n outputs, y = x W) with gradient G [m, n] and a basis P of r orthonormal columns,

.. math::  R = P^T G \;\; [r, n] \quad\text{or}\quad R = G P \;\; [m, r],

by the side that is projected, goes to an inner optax transformation in place of G, so that the inner state has the
shape of R; what comes back is carried up again, P u or u P^T. The basis is renewed every ``period`` steps (at step 0
first) under ``lax.cond``, with shapes that do not change: nothing is recompiled. Leaves of more than two axes are
stacks of matrices [..., in, out], each with a basis of its own, unless ``axes`` says what they are. Every other leaf
(fewer than two axes, not chosen by ``where``, or a smaller side below ``rank``, where nothing would be saved) goes to
the inner transformation as it is. A stack of vectors [layers, features] looks like one matrix: keep it out by
``where``.

The inner transformation is given, as the parameters of a projected leaf, zeros of the shape of R. What it adds that is
proportional to them, which is weight decay, is read off by differentiation and applied to W itself, neither projected
nor scaled: ``galore(optax.adamw(1e-3, weight_decay=0.1))`` decays as ``adamw`` does. A transformation that uses the
parameters otherwise (trust ratios) does not fit inside; gradient clipping belongs before, in an ``optax.chain``.

A gradient that is not finite, or is all zeros, leaves the basis of its matrix as it was (at first: unit vectors), so
that it does not spoil a whole period. It still reaches the inner state: ``optax.apply_if_finite`` around all guards
that.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, PyTree

from jlora import paths
from jlora.linalg import qr, truncated_svd
from jlora.optim.moments import fields, is_second
from jlora.optim.quantized import is_blocks
from jlora.paths import Pattern
from jlora.weight import Axes

SIDES = ("smaller", "larger", "in", "out", "both")
SOLVERS = ("svd", "eigh", "randomized", "subspace")
TRANSPORTS = ("keep", "rotate", "reset")

Basis = dict[str, Array]  # {"in": [*stack, m, r]}, {"out": [*stack, n, r]} or both


class ProjectionState(NamedTuple):
    """The state of all projecting transformations. In ``stored`` and ``extra``, leaves of the parameter tree that are
    not projected are ``optax.MaskedNode()``."""

    count: Int[Array, ""]  # steps taken; the basis is renewed when it is a multiple of the period
    stored: PyTree  # per leaf, what the basis is made from: {"in": [*stack, m, r]}, indices [*stack, r], or nothing
    inner: PyTree  # the inner transformation's state, of the shapes of R
    extra: PyTree  # per leaf, what a method remembers besides: Fira's norms [*stack], or nothing


@dataclasses.dataclass(frozen=True)
class Plan:
    """How one leaf is projected: all that is known before there are numbers."""

    index: int  # among the leaves of the tree
    axes: Axes
    shape: tuple[int, ...]  # of the leaf
    sides: tuple[str, ...]  # ("in",), ("out",) or both
    rank: int
    dtype: Any  # of the basis and of what the inner transformation sees
    mesh: Any = None  # with the next, where the leaf's type says how it is sharded (explicit sharding)
    spec: tuple = ()  # of [*stack, in, out]

    @property
    def stack(self) -> tuple[int, ...]:
        return tuple(self.shape[a] for a in self.axes.stack)

    def size(self, side: str) -> int:
        _, n_in, n_out = self.axes.canonical_shape(self.shape)
        return n_in if side == "in" else n_out

    @property
    def projected_shape(self) -> tuple[int, ...]:
        return (*self.stack, *(self.rank if s in self.sides else self.size(s) for s in ("in", "out")))

    @property
    def projected_spec(self) -> tuple:
        return self.spec and (*self.spec[:-2], *self._ends(self.sides))

    def basis_spec(self, side: str) -> tuple:
        return self.spec and (*self.spec[:-2], self.spec[-2 if side == "in" else -1], None)

    def _ends(self, projected: tuple[str, ...]) -> tuple:
        return tuple(None if s in projected else axis for s, axis in zip(("in", "out"), self.spec[-2:], strict=True))

    def put(self, x: Array, spec: tuple) -> Array:
        """``x`` sharded so, on an explicit mesh; the same elsewhere."""
        return x if self.mesh is None else jax.reshard(x, NamedSharding(self.mesh, PartitionSpec(*spec)))

    def whole(self, x: Array) -> Array:
        return self.put(x, (None,) * x.ndim)

    def to_matrices(self, x: Array) -> Float[Array, "*stack m n"]:
        if self.mesh is not None and len(self.shape) > len(self.stack) + 2:  # axes that are flattened are made whole
            x = self.whole(x)
        return self.put(self.axes.to_canonical(x), self.spec)

    def from_matrices(self, x: Float[Array, "*stack m n"], like: Array) -> Array:
        if self.mesh is not None and len(self.shape) > len(self.stack) + 2:
            x = self.whole(x)
        x = self.axes.from_canonical(x, self.shape).astype(like.dtype)
        return x if self.mesh is None else self.put(x, jax.typeof(like).sharding.spec)

    def product(self, equation: str, a: Array, b: Array, spec: tuple) -> Array:
        out = None if self.mesh is None else NamedSharding(self.mesh, PartitionSpec(*spec))
        wide = jnp.promote_types(jnp.promote_types(a.dtype, b.dtype), jnp.float32)
        return jnp.einsum(equation, a, b, preferred_element_type=wide, out_sharding=out)

    def down(self, g: Float[Array, "*stack m n"], basis: Basis) -> Array:
        """R, of ``projected_shape``, in at least float32."""
        if "in" in basis:
            ends = self.spec and self._ends(("in",))
            g = self.product("...mr,...mn->...rn", basis["in"], g, (*self.spec[:-2], *ends))
        if "out" in basis:
            g = self.product("...mn,...nr->...mr", g, basis["out"], self.projected_spec)
        return g

    def up(self, r: Array, basis: Basis) -> Float[Array, "*stack m n"]:
        if "out" in basis:
            ends = self.spec and self._ends(tuple(s for s in self.sides if s == "in"))
            r = self.product("...mr,...nr->...mn", r, basis["out"], (*self.spec[:-2], *ends))
        if "in" in basis:
            r = self.product("...mr,...rn->...mn", basis["in"], r, self.spec)
        return r


class Source(Protocol):
    """Where bases come from. ``plan`` is the leaf's; g its matrices [*stack, m, n]."""

    def init(self, plan: Plan) -> PyTree:
        """What is stored at first."""
        ...

    def refresh(self, plan: Plan, stored: PyTree, g: Array, count: Array) -> tuple[PyTree, Array | None]:
        """What is stored from now on; and R, where it comes out of this more cheaply than ``plan.down`` makes it."""
        ...

    def basis(self, plan: Plan, stored: PyTree, count: Array) -> Basis: ...

    def overlap(self, plan: Plan, new: PyTree, old: PyTree) -> Basis:
        """P_new^T P_old [*stack, r, r] for each side that is projected."""
        ...


@dataclasses.dataclass(frozen=True)
class Leading:
    """The leading singular vectors of the gradient, stored: d r entries per matrix.

    ``solver`` finds them: "svd" decomposes densely, as the authors do; "randomized" by subspace iteration from a random
    start (two passes), and densely where the matrix is small or a quarter of it is wanted; "eigh" from the Gram matrix
    [d, d] of the projected side, one product and no gathering of a sharded gradient, at the price of the small singular
    values; "subspace" by two passes from the basis before, cheapest and never a full decomposition.
    """

    solver: str = "randomized"

    def init(self, plan: Plan) -> Basis:
        one = lambda side: jnp.broadcast_to(
            jnp.eye(plan.size(side), plan.rank, dtype=plan.dtype), (*plan.stack, plan.size(side), plan.rank)
        )
        return {side: plan.put(one(side), plan.basis_spec(side)) for side in plan.sides}

    def refresh(self, plan: Plan, stored: Basis, g: Array, count: Array) -> tuple[Basis, None]:
        g = g.astype(jnp.promote_types(g.dtype, jnp.float32))
        usable = jnp.isfinite(g).all((-2, -1)) & (g != 0).any((-2, -1))
        with jax.default_matmul_precision("highest"):
            found = self._solve(plan, stored, g, count)
        usable = plan.whole(usable)[..., None, None]
        keep = lambda new, old: jnp.where(usable, new.astype(old.dtype), plan.whole(old))
        return {side: plan.put(keep(found[side], stored[side]), plan.basis_spec(side)) for side in plan.sides}, None

    def _solve(self, plan: Plan, stored: Basis, g: Array, count: Array) -> Basis:
        r, whole = plan.rank, (None,) * g.ndim
        if self.solver == "svd":  # of the transpose, which is the authors' weight: LAPACK's signs then are theirs
            u, _, vh = jnp.linalg.svd(plan.whole(g).mT, full_matrices=False)
            return {"in": vh[..., :r, :].mT, "out": u[..., :r]}
        if self.solver == "randomized":
            key = jax.random.fold_in(jax.random.key(plan.index), count)
            one = lambda g: truncated_svd(g, r, key=key, iterations=2)
            for _ in plan.stack:
                one = jax.vmap(one)
            u, _, vh = one(plan.whole(g))
            return {"in": u, "out": vh.mT}
        grams = {"in": "...mn,...kn->...mk", "out": "...mn,...mk->...nk"}
        found = {}
        for side in plan.sides:
            if self.solver == "eigh":
                found[side] = jnp.linalg.eigh(plan.product(grams[side], g, g, whole))[1][..., ::-1][..., :r]
                continue
            h = plan.whole(g if side == "in" else g.mT)
            q = plan.whole(stored[side]).astype(h.dtype)
            for _ in range(2):
                q = qr(h @ (h.mT @ q))[0]
            found[side] = q
        return found

    def basis(self, plan: Plan, stored: Basis, count: Array) -> Basis:
        return stored

    def overlap(self, plan: Plan, new: Basis, old: Basis) -> Basis:
        spec = plan.spec and (*plan.spec[:-2], None, None)
        with jax.default_matmul_precision("highest"):
            return {s: plan.product("...dr,...ds->...rs", new[s], old[s], spec) for s in plan.sides}


def low_rank(
    inner: optax.GradientTransformation,
    source: Source,
    finish: Callable,
    *,
    rank: int,
    period: int,
    side: str = "smaller",
    transport: str = "keep",
    axes: Mapping[Pattern, Axes] | None = None,
    where: Pattern = "**",
    dtype: Any = None,
    remember: Callable[[Plan], PyTree] | None = None,
    begin: Callable[[Array, PyTree], Array] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """The transformation that all of them are.

    Args:
      inner: gets R where a leaf is projected and the gradient elsewhere.
      source: of bases.
      finish: ``(plan, basis, g, r, u, extra) -> (update [*stack, m, n], extra)``, u being the inner update of R.
      rank: r. A leaf whose smaller side is below it is not projected.
      period: steps between two refreshes.
      side: which side of W is projected: the "smaller" ([in] for a square one), the "larger", "in", "out" or "both".
      transport: what becomes of the inner state at a refresh. Second moments are those called ``nu``.
      axes: ``{pattern: Axes}``, for leaves of several axes that are not stacks of [in, out].
      where: which leaves may be projected.
      dtype: of the basis and of the inner state of projected leaves; None, the leaf's.
      remember: ``plan -> extra``, what is there at the first step.
      begin: ``(g, extra) -> g``, before anything else.
    """
    for name, value in (("rank", rank), ("period", period)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(
                f"{name} is a whole number of at least 1, known before tracing; got {value!r}. Under "
                f'optax.inject_hyperparams, list it: static_args=("rank", "period").'
            )
    for name, value, choices in (("side", side, SIDES), ("transport", transport, TRANSPORTS)):
        if value not in choices:
            raise ValueError(f"{name}={value!r}: one of {', '.join(choices)} is wanted.")
    inner = optax.with_extra_args_support(inner)
    explicit = dict(axes or {})
    remember = remember or (lambda plan: ())

    def plans(tree: PyTree) -> tuple[list[Array], list[Plan | None], Any]:
        leaves, treedef = jax.tree_util.tree_flatten_with_path(tree)
        make = lambda i, keys, leaf: _plan(i, paths.path_of(keys), leaf, rank, side, explicit, where, dtype)
        found = [make(i, keys, leaf) for i, (keys, leaf) in enumerate(leaves)]
        return [leaf for _, leaf in leaves], found, treedef

    def init(params: PyTree) -> ProjectionState:
        leaves, found, treedef = plans(params)
        if leaves and not any(found):
            raise ValueError(nothing_to_project(leaves, rank))
        each = lambda fn: treedef.unflatten([optax.MaskedNode() if plan is None else fn(plan) for plan in found])
        shown = [leaf if plan is None else _zeros(plan) for leaf, plan in zip(leaves, found, strict=True)]
        state = inner.init(treedef.unflatten(shown))
        return ProjectionState(jnp.zeros((), jnp.int32), each(source.init), state, each(remember))

    def update(
        updates: PyTree, state: ProjectionState, params: PyTree | None = None, **extra_args: Any
    ) -> tuple[PyTree, ProjectionState]:
        leaves, found, treedef = plans(updates)
        at = {plan.index: plan for plan in found if plan is not None}
        given = None if params is None else treedef.flatten_up_to(params)
        if given is not None and dtype is None:  # as at the start, whatever the gradients' is
            at = {i: dataclasses.replace(plan, dtype=given[i].dtype) for i, plan in at.items()}
        stored, extra = treedef.flatten_up_to(state.stored), treedef.flatten_up_to(state.extra)
        count, g = state.count, {i: plan.to_matrices(leaves[i]) for i, plan in at.items()}
        if begin is not None:
            g = {i: begin(g[i], extra[i]) for i in at}

        def refresh(operands: tuple) -> tuple:
            old, moments = operands
            new, r = {}, {}
            for i, plan in at.items():
                new[i], r[i] = source.refresh(plan, old[i], g[i], count)
            if transport != "keep":
                overlaps = {i: transport == "rotate" and source.overlap(p, new[i], old[i]) for i, p in at.items()}
                moments = _transport(inner, moments, treedef, at, overlaps)
            return new, moments, r

        before = ({i: stored[i] for i in at}, state.inner)
        if period == 1:
            now, moments, r = refresh(before)
        else:
            now, moments = jax.lax.cond(count % period == 0, lambda old: refresh(old)[:2], lambda old: old, before)
            r = dict.fromkeys(at)

        bases = {i: source.basis(plan, now[i], count) for i, plan in at.items()}
        for i, plan in at.items():
            r[i] = (plan.down(g[i], bases[i]) if r[i] is None else r[i]).astype(plan.dtype)
        shown = treedef.unflatten([r.get(i, leaf) for i, leaf in enumerate(leaves)])
        out, moments, decay = _inner_update(inner, shown, moments, given, at, treedef, extra_args)
        for i, plan in at.items():
            u, extra[i] = finish(plan, bases[i], g[i], r[i], out[i], extra[i])
            if given is not None:
                u = u + decay[i] * plan.to_matrices(given[i])
            out[i] = plan.from_matrices(u, leaves[i])
            stored[i] = now[i]
        state = ProjectionState(
            optax.safe_increment(count), treedef.unflatten(stored), moments, treedef.unflatten(extra)
        )
        return treedef.unflatten(out), state

    return optax.GradientTransformationExtraArgs(init, update)


def projected(
    tree: PyTree,
    rank: int,
    *,
    side: str = "smaller",
    axes: Mapping[Pattern, Axes] | None = None,
    where: Pattern = "**",
) -> PyTree:
    """For every leaf whether it is one that is projected."""
    leaves, treedef = jax.tree_util.tree_flatten_with_path(tree)
    found = (_plan(0, paths.path_of(keys), leaf, rank, side, dict(axes or {}), where, None) for keys, leaf in leaves)
    return treedef.unflatten([plan is not None for plan in found])


def _plan(
    index: int,
    path: str,
    leaf: Array,
    rank: int,
    side: str,
    explicit: Mapping[Pattern, Axes],
    where: Pattern,
    dtype: Any,
) -> Plan | None:
    shape = jnp.shape(leaf)
    if len(shape) < 2 or not jnp.issubdtype(leaf.dtype, jnp.floating) or not paths.matches(where, path, leaf):
        return None
    last = len(shape) - 1
    axes = next((axes for pattern, axes in explicit.items() if paths.matches(pattern, path, leaf)), None)
    axes = axes or Axes((last - 1,), (last,), tuple(range(last - 1)))
    axes.labels(shape)  # refuses axes that do not fit
    _, n_in, n_out = axes.canonical_shape(shape)
    if rank > min(n_in, n_out):
        return None
    smaller, larger = ("in", "out") if n_in <= n_out else ("out", "in")
    sides = {"smaller": (smaller,), "larger": (larger,), "both": ("in", "out")}.get(side, (side,))
    dtype = leaf.dtype if dtype is None else jnp.dtype(dtype)
    sharding = jax.typeof(leaf).sharding
    if all(axis is None for axis in sharding.spec):
        return Plan(index, axes, shape, sides, rank, dtype)
    flat = len(axes.stack) + 2 == len(shape)
    head = [sharding.spec[a] for a in axes.stack]
    ends = [sharding.spec[axes.inputs[0]], sharding.spec[axes.outputs[0]]] if flat else [None, None]
    return Plan(index, axes, shape, sides, rank, dtype, sharding.mesh, (*head, *ends))


def nothing_to_project(leaves: list[Array], rank: int) -> str:
    sizes = sorted({min(jnp.shape(leaf)[-2:]) for leaf in leaves if jnp.ndim(leaf) >= 2})
    return (
        f"No leaf can be projected to rank {rank}: it has to be a matrix, chosen by where, with no side below the "
        f"rank. Smaller sides here: {sizes or 'no matrices'}"
        + (f"; the highest rank possible is {sizes[-1]}." if sizes else ".")
    )


def whole_zeros(plan: Plan) -> Float[Array, "*stack m n"]:
    """A matrix of the weight's size to remember."""
    return plan.put(jnp.zeros((*plan.stack, plan.size("in"), plan.size("out")), plan.dtype), plan.spec)


def _zeros(plan: Plan) -> Array:
    return plan.put(jnp.zeros(plan.projected_shape, plan.dtype), plan.projected_spec)


def _inner_update(
    inner: optax.GradientTransformationExtraArgs,
    updates: PyTree,
    state: PyTree,
    params: list[Array] | None,
    at: Mapping[int, Plan],
    treedef: Any,
    extra_args: Mapping[str, Any],
) -> tuple[list[Array], PyTree, dict[int, Array]]:
    """The inner update, its state, and by how much of itself each projected weight is to change besides."""
    if params is None:
        out, state = inner.update(updates, state, None, **extra_args)
        return treedef.flatten_up_to(out), state, {}

    def call(shown: dict[int, Array]) -> tuple[dict[int, Array], tuple]:
        out, new = inner.update(
            updates, state, treedef.unflatten([shown.get(i, p) for i, p in enumerate(params)]), **extra_args
        )
        out = treedef.flatten_up_to(out)
        return {i: out[i] for i in at}, (out, new)

    zeros = {i: _zeros(plan) for i, plan in at.items()}
    _, slopes, (out, state) = jax.jvp(call, (zeros,), (jax.tree.map(jnp.ones_like, zeros),), has_aux=True)
    return list(out), state, {i: at[i].whole(slope)[..., :1, :1] for i, slope in slopes.items()}


def _transport(inner: Any, state: PyTree, treedef: Any, at: Mapping[int, Plan], overlaps: Mapping[int, Any]) -> PyTree:
    """The moments in the new basis: M <- Z M and V <- (Z*Z) V with Z the overlap, or zeros where there is none."""
    known, index = fields(inner), treedef.unflatten(range(treedef.num_leaves))
    owner = optax.tree_map_params(
        inner, lambda _, i: i, state, index, transform_non_params=lambda _: -1, is_leaf=is_blocks
    )

    def one(keys: tuple, leaf: Any, i: int) -> Any:
        plan = at.get(i)
        if plan is None or leaf.shape != plan.projected_shape:
            return leaf
        if is_blocks(leaf):
            return leaf.like(moved(keys, leaf.decode(), i))
        return moved(keys, leaf, i)

    def moved(keys: tuple, leaf: Array, i: int) -> Array:
        plan = at[i]
        if not overlaps[i]:
            return jnp.zeros_like(leaf)
        z = {side: z * z if is_second(keys, known) else z for side, z in overlaps[i].items()}
        moved = leaf
        if "in" in z:
            moved = plan.product("...rs,...sn->...rn", z["in"], moved, plan.projected_spec)
        if "out" in z:
            moved = plan.product("...ms,...rs->...mr", moved, z["out"], plan.projected_spec)
        return moved.astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(one, state, owner, is_leaf=is_blocks)
