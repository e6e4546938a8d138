"""The interpreter that runs a function with adapted weights where it expects arrays.

How it works, for someone who has never written one. JAX can trace a Python function into a jaxpr: a flat list of
equations, each a primitive applied to variables. ``lift(f)`` traces ``f`` with ordinary arrays in the adapted weights'
places, then walks the equations and computes them again, this time with the adapted weights themselves in the
environment. Three things can happen at an equation:

1. No operand is adapted: JAX evaluates it. Neighbouring equations of this kind are handed over together, and a run of
   them that has been seen before (the next layer of an unrolled model) as one call of a jitted function.
2. An operand is adapted and there is a rule for the primitive: the rule carries the weight along (``layout.py``),
   consumes it in a product through its method (``products.py``), or enters a loop's body with it (``control.py``).
   Products of one activation with several weights (queries, keys and values) are computed together, at the first.
3. There is no rule, or the rule does not apply: the effective weight is formed, once, and said so.

All of this happens while tracing. What is compiled in the end is a program like one written by hand.
"""

import dataclasses
import functools
import math
import warnings
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import jax.extend.core as jex
import numpy as np

from jlora import _compat, paths
from jlora.storage import is_far, is_stored
from jlora.weight import IN, AdaptedWeight, Context, Unadapted


class MaterializeWarning(UserWarning):
    """An effective weight was formed where a low-rank product would have been expected."""


Rule = Callable[["Run", Any, list], "list | None"]
RULES: dict[str, Rule] = {}
LAYOUTS: set[str] = set()
TOGETHER: dict[str, Callable[["Run", list, list[list]], "list[list | None]"]] = {}


def rule(*primitives: str, layout: bool = False) -> Callable[[Rule], Rule]:
    """Register a rule: ``(run, equation, operands) -> results``, or None where it does not apply. ``layout``: it does
    nothing but to change how a weight lies, so that it may be done earlier than the equation says."""

    def register(fn: Rule) -> Rule:
        RULES.update(dict.fromkeys(primitives, fn))
        LAYOUTS.update(primitives if layout else ())
        return fn

    return register


def together(primitive: str) -> Callable:
    """Register what computes several equations of one primitive at once, which have an operand in common that is not
    adapted: ``(run, equations, operands of each) -> results of each``, None for those it leaves to the rule."""

    def register(fn: Callable) -> Callable:
        TOGETHER[primitive] = fn
        return fn

    return register


@dataclasses.dataclass
class Run:
    """One evaluation of a jaxpr: the options, and what it reports.

    Attributes:
      on_materialize: "warn", "error" or "silent".
      implementation: handed to the kernels.
      collect: whether methods' reports are wanted. Loops then return them as outputs.
      observe: for ``usage``: called with every use of a weight instead of adapting it.
      aux: path -> what its method reported, in the order of its uses.
      repeat: how often the equations run that are being evaluated (the lengths of the scans around them).
      seen: (path, primitive) of materializations already reported, shared by all runs of one trace.
      uses: path -> number of uses so far; gives every use of one weight its own random key.
      calls: what two equal computations have in common -> the jitted function that does them, None at the first. Shared
        by all runs of one trace.
    """

    on_materialize: str = "warn"
    implementation: str | None = None
    collect: bool = False
    observe: Callable[..., None] | None = None
    aux: dict[str, list] = dataclasses.field(default_factory=dict)
    repeat: int = 1
    seen: set = dataclasses.field(default_factory=set)
    uses: dict[str, int] = dataclasses.field(default_factory=dict)
    calls: dict[Hashable, Callable | None] = dataclasses.field(default_factory=dict)

    def inner(self, repeat: int = 1) -> "Run":
        """The run of a loop's body: same options, its own reports."""
        return dataclasses.replace(self, aux={}, repeat=self.repeat * repeat)

    def report(self, path: str, aux: Any) -> None:
        if self.collect and aux is not None:
            self.aux.setdefault(path, []).append(aux)

    def absorb(self, aux: dict[str, list]) -> None:
        for path, values in aux.items():
            self.aux.setdefault(path, []).extend(values)

    def context(self, w: AdaptedWeight) -> Context:
        """The context of the next use of a weight. Keys have the stack axes of the weight."""
        use = self.uses[w.path] = self.uses.get(w.path, -1) + 1
        keys = w.keys
        if keys is not None and use:
            fold = lambda key: jax.random.fold_in(key, use)
            for _ in keys.shape:
                fold = jax.vmap(fold)
            keys = fold(keys)
        return Context(keys, w.values, self.implementation)

    def again(self, key: Hashable | None, fn: Callable) -> Callable:
        """``fn`` the first time that a key comes, its jitted form from then on: the layers of an unrolled model are
        traced, differentiated and lowered once. None is no key."""
        if key is None or key not in self.calls:
            self.calls[key] = None
            return fn
        self.calls[key] = self.calls[key] or jax.jit(fn)
        return self.calls[key]

    def call(self, fn: Callable, static: tuple, operands: tuple) -> Any:
        """``fn(*static, *operands)``, jitted where it comes again with operands of the same types."""
        leaves, treedef = jax.tree.flatten(operands)
        # A context may hold what jit does not take, strings say. That is rare, and costs a trace for each use.
        jittable = all(isinstance(leaf, jax.Array) for leaf in leaves)
        key = (fn, static, treedef, tuple(map(jax.typeof, leaves))) if jittable else None
        return self.again(key, functools.partial(fn, *static))(*operands)

    def materialize(self, w: Any, where: str) -> Any:
        """The effective weight of an adapted value; other values as they are."""
        if not isinstance(w, AdaptedWeight):
            return w
        if self.observe is not None:
            self.observe(w, where)
            return w.base
        # A single row that was looked up is an activation already: forming it is the low-rank path.
        is_row = math.prod(atom.size for atom in w.group(IN)) == 1
        if self.on_materialize != "silent" and not is_row and (w.path, where) not in self.seen:
            self.seen.add((w.path, where))
            message = (
                f"The effective weight of {w.path!r} {w.shape} was formed for {where!r}, which has no low-rank form "
                f"with this weight: it costs a temporary of the weight's size, and its gradient a full matrix product."
            )
            if isinstance(w.method, Unadapted):
                message = (
                    f"The quantized weight {w.path!r} {w.shape} was dequantized as a whole for {where!r}, which is no "
                    "product with its matrices."
                )
            if self.on_materialize == "error":
                raise ValueError(
                    message + " It was refused since on_materialize='error'. Leave the path out of the targets, "
                    "change how the model uses it, or pass on_materialize='silent' if the cost is fine."
                )
            warnings.warn(
                message + " lift(..., on_materialize='silent') accepts it, 'error' refuses it.",
                MaterializeWarning,
                stacklevel=2,
            )
        return w.materialize()


def is_adapted(x: Any) -> bool:
    return isinstance(x, AdaptedWeight)


def plain(eqn: Any, values: Sequence[Any]) -> list:
    """Evaluate one equation on arrays, through JAX's own evaluation of a jaxpr."""
    given = {var: value for var, value in zip(eqn.invars, values, strict=True) if not isinstance(var, jex.Literal)}
    return jex.jaxpr_as_fun(_compat.sub_jaxpr(list(given), eqn.outvars, [eqn]))(*given.values())


def evaluate(run: Run, jaxpr: jex.ClosedJaxpr, args: Sequence[Any]) -> list:
    """Evaluate a jaxpr on values of which some are adapted weights. The results may be adapted, too."""
    if not any(map(is_adapted, args)):
        return jex.jaxpr_as_fun(jaxpr)(*args)
    closed, jaxpr = jaxpr, jaxpr.jaxpr
    env: dict[Any, Any] = {}
    env.update(zip(jaxpr.constvars, closed.consts, strict=True))
    env.update(zip(jaxpr.invars, args, strict=True))
    is_var = lambda v: not isinstance(v, jex.Literal)
    read = lambda v: env[v] if is_var(v) else v.val

    last_use = {v: i for i, eqn in enumerate(jaxpr.eqns) for v in eqn.invars if is_var(v)}
    last_use.update((v, len(jaxpr.eqns)) for v in jaxpr.outvars if is_var(v))
    pending: list[Any] = []  # equations without adapted operands, not evaluated yet

    def flush(now: int) -> None:
        """Evaluate the pending equations as one sub-jaxpr; keep what is used from equation ``now`` on."""
        if not pending:
            return
        made = {v for eqn in pending for v in eqn.outvars}
        needs = list(dict.fromkeys(v for eqn in pending for v in eqn.invars if is_var(v) and v not in made))
        keeps = [v for eqn in pending for v in eqn.outvars if last_use.get(v, -1) >= now]
        fn = _evaluator(run, needs, keeps, pending)
        env.update(zip(keeps, fn(*map(read, needs)), strict=True))
        pending.clear()

    products = _Products(jaxpr.eqns)
    early: set[int] = set()  # equations that were evaluated before their turn

    def evaluate_now(i: int) -> None:
        eqn = jaxpr.eqns[i]
        env.update(zip(eqn.outvars, step(run, eqn, list(map(read, eqn.invars))), strict=True))

    def is_ready(v: Any) -> bool:
        """Whether v is an adapted weight; or can be, by changes of its layout alone, which are then made."""
        at = products.layouts.get(v) if is_var(v) and v not in env else None
        if at is not None and is_ready(jaxpr.eqns[at].invars[0]):
            early.add(at)
            evaluate_now(at)
        return is_var(v) and is_adapted(env.get(v))

    for i, eqn in enumerate(jaxpr.eqns):
        if i in early:
            continue
        if not any(is_var(v) and is_adapted(env.get(v)) for v in eqn.invars):
            pending.append(eqn)
            continue
        flush(i)
        shared = [v for v in eqn.invars if is_var(v) and not is_adapted(env.get(v))]
        group = [j for j in products.beside(i, shared) if any(map(is_ready, jaxpr.eqns[j].invars))]
        if len(group) > 1:
            eqns = [jaxpr.eqns[j] for j in group]
            results = TOGETHER[eqn.primitive.name](run, eqns, [list(map(read, e.invars)) for e in eqns])
            for j, result in zip(group, results, strict=True):
                if result is not None:
                    early.add(j)
                    env.update(zip(jaxpr.eqns[j].outvars, result, strict=True))
        if i not in early:
            evaluate_now(i)
    flush(len(jaxpr.eqns))
    return list(map(read, jaxpr.outvars))


class _Products:
    """Which equations of a jaxpr may be computed together.

    Attributes:
      layouts: variable -> the equation that makes it of one other and only changes how that lies.
    """

    def __init__(self, eqns: Sequence[Any]):
        self._eqns, self.layouts, self._of = eqns, {}, {}
        for i, eqn in enumerate(eqns):
            name = eqn.primitive.name
            if name in TOGETHER:
                for v in eqn.invars:
                    if not isinstance(v, jex.Literal):
                        self._of.setdefault((name, v), []).append(i)
            elif name in LAYOUTS and len(eqn.invars) == 1:
                self.layouts.update(dict.fromkeys(eqn.outvars, i))

    def beside(self, i: int, operands: list) -> list[int]:
        """The equations from i on of the same primitive that have its only operand among ``operands``, too."""
        sets = [self._of.get((self._eqns[i].primitive.name, v), []) for v in operands]
        return [j for j in sets[0] if j >= i] if len(sets) == 1 else []


def _evaluator(run: Run, invars: list, outvars: list, eqns: list) -> Callable:
    """A function that evaluates equations without adapted operands. A run of them that comes again is jitted: the
    layers of an unrolled model are then traced, differentiated and lowered once."""
    fn = jex.jaxpr_as_fun(_compat.sub_jaxpr(invars, outvars, eqns))
    return run.again(_structure(invars, outvars, eqns) if len(eqns) > 2 else None, fn)


def _structure(invars: list, outvars: list, eqns: list) -> Hashable | None:
    """Equal for equations that compute the same of the same types. None where that cannot be told, or where they do
    more than compute."""
    numbers: dict[Any, int] = {}

    def number(v: Any) -> Hashable:
        return (
            (np.asarray(v.val).tobytes(), v.aval) if isinstance(v, jex.Literal) else numbers.setdefault(v, len(numbers))
        )

    key = [tuple((number(v), v.aval) for v in invars)]
    for eqn in eqns:
        if eqn.effects:
            return None
        key.append((eqn.primitive, eqn.ctx, tuple(map(number, eqn.invars)), tuple(eqn.params.items())))
        key.append(tuple((number(v), v.aval) for v in eqn.outvars))
    key.append(tuple(map(number, outvars)))
    return tuple(key) if _hashable(tuple(key)) else None


def step(run: Run, eqn: Any, values: list) -> list:
    """One equation with at least one adapted operand."""
    fn = RULES.get(eqn.primitive.name)
    results = None if fn is None else fn(run, eqn, values)
    if results is None:
        results = plain(eqn, [run.materialize(v, eqn.primitive.name) for v in values])
    return results


def plain_jaxpr(run: Run, jaxpr: jex.ClosedJaxpr, args: Sequence[Any], where: str) -> list:
    """``evaluate``, with every result an array."""
    return [run.materialize(out, where) for out in evaluate(run, jaxpr, args)]


@dataclasses.dataclass(frozen=True)
class _Static:
    """The arguments that are not arrays, and the structure of all: part of the key of the compiled function."""

    treedef: Any
    leaves: tuple[Any, ...]  # _ARRAY where an array goes


class _Array:
    def __repr__(self):
        return "<array>"


_ARRAY = _Array()


def _is_array(x: Any) -> bool:
    return isinstance(x, (jax.Array, jax.ShapeDtypeStruct)) or hasattr(x, "__array__") and hasattr(x, "dtype")


def trace(fn: Callable, args: tuple, kwargs: dict) -> tuple[jex.ClosedJaxpr, Any, list]:
    """(jaxpr, tree of results, operands): ``fn`` traced with arrays in the places of adapted weights. A quantized leaf
    that nothing adapts becomes a weight whose method is the base's product."""
    named, treedef = jax.tree.flatten_with_path((args, kwargs), is_leaf=lambda x: is_adapted(x) or is_stored(x))
    name = lambda keys: paths.path_of(keys[2:] or keys[1:])
    leaves = [AdaptedWeight.unadapted(leaf, name(keys)) if is_stored(leaf) else leaf for keys, leaf in named]
    operands = [leaf for leaf in leaves if is_adapted(leaf) or _is_array(leaf)]
    where = [i for i, leaf in enumerate(leaves) if is_adapted(leaf) or _is_array(leaf)]

    def flat(*arrays):
        full = list(leaves)
        for i, array in zip(where, arrays, strict=True):
            full[i] = array
        args, kwargs = jax.tree.unflatten(treedef, full)
        return fn(*args, **kwargs)

    jaxpr, out = jax.make_jaxpr(flat, return_shape=True)(*map(_stand_in, operands))
    return jaxpr, jax.tree.structure(out), operands


def _stand_in(x: Any) -> Any:
    """What the function is traced with in the place of an operand."""
    if not is_adapted(x):
        return x
    if not is_stored(x.base) and not is_far(x.base):
        return x.base
    kind = jax.typeof(jax.tree.leaves(x.base)[0])
    sharding = None if is_stored(x.base) or kind.sharding.mesh.empty else kind.sharding
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding, manual_axis_type=kind.manual_axis_type)


def run_traced(run: Run, fn: Callable, args: tuple, kwargs: dict) -> Any:
    jaxpr, out_tree, operands = trace(fn, args, kwargs)
    return jax.tree.unflatten(out_tree, plain_jaxpr(run, jaxpr, operands, "output"))


def lift(
    fn: Callable,
    *,
    aux: bool = False,
    on_materialize: str = "warn",
    implementation: str | None = None,
) -> Callable:
    """Make a function accept adapted weights wherever it accepts arrays.

    >>> apply = jlora.lift(model.apply)
    >>> logits = apply({"params": adapted.bind(trainable)}, ids)

    Quantized weights (``jlora.quant``) may stand in its arguments as well, adapted or not. Their matrices are formed in
    the products that use them, for the forward and again for the backward pass, and not kept.

    The function stays as it is: what it does with a weight decides how the adaptation is computed. A product, a
    convolution, an embedding lookup or a ragged product takes the method's low-rank path; layout changes, scans, remat,
    ``jit`` and ``shard_map`` around it are entered. Anything else forms the effective weight: always correct, never
    silent. The result composes with ``jit``, ``grad``, ``vmap`` and sharding like the function itself.

    Args:
      fn: any function of pytrees that JAX can trace. Arguments that are not arrays (flags, strings, None, numbers)
        are static and must be hashable; a new value traces anew.
      aux: also return what methods report (balancing losses, statistics): ``(fn's result, {path: [report, ...]})``,
        one report a use, stacked along a leading axis by a scan.
      on_materialize: when an effective weight is formed, "warn" (once a weight and primitive), "error" or be "silent".
      implementation: which form of the kernels to use; see ``jlora.kernels``. None lets them choose; "plain" is the
        one with forward-mode derivatives.

    Returns:
      A function of the same arguments. Outside of ``jit`` it is compiled, once for each structure, shape, dtype and
      static argument; inside it becomes part of the program around it, as ``fn`` would.

    A function with a custom derivative that takes an adapted weight itself is given the effective weight, since its
    derivative is defined for a weight and for nothing else. (Attention and the like, which take activations, are
    unaffected.)
    """
    if on_materialize not in ("warn", "error", "silent"):
        raise ValueError(f"on_materialize is 'warn', 'error' or 'silent'; got {on_materialize!r}.")

    def inline(static: _Static, arrays: list) -> Any:
        arrays = iter(arrays)
        leaves = [next(arrays) if leaf is _ARRAY else leaf for leaf in static.leaves]
        args, kwargs = jax.tree.unflatten(static.treedef, leaves)
        run = Run(on_materialize, implementation, collect=aux)
        out = run_traced(run, fn, args, kwargs)
        return (out, run.aux) if aux else out

    compiled = jax.jit(inline, static_argnums=0)

    @functools.wraps(fn)
    def lifted(*args, **kwargs):
        leaves, treedef = jax.tree.flatten((args, kwargs))
        static = _Static(treedef, tuple(_ARRAY if _is_array(leaf) else leaf for leaf in leaves))
        try:
            hash(static)
        except TypeError as error:
            bad = next(leaf for leaf in static.leaves if not _hashable(leaf))
            raise TypeError(
                f"{getattr(fn, '__name__', fn)} was lifted and called with {bad!r} of type {type(bad).__name__}, which "
                "is neither an array nor hashable. Close over it, or pass it as an array."
            ) from error
        # Within a trace the equations join it as they are: a jit of their own would be traced again for its gradient.
        call = inline if _compat.is_staging() else compiled
        return call(static, [leaf for leaf in leaves if _is_array(leaf)])

    return lifted


def _hashable(x: Any) -> bool:
    try:
        hash(x)
    except TypeError:
        return False
    return True
