"""The value that stands where a weight stood.

An ``AdaptedWeight`` is what ``Adapted.bind`` lays into the parameter tree and what ``lift`` carries from there to the
product that uses it. It has three parts:

* ``base``: the weight itself, in whatever layout the model's code has brought it to by now; or what is stored of it
  (``jlora.storage``), canonical like the parameters, and the labels alone say what the layout is;
* ``labels``: what each of its current axes stands for. An axis is a tuple of atoms; an atom is a (piece of an) axis of
  the original weight and belongs to a group: ``stack`` (layers, experts), ``in`` (contracted) or ``out``;
* ``own``, ``shared``: the method's parameters, always in canonical form: stack axes first, the in group flattened in
  order to one axis, the out group likewise.

Layout changes edit ``base`` and ``labels`` only. The parameters stay as they are until a product consumes the weight.
A reshape may even mix groups for a while: what counts is where the atoms are when the product comes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from jlora.factors import Factors
from jlora.storage import Cast, Cut, Stored, Take, is_stored, near

STACK, IN, OUT = "stack", "in", "out"


@dataclasses.dataclass(frozen=True)
class Axes:
    """Which axes of a weight are stacked, contracted (inputs) and produced (outputs). Several inputs or outputs are
    flattened in the order given.

    Attributes:
      inputs: axes that the product contracts; for an embedding, the axis that is looked up.
      outputs: axes that the product produces.
      stack: axes over which the model holds one matrix each (layers of a scan, experts).
      kind: ``"linear"``, ``"embedding"`` or ``"conv"`` (inputs are then the window and the input features). It decides
        how a method initializes; how a weight is used is found out where it is used.
      features: of a convolution, the axis of the input features. None: the one beside the outputs, the first of two, as
        in HWIO and OIHW.
    """

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    stack: tuple[int, ...] = ()
    kind: str = "linear"
    features: int | None = dataclasses.field(default=None, repr=False)

    @property
    def features_axis(self) -> int:
        """Which axis holds a convolution's input features."""
        near = lambda axis: abs(axis - self.outputs[0])
        return min(self.inputs, key=near) if self.features is None else self.features

    def __post_init__(self):
        if self.features is not None and self.features not in self.inputs:
            raise ValueError(f"Axes.features is one of inputs={self.inputs}; got {self.features}.")
        if self.kind not in ("linear", "embedding", "conv"):
            raise ValueError(f"Axes.kind is 'linear', 'embedding' or 'conv'; got {self.kind!r}.")
        axes = (*self.stack, *self.inputs, *self.outputs)
        if sorted(axes) != list(range(len(axes))) or not self.inputs or not self.outputs:
            raise ValueError(
                "Axes names every axis of the weight once, counted from 0, at least one input and one output; got "
                f"stack={self.stack}, inputs={self.inputs}, outputs={self.outputs}."
            )

    def labels(self, shape: Sequence[int]) -> tuple[Label, ...]:
        if len(shape) != len(self.stack) + len(self.inputs) + len(self.outputs):
            raise ValueError(f"{self} does not fit a weight of shape {tuple(shape)}.")
        atoms = {}
        for group, axes in ((STACK, self.stack), (IN, self.inputs), (OUT, self.outputs)):
            atoms |= {axis: Atom(group, (i,), shape[axis]) for i, axis in enumerate(axes)}
        return tuple((atoms[axis],) for axis in range(len(shape)))

    def canonical_shape(self, shape: Sequence[int]) -> tuple[tuple[int, ...], int, int]:
        """(stack sizes, in, out) of a weight of this shape."""
        size = lambda axes: math.prod(shape[a] for a in axes)
        return tuple(shape[a] for a in self.stack), size(self.inputs), size(self.outputs)

    def to_canonical(self, w: Array | Stored) -> Array:
        """``w`` as ``[*stack, in, out]``."""
        if is_stored(w):
            return w.canonical()
        stack, n_in, n_out = self.canonical_shape(w.shape)
        return w.transpose(*self.stack, *self.inputs, *self.outputs).reshape(*stack, n_in, n_out)

    def from_canonical(self, w: Array, shape: Sequence[int]) -> Array:
        order = (*self.stack, *self.inputs, *self.outputs)
        return w.reshape([shape[a] for a in order]).transpose([order.index(a) for a in range(len(order))])


class Atom(NamedTuple):
    """A piece of an axis of the original weight: its group, its place within the group, how long it is, and whether it
    runs backwards by now, as the window of a transposed convolution does."""

    group: str
    pos: tuple[int, ...]
    size: int
    backwards: bool = False


Label = tuple[Atom, ...]  # of one axis, slowest atom first; () for an axis of size 1 that the model's code added


class Params(NamedTuple):
    """What a method sees of its parameters: this weight's own leaves, and its group's, shared by many weights."""

    trainable: Any = None
    frozen: Any = None
    shared: Any = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Context:
    """What a method may need at run time and that is not a parameter.

    Attributes:
      key: a key for this weight (dropout, stochastic ranks), or None: then nothing is random.
      values: everything else that was given to ``bind(context=...)``, as it was given.
      implementation: which form of the fused kernels to use; None lets them choose.
    """

    key: Any = None
    values: Any = None
    implementation: str | None = dataclasses.field(default=None, metadata=dict(static=True))


class Dot(Protocol):
    """The product in which a weight is consumed, handed to ``Method.forward``.

    ``dot(x, w)`` is the base product just as the model wrote it (precision and accumulation type included). The other
    operations carry a factored branch along the same way, whatever the product is: a matrix product, a convolution, a
    ragged product over experts, an embedding lookup (where x is the ids).
    """

    kind: str  # "linear", "transposed", "conv", "ragged" or "lookup"

    def __call__(self, x: Array, w: Array) -> Array: ...

    def inner(self, x: Array, a: Array) -> Array:
        """x times ``a`` [in, r], giving r features."""

    def outer(self, h: Array, b: Array) -> Array:
        """r features times ``b`` [r, out]."""

    def features_last(self, x: Array) -> bool:
        """Whether x is [..., in], the result [..., out], and a method may cut and reshape that axis itself."""

    def einsum(self, subscripts: str, x: Array, w: Array) -> Array:
        """A product of x and parameters in the arithmetic of the base's; only where ``features_last``."""

    def per_matrix(self, fn: Callable[[Array, Params], Any], w: Array, p: Params) -> Any:
        """``fn(w, p)`` for one matrix, mapped over the experts where the product has many."""

    def per_output(self, y: Array, g: Array) -> Array:
        """y times ``g`` [out], feature by feature."""

    def along(self, y: Array, g: Array) -> Array:
        """``g`` [k] laid along the features of y, to be added or multiplied. Where y has n k of them (what ``inner``
        gives for a convolution with n groups), n times over."""

    def mix(self, y: Array, m: Array) -> Array:
        """The features of y, k at a time, times ``m`` [k, l]: for what goes on from a result, or from ``inner``'s."""

    def staged(self, x: Array, a: Array, core: Array) -> Array | None:
        """``inner`` of a convolution in two steps, the features first and then the window, where that is cheaper."""

    def factored(self, x: Array, w: Array, factors: Factors, context: Context, rate: float = 0.0) -> Array:
        """``dot(x, w) + scale * outer(inner(drop(x), a), b)``, in one fused kernel where there is one. ``rate`` is that
        of the dropout; without a key in the context there is none, and none of the numbers of rows that are looked up.
        """


class MethodLike(Protocol):
    """What ``lift`` and ``adapt`` ask of a method; ``jlora.methods.base.Method`` gives the defaults."""

    sliceable: frozenset[str]
    lookup_only: bool

    def forward(self, dot: Dot, x: Array, w: Array, p: Params, ctx: Context) -> tuple[Array, Any]: ...

    def forward_transposed(self, dot: Dot, x: Array, wt: Array, p: Params, ctx: Context) -> Array | None: ...

    def is_branch(self, keyed: bool) -> bool:
        """Whether products of one x may be computed together, from ``factors`` and ``output_gain``."""
        return False

    def factors(self, w: Array, p: Params) -> Factors | None: ...

    def output_gain(self, w: Array, p: Params) -> Array | None: ...

    def weight_in(self, w: Float[Array, "in out"], p: Params, values: Any) -> Float[Array, "in out"]: ...

    def dims(self, p: Params) -> Params: ...


@dataclasses.dataclass(frozen=True)
class Unadapted(MethodLike):
    """The method of a stored weight that has none: its product is the base's."""

    sliceable = frozenset({IN, OUT})
    lookup_only = False

    def forward(self, dot: Dot, x: Array, w: Array, p: Params, ctx: Context) -> tuple[Array, Any]:
        return dot(x, w), None

    def forward_transposed(self, dot: Dot, x: Array, wt: Array, p: Params, ctx: Context) -> Array:
        return dot(x, wt)

    def weight_in(self, w: Array, p: Params, values: Any) -> Array:
        return w

    def dims(self, p: Params) -> Params:
        return Params()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AdaptedWeight:
    """A weight and the parameters that adapt it. See the module's docstring.

    Attributes:
      base: the weight in its current layout, or stored.
      own: ``Params`` of this weight, every leaf with the stack axes first; ``own.shared`` is None.
      shared: the parameters of the method's group; never sliced by a scan.
      keys: a random key for each index of the stack axes, or None.
      values: the rest of the context; never sliced.
    """

    base: Array | Stored
    own: Params
    shared: Any
    keys: Any
    values: Any
    method: MethodLike = dataclasses.field(metadata=dict(static=True))
    labels: tuple[Label, ...] = dataclasses.field(metadata=dict(static=True))
    path: str = dataclasses.field(metadata=dict(static=True))

    @classmethod
    def unadapted(cls, base: Stored, path: str) -> AdaptedWeight:
        """A stored leaf of a tree, without a method."""
        return cls(base, Params(), None, None, None, Unadapted(), base.axes.labels(base.shape), path)

    # What it is.

    @property
    def shape(self) -> tuple[int, ...]:
        if is_stored(self.base):
            return tuple(math.prod(atom.size for atom in label) for label in self.labels)
        return self.base.shape

    @property
    def dtype(self):
        return self.base.dtype

    def group(self, name: str) -> list[Atom]:
        """The atoms of a group that are still there, in canonical order."""
        return sorted(atom for label in self.labels for atom in label if atom.group == name)

    @property
    def stack_shape(self) -> tuple[int, ...]:
        return tuple(atom.size for atom in self.group(STACK))

    @property
    def backwards(self) -> set[int]:
        """The axes that run backwards, all or a part of them."""
        return {axis for axis, label in enumerate(self.labels) if any(atom.backwards for atom in label)}

    def params(self) -> Params:
        return self.own._replace(shared=self.shared)

    # Layout changes: base and labels, and the stack axes of the parameters where those change.

    def with_base(self, base: Array | Stored, labels: Sequence[Label] | None = None) -> AdaptedWeight:
        new = dataclasses.replace(self, base=base, labels=self.labels if labels is None else tuple(labels))
        old, now = self.stack_shape, new.stack_shape
        if old == now:
            return new
        # Splitting, merging or dropping a stack axis of size 1 keeps the order: a reshape of the leading axes.
        reshape = lambda tree: jax.tree.map(lambda leaf: leaf.reshape(now + leaf.shape[len(old) :]), tree)
        base = reshape(base) if is_stored(base) else base
        return dataclasses.replace(new, base=base, own=reshape(self.own), keys=reshape(self.keys))

    def reshaped(self, base: Array | Stored, shape: Sequence[int]) -> AdaptedWeight | None:
        """This weight with ``base`` reshaped. None where a new axis would cut an atom at an uneven place."""
        labels = relabel(self.labels, shape)
        return None if labels is None else self.with_base(base, labels)

    def cast(self, dtype: Any) -> AdaptedWeight:
        """A stored weight that gives matrices of another dtype."""
        return self if dtype == self.dtype else dataclasses.replace(self, base=self.base.then(Cast(jnp.dtype(dtype))))

    def sliced(self, axis: int, take: Take) -> AdaptedWeight | None:
        """This weight restricted to a range of one axis.

        A stack axis restricts every leaf; an in or out axis restricts the leaves that have it, if the method says that
        a slice of its weight is its weight of the slices (``sliceable``). None where that does not hold.
        """
        (label,) = self.labels[axis : axis + 1]
        if len(label) != 1 or label[0].backwards:
            return None
        (atom,) = label
        labels = list(self.labels)
        labels[axis] = (atom._replace(size=take.size),)
        base = self.base if is_stored(self.base) else take(self.base, axis)
        if atom.group == STACK:
            at = self.group(STACK).index(atom)
            cut = lambda tree: jax.tree.map(lambda leaf: take(leaf, at), tree)
            base = cut(base) if is_stored(base) else base
            own, keys, shared = cut(self.own), cut(self.keys), self.shared
        elif atom.group in self.method.sliceable:
            base = self.cut_base(base, atom, take) if is_stored(base) else base
            own, shared = self._sliced_groups(atom, take)
            keys = self.keys
        else:
            return None
        return dataclasses.replace(self, base=base, labels=tuple(labels), own=own, shared=shared, keys=keys)

    def cut_base(self, base: Stored, atom: Atom, take: Take) -> Stored:
        """``base``, of these labels, of which less is wanted along an in or out axis once there is a matrix."""
        atoms = self.group(atom.group)
        sizes = [a.size for a in atoms]
        return base.then(Cut.of(base.stack_shape, take, (IN, OUT).index(atom.group), sizes, atoms.index(atom)))

    def _sliced_groups(self, atom: Atom, take: Take) -> tuple[Params, Any]:
        atoms = self.group(atom.group)
        sizes, at = [a.size for a in atoms], atoms.index(atom)

        def cut(leaf: Array, dims: str, n_stack: int) -> Array:
            dims = dims.split()
            if atom.group not in dims:
                return leaf
            axis = n_stack + dims.index(atom.group)
            leaf = jax.lax.slice_in_dim(leaf, 0, math.prod(sizes), axis=axis)  # shared leaves may be longer
            return take.within(leaf, axis, sizes, at)

        dims = self.method.dims(self.params())
        n_stack = len(self.stack_shape)
        own = jax.tree.map(lambda leaf, d: cut(leaf, d, n_stack), self.own, dims._replace(shared=None))
        return own, jax.tree.map(lambda leaf, d: cut(leaf, d, 0), self.shared, dims.shared)

    # Leaving the low-rank path.

    def foldable(self) -> bool:
        """Whether the in and out groups can be flattened without moving data between devices, as far as the types say
        (explicit sharding): only the slowest axis of a group may be sharded. What is stored is folded as it is."""
        if is_stored(self.base):
            return True
        spec = jax.typeof(self.base).sharding.spec
        sharded = {atom for label, axis in zip(self.labels, spec, strict=False) if axis is not None for atom in label}
        return not any(sharded & set(self.group(name)[1:]) for name in (IN, OUT))

    def canonical(self) -> Shaped[Array, "*stack in out"]:
        """The base as ``[*stack, in, out]``."""
        if is_stored(self.base):
            return self.base.canonical()
        flat = [atom for label in self.labels for atom in label]
        order = [*self.group(STACK), *self.group(IN), *self.group(OUT)]
        base = turned(near(self.base).reshape([atom.size for atom in flat]), flat)
        if flat != order:
            base = base.transpose([flat.index(atom) for atom in order])
        n = len(self.stack_shape)
        n_in = math.prod(a.size for a in self.group(IN))
        shape = (*base.shape[:n], n_in, math.prod(a.size for a in self.group(OUT)))
        return base if base.shape == shape else base.reshape(shape)

    def materialize(self) -> Array:
        """The effective weight in the current layout and dtype. Computed in at least float32."""
        base = self.canonical()
        wide = jnp.promote_types(base.dtype, jnp.float32)
        fn = lambda w, own: self.method.weight_in(w, own._replace(shared=self.shared), self.values or {})
        for _ in self.stack_shape:
            fn = jax.vmap(fn)
        try:
            w = fn(base.astype(wide), self.own).astype(self.dtype)
        except ValueError as error:
            raise ValueError(f"{self.path!r} {self.shape}: {error}") from error
        flat = [atom for label in self.labels for atom in label]
        order = [*self.group(STACK), *self.group(IN), *self.group(OUT)]
        w = w.reshape([atom.size for atom in order])
        return turned(w.transpose([order.index(atom) for atom in flat]), flat).reshape(self.shape)


def turned(x: Array, atoms: Sequence[Atom]) -> Array:
    """``x``, an axis for each of the first atoms, with the axes turned round that run backwards."""
    axes = [axis for axis, atom in enumerate(atoms) if atom.backwards]
    return jnp.flip(x, axes) if axes else x


def relabel(labels: Sequence[Label], shape: Sequence[int]) -> tuple[Label, ...] | None:
    """Labels after a row-major reshape to ``shape``: atoms keep their order and are split where an axis ends within
    one. None if an axis would end where no split of an atom ends.

    >>> kernel = ((Atom("in", (0,), 4),), (Atom("out", (0,), 6),))
    >>> [atom.pos for (atom,) in relabel(kernel, (4, 2, 3))[1:]]
    [(0, 0), (0, 1)]
    """
    atoms = [atom for label in labels for atom in label if atom.size != 1]
    out: list[Label] = []
    for size in shape:
        label: list[Atom] = []
        while size > 1:
            if not atoms:
                return None
            atom = atoms.pop(0)
            if size % atom.size == 0:
                label.append(atom)
                size //= atom.size
            elif atom.size % size == 0:
                label.append(atom._replace(pos=(*atom.pos, 0), size=size))
                atoms.insert(0, atom._replace(pos=(*atom.pos, 1), size=atom.size // size))
                size = 1
            else:
                return None
        out.append(tuple(label))
    return None if atoms else tuple(out)
