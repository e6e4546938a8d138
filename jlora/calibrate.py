"""One pass over data for everything that starts from data (``jlora.init``).

The interpreter of ``jlora.lift`` runs the model with observers where weights stand. An observer computes its product
like the base, and reports sums over the inputs that it met; and it adds a matrix of zeros, whose gradient is the
weight's. The sums are outputs of the program and the gradients come from one ordinary ``jax.grad``, so scans, remat,
meshes and bfloat16 are as for training. All sums are float32 or wider, that of x^T g too, which is the gradient.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import os
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, PyTree

from jlora import paths
from jlora.adapt import plan
from jlora.lift.capture import input_weights
from jlora.lift.core import lift
from jlora.lift.usage import LeafUsage
from jlora.lift.usage import usage as trace_usage
from jlora.methods.base import Method, Site, unsharded
from jlora.paths import Pattern
from jlora.weight import AdaptedWeight, Axes, Context, Dot, MethodLike, Params

# What there is, and its axes after those of the stack.
STATISTICS = {
    "n": "",
    "x": "in",
    "absx": "in",
    "xx": "in in",
    "scaled_xx": "in in",
    "g": "in out",
}
_OF_INPUTS = ("n", "x", "absx", "xx", "scaled_xx")


@functools.partial(jax.tree_util.register_dataclass, data_fields=("leaves", "batches"), meta_fields=())
@dataclasses.dataclass(frozen=True)
class Calibration:
    """What ``calibrate`` found. A pytree of arrays: orbax can store it, and ``save`` does, in one file.

    Attributes:
      leaves: path -> statistic -> array, [*stack, ...]: "n" the tokens, "x" [in] and "absx" [in] the sums of x and of
        its absolute value over them, "xx" [in, in] the sum of x^T x; "scaled_xx" [in, in] the mean over the batches of
        X^T X, X [tokens, in] divided by the size of its largest entry; "g" [in, out] the mean over the batches of the
        loss's gradient.
      batches: how many.
    """

    leaves: dict[str, dict[str, Array]]
    batches: int | Array

    def save(self, file: str | os.PathLike[str]) -> None:
        """Write a NumPy ``.npz`` file."""
        arrays = {
            f"{path}:{name}": np.asarray(value) for path, own in self.leaves.items() for name, value in own.items()
        }
        file = pathlib.Path(file)
        temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp.npz")
        try:
            np.savez(temporary, **arrays, **{":batches": np.asarray(self.batches)})
            os.replace(temporary, file)
        finally:
            temporary.unlink(missing_ok=True)

    @classmethod
    def load(cls, file: str | os.PathLike[str]) -> Calibration:
        """What ``save`` wrote. The arrays are in host memory."""
        leaves: dict[str, dict[str, np.ndarray]] = {}
        with np.load(file) as arrays:
            if ":batches" not in arrays.files:
                raise ValueError(f"{file} is no file of Calibration.save: it holds {arrays.files[:5]}.")
            for key in arrays.files:
                path, _, name = key.rpartition(":")
                if path:
                    leaves.setdefault(path, {})[name] = arrays[key]
            return cls(leaves, int(arrays[":batches"]))


def calibrate(
    fn: Callable,
    params: PyTree,
    batches: Iterable[Any],
    methods: Method | Mapping[Pattern, Method] | Sequence[tuple[Pattern, Method]],
    targets: Pattern | Sequence[Pattern] | None = None,
    *,
    collect: Iterable[str] | None = None,
    token_weights: Callable[[Any], Array] | None = None,
    exclude: Pattern | Sequence[Pattern] = (),
    usage: Mapping[str, LeafUsage] | None = None,
    axes: Mapping[Pattern, Axes] | None = None,
    leaves_at_a_time: int | None = None,
    progress: Callable[[Iterable[Any]], Iterable[Any]] | None = None,
    start: Calibration | None = None,
) -> Calibration:
    """Collect, in one pass over batches, the statistics that methods start from.

    >>> rules = jlora.LoRA(16, start=jlora.init.EVA())
    >>> stats = jlora.calibrate(loss_fn, params, batches, rules)
    >>> adapted = jlora.adapt(params, rules, fn=loss_fn, args=(batches[0],), stats=stats, key=jax.random.key(0))

    Where only inputs are asked for, the forward pass runs alone; gradients take the backward pass as well.

    Args:
      fn: ``fn(params, batch)``: the loss, a scalar, where gradients are asked for; else anything that uses the weights.
        It is compiled once for each shape of batch. Without dropout, if the statistics are to be those of inference.
      params: the parameter tree, sharded or not, quantized or not.
      batches: pytrees of arrays. The first tells how the weights are used, unless ``usage`` does.
      methods, targets, exclude, axes: as for ``jlora.adapt``. They say which weights, and which statistics of each.
      collect: names of the statistics to collect of all these weights in place of what the methods ask for; see
        ``Calibration``.
      token_weights: ``token_weights(batch)``, the weight of each token in the sums over inputs, 0 for padding: an
        array of the inputs' leading axes, or flattened as they are. An input that is one for several tokens (a
        pooler's) has the largest of theirs. It does not act on gradients: mask the loss.
      leaves_at_a_time: how many leaves' gradients are on the device at a time; those that are finished wait in host
        memory. There is one pass for each group, so ``batches`` can be gone through again (a list, say).
      progress: wraps the batches of each pass, like ``tqdm.tqdm``.
      start: an earlier result to go on from, of the same weights and statistics.

    Raises:
      ValueError: no batch, no method that starts from data, activations or gradients that are not finite, a weight that
        the function does not use.
    """
    collect = None if collect is None else tuple(collect)
    unknown = [name for name in collect or () if name not in STATISTICS]
    if unknown:
        raise ValueError(f"collect={collect}: {unknown} are not known; there are {', '.join(STATISTICS)}.")
    if leaves_at_a_time is not None and leaves_at_a_time < 1:
        raise ValueError(f"leaves_at_a_time={leaves_at_a_time}: at least 1 is wanted, or None for all.")
    batches, first = _first(batches)
    if usage is None:
        usage = trace_usage(fn, params, first)
    sites = plan(params, methods, targets, exclude=exclude, usage=usage, axes=axes)
    wanted = {path: _wanted(path, site, collect, usage) for path, site in sites.items() if not site.method.whole_leaf}
    wanted = {path: names for path, names in wanted.items() if names}
    if not wanted:
        raise ValueError(
            f"None of the methods starts from data: {sorted({str(site.method) for site in sites.values()})}. Give one "
            "a start that does, LoRA(8, start=jlora.init.EVA()), or name statistics in collect=."
        )
    groups = _groups(wanted, leaves_at_a_time)
    if len(groups) > 1 and iter(batches) is batches:
        raise ValueError(f"leaves_at_a_time={leaves_at_a_time} takes {len(groups)} passes: give a list of batches.")
    found: dict[str, dict[str, Array]] = {path: {} for path in wanted}
    for group in groups:
        own = {path: sites[path] for path in group}
        part, count = _pass(fn, params, batches, own, group, token_weights, progress)
        move = jax.device_get if len(groups) > 1 else lambda tree: tree
        for path, values in part.items():
            found[path] |= move(values)
    result = Calibration({path: _means(own, count) for path, own in found.items()}, count)
    return result if start is None else _joined(start, result)


def planned(sites: Mapping[str, Site]) -> Calibration:
    """The shapes, without numbers, of what the methods of these sites start from."""
    leaves = {}
    for path, site in sites.items():
        if site.method.needs:
            leaves[path] = jax.eval_shape(functools.partial(_zeros, site, site.method.needs, jnp.float32))
    return Calibration(leaves, 0)


def _first(batches: Iterable[Any]) -> tuple[Iterable[Any], Any]:
    """The batches, and the first of them."""
    iterator = iter(batches)
    first = next(iterator, None)
    if first is None:
        raise ValueError("There is no batch to calibrate on: batches is empty. (A generator can be used once only.)")
    return (itertools.chain([first], iterator) if iterator is batches else batches), first


def _wanted(path: str, site: Site, collect: tuple[str, ...] | None, usage: Mapping[str, LeafUsage]) -> tuple[str, ...]:
    names = site.method.needs if collect is None else collect
    of_inputs = [name for name in names if name in _OF_INPUTS]
    has_inputs = site.axes.kind == "linear" and path in usage and "linear" in usage[path].kinds
    if of_inputs and not has_inputs:
        if collect is not None:
            return tuple(name for name in names if name not in of_inputs)
        uses = usage[path].kinds if path in usage else "no use in a product at all"
        raise ValueError(
            f"{path!r}: {site.method} starts from the inputs of a linear layer, and this weight has {uses}. Leave it "
            "out of the targets, or give it a start from the weight."
        )
    if "g" in names and has_inputs:
        names = ("n", *names)  # how many tokens the gradient is of: it costs nothing
    return tuple(dict.fromkeys(names))


def _groups(wanted: dict[str, tuple[str, ...]], size: int | None) -> list[dict[str, tuple[str, ...]]]:
    """What each pass collects. Statistics of inputs all come with the first."""
    of_gradient = [path for path, names in wanted.items() if "g" in names]
    if size is None or len(of_gradient) <= size:
        return [wanted]
    groups = [{path: ("g",) for path in of_gradient[i : i + size]} for i in range(0, len(of_gradient), size)]
    inputs = {path: tuple(name for name in names if name != "g") for path, names in wanted.items()}
    for path, names in inputs.items():
        if names:
            groups[0][path] = (*names, *groups[0].get(path, ()))
    return groups


def _pass(
    fn: Callable,
    params: PyTree,
    batches: Iterable[Any],
    sites: Mapping[str, Site],
    wanted: Mapping[str, tuple[str, ...]],
    token_weights: Callable | None,
    progress: Callable | None,
) -> tuple[dict[str, dict[str, Array]], int]:
    """Sums over all batches, and their number."""
    arrays = dict(paths.flatten(params)[0])
    wide = {path: _wide(arrays[path].dtype) for path in wanted}
    sums = {path: _zeros(sites[path], names, wide[path]) for path, names in wanted.items()}
    state = sums, {path: jnp.full((), -1) for path in wanted}
    step = functools.partial(_step, fn=fn, sites=tuple(sites.items()), weigh=token_weights)
    count = 0
    for batch in batches if progress is None else progress(batches):
        state = step(state, params, batch, count)
        count += 1
    if not count:
        raise ValueError("There is no batch to calibrate on: batches can be gone through once only. Give a list.")
    sums, bad = state
    for path, at in bad.items():
        if int(at) >= 0:
            raise ValueError(
                f"{path!r}: batch {int(at)} (counted from 0) gave activations or gradients that are not finite. Look "
                "at that batch, and at the model's dtype: float16 overflows above 65504."
            )
    for path, own in sums.items():
        if "n" in own and not bool(jnp.all(own["n"] > 0)):
            raise ValueError(
                f"No token was counted at {path!r}: the function does not use all of it, or every token weight is 0."
            )
    return sums, count


def _wide(dtype: Any) -> Any:
    return jax.dtypes.canonicalize_dtype(jnp.promote_types(dtype, jnp.float32))


def _zeros(site: Site, names: Sequence[str], dtype: Any) -> dict[str, Array]:
    stack, n_in, n_out = site.canonical_shape
    sizes = {"in": n_in, "out": n_out}
    return {name: jnp.zeros((*stack, *(sizes[axis] for axis in STATISTICS[name].split())), dtype) for name in names}


@functools.partial(jax.jit, static_argnames=("fn", "sites", "weigh"), donate_argnums=0)
def _step(
    state: Any, params: PyTree, batch: Any, number: Array, *, fn: Callable, sites: tuple, weigh: Callable | None
) -> Any:
    """``state`` with what one batch adds."""
    sums, bad = state
    of = dict(sites)
    leaves, treedef = paths.flatten(params)
    values = None if weigh is None else {"token_weights": weigh(batch)}
    accumulators = {path: {"g": jnp.zeros_like(own["g"])} for path, own in sums.items() if "g" in own}

    def observed(accumulators: dict) -> tuple[Array, dict]:
        def observe(path: str, leaf: Any) -> Any:
            if path not in sums:
                return leaf
            site = of[path]
            stack, labels = site.canonical_shape[0], site.axes.labels(leaf.shape)
            index = jnp.arange(site.stack).reshape(stack)
            names = tuple(name for name in sums[path] if name != "g")
            observer = _Observer(names, jnp.dtype(next(iter(sums[path].values())).dtype))
            p = Params(accumulators.get(path), {"index": index})
            return AdaptedWeight(leaf, p, None, None, values, observer, labels, path)

        tapped = jax.tree.unflatten(treedef, [observe(path, leaf) for path, leaf in leaves])
        out, reports = lift(fn, aux=True, on_materialize="silent")(tapped, batch)
        if accumulators and not (hasattr(out, "shape") and out.shape == () and jnp.issubdtype(out.dtype, jnp.floating)):
            raise ValueError(
                f"Gradients are asked for, so fn(params, batch) is the loss, one number; it gave {out}. Statistics of "
                "inputs alone (jlora.init.EVA, CorDA) take any function."
            )
        return out, reports

    if accumulators:
        grads, reports = jax.grad(observed, has_aux=True)(accumulators)
    else:
        reports, grads = observed({})[1], {}
    new_sums, new_bad = {}, {}
    for path, own in sums.items():
        added = _added(own, reports.get(path, [])) | {name: own[name] + g for name, g in grads.get(path, {}).items()}
        finite = jnp.stack([jnp.isfinite(value).all() for value in added.values()]).all()
        new_sums[path] = added
        new_bad[path] = jnp.where((bad[path] < 0) & ~finite, number, bad[path])
    return new_sums, new_bad


def _added(sums: dict[str, Array], reports: list[dict[str, Array]]) -> dict[str, Array]:
    """Sums with the reports of each use, each at the place in the stack that it is of."""
    out = dict(sums)
    for report in reports:
        index = report["index"]
        for name, total in out.items():
            if name not in report:
                continue
            rest = report[name].shape[index.ndim :]
            stack = total.shape[: total.ndim - len(rest)]
            flat = total.reshape(-1, *rest).at[index.reshape(-1)].add(report[name].reshape(-1, *rest))
            out[name] = flat.reshape(*stack, *rest)
    return out


def _means(own: Mapping[str, Array], count: int) -> dict[str, Array]:
    return {name: value / count if name in ("scaled_xx", "g") else value for name, value in own.items()}


def _joined(first: Calibration, second: Calibration) -> Calibration:
    """Two calibrations as one over the batches of both."""
    names = lambda of: {path: sorted(own) for path, own in of.leaves.items()}
    if names(first) != names(second):
        raise ValueError(
            f"start= holds other weights or statistics ({list(first.leaves)[:3]}...) than this pass collects "
            f"({list(second.leaves)[:3]}...): give it the same rules, or begin anew."
        )
    n, m = int(first.batches), int(second.batches)

    def join(name: str, a: Array, b: Array) -> Array:
        return (n * a + m * b) / (n + m) if name in ("scaled_xx", "g") else a + b

    leaves = {
        path: {name: join(name, first.leaves[path][name], value) for name, value in own.items()}
        for path, own in second.leaves.items()
    }
    return Calibration(leaves, n + m)


@dataclasses.dataclass(frozen=True)
class _Observer(MethodLike):
    """A method whose output is the base's, and that reports sums over its inputs.

    Attributes:
      names: of the sums.
      wide: their dtype.
    """

    names: tuple[str, ...]
    wide: Any

    sliceable = frozenset()
    lookup_only = False

    def forward(self, dot: Dot, x: Array, w: Array, p: Params, ctx: Context) -> tuple[Array, Any]:
        zeros = (p.trainable or {}).get("g")
        if dot.kind != "linear":
            return dot(x, w if zeros is None else w + zeros.astype(w.dtype)), None
        y = dot(x, w)
        if zeros is not None:
            y = _with_gradient(y, x, zeros)
        if not self.names:
            return y, None
        report = self.sums(jax.lax.stop_gradient(x), (ctx.values or {}).get("token_weights"))
        return y, report | {"index": p.frozen["index"]}

    def sums(self, x: Float[Array, "*tokens in"], weights: Array | None) -> dict[str, Array]:
        x = x.astype(self.wide)
        tokens = tuple(range(x.ndim - 1))
        if weights is None:
            weighted, n = x, jnp.asarray(x.size // x.shape[-1], self.wide)
        else:
            weights = input_weights(weights, x).astype(self.wide)
            weighted, n = x * weights[..., None], weights.sum()
        made = {
            "n": lambda: n,
            "x": lambda: unsharded(weighted.sum(tokens)),
            "absx": lambda: unsharded(jnp.abs(weighted).sum(tokens)),
            "xx": lambda: _over_tokens(weighted, x),
            "scaled_xx": lambda: _of_scaled(weighted, x),
        }
        return {name: made[name]() for name in self.names}

    def forward_transposed(self, dot: Dot, x: Array, wt: Array, p: Params, ctx: Context) -> Array:
        zeros = (p.trainable or {}).get("g")
        return dot(x, wt if zeros is None else wt + zeros.T.astype(wt.dtype))

    def weight_in(self, w: Array, p: Params, values: Any) -> Array:
        zeros = (p.trainable or {}).get("g")
        return w if zeros is None else w + zeros.astype(w.dtype)

    def dims(self, p: Params) -> Params:
        raise NotImplementedError("an observed weight is not sliced along its inputs or outputs")


def _of_scaled(weighted: Array, x: Array) -> Array:
    """X^T X of X over the size of its largest entry. A batch of zeros gives zeros."""
    largest = jnp.abs(jnp.max(x))
    return _over_tokens(weighted, x) / jnp.square(jnp.where(largest > 0, largest, 1.0))


def _over_tokens(a: Float[Array, "*n i"], b: Float[Array, "*n o"], dtype: Any = None) -> Float[Array, "i o"]:
    """a^T b, whole on every device where types say how arrays are sharded."""
    tokens = tuple(range(a.ndim - 1))
    sharded = any(axis is not None for x in (a, b) for axis in jax.typeof(x).sharding.spec)
    dtype = a.dtype if dtype is None else dtype
    return jax.lax.dot_general(
        a,
        b,
        ((tokens, tokens), ((), ())),
        precision="highest",
        preferred_element_type=dtype,
        out_sharding=PartitionSpec(None, None) if sharded else None,
    ).astype(dtype)


@jax.custom_vjp
def _with_gradient(y: Float[Array, "*n out"], x: Float[Array, "*n in"], zeros: Float[Array, "in out"]) -> Array:
    """y. Its gradient by ``zeros`` is x^T dy, summed in the dtype of ``zeros``."""
    return y


def _with_gradient_fwd(y, x, zeros):
    return y, (x, zeros)


def _with_gradient_bwd(residuals, dy):
    x, zeros = residuals
    return dy, jnp.zeros_like(x), _over_tokens(x, dy, zeros.dtype)


_with_gradient.defvjp(_with_gradient_fwd, _with_gradient_bwd)
