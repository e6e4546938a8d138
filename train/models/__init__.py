"""Models to fine-tune: ordinary Flax modules with stacked layers, which know nothing of adapters.

A family is one small file with a `FAMILY`, listed in `FAMILIES` under its `model_type`.
"""

import dataclasses
import json
import os
import pathlib
import shutil
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax

from jlora.train.models import (
    bert,
    gemma2,
    gemma3,
    gpt2,
    hf,
    llama,
    mistral,
    mixtral,
    phi3,
    qwen2,
    qwen2_moe,
    qwen3,
    qwen3_moe,
    roberta,
    stories,
    vit,
)
from jlora.train.models.hf import Family as Family
from jlora.train.models.layers import Cache as Cache
from jlora.train.models.layers import CausalLM as CausalLM
from jlora.train.models.layers import DecoderConfig as DecoderConfig
from jlora.train.tokenizers import Tokenizer, read_tokenizer, stories_tokenizer

_MODULES = (
    bert, gemma2, gemma3, gpt2, llama, mistral, mixtral, phi3, qwen2, qwen2_moe, qwen3, qwen3_moe, roberta, vit,
)  # fmt: skip
FAMILIES: dict[str, Family] = {module.FAMILY.model_type: module.FAMILY for module in _MODULES}
BUNDLED = "stories260k"
# Files that ride along unchanged when a model read from a directory is written to another.
_COMPANIONS = ("generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


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

    @property
    def inputs(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Shapes of an example of what the module is called with."""
        return self.family.inputs(self.config)

    @property
    def tokenizer(self) -> Tokenizer:
        if self.optional_tokenizer is None:
            raise FileNotFoundError(f"{self.directory} has no tokenizer.json, which is needed to read or write text")
        return self.optional_tokenizer


def load(
    name_or_directory: str | os.PathLike[str],
    *,
    dtype: str = "float32",
    remat: bool = False,
    labels: Sequence[str] | None = None,
    seed: int = 0,
) -> LoadedModel:
    """Loads the bundled model ("stories260k") or a directory in the Hugging Face layout.

    Args:
      name_or_directory: the bundled name, or a directory with config.json, model.safetensors (or shards and their
        index) and, for work with text, tokenizer.json.
      dtype: of parameters and activations, whatever the files hold: "float32" or "bfloat16".
      remat: recompute each block in the backward pass; less memory for about a third more time.
      labels: names of classes, for a classification head in place of what the checkpoint has on top. It is the
        checkpoint's own if that tells these classes apart, in this order; otherwise it is drawn from `seed`.
    """
    bundled = str(name_or_directory).lower() == BUNDLED
    directory = None if bundled else pathlib.Path(name_or_directory)
    if bundled:
        source, tensors = stories.read()
    elif directory.is_dir():
        source = hf.read_json(directory / "config.json")
    else:
        raise FileNotFoundError(f"no model directory {str(directory)!r}; give one, or {BUNDLED!r}, which is shipped")
    where = BUNDLED if bundled else str(directory / "config.json")
    model_type = source.get("model_type")
    if model_type not in FAMILIES:
        raise ValueError(f"{where}: model_type {model_type!r} is not known; known are {sorted(FAMILIES)}")
    family = FAMILIES[model_type]
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
        params = hf.build_params(module, shapes, tensors.__getitem__, BUNDLED)
        tokenizer = stories_tokenizer()
    else:
        inputs, new = family.inputs(config), {}
        if drawing:
            new = {"drawn": hf.draw(module, inputs, family.layout.new_head, seed), "without": r"^classifier\."}
            source |= {"architectures": [type(module).__name__], "id2label": dict(enumerate(labels))}
            source |= {"label2id": {label: i for i, label in enumerate(labels)}}
        params = hf.load_params(module, directory, family.layout, inputs, **new)
        tokenizer = read_tokenizer(directory, source)
    name = BUNDLED if bundled else str(directory)
    return LoadedModel(module, params, config, name, family, source, directory, tokenizer)


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
