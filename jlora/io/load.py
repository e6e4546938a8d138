"""From a PEFT directory to an ``Adapted``."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from jlora import paths
from jlora.adapt import Adapted, build
from jlora.io import files, matching
from jlora.io.format import HEAD, Format
from jlora.io.formats import FORMATS
from jlora.io.layouts import View, candidates, from_torch, to_torch, view
from jlora.io.names import Names, Place, Tree
from jlora.io.tokens import BESIDE
from jlora.methods import Follow, Full, Offset, Site, TrainableTokens
from jlora.weight import Axes, Params

# Config fields that say which modules, or nothing that changes the numbers.
_COMMON = frozenset(
    "peft_type peft_version task_type base_model_name_or_path revision inference_mode auto_mapping runtime_config "
    "target_modules exclude_modules modules_to_save layers_to_transform layers_pattern bias fan_in_fan_out "
    "trainable_token_indices".split()
)
# What the fields of several formats hold. PEFT takes None for those in the last list, by type.
_INTEGERS = frozenset(
    "r init_r gralora_k hybrid_r mini_r oft_block_size num_cayley_neumann_terms boft_block_num boft_block_size "
    "boft_n_butterfly_factor group_size n_frequency block_size u depth num_vectors topk vector_length theta_d_length "
    "num_B stride_A n_tasks n_skills n_splits decompose_factor".split()
)
_NUMBERS = frozenset(
    "alpha lora_alpha randlora_alpha lora_dropout gralora_dropout hira_dropout miss_dropout vera_dropout pvera_dropout "
    "tinylora_dropout psoft_dropout vblora_dropout unilora_dropout randlora_dropout deft_dropout scaling eps "
    "delora_lambda d_initial weight_tying sparsity sparse_rate regularization_alpha".split()
)
_PATTERNS = frozenset("rank_pattern alpha_pattern lambda_pattern n_frequency_pattern block_size_pattern".split())
_OPTIONAL = {"SUPERTUNING": ("r", "lora_alpha"), "DEFT": ("alpha",)}
_ROWS = 30


@dataclasses.dataclass(frozen=True)
class _Tensor:
    key: str
    array: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape


@dataclasses.dataclass
class _Content:
    """The tensors of a file by what they are.

    Attributes:
      modules: the format's own, by module and suffix. Parameters of one module nest: ``experts.base_layer`` is another.
      whole: full copies of parameters, by name.
      base: full copies of the base weights of adapted modules, by name.
      shared: the format's tensors for the whole model.
      tokens: trained rows of tables, by module.
    """

    modules: dict[str, dict[str, _Tensor]]
    whole: dict[str, _Tensor]
    base: dict[str, _Tensor]
    shared: dict[str, _Tensor]
    tokens: dict[str, _Tensor] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class _Member:
    """A module of the file at its place in the tree."""

    place: Place
    prefix: str
    tensors: dict[str, _Tensor]


class _Diff:
    """What does not fit, as a table."""

    def __init__(self):
        self.rows: list[tuple[str, str, str, str]] = []
        self.reasons: dict[str, list[str]] = {}  # what the rows show, where that is known, and of which modules

    def add(self, key: str, path: str | None, expected: Any, found: Any) -> None:
        self.rows.append((key, path or "-", str(expected), str(found)))

    def check(self, where: str) -> None:
        if not self.rows:
            return
        head = ("tensor", "leaf", "expected", "found")
        table = [head, *sorted(self.rows)[:_ROWS]]
        widths = [max(len(row[i]) for row in table) for i in range(4)]
        lines = ["  " + "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in table]
        more = [f"  ... and {len(self.rows) - _ROWS} more"] if len(self.rows) > _ROWS else []
        question = (
            "Is it the adapter of another model? If the leaves are only called otherwise, pass "
            "load_peft(..., names=function from the path of a leaf to the name of its PyTorch module)."
        )
        others = lambda modules: f" and {len(modules) - 1} more" if len(modules) > 1 else ""
        reasons = [f"{modules[0]}{others(modules)}: {reason}." for reason, modules in self.reasons.items()]
        raise ValueError(
            "\n".join(
                [
                    f"{where} does not fit these parameters:",
                    *lines,
                    *more,
                    *(reasons or [question]),
                ]
            )
        )


def load_peft(
    directory: str | os.PathLike[str],
    params: PyTree,
    *,
    names: Names | None = None,
    axes: Mapping[paths.Pattern, Axes] | None = None,
    usage: Mapping[str, Any] | None = None,
) -> Adapted:
    """Read an adapter that PEFT (or ``save_peft``) wrote.

    >>> adapted = jlora.io.load_peft("adapter", params)
    >>> logits = jlora.lift(model.apply)(adapted.bind(), ids)

    Leaves are found by name: the path's own segments, joined by dots, are PyTorch's name of the module, and a stacked
    leaf is one module for each layer (``jlora.io.names.Tree`` has the rule). Every tensor of the file must have a place
    and every module that the config selects must have its tensors. Layers without tensors, and ranks that differ from
    layer to layer, become ``ranks`` and ``alphas`` of the method on a stacked leaf. Full copies (``modules_to_save``,
    trained biases) become ``Full``, ``lora_bias`` becomes ``Offset``, trained rows
    ``TrainableTokens``. A table that the tree uses as its output head too is adapted for its lookups only, as PEFT does
    (``lookup_only``).

    Args:
      directory: with ``adapter_config.json`` and ``adapter_model.safetensors``.
      params: the base model's parameters, nested by PyTorch's names or flat under them, stacked or not.
      names: path of a leaf -> name of its PyTorch module, or None if it has none; without it, the rule above. For a
        stacked leaf the number goes to a ``*`` in the name, else after ``layers``, ``h``, ``block`` and the like.
      axes, usage: as for ``jlora.adapt``. Needed where neither a leaf's name nor its shape tells inputs from outputs: a
        square matrix called ``weight``, or a square one of experts.

    Returns:
      An ``Adapted``, its adapters in float32 or the leaf's dtype if that is wider.

    Raises:
      FileNotFoundError: one of the two files is not there.
      TypeError: ``params`` has adapters already.
      ValueError: the file is damaged, of a kind that is not read, or does not fit: the message has a table.
    """
    if isinstance(params, Adapted):
        raise TypeError(
            f"load_peft({str(directory)!r}, params): got an Adapted, and the parameters of the base model are wanted. "
            "Pass adapted.base, or jlora.merge(adapted) to put this adapter on top of that one."
        )
    directory = pathlib.Path(directory)
    where = str(directory)
    config = files.read_config(directory)
    fmt = _format(config, where)
    tree = Tree(params, names, axes, usage)
    tensors = files.read_tensors(directory)
    try:
        tensors = fmt.complete(config, tensors, lambda: _targets(tree, config))
    except ValueError as error:
        raise ValueError(f"{where}: {error}.") from None
    config = fmt.settle(config, tensors)
    content = _sort(tensors, fmt, where)
    diff = _Diff()

    members = _locate(tree, fmt, config, content, diff)
    sites, views = _sites(tree, fmt, config, members, diff, where)
    _missing(tree, fmt, config, content, members, sites, views, diff)
    offsets = _offsets(tree, fmt, config, members, diff)
    whole = _whole(tree, config, content.whole, sites, diff, where)
    base = _base(tree, config, content.base, diff)
    tokens = _tokens(tree, config, content.tokens, sites, diff, where)
    diff.check(where)
    if both := sorted(whole.keys() & offsets.keys()):
        raise ValueError(f"{where}: for {both[0]!r} the file has a bias and lora_bias, two names for one thing.")
    sites |= {path: Site(Full(), None, tuple(tree.leaves[path].shape)) for path in whole}
    follows = _follows(tree, fmt, members, sites, where)
    sites |= follows
    sites |= {path: Site(Offset(s), None, tuple(tree.leaves[path].shape)) for path, (s, _) in offsets.items()}
    sites |= {path: site for path, (site, _) in tokens.items()}

    if base:
        params = jax.tree.unflatten(tree.treedef, [base.get(path, leaf) for path, leaf in tree.leaves.items()])
        tree.leaves |= base
    sites = {path: sites[path] for path in tree.leaves if path in sites}
    abstract = {path: jax.ShapeDtypeStruct(tree.leaves[path].shape, tree.leaves[path].dtype) for path in sites}
    built = build(params, sites, key=jax.random.key(0), arrays=abstract)
    trainable, frozen = {}, {}
    common: dict[str, dict[str, np.ndarray]] = collections.defaultdict(dict)
    for path, site in sites.items():
        if path in follows:
            trainable[path] = built.trainable[path]
        elif path in whole:
            trainable[path] = _fill(built.trainable[path], {"": whole[path]})
        elif path in offsets:
            trainable[path] = _fill(built.trainable[path], {"delta": offsets[path][1]})
        elif path in tokens:
            trainable[path] = _fill(built.trainable[path], {"rows": [((), tokens[path][1])]})
        else:
            values = _values(tree, fmt, site, views[path], members[path])
            for name in [name for name in values if name.startswith("group/")]:
                copies = [array for _, array in values.pop(name)]
                first = common[site.method.group].setdefault(name.removeprefix("group/"), copies[0])
                if not all(np.array_equal(copy, first) for copy in copies):
                    raise ValueError(f"{where}: {path!r} and others share parameters, and have different ones.")
            kept = {name.removeprefix("frozen/"): v for name, v in values.items() if name.startswith("frozen/")}
            filled = _fill(built.trainable[path], {k: v for k, v in values.items() if not k.startswith("frozen/")})
            own = Params(filled, _fill(built.frozen[path], kept) if kept else None)
            dtype = next((leaf.dtype for leaf in jax.tree.leaves(filled)), jnp.dtype(jnp.float32))
            own = site.method.init_stack(own, site, dtype)
            trainable[path] = own.trainable
            if own.frozen is not None:
                frozen[path] = own.frozen
    if fmt.shared:
        shared = {name: tensor.array for name, tensor in content.shared.items()}
        try:
            common |= fmt.read_shared(config, list(views.values()), shared)
        except ValueError as error:
            raise ValueError(f"{where}: {error}.") from None
    for group, arrays in common.items():
        for parts, made in ((trainable, built.trainable), (frozen, built.frozen)):
            if group in made:
                parts[group] = _fill_shared(made[group], arrays)
    return built.replace(trainable=trainable, frozen=frozen)


# The file.


def _format(config: Mapping[str, Any], where: str) -> Format:
    kind = config.get("peft_type")
    if kind not in FORMATS:
        why = {
            "XLORA": " jlora.io.load_xlora reads this one.",
            "ADAMSS": " This one does not say which outputs a subspace has: PEFT clusters the base anew. Merge it "
            "there, or convert it there to LoRA (peft.tuners.lora.conversion.convert_to_lora).",
        }
        other = why.get(kind, "")
        raise ValueError(
            f"{where}: adapters of peft_type {kind!r} are not read; those that are: {sorted(FORMATS)}.{other}"
        )
    fmt = FORMATS[kind]
    known = _COMMON | fmt.fields | fmt.inert
    real = {k: v for k, v in config.items() if k not in known and not (v is None or v is False or v in ({}, [], ""))}
    if real:
        asked = ", ".join(f"{k}={v!r}" for k, v in sorted(real.items()))
        raise ValueError(f"{where}: the config asks for {asked}, which is not read here and may change the result.")
    if wrong := _wrong_type(config, fmt):
        raise ValueError(f"{pathlib.Path(where) / files.CONFIG}: {wrong}. Correct the file, or save the adapter again.")
    bias = config.get("bias", "none")
    problem = fmt.check(config)
    # PEFT takes whatever ends so for the biases of the adapted modules; FourierFT's own word is "fourier_only".
    if not isinstance(bias, str) or not (bias in ("none", "all") or bias.endswith("_only")):
        problem = f"bias={bias!r}, where 'none', 'all' or {fmt.own_biases!r} is wanted"
    if problem:
        raise ValueError(f"{where}: {problem}.")
    return fmt


def _wrong_type(config: Mapping[str, Any], fmt: Format) -> str | None:
    """A field that does not hold what PEFT has there: what was got, and what is wanted."""
    number = lambda value, types: isinstance(value, types) and not isinstance(value, bool)
    for key in sorted(fmt.fields & config.keys()):
        value, wanted = config[key], None
        if value is None and key in (*_PATTERNS, *_OPTIONAL.get(fmt.peft_type, ())):
            continue
        if key in _INTEGERS and not number(value, int):
            wanted = "an integer"
        elif key in _NUMBERS and not number(value, int | float):
            wanted = "a number"
        elif key in _PATTERNS and not isinstance(value, Mapping):
            wanted = "an object of names and numbers"
        elif key in _PATTERNS:
            # AdaLoRA keeps a list of what is left of each rank.
            bad = next((k for k, v in value.items() if not (number(v, int | float) or isinstance(v, list))), None)
            if bad is not None:
                key, value, wanted = f"{key}[{bad!r}]", value[bad], "a number"
        if wanted:
            return f"{key} is {value!r}, a {type(value).__name__}, where {wanted} is wanted"
    return None


def _targets(tree: Tree, config: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """(in, out) of every module that the config targets."""
    matrices = {place.module: place for place in tree.matrices()}
    sizes = {}
    for module in matching.targeted(config, matrices):
        place = matrices[module]
        shape, given = tree.leaves[place.path].shape, tree.given(place.path)
        options = [given] if given else candidates(tree.last(place.path), shape, None, len(place.index), place.bare)
        found = {axes.canonical_shape(shape)[1:] for axes in options}
        if len(found) != 1:
            raise ValueError(
                f"which axes of {place.path!r} {tuple(shape)} are inputs and outputs is not known: pass axes= or usage="
            )
        sizes[module] = found.pop()
    return sizes


def _suffix_pattern(suffix: str) -> re.Pattern:
    """A key that ends so, with or without the adapter's name in its usual place."""
    stem, dot, last = suffix.partition(".")
    named = rf"(?:\.[^.]+)?\.{last}" if dot else r"(?:\.[^.]+){0,2}"
    return re.compile(rf"(?:(.+)\.)?{stem}{named}")


def _sort(tensors: Mapping[str, np.ndarray], fmt: Format, where: str) -> _Content:
    suffixes = [*fmt.suffixes, *([fmt.offset] if fmt.offset else [])]
    patterns = {suffix: _suffix_pattern(suffix) for suffix in (*suffixes, *fmt.shared)}
    content = _Content(collections.defaultdict(dict), {}, {}, {})
    for key, array in tensors.items():
        name = re.sub(HEAD, "", key, count=1)
        tensor = _Tensor(key, array)
        for suffix, pattern in patterns.items():
            if match := pattern.fullmatch(name):
                module = match[1] or ""
                target = content.shared if suffix in fmt.shared else content.modules[module]
                break
        else:
            if match := _suffix_pattern(BESIDE).fullmatch(name):
                content.tokens[match[1]] = tensor
                continue
            module, _, suffix = re.sub(r"\.modules_to_save\.[^.]+\.", ".", name).rpartition(".")
            base = module.endswith(".base_layer") and suffix != "bias"
            target = content.base if base else content.whole
            suffix = f"{module.removesuffix('.base_layer')}.{suffix}".lstrip(".")
        if target is content.shared and suffix in target and np.array_equal(target[suffix].array, array):
            continue
        if suffix in target:
            raise ValueError(
                f"{where}: {target[suffix].key} and {key} are the same tensor of two adapters; save one at a time."
            )
        target[suffix] = tensor
    return content


# Adapted weights.


def _locate(
    tree: Tree, fmt: Format, config: Mapping[str, Any], content: _Content, diff: _Diff
) -> dict[str, dict[tuple[int, ...], _Member]]:
    """The modules of the file by leaf and index."""
    nested: dict[str, dict[int, str]] = collections.defaultdict(dict)
    for module in content.modules:
        stem = re.sub(r"(\.base_layer)+$", "", module)
        nested[stem][module.count(".base_layer", len(stem))] = module
    found: dict[str, dict[tuple[int, ...], _Member]] = collections.defaultdict(dict)
    for stem, levels in nested.items():
        place = tree.places.get(f"{stem}.weight")
        if place is not None and list(levels) == [0]:
            pairs = [(place, levels[0])]
        else:
            pairs = _nested_parameters(tree, fmt, config, content, stem, levels)
        for place, module in pairs:
            key = next(iter(content.modules[module].values())).key
            prefix = (re.match(HEAD, key)[0] + module).rstrip(".")
            found[place.path][place.index] = _Member(place, prefix, content.modules[module])
        if not pairs:
            for module in levels.values():
                for tensor in content.modules[module].values():
                    diff.add(tensor.key, None, "no such leaf", tensor.shape)
    return found


def _nested_parameters(
    tree: Tree, fmt: Format, config: Mapping[str, Any], content: _Content, module: str, levels: Mapping[int, str]
) -> list[tuple[Place, str]]:
    """Which bare parameter of a module each level of nesting is. PEFT nests them in the order in which the PyTorch
    module defines them, the first innermost, and writes down neither names nor order: shapes decide, and where they do
    not, the order in the config."""
    order = {place: matching.target_parameter(config, place.name) for place in tree.bare(module)}
    places = sorted((place for place in order if order[place] is not None), key=order.__getitem__)
    if len(places) != len(levels):
        return []
    inner_first = [levels[level] for level in sorted(levels, reverse=True)]
    for permuted in itertools.permutations(places):
        pairs = list(zip(permuted, inner_first, strict=True))
        if all(_layouts(tree, fmt, place, content.modules[name])[0] for place, name in pairs):
            return pairs
    return list(zip(places, inner_first, strict=True))


def _layouts(tree: Tree, fmt: Format, place: Place, tensors: Mapping[str, _Tensor]) -> tuple[list[Axes], list[Axes]]:
    """The axes that a leaf may have: those that agree with the shapes of the file, and all."""
    hint = fmt.hint({suffix: tensor.shape for suffix, tensor in tensors.items()})
    shape, given = tree.leaves[place.path].shape, tree.given(place.path)
    # Patterns for axes are often broad: those of linear weights do not speak of the tables and
    # convolutions that they happen to match.
    fits = given is not None and len(given.stack + given.inputs + given.outputs) == len(shape)
    if fits and hint.kind in (None, given.kind):
        options = [given]
    else:
        options = candidates(tree.last(place.path), shape, hint.kind, len(place.index), place.bare)
    return [option for option in options if hint.fits(option, shape)], options


def _sites(
    tree: Tree,
    fmt: Format,
    config: Mapping[str, Any],
    members: Mapping[str, Mapping[tuple[int, ...], _Member]],
    diff: _Diff,
    where: str,
) -> tuple[dict[str, Site], dict[str, View]]:
    sites, views = {}, {}
    for path, at in members.items() if fmt.suffixes else ():  # else the file is about biases alone
        first = next(iter(at.values()))
        place, shape = first.place, tuple(tree.leaves[path].shape)
        fitting, options = _layouts(tree, fmt, place, first.tensors)
        if len(fitting) > 1:
            raise ValueError(
                f"Which axes of {path!r} {shape} are inputs and outputs is not known: neither its name nor its shape "
                f"tells. Pass load_peft(..., axes={{{path!r}: jlora.Axes(inputs=(...), outputs=(...))}}), with a "
                "pattern for all such leaves, or usage=jlora.usage(apply, params, batch)."
            )
        if not options:
            for tensor in first.tensors.values():
                diff.add(tensor.key, path, f"no tensor: the leaf is {shape}", tensor.shape)
            continue
        axes = (fitting or options)[0]
        views[path] = view(axes, shape, tree.last(path), place.bare, len(place.index))
        for member in at.values():
            wanted = fmt.shapes(config, member.place.target, views[path])
            before = len(diff.rows)
            for suffix in wanted.keys() | member.tensors.keys() - {fmt.offset}:
                tensor = member.tensors.get(suffix)
                found = "missing" if tensor is None else tensor.shape
                if found != wanted.get(suffix):
                    key = f"{member.prefix}.{suffix}" if tensor is None else tensor.key
                    diff.add(key, path, wanted.get(suffix, "no such tensor"), found)
            if len(diff.rows) > before:
                shapes = {suffix: tensor.shape for suffix, tensor in member.tensors.items()}
                if reason := fmt.reason(views[path], shapes):
                    diff.reasons.setdefault(reason, []).append(member.place.module)
        named = [at.get(p.index) and p.target for p in tree.by_path[path]]
        method = fmt.method(config, named, tied=axes.kind == "embedding" and tree.tied(path))
        if getattr(method, "varies", False) and len(axes.stack) != 1:
            raise ValueError(
                f"{where}: rank or alpha differ along the leaf {path!r} {shape}, which is stacked over "
                f"{len(axes.stack)} axes; they may differ along one. Use a tree that holds the layers apart."
            )
        if None in named and len(axes.stack) != 1:
            absent = [p.module for p in tree.by_path[path] if p.index not in at]
            raise ValueError(f"{where}: {path!r} {shape} holds layers that have no tensors in the file: {absent[:3]}.")
        sites[path] = Site(method, axes, shape)
    return sites, views


def _missing(
    tree: Tree,
    fmt: Format,
    config: Mapping[str, Any],
    content: _Content,
    members: Mapping[str, Mapping[tuple[int, ...], _Member]],
    sites: Mapping[str, Site],
    views: Mapping[str, View],
    diff: _Diff,
) -> None:
    """Rows for everything that the config promises and the file does not hold."""
    here = {place.name for at in members.values() for place in (member.place for member in at.values())}
    matrices = {place.module: place for place in tree.matrices()}
    expected = [matrices[module] for module in matching.targeted(config, matrices)]
    expected += [p for p in tree.places.values() if p.bare and matching.target_parameter(config, p.name) is not None]
    for place in expected:
        if place.name in here:
            continue
        shape, known = tree.leaves[place.path].shape, views.get(place.path)
        if known is None:
            given = tree.given(place.path)
            last = tree.last(place.path)
            options = [given] if given else candidates(last, shape, None, len(place.index), place.bare)
            known = view(options[0], shape, last, place.bare, len(place.index)) if len(options) == 1 else None
        if known is None:
            diff.add(f"base_model.model.{place.module}.*", place.path, f"for a leaf {tuple(shape)}", "missing")
            continue
        for suffix, wanted in fmt.shapes(config, place.target, known).items():
            diff.add(f"base_model.model.{place.module}.{suffix}", place.path, wanted, "missing")
    copies = matching.saved(config, tree.modules())
    bias = config.get("bias", "none")
    adapted = {member.place.module for at in members.values() for member in at.values() if not member.place.bare}
    for place in tree.places.values():
        own = place.param == "bias" and (bias == "all" or (bias != "none" and place.module in adapted))
        if (own or place.module in copies) and place.name not in content.whole:
            name = f"{place.module}.base_layer.bias" if place.module in adapted else place.name
            diff.add(f"base_model.model.{name}", place.path, _torch_shape(tree, place), "missing")


def _values(
    tree: Tree, fmt: Format, site: Site, view: View, at: Mapping[tuple[int, ...], _Member]
) -> dict[str, list[tuple[tuple[int, ...], np.ndarray]]]:
    """For each array of a leaf that the file holds, its pieces and where they go."""
    pieces = collections.defaultdict(list)
    leaf = tree.leaves[next(iter(at.values())).place.path]
    for index in np.ndindex(*site.canonical_shape[0][: len(next(iter(at)))]):
        weight = lambda i=index: site.axes.to_canonical(np.asarray(leaf))[i]
        if index in at:
            arrays = fmt.read(view, {suffix: tensor.array for suffix, tensor in at[index].tensors.items()})
            arrays = arrays | fmt.derived(site.method, weight, arrays)
        else:
            arrays = fmt.absent(site.method, weight)
        for name, array in arrays.items():
            pieces[name].append((index, array))
    return pieces


def _fill(empty: Any, values: Mapping[str, list[tuple[tuple[int, ...], np.ndarray]]]) -> Any:
    """A tree like ``empty`` of zeros with the pieces laid in, each at the start of its index: ranks are padded."""
    leaves, treedef = paths.flatten(empty)
    assert {name for name, _ in leaves} >= set(values)
    out = []
    for name, leaf in leaves:
        buffer = np.zeros(leaf.shape, leaf.dtype)
        for index, piece in values.get(name, ()):
            buffer[(*index, *map(slice, piece.shape))] = piece
        out.append(jnp.asarray(buffer))
    return jax.tree.unflatten(treedef, out)


def _fill_shared(empty: Any, arrays: Mapping[str, np.ndarray]) -> Any:
    leaves, treedef = paths.flatten(empty)
    return jax.tree.unflatten(treedef, [jnp.asarray(arrays[name], leaf.dtype) for name, leaf in leaves])


# Everything else: biases, full copies, tables.


def _offsets(
    tree: Tree,
    fmt: Format,
    config: Mapping[str, Any],
    members: Mapping[str, Mapping[tuple[int, ...], _Member]],
    diff: _Diff,
) -> dict[str, tuple[float, list[tuple[tuple[int, ...], np.ndarray]]]]:
    """(scale, pieces) of the vectors that are added to a module's output, by the leaf of the module's bias."""
    found = collections.defaultdict(list)
    for member in (member for at in members.values() for member in at.values()):
        tensor = member.tensors.get(fmt.offset)
        if tensor is None:
            continue
        module = member.place.module
        place = tree.places.get(f"{module}.bias")
        if place is None:
            # Without a bias in the model there is no leaf to carry it; zeros need none.
            if tensor.array.any():
                diff.add(tensor.key, None, f"no tensor: {module} has no bias", tensor.shape)
            continue
        delta = from_torch("bias", tree.slice_shape(place), tensor.array, False)
        if delta is None:
            diff.add(tensor.key, place.path, _torch_shape(tree, place), tensor.shape)
            continue
        found[place.path].append((place.index, fmt.scale(config, module), delta))
    offsets = {}
    for path, each in found.items():
        scales = {scale for _, scale, _ in each}
        common = scales.pop() if len(scales) == 1 else 1.0
        offsets[path] = (common, [(i, d if s == common else d * (s / common)) for i, s, d in each])
    return offsets


def _follows(
    tree: Tree,
    fmt: Format,
    members: Mapping[str, Mapping[tuple[int, ...], _Member]],
    sites: Mapping[str, Site],
    where: str,
) -> dict[str, Site]:
    """The biases that change with the outputs of their modules."""
    found = {}
    for path, at in members.items():
        if path not in sites or not fmt.follows(sites[path].method):
            continue
        for member in at.values():
            place = tree.places.get(f"{member.place.module}.bias")
            if place is not None:
                method = Follow(group=path, method=sites[path].method, n_stack=len(place.index))
                found[place.path] = Site(method, None, tuple(tree.leaves[place.path].shape))
            elif lost := fmt.for_bias({suffix: tensor.array for suffix, tensor in member.tensors.items()}):
                raise ValueError(
                    f"{where}: {', '.join(member.tensors[suffix].key for suffix in lost)} are for the bias of "
                    f"{member.place.module}, which has none in these parameters, and would be lost. If it is only "
                    "called otherwise, pass load_peft(..., names=function from the path of a leaf to the name of its "
                    "PyTorch parameter); if the model has none, give it one of zeros, or merge in PEFT."
                )
    return found


def _whole(
    tree: Tree,
    config: Mapping[str, Any],
    tensors: Mapping[str, _Tensor],
    sites: Mapping[str, Site],
    diff: _Diff,
    where: str,
) -> dict[str, list[tuple[tuple[int, ...], np.ndarray]]]:
    """The pieces of leaves that the file holds full copies of."""
    pieces = collections.defaultdict(list)
    for name, tensor in tensors.items():
        place = tree.places.get(name)
        if place is None or place.path in sites:
            diff.add(tensor.key, place and place.path, "no full copy" if place else "no such leaf", tensor.shape)
            continue
        shape = tree.slice_shape(place)
        fan_in_fan_out = config.get("fan_in_fan_out", False)
        array = from_torch(tree.last(place.path), shape, tensor.array, fan_in_fan_out)
        if array is None:
            diff.add(tensor.key, place.path, _torch_shape(tree, place), tensor.shape)
            continue
        pieces[place.path].append((place.index, array))
    for path, found in pieces.items():
        absent = [place for place in tree.by_path[path] if place.index not in {index for index, _ in found}]
        if absent:
            raise ValueError(
                f"{where}: of the stacked leaf {path!r} the file holds {len(found)} of {len(tree.by_path[path])} "
                f"layers; {absent[0].name} is not there. A stacked leaf is trained as a whole: use a tree that holds "
                "the layers apart."
            )
    return pieces


def _base(tree: Tree, config: Mapping[str, Any], tensors: Mapping[str, _Tensor], diff: _Diff) -> dict[str, jax.Array]:
    """Base weights that came with the adapter (of embeddings and heads) where they differ from the tree's."""
    changed = {}
    for name, tensor in tensors.items():
        place = tree.places.get(name)
        array = None
        if place is not None and not place.index:
            fan_in_fan_out = config.get("fan_in_fan_out", False)
            array = from_torch(tree.last(place.path), tree.slice_shape(place), tensor.array, fan_in_fan_out)
        if array is None:
            expected = _torch_shape(tree, place) if place else "no such leaf"
            diff.add(tensor.key, place and place.path, expected, tensor.shape)
            continue
        leaf = tree.leaves[place.path]
        array = array.astype(leaf.dtype)
        if not np.array_equal(array, np.asarray(leaf)):
            changed[place.path] = jnp.asarray(array)
    return changed


def _tokens(
    tree: Tree,
    config: Mapping[str, Any],
    tensors: Mapping[str, _Tensor],
    sites: Mapping[str, Site],
    diff: _Diff,
    where: str,
) -> dict[str, tuple[Site, np.ndarray]]:
    """The tables of which the file holds rows, beside adapters of another type."""
    indices = config.get("trainable_token_indices") or {}
    each = indices if isinstance(indices, Mapping) else dict.fromkeys(tensors or ["embed_tokens"], indices)
    found = {}
    for name, numbers in each.items():
        modules = [module for module in tensors if module == name or module.endswith(f".{name}")]
        if not modules:
            diff.add(f"base_model.model.*{name}.{BESIDE}", None, f"{len(numbers)} rows", "missing")
        for module in modules:
            found[module] = TrainableTokens(tuple(numbers))
    rows = {}
    for module, tensor in tensors.items():
        place, method = tree.places.get(f"{module}.weight"), found.get(module)
        if place is None or place.index or method is None:
            problem = "no such leaf" if method is not None else "no trainable_token_indices"
            diff.add(tensor.key, place and place.path, problem, tensor.shape)
            continue
        if place.path in sites:
            raise ValueError(
                f"{where}: of {place.path!r} the file trains rows, and adapts all of it too: a leaf has one method "
                "here. Merge the two in PEFT."
            )
        shape = tuple(tree.leaves[place.path].shape)
        axes = Axes((0,), tuple(range(1, len(shape))), kind="embedding")
        site = Site(method, axes, shape)
        wanted = (len(method.indices), site.canonical_shape[2])
        if tensor.shape != wanted or method.check(site):
            diff.add(tensor.key, place.path, method.check(site) or wanted, tensor.shape)
            continue
        rows[place.path] = site, tensor.array
    return rows


def _torch_shape(tree: Tree, place: Place) -> Sequence[int]:
    shape = tree.slice_shape(place)
    array = to_torch(tree.last(place.path), np.broadcast_to(np.zeros(()), shape))
    return shape if array is None else array.shape
