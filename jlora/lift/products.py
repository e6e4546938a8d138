"""Rules for the products that consume a weight: here, and only here, a method's forward runs.

Each rule checks that the product contracts the whole in group (or the whole out group: a tied head, ``x @ W.T``),
brings the activation to canonical form, hands the method a ``Dot`` for this kind of product, and gives the result the
shape and axis order that the equation promised.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array

from jlora.factors import Factors
from jlora.kernels import lora_linear, lora_linears, product
from jlora.kernels.dropout import dropout
from jlora.lift.core import Run, is_adapted, plain, rule, together
from jlora.storage import Stored, is_far, is_stored, near
from jlora.weight import IN, OUT, STACK, AdaptedWeight, Atom, Context, Params, Unadapted, turned


@dataclasses.dataclass(frozen=True)
class Use:
    """A use of a weight, for ``usage``: the atoms contracted (or looked up), batched over, and produced."""

    kind: str
    contracted: frozenset[Atom]
    batched: frozenset[Atom]
    produced: frozenset[Atom]
    flops: float
    features: frozenset[Atom] = frozenset()  # of a convolution's window and features, the features


def _atoms(w: AdaptedWeight, axes: Sequence[int]) -> list[Atom]:
    return [atom for axis in axes for atom in w.labels[axis]]


def _observe(run: Run, w: AdaptedWeight, kind: str, contracted, batched, produced, flops, features=()) -> None:
    sets = [frozenset(_atoms(w, axes)) for axes in (contracted, batched, produced)]
    run.observe(w, Use(kind, *sets, flops * run.repeat, frozenset(_atoms(w, features))))


class _Branch:
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


# Matrix products.


@dataclasses.dataclass(frozen=True)
class LinearDot(_Branch):
    """x [..., in] times [in, out].

    ``out_spec``: how the result is sharded where the model says so (explicit sharding over contracted axes). The
    factors then follow x and the result: the rank is sharded over nothing.
    ``implementation``: of the kernels, as in a ``Context``.
    """

    precision: Any
    preferred: Any
    kind: str = "linear"
    out_spec: PartitionSpec | None = None
    implementation: str | None = None

    def features_last(self, x: Array) -> bool:
        # An axis that is sharded by its type is reshaped only by saying how, and that may move data.
        return self.out_spec is None and all(entry is None for entry in jax.typeof(x).sharding.spec[x.ndim - 1 :])

    def einsum(self, subscripts: str, x: Array, w: Array) -> Array:
        of_x, of_w, of_y = subscripts.replace("->", ",").split(",")
        if of_x.endswith(of_w[:-1]) and of_y == of_x[:-1] + of_w[-1]:
            # x [..., *blocks, k] times w [*blocks, k, l], with ``product``'s gradient, which moves the smaller operand.
            times = functools.partial(self._product, preferred=self.preferred)
            for axis in range(-2, -len(of_w), -1):
                times = jax.vmap(times, (axis, 0), axis)
            return times(x, w)
        return jnp.einsum(
            subscripts, x, w.astype(x.dtype), precision=self.precision, preferred_element_type=self.preferred
        )

    def _dot(self, x: Array, w: Array, preferred: Any, spec: PartitionSpec | None) -> Array:
        axes = ((x.ndim - 1,), (0,)), ((), ())
        return lax.dot_general(
            x, w, axes, precision=self.precision, preferred_element_type=preferred, out_sharding=spec
        )

    def _product(self, x: Array, m: Array, preferred: Any) -> Array:
        return product(
            x,
            m,
            implementation=self.implementation,
            precision=self.precision,
            preferred_element_type=preferred,
        )

    def __call__(self, x: Array, w: Array) -> Array:
        if self.out_spec is None and x.dtype == w.dtype:
            return self._product(x, w, self.preferred)
        return self._dot(x, w, self.preferred, self.out_spec)

    def inner(self, x: Array, a: Array) -> Array:
        if self.out_spec is None:
            return self._product(x, a, None)
        a = a.astype(x.dtype)
        *rows, contracted = jax.typeof(x).sharding.spec
        return self._dot(x, jax.reshard(a, PartitionSpec(contracted, None)), None, PartitionSpec(*rows, None))

    def outer(self, h: Array, b: Array) -> Array:
        if self.out_spec is None:
            return self._product(h, b, self.preferred)
        b = jax.reshard(b.astype(h.dtype), PartitionSpec(None, self.out_spec[-1]))
        return self._dot(h, b, self.preferred, self.out_spec)

    def mix(self, y: Array, m: Array) -> Array:
        return self._product(y, m, None)

    def factored(self, x: Array, w: Array, f: Factors, context: Context, rate: float = 0.0) -> Array:
        if self.out_spec is not None:
            return super().factored(x, w, f, context, rate)
        return lora_linear(
            x,
            w,
            f.a,
            f.b,
            f.scale,
            implementation=context.implementation,
            precision=self.precision,
            preferred_element_type=self.preferred,
            dropout=rate,
            key=context.key,
        )

    def factored_together(self, x: Array, ws: list[Array], fs: list[Factors]) -> tuple[Array, ...]:
        """``factored`` of several weights."""
        return lora_linears(
            x,
            ws,
            [f.a for f in fs],
            [f.b for f in fs],
            [f.scale for f in fs],
            implementation=self.implementation,
            precision=self.precision,
            preferred_element_type=self.preferred,
        )


@rule("dot_general")
def dot_general(run: Run, eqn: Any, values: list) -> list | None:
    lhs, rhs = values
    if is_adapted(lhs) and is_adapted(rhs):
        values = lhs, rhs = run.materialize(lhs, "dot_general of two adapted weights"), rhs
    ((lc, rc), (lb, rb)) = eqn.params["dimension_numbers"]
    w, wc, wb = (rhs, rc, rb) if is_adapted(rhs) else (lhs, lc, lb)
    if run.observe is not None:
        free = [axis for axis in range(len(w.shape)) if axis not in wc and axis not in wb]
        flops = 2.0 * math.prod(eqn.outvars[0].aval.shape) * math.prod(w.shape[a] for a in wc)
        _observe(run, w, "linear", wc, wb, free, flops)
        return plain(eqn, [v.base if is_adapted(v) else v for v in values])
    found = _MatrixProduct.of(run, eqn, values)
    if found is None:
        return None
    if found.transposed and w.method.lookup_only:
        if not is_stored(w.base):
            return plain(eqn, [v.base if is_adapted(v) else v for v in values])
        bare = dataclasses.replace(w, method=Unadapted(), own=Params(), shared=None, keys=None, values=None)
        found = dataclasses.replace(found, w=bare)
    return [found.finish(_apply(run, found.w, found.dot, found.x, found.transposed, found.batched))]


@together("dot_general")
def dot_generals(run: Run, eqns: list, values: list[list]) -> list[list | None]:
    """Products of one activation with several weights, whose branches share what they do with it."""
    results: list[list | None] = [None] * len(eqns)
    if run.observe is not None or not _shares_x(_weight(values[0])):
        return results
    products = {i: _MatrixProduct.of(run, eqns[i], v) for i, v in enumerate(values) if _shares_x(_weight(v))}
    first = products[0]
    if first is None or first.transposed or first.dot.out_spec is not None:
        return results
    chosen = {i: p for i, p in products.items() if p is not None and p.x is first.x and p.dot == first.dot}
    if len(chosen) < 2:
        return results
    ws = [p.w for p in chosen.values()]
    operands = (
        first.x,
        [w.base if is_stored(w.base) else w.canonical() for w in ws],
        [w.own for w in ws],
    )
    ys = run.call(_forward_together, (tuple(w.method for w in ws), first.dot), operands)
    for (i, p), y in zip(chosen.items(), ys, strict=True):
        results[i] = [p.finish(y)]
    return results


def _weight(values: Sequence[Any]) -> AdaptedWeight | None:
    """The weight of a product, None where both operands are weights."""
    adapted = list(filter(is_adapted, values))
    return adapted[0] if len(adapted) == 1 else None


def _shares_x(w: AdaptedWeight | None) -> bool:
    """Whether a weight is one matrix at hand, with a branch beside it that sees x as it is."""
    if w is None or w.stack_shape or is_far(w.base):
        return False
    return w.method.is_branch(w.keys is not None)


@dataclasses.dataclass(frozen=True)
class _MatrixProduct:
    """A product of an activation and a weight as a method computes it, and the way back to what the model wrote.

    Attributes:
      x: [*batched stack, ..., contracted], in canonical order.
      transposed: the out group is contracted, as in a tied head.
      batched: the stack axes that x has as well.
    """

    w: AdaptedWeight
    x: Array
    dot: LinearDot
    transposed: bool
    batched: set[Atom]
    finish: Callable[[Array], Array]

    @classmethod
    def of(cls, run: Run, eqn: Any, values: Sequence[Any]) -> _MatrixProduct | None:
        """None where there is no low-rank form: the contracted axes are not the whole of one group, say."""
        lhs, rhs = values
        if is_adapted(lhs) and is_adapted(rhs):
            return None
        ((lc, rc), (lb, rb)) = eqn.params["dimension_numbers"]
        (w, wc, wb, x, xc, xb) = (rhs, rc, rb, lhs, lc, lb) if is_adapted(rhs) else (lhs, lc, lb, rhs, rc, rb)
        free = [axis for axis in range(len(w.shape)) if axis not in wc and axis not in wb]
        batched, stack = set(_atoms(w, wb)), w.group(STACK)
        if not jnp.issubdtype(x.dtype, jnp.floating) or not batched <= set(stack) or not w.foldable() or w.backwards:
            return None
        contracted = set(_atoms(w, wc))
        transposed = contracted == set(w.group(OUT)) and contracted != set(w.group(IN))
        if not transposed and contracted != set(w.group(IN)):
            return None

        n_free = len(x.shape) - len(xc) - len(xb)
        x_free = [axis for axis in range(len(x.shape)) if axis not in xc and axis not in xb]
        x = x.transpose([*xb, *x_free, *xc]) if (*xb, *x_free, *xc) != tuple(range(len(x.shape))) else x
        x = _to_canonical(x, len(xb) + n_free, [w.labels[a] for a in wc], flatten=True)
        x = _to_canonical(x, 0, [w.labels[a] for a in wb], flatten=False)

        spec, out = None, eqn.params["out_sharding"]
        if out is not None:
            if wb:
                return None
            full = [*out.spec, *(None,) * (n_free + len(free) - len(out.spec))]
            of_w, of_x = (full[: len(free)], full[len(free) :]) if w is lhs else (full[n_free:], full[:n_free])
            spec = PartitionSpec(*of_x, *of_w[:1])  # foldable: only the slowest axis is sharded
            if any(entry is not None for entry in of_w[1:]):
                return None
        dot = LinearDot(
            eqn.params["precision"],
            eqn.params["preferred_element_type"],
            "transposed" if transposed else "linear",
            spec,
            run.implementation,
        )

        def finish(y: Array) -> Array:
            """From [*stack, ..., produced] to the order of the equation: batch, free of lhs, free of rhs. Where all
            matrices of a stack meet the same activation (every expert on every token), the stack axis is free, too."""
            every = [i for i, atom in enumerate(stack) if atom not in batched]
            if every:
                y = jnp.moveaxis(y, every, range(y.ndim - len(every), y.ndim))
            start = y.ndim - 1 - len(every)
            y = _from_canonical(y, start, [w.labels[a] for a in free], [w.shape[a] for a in free], n=1 + len(every))
            y = _from_canonical(y, 0, [w.labels[a] for a in wb], [w.shape[a] for a in wb], n=len(stack) - len(every))
            if w is lhs:
                n_batch, n_w = len(wb), len(free)
                y = jnp.moveaxis(y, range(n_batch + n_free, n_batch + n_free + n_w), range(n_batch, n_batch + n_w))
            return y if out is None else jax.reshard(y, out)

        return cls(w, x, dot, transposed, batched, finish)


def _apply(run: Run, w: AdaptedWeight, dot: Any, x: Array, transposed: bool, batched: set[Atom]) -> Array:
    """The method's forward on canonical operands, mapped over the stack axes, of which x has the batched ones."""
    ctx = run.context(w)
    in_axes = tuple(0 if atom in batched else None for atom in w.group(STACK))

    def call(w: AdaptedWeight, x: Array, base: Array | Stored, own: Params, key: Any) -> tuple[Array, Any]:
        operands = x, base, own, w.shared, dataclasses.replace(ctx, key=key)
        return run.call(_forward, (w.method, dot, transposed, in_axes), operands)

    y, aux = _fetched(call, w, x, ctx.key)
    run.report(w.path, aux)
    return y


def _fetched(call: Callable, w: AdaptedWeight, x: Array, key: Any) -> tuple[Array, Any]:
    """``call(w, x, its base for a product, its own parameters, key)``. A base in the host's memory comes to the device
    here, and once more for the backward pass."""

    def fetched(x: Array, base: Array | Stored, own: Params, key: Any) -> tuple[Array, Any]:
        here = dataclasses.replace(w, base=near(base))
        return call(here, x, here.base if is_stored(here.base) else here.canonical(), own, key)

    return (jax.checkpoint(fetched) if is_far(w.base) else fetched)(x, w.base, w.own, key)


def _with_matrices(forward: Callable, x: Array, base: Any, own: Any, key: Any) -> tuple[Any, Any]:
    """``forward(x, matrices, own, key)``. What is stored gives its matrices here, and once more for the backward pass:
    between the two only what is stored is kept, or a scan over layers would keep the matrices of all of them."""
    if not any(map(is_stored, jax.tree.leaves(base, is_leaf=is_stored))):
        return forward(x, base, own, key)
    formed = lambda base: jax.tree.map(lambda w: w.canonical() if is_stored(w) else w, base, is_leaf=is_stored)
    return jax.checkpoint(lambda x, base, own, key: forward(x, formed(base), own, key))(x, base, own, key)


def _consume(run: Run, w: AdaptedWeight, x: Array, forward: Callable) -> Array:
    """``forward(weight, x, its canonical form, params, context)`` of a method, outside of what ``_forward`` maps."""
    ctx = run.context(w)

    def call(w: AdaptedWeight, *operands: Any) -> tuple[Array, Any]:
        with_context = lambda x, base, own, key: forward(
            w, x, base, own._replace(shared=w.shared), dataclasses.replace(ctx, key=key)
        )
        return _with_matrices(with_context, *operands)

    y, aux = _fetched(call, w, x, ctx.key)
    run.report(w.path, aux)
    return y


def _forward(
    method: Any,
    dot: Any,
    transposed: bool,
    in_axes: tuple,
    x: Array,
    base: Array | Stored,
    own: Params,
    shared: Any,
    ctx: Context,
) -> tuple[Array, Any]:
    """One product of a weight."""

    def one(x: Array, w: Array, own: Params, key: Any) -> tuple[Array, Any]:
        p, c = own._replace(shared=shared), dataclasses.replace(ctx, key=key)
        if transposed:
            return method.forward_transposed(dot, x, w.T, p, c), None
        return method.forward(dot, x, w, p, c)

    fn = functools.partial(_with_matrices, one)
    for axis in reversed(in_axes):
        fn = jax.vmap(fn, in_axes=(axis, 0, 0, 0))
    return fn(x, base, own, ctx.key)


def _forward_together(
    methods: tuple, dot: LinearDot, x: Array, bases: list[Array | Stored], owns: list[Params]
) -> list[Array]:
    """The products of one x by weights whose methods are branches."""

    def forward(x: Array, ws: list[Array], owns: list[Params], key: None) -> tuple[list[Array], None]:
        layers = list(zip(methods, ws, owns, strict=True))
        pairs = [method.factors(w, p) for method, w, p in layers]
        ys = dot.factored_together(x, ws, pairs)
        gains = [method.output_gain(w, p) for method, w, p in layers]
        return [y if gain is None else dot.per_output(y, gain) for y, gain in zip(ys, gains, strict=True)], None

    return _with_matrices(forward, x, bases, owns, None)[0]


def _to_canonical(x: Array, start: int, labels: Sequence[tuple[Atom, ...]], flatten: bool) -> Array:
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


def _from_canonical(
    y: Array, start: int, labels: Sequence[tuple[Atom, ...]], sizes: Sequence[int], n: int = 1
) -> Array:
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


# Ragged products: rows of x sorted by expert, a matrix for each expert.


@dataclasses.dataclass(frozen=True)
class RaggedDot(_Branch):
    """x [rows, in] times [experts, in, out], row by row with the expert of its group."""

    group_sizes: Array
    precision: Any
    preferred: Any
    kind: str = "ragged"

    def _dot(self, x: Array, w: Array, preferred: Any) -> Array:
        return lax.ragged_dot(x, w, self.group_sizes, precision=self.precision, preferred_element_type=preferred)

    def __call__(self, x: Array, w: Array) -> Array:
        return self._dot(x, w, self.preferred)

    def inner(self, x: Array, a: Array) -> Array:
        return self._dot(x, a.astype(x.dtype), None)

    def outer(self, h: Array, b: Array) -> Array:
        return self._dot(h, b.astype(h.dtype), self.preferred)

    def per_matrix(self, fn: Callable, w: Array, p: Params) -> Any:
        return jax.vmap(lambda w, own: fn(w, own._replace(shared=p.shared)))(w, p._replace(shared=None))

    def along(self, y: Array, g: Array) -> Array:
        return jnp.repeat(g.astype(y.dtype), self.group_sizes, axis=0, total_repeat_length=y.shape[0])

    def mix(self, y: Array, m: Array) -> Array:
        return self._dot(y, m.astype(y.dtype), None)


@rule("ragged_dot_general", "ragged_dot")
def ragged_dot(run: Run, eqn: Any, values: list) -> list | None:
    x, w, group_sizes = values
    numbers = eqn.params.get("ragged_dot_dimension_numbers")
    if is_adapted(x) or not is_adapted(w) or is_adapted(group_sizes) or eqn.params.get("group_offset") is not None:
        return None
    if numbers is not None and (
        numbers.dot_dimension_numbers != (((1,), (1,)), ((), ()))
        or tuple(numbers.lhs_ragged_dimensions) != (0,)
        or tuple(numbers.rhs_group_dimensions) != (0,)
    ):
        return None
    if run.observe is not None:
        _observe(run, w, "ragged", (1,), (0,), (2,), 2.0 * x.shape[0] * w.shape[1] * w.shape[2])
        return plain(eqn, [x, w.base, group_sizes])
    groups = [set(_atoms(w, (axis,))) for axis in range(3)]
    if groups != [set(w.group(STACK)), set(w.group(IN)), set(w.group(OUT))] or len(w.stack_shape) != 1 or w.backwards:
        return None
    dot = RaggedDot(group_sizes, eqn.params["precision"], eqn.params["preferred_element_type"])

    def forward(w: AdaptedWeight, x: Array, base: Array, p: Params, ctx: Context) -> tuple[Array, Any]:
        one_key = dataclasses.replace(ctx, key=None if ctx.key is None else ctx.key[0])
        return w.method.forward(dot, x, base, p, one_key)

    return [_consume(run, w, x, forward)]


# Convolutions.


@dataclasses.dataclass(frozen=True)
class ConvDot(_Branch):
    """x convolved with a kernel whose canonical form is [window * in / groups, out]."""

    weight: AdaptedWeight
    canonical: Array
    params: dict[str, Any]
    kind: str = "conv"

    def _conv(self, x: Array, kernel: Array, preferred: Any, groups: int | None = None) -> Array:
        p = self.params
        return lax.conv_general_dilated(
            x,
            kernel,
            p["window_strides"],
            p["padding"],
            lhs_dilation=p["lhs_dilation"],
            rhs_dilation=p["rhs_dilation"],
            dimension_numbers=p["dimension_numbers"],
            feature_group_count=p["feature_group_count"] if groups is None else groups,
            precision=p["precision"],
            preferred_element_type=preferred,
        )

    @property
    def _features(self) -> int:
        """The axis of the result that holds the output features."""
        return self.params["dimension_numbers"].out_spec[1]

    def __call__(self, x: Array, w: Array) -> Array:
        kept = w is self.canonical and not is_stored(self.weight.base)
        kernel = self.weight.base if kept else self._kernel(w)
        return self._conv(x, kernel, self.params["preferred_element_type"])

    def _kernel(self, w: Array) -> Array:
        """A matrix [window * in, k] in the layout of the kernel, k in the place of the output features."""
        labels = self.weight.labels
        flat = [atom for label in labels for atom in label if atom.group == IN]
        order = sorted(flat)
        w = w.reshape(*(atom.size for atom in order), w.shape[-1])
        w = turned(w.transpose(*(order.index(atom) for atom in flat), w.ndim - 1), flat)
        out_axis = self.params["dimension_numbers"].rhs_spec[0]
        sizes = [size for axis, size in enumerate(self.weight.shape) if axis != out_axis]
        return jnp.moveaxis(w.reshape(*sizes, w.shape[-1]), -1, out_axis)

    def inner(self, x: Array, a: Array) -> Array:
        groups = self.params["feature_group_count"]
        return self._conv(x, self._kernel(jnp.tile(a.astype(x.dtype), (1, groups))), None)

    def outer(self, h: Array, b: Array) -> Array:
        groups, (r, n_out) = self.params["feature_group_count"], b.shape
        h = jnp.moveaxis(h, self._features, -1)
        h = h.reshape(*h.shape[:-1], groups, r)
        b = b.astype(h.dtype).reshape(r, groups, n_out // groups)
        y = jnp.einsum(
            "...gr,rgo->...go",
            h,
            b,
            precision=self.params["precision"],
            preferred_element_type=self.params["preferred_element_type"],
        )
        return jnp.moveaxis(y.reshape(*y.shape[:-2], n_out), -1, self._features)

    def along(self, y: Array, g: Array) -> Array:
        shape = [1] * y.ndim
        shape[self._features] = y.shape[self._features]
        return jnp.tile(g.astype(y.dtype), y.shape[self._features] // g.shape[0]).reshape(shape)

    def mix(self, y: Array, m: Array, axis: int | None = None) -> Array:
        axis = self._features if axis is None else axis
        y = jnp.moveaxis(y, axis, -1)
        parts = y.reshape(*y.shape[:-1], -1, m.shape[0])
        parts = jnp.einsum("...gk,kl->...gl", parts, m.astype(y.dtype), precision=self.params["precision"])
        return jnp.moveaxis(parts.reshape(*y.shape[:-1], -1), -1, axis)

    @property
    def features_axis(self) -> int | None:
        """Which of the weight's input axes, in canonical order, holds the features. None where the model's code has
        cut or merged these axes."""
        labels = [self.weight.labels[axis] for axis in self.params["dimension_numbers"].rhs_spec[1:]]
        inputs = self.weight.group(IN)
        if any(len(label) != 1 for label in labels) or any(len(atom.pos) != 1 for atom in inputs):
            return None
        return inputs.index(labels[0][0])

    def staged(self, x: Array, a: Array, core: Array) -> Array | None:
        """``inner`` in two steps: x times ``a`` [features, n] at every place, then a convolution of the n features with
        ``core`` [*window, q, r], in groups of q and with r results for all of them. The window's axes are in canonical
        order. None where the one convolution costs less."""
        numbers, groups = self.params["dimension_numbers"], self.params["feature_group_count"]
        (features, n), (*window, q, r) = a.shape, core.shape
        places = math.prod(self.params["window_strides"]) / math.prod(self.params["lhs_dilation"])  # of x, for a result
        if places * a.size + core.size >= features * math.prod(window) * r:
            return None
        h = self.mix(x, a, numbers.lhs_spec[1])
        out_axis, in_axis, *spatial = numbers.rhs_spec
        inputs = self.weight.group(IN)
        inputs.pop(self.features_axis)
        order = {out_axis: len(window) + 1, in_axis: len(window)}
        order |= {axis: inputs.index(self.weight.labels[axis][0]) for axis in spatial}
        kernel = jnp.tile(core.astype(x.dtype), groups).transpose([order[axis] for axis in range(core.ndim)])
        kernel = jnp.flip(kernel, list(self.weight.backwards)) if self.weight.backwards else kernel
        return self._conv(h, kernel, None, groups * n // q)


@rule("conv_general_dilated")
def conv_general_dilated(run: Run, eqn: Any, values: list) -> list | None:
    x, w = values
    if is_adapted(x) or not is_adapted(w):
        return None
    spec = eqn.params["dimension_numbers"].rhs_spec
    out_axis, in_axes = spec[0], sorted(spec[1:])
    if run.observe is not None:
        flops = 2.0 * math.prod(eqn.outvars[0].aval.shape) * math.prod(w.shape[a] for a in in_axes)
        _observe(run, w, "conv", in_axes, (), (out_axis,), flops, features=spec[1:2])
        return plain(eqn, [x, w.base])
    fits = set(_atoms(w, (out_axis,))) == set(w.group(OUT)) and set(_atoms(w, in_axes)) == set(w.group(IN))
    if not fits or w.stack_shape or eqn.params["batch_group_count"] != 1 or not w.backwards <= set(spec[2:]):
        return None
    forward = lambda w, x, base, p, ctx: w.method.forward(ConvDot(w, base, eqn.params), x, base, p, ctx)
    return [_consume(run, w, x, forward)]


# Embedding lookups.


@dataclasses.dataclass(frozen=True)
class LookupDot(_Branch):
    """Row lookup: x holds row numbers [..., 1]; out-of-bounds rows are treated as the model's gather treats them.

    ``stored``, ``table``: where the base is stored, and the matrix that the method is shown for it: of that one, only
    the rows looked up are formed.
    """

    params: dict[str, Any]
    stored: Stored | None = None
    table: Array | None = None
    kind: str = "lookup"

    def _rows(self, ids: Array, table: Array, fill: Any) -> Array:
        n = ids.ndim - 1
        offset = tuple(range(n, n + table.ndim - 1))
        numbers = lax.GatherDimensionNumbers(offset_dims=offset, collapsed_slice_dims=(0,), start_index_map=(0,))
        return lax.gather(
            table,
            ids,
            numbers,
            slice_sizes=(1, *table.shape[1:]),
            indices_are_sorted=self.params["indices_are_sorted"],
            unique_indices=self.params["unique_indices"],
            mode=self.params["mode"],
            fill_value=fill,
        )

    def __call__(self, ids: Array, w: Array) -> Array:
        rows = self.stored.rows(lambda part: self._rows(ids, part, 0)) if w is self.table and self.stored else None
        if rows is None:
            return self._rows(ids, w, self.params["fill_value"])
        if self.params["mode"] != lax.GatherScatterMode.FILL_OR_DROP:
            return rows
        fill = self._rows(ids, jnp.zeros((w.shape[0], 1), rows.dtype), self.params["fill_value"])  # 0 where it is a row
        return jnp.where(fill == 0, rows, fill)

    def inner(self, ids: Array, a: Array) -> Array:
        return self._rows(ids, a, 0)  # the base's row already carries the fill

    def outer(self, h: Array, b: Array) -> Array:
        return h @ b.astype(h.dtype)

    mix = outer  # a looked up row is an activation like any other

    def factored(self, ids: Array, w: Array, f: Factors, context: Context, rate: float = 0.0) -> Array:
        return self(ids, w) + (self.outer(self.inner(ids, f.a), f.b) * f.scale).astype(w.dtype)


@rule("gather")
def gather(run: Run, eqn: Any, values: list) -> list | None:
    w, ids = values
    if not is_adapted(w) or is_adapted(ids):
        return None
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    indexed = list(numbers.start_index_map)
    if len(indexed) > 1 and eqn.params["mode"] in (lax.GatherScatterMode.CLIP, lax.GatherScatterMode.PROMISE_IN_BOUNDS):
        # A row that is cut out under vmap has a number on every axis; on those that it takes whole, that counts as 0.
        indexed = [a for a in indexed if sizes[a] != w.shape[a]]
    if len(indexed) != 1 or sizes[indexed[0]] != 1 or tuple(numbers.collapsed_slice_dims) not in ((), tuple(indexed)):
        return None
    (axis,) = indexed
    rest = [a for a in range(len(w.shape)) if a != axis]
    if numbers.operand_batching_dims or any(sizes[a] != w.shape[a] for a in rest):
        return None
    if run.observe is not None:
        _observe(run, w, "lookup", (axis,), (), rest, 0.0)
        return plain(eqn, [w.base, ids])
    if set(_atoms(w, (axis,))) != set(w.group(IN)) or w.stack_shape or w.backwards:
        return None
    at = numbers.start_index_map.index(axis)
    ids = lax.slice_in_dim(ids, at, at + 1, axis=ids.ndim - 1)

    def forward(w: AdaptedWeight, ids: Array, base: Array, p: Params, ctx: Context) -> tuple[Array, Any]:
        stored = w.base if is_stored(w.base) else None
        return w.method.forward(LookupDot(eqn.params, stored, base), ids, base, p, ctx)

    y = _consume(run, w, ids, forward)
    y = _from_canonical(y, y.ndim - 1, [w.labels[a] for a in rest], [w.shape[a] for a in rest])
    n = ids.ndim - 1
    y = y if numbers.collapsed_slice_dims else jnp.expand_dims(y, n + axis)
    return [jnp.moveaxis(y, range(n, y.ndim), numbers.offset_dims)]
