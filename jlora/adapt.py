"""``adapt`` and what it makes: the user's tree, frozen, and a small trainable tree beside it."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from jlora import paths
from jlora.lift.usage import usage as trace_usage
from jlora.methods.base import Method, Site
from jlora.paths import Pattern
from jlora.storage import dense, is_abstract, is_stored, one_by_one
from jlora.tables import table
from jlora.weight import AdaptedWeight, Axes, Params

ALL_LINEAR = "all-linear"
# Output heads, which "all-linear" leaves alone as PEFT does, and names that mean a [in, out] kernel in Flax and Haiku.
_HEADS = ("lm_head", "output_head", "unembed", "unembedding")
_KERNELS = ("kernel", "w")
_TABLES = ("embedding", "embeddings")


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("base", "trainable", "frozen"), meta_fields=("_sites",)
)
@dataclasses.dataclass(frozen=True)
class Adapted:
    """A parameter tree and its adapters. A pytree: it can be jitted over, donated, sharded, checkpointed.

    Attributes:
      base: the user's tree as it was given, the same buffers. Frozen. It may hold quantized weights (``jlora.quant``).
      trainable: ``{path: the method's trainable parameters}``, and an entry for each group of shared ones.
      frozen: the methods' buffers, same keys.
    """

    base: PyTree
    trainable: dict[str, Any]
    frozen: dict[str, Any]
    _sites: tuple[tuple[str, Site], ...]

    @property
    def sites(self) -> dict[str, Site]:
        """What is adapted: path -> method, axes and shape."""
        return dict(self._sites)

    def replace(self, **changes: Any) -> Adapted:
        """A copy with other ``base``, ``trainable`` or ``frozen``."""
        return dataclasses.replace(self, **changes)

    def bind(self, trainable: dict[str, Any] | None = None, context: Mapping[str, Any] | None = None) -> PyTree:
        """The tree to hand to a lifted function: the base with adapted weights in the places of the adapted leaves.

        Args:
          trainable: the trainable parameters to use, by default this object's: differentiate with respect to them.
          context: what methods need at run time and is not a parameter. ``"key"``: a random key; dropout is on exactly
            when it is given. Everything else is handed to the methods as it is.

        Returns:
          A tree of the base's structure. Nothing in it is trained but ``trainable``: the base carries no gradient.
        """
        bound = self if trainable is None else self.replace(trainable=self._checked(trainable))
        if not isinstance(context, Mapping | None):
            raise TypeError(f"bind(context=...) wants a dictionary such as {{'key': key}}; got {_short(context)}.")
        context = dict(context or {})
        key = context.pop("key", None)
        sites = self.sites
        leaves, treedef = paths.flatten(self.base)
        out = []
        for path, leaf in leaves:
            site = sites.get(path)
            if site is None:
                out.append(leaf)
                continue
            p, method = bound.params_of(path, site), site.method
            if method.whole_leaf:
                out.append(method.weight(dense(leaf), p))
                continue
            keys = None
            if key is not None and (method.dropout > 0.0 or method.draws):
                keys = _stack_keys(paths.fold_path(key, path), site.canonical_shape[0])
            labels = site.axes.labels(site.shape)
            values = context | {"key": key} if key is not None and method.model_key else context
            own, values = method.enter(path, site, p._replace(shared=None), values)
            out.append(AdaptedWeight(leaf, own, p.shared, keys, values or None, method, labels, path))
        return jax.tree.unflatten(treedef, out)

    def _checked(self, trainable: Any) -> Mapping[str, Any]:
        if not isinstance(trainable, Mapping) or any(path not in trainable for path, _ in self._sites):
            got = sorted(map(str, trainable)) if isinstance(trainable, Mapping) else _short(trainable)
            raise ValueError(
                f"bind(trainable) wants what adapted.trainable is, with entries {sorted(self.sites)}; got {got}. "
                "A context goes by name, bind(context={'key': key}); the model's own parameters into replace(base=...)."
            )
        return trainable

    def __getitem__(self, path: Any) -> Any:
        raise TypeError(
            f"This is an Adapted, no tree of parameters, and has no {path!r}: pass adapted.bind() to a lifted "
            "function, or look into adapted.base and adapted.trainable."
        )

    def params_of(self, path: str, site: Site) -> Params:
        """What the method of a leaf sees: the leaf's own parameters, and its group's."""
        group, shared = site.method.group, None
        if group is not None:
            shared = {**self.trainable.get(group, {}), **self.frozen.get(group, {})}
        if site.method.follows_weight and group in self.sites:
            weight = dense(dict(paths.flatten(self.base)[0])[group])
            shared["weight"] = self.sites[group].axes.to_canonical(weight)
        return Params(self.trainable[path], self.frozen.get(path), shared)

    def __repr__(self) -> str:
        trained = sum(leaf.size for leaf in jax.tree.leaves(self.trainable))
        return f"Adapted({len(self._sites)} leaves adapted, {trained:,} trainable parameters; see jlora.summary)"


def adapt(
    params: PyTree,
    methods: Method | Mapping[Pattern, Method] | Sequence[tuple[Pattern, Method]],
    targets: Pattern | Sequence[Pattern] | None = None,
    *,
    key: jax.Array | None = None,
    exclude: Pattern | Sequence[Pattern] = (),
    fn: Callable | None = None,
    args: Sequence[Any] = (),
    usage: Mapping[str, Any] | None = None,
    axes: Mapping[Pattern, Axes] | None = None,
    param_dtype: Any = None,
    allow_unmatched: bool = False,
    stats: Any = None,
) -> Adapted:
    """Put adapters beside a parameter tree.

    >>> adapted = jlora.adapt(params, jlora.LoRA(rank=16, alpha=32), targets="all-linear", key=jax.random.key(0))
    >>> adapted = jlora.adapt(params, {"**/q_proj/kernel": jlora.LoRA(8), "**/bias": jlora.Full()}, key=key)

    Args:
      params: any pytree of arrays (or of ``jax.ShapeDtypeStruct``, to plan without allocating).
      methods: one method, for ``targets``; or rules, pattern -> method, tried in order: the first match adapts a leaf.
        A method for matrices passes over leaves with fewer than two axes, so ``"**/mlp/**"`` need not exclude biases.
      targets: what the one method adapts: a pattern (``jlora.paths``), several, or ``"all-linear"``: every matrix that
        is multiplied, except embeddings and a head named like one (``lm_head``). The default is "all-linear".
      key: random key. Every leaf folds its own path into it, so adding a leaf changes no other leaf's start.
      exclude: patterns of leaves that no rule touches.
      fn, args: the model's function; ``fn(params, *args)`` is traced abstractly, once, to find out how it uses each
        leaf: which axes are contracted, which are stacked. Needed for leaves of three and more axes, unless ``usage``
        (the result of ``jlora.usage``) or ``axes`` says so. Leaves of two axes are [in, out] without it.
      axes: ``{pattern: Axes}``, for those who know better.
      param_dtype: dtype of the adapters; by default float32, or the leaf's if that is wider.
      allow_unmatched: let a rule adapt nothing, and a pattern of ``exclude`` or ``axes`` match nothing.
      stats: what ``jlora.calibrate`` found, for methods that start from data (``jlora.init``).

    Returns:
      An ``Adapted``. Its output starts as the base's (or as the method's file says).

    Raises:
      ValueError: a rule that adapts nothing, a rank that a leaf's shape does not allow, a leaf whose axes cannot be
        known. The message names the leaf, its shape, the rule and what to do.
      TypeError: ``params`` is adapted already, or one argument stands in the place of another.
    """
    sites = plan(
        params,
        methods,
        targets,
        exclude=exclude,
        fn=fn,
        args=args,
        usage=usage,
        axes=axes,
        allow_unmatched=allow_unmatched,
    )
    return build(params, sites, key=key, param_dtype=param_dtype, stats=stats)


def plan(
    params: PyTree,
    methods: Method | Mapping[Pattern, Method] | Sequence[tuple[Pattern, Method]],
    targets: Pattern | Sequence[Pattern] | None = None,
    *,
    exclude: Pattern | Sequence[Pattern] = (),
    fn: Callable | None = None,
    args: Sequence[Any] = (),
    usage: Mapping[str, Any] | None = None,
    axes: Mapping[Pattern, Axes] | None = None,
    allow_unmatched: bool = False,
) -> dict[str, Site]:
    """What ``adapt`` of the same arguments adapts: rules and axes settled, and nothing made."""
    _check_plain(params)
    leaves, _ = paths.flatten(params)
    if fn is not None and usage is None:
        usage = trace_usage(fn, params, *args)
    rules = _rules(methods, targets)
    find = _AxesFinder(usage, axes or {})
    exclude = _as_list(exclude)
    chosen: dict[str, Site] = {}
    behind: dict[int, str] = {}  # a rule -> a leaf of its own that an earlier rule with another method adapts
    hits = [0] * len(rules)
    passed: list[list[tuple[str, Any]]] = [[] for _ in rules]  # matched, but not by a method for it
    for path, leaf in leaves:
        if not hasattr(leaf, "shape") or any(paths.matches(p, path, leaf) for p in exclude):
            continue
        for i, (pattern, method) in enumerate(rules):
            if not find.matches(pattern, path, leaf):
                continue
            if not jnp.issubdtype(leaf.dtype, jnp.floating) or not (method.whole_leaf or find.is_matrix(path, leaf)):
                passed[i].append((path, leaf))
                continue
            if path not in chosen:
                chosen[path] = _site(path, leaf, pattern, method, find)
            if chosen[path].method == method:
                hits[i] += 1
            else:
                behind.setdefault(i, path)
    if not allow_unmatched:
        names = [path for path, _ in leaves]
        for option, patterns in {"exclude": exclude, "axes": [pattern for pattern, _ in find.explicit]}.items():
            for pattern in patterns:
                if not any(paths.matches(pattern, path, leaf) for path, leaf in leaves):
                    raise ValueError(_no_match(f"{option}: {paths.describe(pattern)}", pattern, names))
        for i, path in behind.items():
            if not hits[i]:
                pattern, method = rules[i]
                raise ValueError(
                    f"The rule {paths.describe(pattern)}: {method} adapts nothing: an earlier rule takes what it "
                    f"matches, {path!r} with {chosen[path].method}. The first match counts: put it before that one."
                )
        for (pattern, method), hit, skipped in zip(rules, hits, passed, strict=True):
            if not hit:
                raise ValueError(_unmatched(pattern, method, skipped, names, usage is not None))
    return chosen


def build(
    params: PyTree,
    sites: Mapping[str, Site],
    *,
    key: jax.Array | None,
    param_dtype: Any = None,
    arrays: dict[str, Any] | None = None,
    stats: Any = None,
) -> Adapted:
    """Initialize the parameters of the given sites: what is left of ``adapt`` once rules and axes are settled."""
    arrays = dict(paths.flatten(params)[0]) if arrays is None else arrays
    found = _stats_of(sites, stats)
    if not is_abstract(found):
        sites = _allocated(sites, found)
    if key is None:
        if any(not site.method.whole_leaf for site in sites.values()):
            raise ValueError("These methods start from random numbers: pass key=jax.random.key(seed).")
        key = jax.random.key(0)
    trainable, frozen = {}, {}
    groups: dict[str, dict[str, Site]] = {}
    for path, site in sites.items():
        if site.method.group is not None and not (site.method.whole_leaf and site.method.group in sites):
            groups.setdefault(site.method.group, {})[path] = site
    of_members: dict[str, dict[str, jax.Array]] = {}
    for group, members in groups.items():
        of = {site.method for site in members.values()}
        if len(of) > 1:
            raise ValueError(
                f"The group {group!r} is shared by different methods, {sorted(map(repr, of))}: give them two names."
            )
        if group in sites:
            raise ValueError(f"The group {group!r} has the name of a leaf: give it another.")
        wide = functools.reduce(jnp.promote_types, (arrays[path].dtype for path in members), jnp.float32)
        abstract = any(is_abstract(arrays[path]) for path in members)
        (method,) = of
        of_all = functools.partial(
            _init_group,
            method=method,
            sites=tuple(members.items()),
            dtype=wide if param_dtype is None else jnp.dtype(param_dtype),
        )
        weights = {path: arrays[path] for path in members} if method.needs_weights else None
        if abstract:
            made, each = jax.eval_shape(of_all, key, weights)
        else:
            made, each = of_all(paths.fold_path(key, group), weights)
            made, each = _place_group(made, each, members, arrays)
        for tree, part in ((trainable, made.trainable), (frozen, made.frozen)):
            if part is not None:
                tree[group] = part
        of_members |= each
    for path, site in sites.items():
        leaf, group = arrays[path], site.method.group
        dtype = jnp.promote_types(leaf.dtype, jnp.float32) if param_dtype is None else jnp.dtype(param_dtype)
        shared = trainable.get(group, {}) | frozen.get(group, {}) if site.method.needs_weights else None
        own_stats = found.get(path)
        init = functools.partial(_starter(leaf, site, shared, own_stats), site=site, dtype=dtype)
        if is_abstract((leaf, shared, own_stats)):
            own = jax.eval_shape(init, key, leaf, shared, own_stats)
        else:
            own = init(paths.fold_path(key, path), leaf, shared, own_stats)
        trainable[path] = own.trainable
        if own.frozen is not None:
            frozen[path] = own.frozen
        if path in of_members:
            frozen[path] = frozen.get(path, {}) | of_members[path]
    return Adapted(params, trainable, frozen, tuple(sites.items()))


def placement(site: Site, mesh: Mesh, spec: PartitionSpec) -> Callable[[str], NamedSharding]:
    """From the names of a parameter's axes to its sharding, beside a weight that is sharded by ``spec``.

    An axis that is sharded in the weight is sharded in the parameters that have it and the rank is whole, rather than
    as the compiler happens to choose: then a product over a sharded axis stays local, with a small sum over devices. In
    explicit mode, where types have to agree, they are whole.
    """
    if AxisType.Explicit in mesh.axis_types:
        return lambda dims: NamedSharding(mesh, PartitionSpec())
    axes, spec = site.axes, [*spec, *(None,) * (len(site.shape) - len(spec))]
    head = [spec[axis] for axis in axes.stack]
    entry = {"in": spec[axes.inputs[0]], "out": spec[axes.outputs[0]]}  # of a flattened group: its slowest axis's
    return lambda dims: NamedSharding(mesh, PartitionSpec(*head, *(entry.get(dim) for dim in dims.split())))


def _placement(leaf: Any, site: Site) -> Callable[[str], NamedSharding] | None:
    """``placement`` beside a leaf that lies on a mesh."""
    concrete = isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer)
    if site.method.whole_leaf or not concrete or not isinstance(leaf.sharding, NamedSharding):
        return None
    return placement(site, leaf.sharding.mesh, leaf.sharding.spec)


def _stats_of(sites: Mapping[str, Site], stats: Any) -> dict[str, dict[str, jax.Array]]:
    """The statistics that the methods start from, by path and name, all that there are for such a leaf."""
    needed = {path: site for path, site in sites.items() if site.method.needs}
    if not needed:
        return {}
    if stats is None:
        path, site = next(iter(needed.items()))
        raise ValueError(
            f"{path!r}: {site.method} starts from data. Collect it first, with the same rules: "
            "stats = jlora.calibrate(loss_fn, params, batches, rules); then adapt(params, rules, stats=stats)."
        )
    found = {}
    for path, site in needed.items():
        own = dict(stats.leaves.get(path, {}))
        missing = [name for name in site.method.needs if name not in own]
        if missing:
            there = sorted(own) or "nothing"
            raise ValueError(
                f"{path!r}: {site.method} starts from {', '.join(missing)}, and the statistics have {there} of this "
                "leaf. Calibrate with the same rules; inputs of convolutions, lookups and ragged products have none."
            )
        if not is_abstract(own):
            problem = _check_stats(site, own)
            if problem:
                raise ValueError(f"{path!r} {site.shape}: {problem} ({site.method}).")
        found[path] = own
    return found


def _check_stats(site: Site, stats: dict[str, Any]) -> str | None:
    stack, n_in, n_out = site.canonical_shape
    shapes = {"n": stack, "x": (*stack, n_in), "absx": (*stack, n_in), "xx": (*stack, n_in, n_in)}
    shapes |= {"scaled_xx": (*stack, n_in, n_in), "g": (*stack, n_in, n_out)}
    for name, value in stats.items():
        if name in shapes and value.shape != shapes[name]:
            return f"the statistics {name!r} have the shape {value.shape}, and this leaf wants {shapes[name]}"
    return site.method.check_stats(site, stats)


def _allocated(sites: Mapping[str, Site], found: dict[str, dict[str, jax.Array]]) -> dict[str, Site]:
    """The sites with the ranks that their starts give them."""
    starts = dict.fromkeys(site.method.start for path, site in sites.items() if path in found)
    for start in starts:
        own = {path: site for path, site in sites.items() if path in found and site.method.start == start}
        given = start.allocate(own, found)
        sites = {path: given.get(path, site) for path, site in sites.items() if path in given or path not in own}
    return dict(sites)


def _starter(leaf: Any, site: Site, shared: Any, stats: Any) -> Callable:
    """The compiled ``_init`` of a leaf, its results placed as ``_placement`` says."""
    place = _placement(leaf, site)
    if place is None:
        return _compiled_init(None)
    own = jax.eval_shape(functools.partial(_init, site=site, dtype=jnp.float32), jax.random.key(0), leaf, shared, stats)
    dims = site.method.dims(own)._replace(shared=None)
    leaves, treedef = jax.tree.flatten(jax.tree.map(place, dims))
    return _compiled_init(tuple(leaves), treedef)


@functools.cache
def _compiled_init(shardings: Any, treedef: Any = None) -> Callable:
    shardings = shardings if treedef is None else jax.tree.unflatten(treedef, shardings)
    return jax.jit(_init, static_argnames=("site", "dtype"), out_shardings=shardings)


def _init(key: jax.Array, leaf: jax.Array, shared: Any, stats: Any, *, site: Site, dtype: Any) -> Params:
    """A method's start for every matrix of a leaf. Those of a quantized leaf are formed one after another, and those
    from statistics are decomposed so."""
    if site.method.whole_leaf:
        return site.method.init(key, dense(leaf), site, dtype)
    given = {"shared": shared} if site.method.needs_weights else {}
    of = lambda stats: {"stats": stats} if site.method.needs else {}
    one = lambda key, w, stats: site.method.init(key, w, site, dtype, **given, **of(stats))
    stack = site.canonical_shape[0]
    keys = _stack_keys(key, stack)
    if is_stored(leaf):
        own = one_by_one(lambda each: one(each[0], each[1].matrix(), each[2]), stack)((keys, leaf, stats))
    elif stats is not None:
        own = one_by_one(lambda each: one(*each), stack)((keys, site.axes.to_canonical(leaf), stats))
    else:
        for _ in stack:
            one = jax.vmap(one)
        own = one(keys, site.axes.to_canonical(leaf), stats)
    assert own.shared is None
    return site.method.init_stack(own, site, dtype)


@functools.partial(jax.jit, static_argnames=("method", "sites", "dtype"))
def _init_group(
    key: jax.Array, weights: dict[str, Any] | None, *, method: Method, sites: tuple[tuple[str, Site], ...], dtype: Any
) -> tuple[Params, dict[str, dict[str, jax.Array]]]:
    """What a group shares, and what its leaves hold of their own because of it."""
    members, given = dict(sites), {}
    if weights is not None:
        given["weights"] = {path: members[path].axes.to_canonical(leaf) for path, leaf in weights.items()}
    return method.init_shared(key, members, dtype, **given), method.init_members(key, members, dtype)


def _place_group(
    made: Params, each: dict[str, Any], members: Mapping[str, Site], arrays: Mapping[str, Any]
) -> tuple[Params, dict[str, Any]]:
    """On a mesh: what is shared, whole on every device; the leaves' own, as their weights."""
    places = {path: _placement(arrays[path], site) for path, site in members.items()}
    on_mesh = [path for path, place in places.items() if place is not None]
    if not on_mesh:
        return made, each
    whole = NamedSharding(arrays[on_mesh[0]].sharding.mesh, PartitionSpec())
    for path in each.keys() & set(on_mesh):
        dims = members[path].method.dims(Params(frozen=each[path])).frozen
        each[path] = {name: jax.device_put(leaf, places[path](dims[name])) for name, leaf in each[path].items()}
    return jax.device_put(made, whole), each


def _stack_keys(key: jax.Array, stack: tuple[int, ...]) -> jax.Array:
    """A key for each index of the stack; the key itself for a single matrix."""
    if not stack:
        return key
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(math.prod(stack)))
    return keys.reshape(*stack, *keys.shape[1:])


# Rules and axes.


def _as_list(patterns: Any) -> list:
    return list(patterns) if isinstance(patterns, (list, tuple)) else [patterns]


def _rules(methods: Any, targets: Any) -> list[tuple[Pattern, Method]]:
    if isinstance(methods, Method):
        rules = [(pattern, methods) for pattern in _as_list(ALL_LINEAR if targets is None else targets)]
    elif isinstance(methods, Mapping | list | tuple):
        rules = list(methods.items() if isinstance(methods, Mapping) else methods)
    else:
        raise TypeError(
            f"adapt(params, methods) wants a method like LoRA(8), or rules, {{pattern: method}}; got {_short(methods)}."
        )
    for rule in rules:
        if not (isinstance(rule, tuple) and len(rule) == 2 and isinstance(rule[1], Method)):
            raise TypeError(
                f"A rule is a pair (pattern, method), the method an instance like LoRA(8); got {_short(rule)}."
            )
    if targets is not None and not isinstance(methods, Method):
        raise ValueError("targets goes with a single method; rules name their own patterns.")
    if not rules:
        raise ValueError("No rules were given: nothing would be adapted.")
    return rules


class _AxesFinder:
    """Which axes of a leaf are what: as given, as traced, or by the name of a leaf with two axes."""

    def __init__(self, usage: Mapping[str, Any] | None, axes: Mapping[Pattern, Axes]):
        self.usage, self.explicit = usage, list(axes.items())
        for pattern, given in self.explicit:
            if not isinstance(given, Axes):
                raise TypeError(
                    f"axes[{paths.describe(pattern)}]: jlora.Axes(inputs=(0,), outputs=(1,)), say, is wanted; got "
                    f"{_short(given)}."
                )

    def given(self, path: str, leaf: Any) -> Axes | None:
        own = leaf.axes if is_stored(leaf) else None
        for pattern, axes in self.explicit:
            if paths.matches(pattern, path, leaf):
                if own not in (None, axes):
                    raise ValueError(f"axes[{paths.describe(pattern)}]: {path!r} was quantized with {own}, not {axes}.")
                return axes
        if own is not None:
            return own
        if self.usage is not None and path in self.usage:
            return self.usage[path].axes
        return None

    def is_matrix(self, path: str, leaf: Any) -> bool:
        """Whether a method for matrices can be meant: biases may have several axes, too."""
        if leaf.ndim < 2:
            return False
        if self.given(path, leaf) is not None:
            return True
        return self.usage is None and path.split("/")[-1] not in ("bias", "b", "scale")

    def matches(self, pattern: Pattern, path: str, leaf: Any) -> bool:
        if pattern != ALL_LINEAR:
            return paths.matches(pattern, path, leaf)
        if leaf.ndim < 2 or any(segment in _HEADS for segment in path.split("/")):
            return False
        axes = self.given(path, leaf)
        if axes is not None:
            return axes.kind == "linear"
        if self.usage is not None:
            return False  # traced, and not multiplied by anything
        if path.split("/")[-1] not in _KERNELS:
            return False
        return True

    def find(self, path: str, leaf: Any) -> Axes | str:
        """The axes, or why they cannot be known."""
        axes = self.given(path, leaf)
        if axes is not None:
            return axes
        name = path.split("/")[-1]
        if leaf.ndim != 2:
            return f"a leaf of {leaf.ndim} axes may be stacked, have several heads or be a convolution"
        if name == "weight":
            return "a leaf named 'weight' is [out, in] in some libraries and [in, out] in others"
        return Axes((0,), (1,), kind="embedding" if name in _TABLES else "linear")


def check_adapted(adapted: Any, fn: str) -> None:
    """Refuse what ``adapt`` has not made."""
    if not isinstance(adapted, Adapted):
        raise TypeError(f"{fn} wants what jlora.adapt makes, an Adapted; got {_short(adapted)}.")


def _check_plain(params: Any) -> None:
    """Refuse what is adapted already, or no tree of parameters."""
    is_jlora = lambda x: isinstance(x, Adapted | AdaptedWeight | Method)
    for found in filter(is_jlora, jax.tree.leaves(params, is_leaf=is_jlora)):
        if isinstance(found, Method):
            raise TypeError(f"adapt(params, methods): the tree of parameters comes first; got {found} in it.")
        raise TypeError(
            "adapt(params, methods) wants a plain tree of parameters; this one is adapted already. Adapt adapted.base, "
            "by all rules at once; or jlora.merge(adapted), on top of what it learned."
        )


def _short(x: Any) -> str:
    """For a message: small values as they are, the type of others."""
    text = repr(x)
    return text if len(text) <= 60 and not isinstance(x, jax.Array) else f"an object of type {type(x).__name__}"


def _site(path: str, leaf: Any, pattern: Pattern, method: Method, find: _AxesFinder) -> Site:
    shape = tuple(leaf.shape)
    rule = f"rule {paths.describe(pattern)}: {method}"
    if method.whole_leaf:
        return Site(method, None, shape)
    axes = find.find(path, leaf)
    if isinstance(axes, str):
        raise ValueError(
            f"Which axes of {path!r} {shape} are inputs and outputs is not known: {axes} ({rule}). Pass the model's "
            "function, adapt(..., fn=apply, args=(batch,)) where apply(params, batch) runs it (it is only traced), or "
            f"adapt(..., axes={{{path!r}: jlora.Axes(inputs=(...), outputs=(...), stack=(...))}})."
        )
    try:
        site = Site(method, axes, shape)
        axes.labels(shape)
    except ValueError as error:
        raise ValueError(f"{path!r}: {error} ({rule})") from None
    problem = method.check(site)
    if problem:
        raise ValueError(f"{path!r} {shape}: {problem} ({rule}).")
    return site


def _unmatched(pattern: Pattern, method: Method, skipped: list[tuple[str, Any]], names: list[str], traced: bool) -> str:
    rule = f"rule {paths.describe(pattern)}: {method}"
    them = ", ".join(f"{path} {leaf.dtype}{list(leaf.shape)}" for path, leaf in skipped[:5])
    if skipped and not any(jnp.issubdtype(leaf.dtype, jnp.floating) for _, leaf in skipped):
        return f"The {rule} matches only leaves that are not of floats: {them}."
    if skipped:
        return (
            f"The {rule} matches only leaves that are no weight of a product: {them}. Use Full() to train leaves of "
            "floats as they are, or another pattern."
        )
    if pattern == ALL_LINEAR and not traced:
        return (
            f"The {rule} finds no kernel: without the model's function it looks for leaves named "
            f"{' or '.join(_KERNELS)}. Pass adapt(..., fn=apply, args=(batch,)), or a pattern. Leaves: {names[:8]}."
        )
    return _no_match(f"The {rule}", pattern, names)


def _no_match(what: str, pattern: Pattern, names: list[str]) -> str:
    return f"{what} matches no leaf. Nearest: {paths.nearest(pattern, names)}. (allow_unmatched=True permits it.)"


# Reading.


def summary(adapted: Adapted) -> str:
    """A table of what is adapted and what is not.

    One row a leaf: path, shape, axes (stack | in | out), method, rank, scale, trainable parameters, their dtype, and
    their share of all trainable parameters.
    """
    check_adapted(adapted, "summary")
    sizes = {
        key: sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree)) for key, tree in adapted.trainable.items()
    }
    total = sum(sizes.values())
    leaves, _ = paths.flatten(adapted.base)
    shapes = {path: leaf for path, leaf in leaves if hasattr(leaf, "shape")}
    header = ("path", "shape", "axes", "method", "rank", "scale", "trainable", "dtype", "share")
    rows = [header]
    for path, site in adapted._sites:
        info = site.method.describe()
        dtypes = {str(leaf.dtype) for leaf in jax.tree.leaves(adapted.trainable[path])}
        count = sizes[path]
        rows.append(
            (
                path,
                "x".join(map(str, site.shape)) or "scalar",
                _describe_axes(site.axes),
                site.method.name,
                info.get("rank", "-"),
                info.get("scale", "-"),
                f"{count:,}",
                ",".join(sorted(dtypes)),
                f"{count / max(total, 1):.1%}",
            )
        )
    for group in sorted(set(adapted.trainable) - set(adapted.sites)):
        rows.append((f"({group}: shared)", "", "", "", "", "", f"{sizes[group]:,}", "", f"{sizes[group] / total:.1%}"))
    lines = [table(rows, right=("rank", "scale", "trainable", "share"))]
    base = sum(math.prod(leaf.shape) for leaf in shapes.values())
    lines.append("")
    lines.append(f"trainable {total:,} beside {base:,} of the base ({total / max(base, 1):.2%})")
    rest = [f"{path} [{'x'.join(map(str, leaf.shape))}]" for path, leaf in shapes.items() if path not in adapted.sites]
    lines.append(f"not adapted ({len(rest)}): " + (", ".join(rest[:20]) + (", ..." if len(rest) > 20 else "")))
    return "\n".join(lines)


def _describe_axes(axes: Axes | None) -> str:
    if axes is None:
        return "whole"
    parts = [",".join(map(str, group)) for group in (axes.stack, axes.inputs, axes.outputs)]
    return "|".join(parts) + ("" if axes.kind == "linear" else f" {axes.kind}")
