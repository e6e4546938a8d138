"""From an ``Adapted`` to a PEFT directory."""

import os
import pathlib
import re
import warnings
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np

from jlora import paths
from jlora.adapt import Adapted
from jlora.io import files, matching
from jlora.io.format import Format, Written
from jlora.io.formats import FORMATS
from jlora.io.layouts import View, to_torch, view
from jlora.io.names import Names, Place, Tree
from jlora.io.tokens import BESIDE
from jlora.methods import AdaMSS, FRoD, Method, Site, TrainableTokens, XLoRA
from jlora.methods.whole import Follow, Offset
from jlora.weight import Params

_PREFIX = "base_model.model."
# PEFT writes the whole table of these beside an adapter on them, and reads it over the base's.
_TABLES = ("embed_tokens", "lm_head")


def save_peft(
    adapted: Adapted,
    directory: str | os.PathLike[str],
    *,
    base_model_name_or_path: str | None = None,
    task_type: str | None = None,
    names: Names | None = None,
    dtype: Any = None,
) -> None:
    """Write an adapter for PEFT, and for ``load_peft``: ``adapter_config.json`` and ``adapter_model.safetensors``.

    >>> jlora.io.save_peft(adapted, "adapter", base_model_name_or_path="meta-llama/Llama-3.2-1B", task_type="CAUSAL_LM")

    Stacked leaves become one module a layer, padded ranks their true ranks. ``Full`` on biases becomes ``bias``, on
    other leaves ``modules_to_save``; PEFT saves a module as a whole, so what belongs to such a module (or, with
    ``bias``, to its kind) and is not trained is written with the base's values. Both files are replaced atomically.

    Args:
      adapted: one PEFT method on all its weights (LoRA and DoRA are two), and ``Full`` and ``Offset`` wherever; beside
        LoRA, ``TrainableTokens`` on tables.
      base_model_name_or_path: the Hub's name or the directory of the base, for PEFT to find it.
      task_type: "CAUSAL_LM", "SEQ_CLS" and so on, for PEFT's automatic classes.
      names: as for ``load_peft``.
      dtype: of the tensors; float32 by default.

    Raises:
      TypeError: ``adapted`` is something else.
      ValueError: PEFT's format has no way to say this. Nothing is written then.
    """
    if not isinstance(adapted, Adapted):
        raise TypeError(
            f"save_peft({type(adapted).__name__}, ...): what jlora.adapt or load_peft gave, an Adapted, is wanted. A "
            "plain tree has no adapters; with trained values in hand, pass adapted.replace(trainable=...)."
        )
    sites = adapted.sites
    matrices = {path: site for path, site in sites.items() if not site.method.whole_leaf}
    rows = {path: site for path, site in matrices.items() if isinstance(site.method, TrainableTokens)}
    rows = rows if len(rows) < len(matrices) else {}  # else they are what the file is of
    offsets = {path: site for path, site in sites.items() if isinstance(site.method, Offset)}
    fmt = _format({path: site for path, site in matrices.items() if path not in rows} or offsets)
    if rows and not fmt.beside_tokens:
        raise ValueError(
            f"{next(iter(rows))!r}: PEFT has no trained rows beside {fmt.peft_type} adapters. Merge instead."
        )
    tree = Tree(adapted.base, names, known={path: site.axes for path, site in matrices.items()})
    for path in sites:
        if not tree.by_path[path]:
            raise ValueError(f"names({path!r}) is None, and the leaf is trained: it needs the name of a module.")
        if not all(place.module for place in tree.by_path[path]):
            raise ValueError(
                f"{path!r} lies at the root of the tree, and PEFT knows weights by their module's name: give it one, "
                f"save_peft(..., names=lambda path: 'model.linear.weight')."
            )
    matrices = {path: site for path, site in matrices.items() if path not in rows}
    if fmt.lookups_only:
        _warn_of_tied(tree, matrices)
    written = {place: one for path, site in matrices.items() for place, one in _write(adapted, tree, fmt, path, site)}
    if not matrices:
        written = dict(pair for path, site in offsets.items() for pair in _biases(adapted, tree, fmt, path, site))
    if not written:
        raise ValueError("None of the adapters has a rank above 0: there is nothing to write.")
    tensors = {
        f"{_PREFIX}{place.module}{_nest(tree, place, sites)}.{suffix}": tensor
        for place, one in written.items()
        for suffix, tensor in one.tensors.items()
    }
    methods = [site.method for site in matrices.values()]
    tensors |= {f"base_model.{name}": tensor for name, tensor in fmt.write_shared(methods, _groups(adapted)).items()}
    modules = {place.module for place in written if not place.bare}
    if fmt.copies_tables and not rows:
        tensors |= _tables(tree, modules)
    copies, copied = _copies(adapted, tree, fmt, written)
    config = fmt.config({place.target: one.facts for place, one in written.items()}) | {
        "peft_type": fmt.peft_type,
        "task_type": task_type,
        "base_model_name_or_path": base_model_name_or_path,
        "inference_mode": True,
        "fan_in_fan_out": _fan_in_fan_out(tree, matrices),
        "target_modules": matching.shortest(modules, tree.modules()),
    }
    if rows:
        places = {tree.by_path[path][0]: path for path in rows}
        tensors |= {
            f"{_PREFIX}{p.module}.{BESIDE}": np.asarray(adapted.trainable[at]["rows"]) for p, at in places.items()
        }
        config["trainable_token_indices"] = {p.module: list(rows[at].method.indices) for p, at in places.items()}
    config |= _target_parameters(tree, [place for place in written if place.bare])
    config, tensors = fmt.finish(config | copied, tensors | copies)
    dtype = jnp.dtype(jnp.float32 if dtype is None else dtype)
    cast = lambda tensor: np.asarray(tensor, dtype if jnp.issubdtype(tensor.dtype, jnp.floating) else None)
    tensors = {key: cast(tensor) for key, tensor in tensors.items()}
    if "bias" in fmt.lacks and config["bias"] != "none":
        raise ValueError(f"PEFT trains no biases beside {fmt.peft_type} adapters. Leave them out of Full, or merge.")
    config = {key: value for key, value in config.items() if key not in fmt.lacks}
    files.write(pathlib.Path(directory), config, tensors)


def _format(matrices: dict[str, Site]) -> Format:
    if not matrices:
        raise ValueError(
            "A PEFT file is an adapter with what was trained beside it; here no weight has an adapter. Save the tree "
            "of jlora.merge(adapted) instead."
        )
    by_method = {method: fmt for fmt in FORMATS.values() for method in fmt.methods}
    kinds = {type(site.method): path for path, site in matrices.items()}
    for kind, path in kinds.items():
        if kind not in by_method:
            raise ValueError(f"{path!r} has {kind.__name__}, which is not written as a PEFT file{_instead(kind)}")
    formats = {by_method[kind].peft_type: by_method[kind] for kind in kinds}
    if len(formats) > 1:
        found = ", ".join(f"{kind.__name__} ({path!r})" for kind, path in kinds.items())
        raise ValueError(f"A PEFT file holds one kind of adapter, and here are {found}. jlora.merge takes all.")
    return next(iter(formats.values()))


_WHY_NOT = {
    XLoRA: "it is several adapters and a classifier",
    FRoD: "PEFT takes V from a file and keeps the U of another V beside it, which it finds itself, signs and all",
    AdaMSS: "a file does not say which outputs a subspace has, and PEFT clusters the base anew, from random numbers",
}


def _instead(kind: type[Method]) -> str:
    """Why a method is not written, and what to do."""
    why = f": {_WHY_NOT[kind]}. " if kind in _WHY_NOT else ". "
    if kind is XLoRA:
        return f"{why}jlora.io.save_xlora writes them."
    if kind.mergeable is False:
        return f"{why}It acts on activations, so no LoRA does the same either: keep adapted.trainable in a checkpoint."
    return (
        f"{why}jlora.to_lora(adapted, rank=...) makes plain LoRA of it, which is, and says what is lost (on the "
        "command line jlora convert RUN --to lora); jlora.merge loses nothing."
    )


def _warn_of_tied(tree: Tree, matrices: dict[str, Site]) -> None:
    for path, site in matrices.items():
        if site.axes.kind == "embedding" and not site.method.lookup_only and tree.tied(path):
            warnings.warn(
                f"{path!r} seems to be the output head as well, and its adapter acts there, too. PEFT's acts on "
                "lookups only, so the file will give other logits. LoRA(lookup_only=True) is what PEFT does.",
                stacklevel=3,
            )


def _write(adapted: Adapted, tree: Tree, fmt: Format, path: str, site: Site) -> Iterator[tuple[Place, Written]]:
    """(place, what is written) of every module of a leaf."""
    arrays = {name: np.asarray(leaf) for name, leaf in paths.flatten(adapted.trainable[path])[0]}
    kept = paths.flatten(adapted.frozen.get(path, {}))[0]
    arrays |= {f"frozen/{name}": np.asarray(leaf) for name, leaf in kept}
    shared = {f"group/{name}": array for name, array in _groups(adapted).get(site.method.group, {}).items()}
    leaf = tree.leaves[path]
    for place in tree.by_path[path]:
        if len(place.index) != len(site.axes.stack) - (place.bare and len(site.axes.stack) > len(place.index)):
            raise ValueError(
                f"{path!r} is stacked over {len(site.axes.stack)} axes, and its name {place.name!r} has a place for "
                f"{len(place.index)} numbers. Pass names= with a * where each number goes."
            )
        one = view(site.axes, site.shape, tree.last(path), place.bare, len(place.index))
        own = {name: array[place.index] for name, array in arrays.items()} | shared
        weight = lambda i=place.index: site.axes.to_canonical(np.asarray(leaf))[i]
        layer = place.index[0] if len(site.axes.stack) == 1 and place.index else None
        try:
            written = fmt.write(site.method, layer, one, own, weight)
        except ValueError as error:
            raise ValueError(f"{path!r}: {error}") from None
        if written is not None:
            yield place, written


def _biases(adapted: Adapted, tree: Tree, fmt: Format, path: str, site: Site) -> Iterator[tuple[Place, Written]]:
    """The same for a file that is about biases alone."""
    delta = np.asarray(adapted.trainable[path]["delta"])
    for place in tree.by_path[path]:
        if place.param != "bias":
            raise ValueError(f"{path!r}: a PEFT file has a place for what is added to biases, not to {place.name!r}.")
        own = delta[place.index]
        yield place, fmt.write(site.method, None, View("linear", 0, own.size), {"delta": own}, lambda: np.zeros(()))


def _groups(adapted: Adapted) -> dict[str, dict[str, np.ndarray]]:
    """The parameters of every group, by their paths."""
    names = {site.method.group for site in adapted.sites.values()} - {None}
    parts = lambda name: (adapted.trainable.get(name), adapted.frozen.get(name))
    flat = {name: [pair for part in parts(name) for pair in paths.flatten(part)[0]] for name in names}
    return {name: {path: np.asarray(leaf) for path, leaf in pairs} for name, pairs in flat.items()}


def _definition_order(place: Place) -> tuple[bool, bool, str]:
    """Of the parameters of one module of experts: in transformers' models what goes out comes last."""
    return place.param.startswith("down"), place.param.startswith("up"), place.param


def _target_parameters(tree: Tree, places: list[Place]) -> dict[str, list[str]]:
    """The config field for bare parameters: inner first, all that a reader can tell equal shapes apart by."""
    if not places:
        return {}
    places = sorted(places, key=_definition_order)
    first = lambda ending: next(i for i, place in enumerate(places) if place.name.endswith(ending))
    return {"target_parameters": sorted(matching.shortest({p.name for p in places}, tree.places), key=first)}


def _nest(tree: Tree, place: Place, sites: dict[str, Site]) -> str:
    """PEFT wraps a module once for each of its adapted parameters, in the order of their definition."""
    if not place.bare:
        return ""
    order = sorted((other for other in tree.bare(place.module) if other.path in sites), key=_definition_order)
    return ".base_layer" * (len(order) - 1 - order.index(place))


def _fan_in_fan_out(tree: Tree, matrices: dict[str, Site]) -> bool:
    """Whether PyTorch's weights are [in, out], as GPT-2's: known where the tree has them as PyTorch has. (PEFT sets it
    right by itself, with a warning, where it is wrong.)"""
    linear = {path: site.axes for path, site in matrices.items() if site.axes.kind == "linear"}
    return any(tree.last(path) == "weight" and max(axes.inputs) < min(axes.outputs) for path, axes in linear.items())


def _tables(tree: Tree, modules: set[str]) -> dict[str, np.ndarray]:
    places = [tree.places[f"{module}.weight"] for module in modules if module.rpartition(".")[2] in _TABLES]
    return {f"{_PREFIX}{p.module}.base_layer.weight": _torch(tree, p, tree.leaves[p.path]) for p in places}


def _torch(tree: Tree, place: Place, leaf: Any) -> np.ndarray:
    array = to_torch(tree.last(place.path), np.asarray(leaf)[place.index])
    if array is None:
        raise ValueError(
            f"{place.path!r} {tuple(leaf.shape)} is trained as a whole, and whether it is a convolution or has several "
            "heads is not known, so neither is its layout in PyTorch. Leave it out of Full."
        )
    return array


def _copies(
    adapted: Adapted, tree: Tree, fmt: Format, written: dict[Place, Written]
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """What is trained without an adapter: the tensors, and the config fields that go with them."""
    modules = {place.module for place in written if not place.bare}
    offsets = _offsets(adapted, tree, fmt, written, modules)
    leaves = {}
    following = {site.method.group for site in adapted.sites.values() if isinstance(site.method, Follow)}
    for place in written:
        alone = place.path not in following and fmt.follows(adapted.sites[place.path].method)
        if alone and f"{place.module}.bias" in tree.places:
            raise ValueError(
                f"{place.module} has a bias, which PEFT's {fmt.peft_type} changes with the outputs and this adapter "
                "does not. Put jlora.methods.Follow on the bias before training, or merge (jlora.merge)."
            )
    done = {place.path for place in written}
    for path, site in adapted.sites.items():
        if isinstance(site.method, Follow) or path in done:
            continue
        if site.method.whole_leaf and (path not in offsets):
            bare = next((place for place in tree.by_path[path] if place.bare), None)
            if bare is not None:
                raise ValueError(
                    f"{path!r} is trained as a whole, and PEFT saves whole modules: {bare.param!r} is neither a weight "
                    "nor a bias."
                )
            own = Params(adapted.trainable[path], adapted.frozen.get(path))
            leaves[path] = site.method.weight(jnp.asarray(tree.leaves[path]), own)
    trained = [place for path in leaves for place in tree.by_path[path]]
    saved = {place.module for place in trained if place.param != "bias"}
    biases = {place.module for place in trained} - saved
    bias = "none" if not biases else fmt.own_biases if biases <= modules else "all"
    config: dict[str, Any] = {"bias": bias, "modules_to_save": None}
    if saved:
        named = _whole_heads(saved, tree.modules())
        config["modules_to_save"] = matching.shortest(named, tree.modules() - saved, boundary=False)
        saved = matching.saved(config, tree.modules())
        if saved & modules:
            raise ValueError(
                f"modules_to_save={config['modules_to_save']} selects what is adapted, too: {sorted(saved & modules)}. "
                "PEFT matches these by the end of the name alone, so the two cannot be in one file."
            )
    tensors = {}
    for place in tree.places.values():
        is_own = place.param == "bias" and (bias == "all" or (bias != "none" and place.module in modules))
        if is_own or place.module in saved:
            name = f"{place.module}.base_layer.bias" if place.module in modules else place.name
            tensors[_PREFIX + name] = _torch(tree, place, leaves.get(place.path, tree.leaves[place.path]))
    if offsets:
        config["lora_bias"] = True
        for place, one in written.items():
            scale, bias_place = fmt.offset_scale(one.facts), tree.places.get(f"{place.module}.bias")
            if bias_place is None or bias_place.path not in offsets:
                delta = np.zeros(one.n_out)  # PEFT has offsets on all modules or none
            else:
                path = bias_place.path
                delta = np.asarray(adapted.trainable[path]["delta"])[bias_place.index].reshape(-1)
                own_scale = adapted.sites[path].method.scale
                delta = delta if own_scale == scale else delta * (own_scale / scale)
            tensors[f"{_PREFIX}{place.module}.{fmt.offset}"] = delta
    return tensors, config


def _whole_heads(saved: set[str], modules: set[str]) -> set[str]:
    """The saved modules, those of a top-level module that is saved as a whole under its name.

    PEFT saves a head so, also one of several layers: it adds ``classifier`` to the list itself, and fails on a file
    that lists ``classifier.dense`` and ``classifier.out_proj``.
    """
    heads = {name.partition(".")[0] for name in saved}
    inside = {head: {name for name in modules if name == head or name.startswith(f"{head}.")} for head in heads}
    listed = lambda head: any(re.match(r"[^.]*\.\d", name) for name in inside[head])
    whole = {head for head in heads if inside[head] <= saved and not listed(head)}
    return {head if (head := name.partition(".")[0]) in whole else name for name in saved}


def _offsets(adapted: Adapted, tree: Tree, fmt: Format, written: dict[Place, Written], modules: set[str]) -> set[str]:
    """The leaves with an ``Offset`` that the format can say as such. The others are written as what they come to."""
    sites = adapted.sites
    biases = {path for path in sites if all(place.param == "bias" for place in tree.by_path[path])}
    trained_too = any(not isinstance(sites[path].method, Offset) for path in biases)
    if fmt.offset is None or trained_too or any(fmt.offset_scale(one.facts) is None for one in written.values()):
        return set()
    delta = {path: np.asarray(adapted.trainable[path]["delta"]) for path in biases}
    return {p for p in biases if all(q.module in modules or not delta[p][q.index].any() for q in tree.by_path[p])}
