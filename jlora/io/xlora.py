"""``peft_type`` XLORA: a classifier, and the names of the directories of the LoRAs that it mixes.

The file holds the linear layers of the classifier, ``base_model.internal_xlora_classifier.layers.N.weight`` [out, in]
and ``.bias`` [out], N counting ReLUs and dropouts too. Where each adapted matrix has scalings of its own, the outputs
of the last layer are [matrices, adapters], the matrices in the order in which the PyTorch model defines its modules.
That order is not in the file.
"""

from __future__ import annotations

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
from jlora.adapt import Adapted
from jlora.io import files
from jlora.io.load import load_peft
from jlora.io.names import Names, Place, Tree
from jlora.io.save import save_peft
from jlora.methods import xlora
from jlora.weight import Axes

_LAYER = re.compile(r"(?:base_model\.)?internal_xlora_classifier\.layers\.(\d+)\.(weight|bias)")
_KEY = "base_model.internal_xlora_classifier.layers.{}.{}"
_EVERY = 3  # a linear layer, its ReLU and its dropout
_MODULE = re.compile(r"(?:base_model\.(?:model\.)?)?(.+)\.lora_(?:embedding_)?A\b.*")
# The parts of Llama, Mistral, Qwen and Gemma, as transformers defines them.
_DEFINED = (
    *"embed_tokens layers self_attn q_proj k_proj v_proj o_proj mlp gate_proj up_proj down_proj".split(),
    "lm_head",
)
_FIELDS = {
    "xlora_depth": "depth",
    "xlora_size": "width",
    "xlora_dropout_p": "dropout",
    "softmax_temperature": "temperature",
    "enable_softmax": "softmax",
    "top_k_lora": "top_k",
    "enable_softmax_topk": "softmax_top_k",
    "global_scaling_weight": "weight",
}


def load_xlora(
    directory: str | os.PathLike[str],
    params: PyTree,
    *,
    adapters: Sequence[str | os.PathLike[str]] | None = None,
    order: Sequence[str] | None = None,
    names: Names | None = None,
    axes: Mapping[paths.Pattern, Axes] | None = None,
    usage: Mapping[str, Any] | None = None,
) -> tuple[Adapted, xlora.Classifier, tuple[dict[str, jax.Array], ...]]:
    """Read an X-LoRA that PEFT wrote: its adapters in one, its classifier, and the classifier's parameters.

    >>> adapted, classifier, weights = jlora.io.load_xlora("xlora", params)
    >>> scalings = classifier(weights, hidden_states(params, ids))

    Args:
      directory: with ``adapter_config.json`` and ``adapter_model.safetensors``.
      params, names, axes, usage: as for ``load_peft``.
      adapters: the directories of the adapters, in the config's order; by default those that the config names, looked
        for where it says, beside ``directory`` and in it.
      order: where every matrix has scalings of its own: the names of the adapted modules in the order in which the
        PyTorch model defines them, ``[name for name, _ in model.named_modules()]`` or a part of it. Not needed for
        models with the modules of Llama.

    Raises:
      FileNotFoundError: a file or an adapter is not there.
      ValueError: the files do not fit each other or these parameters.
    """
    directory = pathlib.Path(directory)
    config, tensors = files.read_config(directory), files.read_tensors(directory)
    if config.get("peft_type") != "XLORA":
        raise ValueError(f"{directory} is of peft_type {config.get('peft_type')!r}: load_peft reads it, if any does.")
    if config.get("scaling_pass_value"):
        raise ValueError(
            f"{directory}: scaling_pass_value={config['scaling_pass_value']} has adapters act in the first pass, which "
            "is the base's alone here."
        )
    found = _directories(directory, config, adapters)
    adapted = xlora.combine(*(load_peft(each, params, names=names, axes=axes, usage=usage) for each in found))
    by_layer = bool(config.get("layerwise_scalings"))
    classifier = xlora.Classifier(
        config["hidden_size"],
        len(found),
        xlora.layers(adapted) if by_layer else None,
        **{ours: config[theirs] for theirs, ours in _FIELDS.items() if theirs in config},
    )
    weights = _weights(tensors, directory)
    if by_layer:
        tree = Tree(params, names, axes, usage, {path: site.axes for path, site in adapted.sites.items()})
        weights[-1] = _reordered(weights[-1], adapted, tree, _in_order(_modules(found), order), len(found))
    wanted = list(zip(classifier.sizes, classifier.sizes[1:], strict=False))
    if [layer["kernel"].shape for layer in weights] != wanted:
        raise ValueError(
            f"{directory}: the layers of the classifier are {[layer['kernel'].shape for layer in weights]} ([in, out]),"
            f" and {wanted} is wanted by its config and {len(found)} adapters of {xlora.layers(adapted)} matrices."
        )
    return adapted, classifier, jax.tree.map(jnp.asarray, tuple(weights))


def save_xlora(
    adapted: Adapted,
    classifier: xlora.Classifier,
    weights: Sequence[Mapping[str, jax.Array]],
    directory: str | os.PathLike[str],
    *,
    base_model_name_or_path: str | None = None,
    task_type: str | None = None,
    names: Names | None = None,
    order: Sequence[str] | None = None,
    dtype: Any = None,
) -> None:
    """Write an X-LoRA for PEFT, and for ``load_xlora``: the classifier's two files and, in directories 0, 1, ... below,
    those of its adapters.

    >>> jlora.io.save_xlora(adapted, classifier, weights, "xlora", task_type="CAUSAL_LM")

    The config names the directories of the adapters as ``directory`` is given, and PEFT looks for them there. Layers
    that an adapter leaves alone in a stack of which it adapts others get a pair of zeros.

    Args:
      adapted: of ``xlora.combine`` or ``load_xlora``, with XLoRA on all its leaves.
      classifier, weights: what gives the scalings, and its parameters.
      base_model_name_or_path, task_type, names, dtype: as for ``save_peft``.
      order: as for ``load_xlora``.

    Raises:
      ValueError: PEFT's format has no way to say this. The classifier's files, which are written last, are not then.
    """
    directory, each = pathlib.Path(directory), xlora.split(adapted)
    if (len(each), classifier.layers or xlora.layers(adapted)) != (classifier.adapters, xlora.layers(adapted)):
        raise ValueError(
            f"{classifier} does not go with {len(each)} adapters of {xlora.layers(adapted)} matrices: "
            "Classifier(adapters=..., layers=xlora.layers(adapted)) does, or layers=None."
        )
    found = [(layer["kernel"].shape, layer["bias"].shape) for layer in weights]
    wanted = [((n_in, n_out), (n_out,)) for n_in, n_out in zip(classifier.sizes, classifier.sizes[1:], strict=False)]
    if found != wanted:
        raise ValueError(f"The classifier's kernels and biases have the shapes {found}; {wanted} are wanted.")
    layers = [{name: np.asarray(leaf) for name, leaf in layer.items()} for layer in weights]
    tree = Tree(adapted.base, names, known={path: site.axes for path, site in adapted.sites.items()})
    modules = [place.module for place in _places(adapted, tree)]
    if classifier.layers is not None:
        layers[-1] = _permuted(layers[-1], modules, _in_order(set(modules), order), len(each))
    dtype = jnp.dtype(jnp.float32 if dtype is None else dtype)
    tensors = {}
    for i, layer in enumerate(layers):
        tensors[_KEY.format(_EVERY * i, "weight")] = layer["kernel"].T.astype(dtype)
        tensors[_KEY.format(_EVERY * i, "bias")] = layer["bias"].astype(dtype)
    config = {theirs: getattr(classifier, ours) for theirs, ours in _FIELDS.items()} | {
        "peft_type": "XLORA",
        "task_type": task_type,
        "base_model_name_or_path": base_model_name_or_path,
        "inference_mode": False,
        "hidden_size": classifier.features,
        "adapters": {str(e): os.fspath(directory / str(e)) for e in range(len(each))},
        "layerwise_scalings": classifier.layers is not None,
        "use_trainable_adapters": False,
        "scaling_pass_value": 0.0,
    }
    for e, one in enumerate(each):
        save_peft(
            one,
            directory / str(e),
            base_model_name_or_path=base_model_name_or_path,
            task_type=task_type,
            names=names,
            dtype=dtype,
        )
    files.write(directory, config, tensors)


def _directories(directory: pathlib.Path, config: Mapping[str, Any], adapters: Any) -> list[pathlib.Path]:
    named = list((config.get("adapters") or {}).values())
    if adapters is not None:
        if len(adapters) != len(named):
            raise ValueError(f"{directory} mixes {len(named)} adapters, {named}; adapters= gives {len(adapters)}.")
        return list(map(pathlib.Path, adapters))
    inside = lambda name: directory / pathlib.Path(name).name
    places = [(pathlib.Path(name), directory.parent / name, inside(name)) for name in named]
    for name, options in zip(named, places, strict=True):
        if not any(path.is_dir() for path in options):
            raise FileNotFoundError(f"{directory} mixes the adapter {name!r}, which is not there: pass adapters=[...].")
    return [next(path for path in options if path.is_dir()) for options in places]


def _weights(tensors: Mapping[str, np.ndarray], directory: pathlib.Path) -> list[dict[str, np.ndarray]]:
    found: dict[int, dict[str, np.ndarray]] = {}
    for key, tensor in tensors.items():
        match = _LAYER.fullmatch(key)
        if match is None:
            raise ValueError(f"{directory}: {key!r} is not of a classifier.")
        name = "kernel" if match[2] == "weight" else "bias"
        found.setdefault(int(match[1]), {})[name] = tensor.T
    if not found or any(len(layer) < 2 for layer in found.values()):
        raise ValueError(f"{directory}: every layer of a classifier has a weight and a bias; found {sorted(tensors)}.")
    return [found[number] for number in sorted(found)]


def _modules(directories: Sequence[pathlib.Path]) -> set[str]:
    """The modules that any of the adapters adapts."""
    keys = {key for each in directories for key in files.read_tensors(each)}
    return {match[1] for match in map(_MODULE.fullmatch, keys) if match}


def _in_order(modules: set[str], order: Sequence[str] | None) -> list[str]:
    """The modules as the PyTorch model defines them."""
    if order is not None:
        if absent := sorted(modules - set(order)):
            raise ValueError(f"order= names {len(order)} modules, and not {absent[0]!r}, which is adapted.")
        return [name for name in order if name in modules]
    rank = lambda part: int(part) if part.isdigit() else _DEFINED.index(part) if part in _DEFINED else -1
    known = sorted(modules, key=lambda name: [*map(rank, name.split("."))])
    for one, other in zip(known, known[1:], strict=False):
        first = next(pair for pair in zip(one.split("."), other.split("."), strict=False) if pair[0] != pair[1])
        if -1 in map(rank, first):
            raise ValueError(
                f"Whether the model defines {one!r} or {other!r} first is not known, and the scalings of this "
                "classifier are in that order: pass load_xlora(..., order=[name for name, _ in model.named_modules()])."
            )
    return known


def _reordered(
    layer: dict[str, np.ndarray], adapted: Adapted, tree: Tree, modules: list[str], n: int
) -> dict[str, np.ndarray]:
    """The last layer with its outputs in the order of ``xlora.spread``; zeros for an index of a stack that no adapter
    adapts."""
    sizes = {leaf.shape[-1] for leaf in layer.values()}
    if sizes != {len(modules) * n}:
        raise ValueError(
            f"The last layer of the classifier has {sizes} outputs, where {n} for each of {len(modules)} modules are "
            "wanted."
        )
    return _permuted(layer, modules, [place.module for place in _places(adapted, tree)], n)


def _places(adapted: Adapted, tree: Tree) -> list[Place]:
    """The adapted modules in the order of ``xlora.spread``."""
    places = [place for path in adapted.sites for place in tree.by_path[path]]
    bare = next((place for place in places if place.bare), None)
    if bare is not None:
        raise ValueError(f"{bare.path!r} is a bare parameter to PyTorch, {bare.name}, and X-LoRA mixes none of these.")
    return places


def _permuted(
    layer: Mapping[str, np.ndarray], given: Sequence[str], wanted: Sequence[str], n: int
) -> dict[str, np.ndarray]:
    """A layer whose outputs are n for each of the given modules, as n for each of those wanted; zeros for the new."""
    number = {module: i for i, module in enumerate(given)}

    def one(leaf: np.ndarray) -> np.ndarray:
        own = leaf.reshape(*leaf.shape[:-1], len(given), n)
        own = np.concatenate([own, np.zeros_like(own[..., :1, :])], axis=-2)
        return own[..., [number.get(module, -1) for module in wanted], :].reshape(*leaf.shape[:-1], -1)

    return {name: one(np.asarray(leaf)) for name, leaf in layer.items()}
