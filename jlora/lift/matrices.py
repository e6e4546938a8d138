"""Rules for matrix products: alone, mapped over a stack, and several of one activation."""

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
from jlora.lift.core import Run, is_adapted, plain, rule, together
from jlora.lift.products import Branch, atoms_of, from_canonical, near_base, observe, to_canonical, with_matrices
from jlora.storage import Stored, is_far, is_stored
from jlora.weight import IN, OUT, STACK, AdaptedWeight, Atom, Context, Params, Unadapted


@dataclasses.dataclass(frozen=True)
class LinearDot(Branch):
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
        observe(run, w, "linear", wc, wb, free, flops)
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
        batched, stack = set(atoms_of(w, wb)), w.group(STACK)
        if not jnp.issubdtype(x.dtype, jnp.floating) or not batched <= set(stack) or not w.foldable() or w.backwards:
            return None
        contracted = set(atoms_of(w, wc))
        transposed = contracted == set(w.group(OUT)) and contracted != set(w.group(IN))
        if not transposed and contracted != set(w.group(IN)):
            return None

        n_free = len(x.shape) - len(xc) - len(xb)
        x_free = [axis for axis in range(len(x.shape)) if axis not in xc and axis not in xb]
        x = x.transpose([*xb, *x_free, *xc]) if (*xb, *x_free, *xc) != tuple(range(len(x.shape))) else x
        x = to_canonical(x, len(xb) + n_free, [w.labels[a] for a in wc], flatten=True)
        x = to_canonical(x, 0, [w.labels[a] for a in wb], flatten=False)

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
            y = from_canonical(y, start, [w.labels[a] for a in free], [w.shape[a] for a in free], n=1 + len(every))
            y = from_canonical(y, 0, [w.labels[a] for a in wb], [w.shape[a] for a in wb], n=len(stack) - len(every))
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

    y, aux = near_base(call, w, x, ctx.key)
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

    fn = functools.partial(with_matrices, one)
    for axis in reversed(in_axes):
        fn = jax.vmap(fn, in_axes=(axis, 0, 0, 0))
    return fn(x, base, own, ctx.key)


def _forward_together(
    methods: tuple, dot: LinearDot, x: Array, bases: list[Array | Stored], owns: list[Params]
) -> list[Array]:
    """The products of one x by weights whose methods are branches."""

    def forward(x: Array, ws: list[Array], owns: list[Params], key: None) -> tuple[list[Array], None]:
        pairs = [method.factors(w, p) for method, w, p in zip(methods, ws, owns, strict=True)]
        paired = [i for i, pair in enumerate(pairs) if pair is not None]
        branches = dot.factored_together(x, [ws[i] for i in paired], [pairs[i] for i in paired]) if paired else ()
        ys = dict(zip(paired, branches, strict=True))

        def one(i: int, method: Any, w: Array, p: Params) -> Array:
            if i not in ys:  # factored for other shapes than this
                return dot(x, method.weight(w, p))
            gain = method.output_gain(w, p)
            return ys[i] if gain is None else dot.per_output(ys[i], gain)

        return list(map(one, range(len(ws)), methods, ws, owns)), None

    return with_matrices(forward, x, bases, owns, None)[0]
