"""Language models to fine-tune: ordinary Flax modules with stacked layers, which know nothing of adapters.

A family is one small file with a `FAMILY`, listed in `FAMILIES` under its `model_type`.
"""

import dataclasses
import json
import os
import pathlib
import shutil
from typing import Any

import flax.linen as nn

from jlora.train.models import hf, llama, qwen2, stories
from jlora.train.models.hf import Family as Family
from jlora.train.models.layers import Cache as Cache
from jlora.train.models.layers import CausalLM as CausalLM
from jlora.train.models.layers import DecoderConfig as DecoderConfig
from jlora.train.tokenizers import Tokenizer, read_tokenizer, stories_tokenizer

FAMILIES: dict[str, Family] = {family.model_type: family for family in (llama.FAMILY, qwen2.FAMILY)}
BUNDLED = "stories260k"
# Files that ride along unchanged when a model read from a directory is written to another.
_COMPANIONS = ("generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A module, its parameters, and what is needed to use and to write it again."""

    module: nn.Module
    params: dict[str, Any]
    config: DecoderConfig
    name: str
    family: Family
    source: dict[str, Any]
    """The content of config.json, kept so that `save_hf` writes back also what the module does not read."""
    directory: pathlib.Path | None = None
    optional_tokenizer: Tokenizer | None = None

    @property
    def tokenizer(self) -> Tokenizer:
        if self.optional_tokenizer is None:
            raise FileNotFoundError(f"{self.directory} has no tokenizer.json, which is needed to read or write text")
        return self.optional_tokenizer


def load(name_or_directory: str | os.PathLike[str], *, dtype: str = "float32", remat: bool = False) -> LoadedModel:
    """Loads the bundled model ("stories260k") or a directory in the Hugging Face layout.

    Args:
      name_or_directory: the bundled name, or a directory with config.json, model.safetensors (or shards and their
        index) and, for work with text, tokenizer.json.
      dtype: of parameters and activations, whatever the files hold: "float32" or "bfloat16".
      remat: recompute each block in the backward pass; less memory for about a third more time.
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
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    module = family.module(config, remat=remat)
    if bundled:
        shapes = {name: tensor.shape for name, tensor in tensors.items()}
        params = hf.build_params(module, shapes, tensors.__getitem__, BUNDLED)
        tokenizer = stories_tokenizer()
    else:
        params = hf.load_params(module, directory)
        tokenizer = read_tokenizer(directory, source)
    name = BUNDLED if bundled else str(directory)
    return LoadedModel(module, params, config, name, family, source, directory, tokenizer)


def save_hf(model: LoadedModel, params: dict[str, Any], directory: str | os.PathLike[str]) -> None:
    """Writes `params` (structured as `model.params`) as a model directory that `load` and transformers read."""
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    hf.save_params(params, directory)
    dtype = str(params["model"]["embed_tokens"]["embedding"].dtype)
    source = {k: v for k, v in model.source.items() if k != "torch_dtype"} | {"dtype": dtype}
    (directory / "config.json").write_text(json.dumps(source, indent=2) + "\n", encoding="utf-8")
    if model.optional_tokenizer is not None:
        model.optional_tokenizer.save(directory)
    for name in _COMPANIONS if model.directory else ():
        if (model.directory / name).exists():
            shutil.copyfile(model.directory / name, directory / name)
