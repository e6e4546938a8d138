"""Checkpoints in the Hugging Face layout: config.json and safetensors, to and from stacked parameter trees.

The module's own tree decides what must be in the files. A path becomes a tensor name by one rule: "/" becomes ".", the
layer index goes after "layers", and the leaf's name becomes "weight" ("bias" stays). A `kernel` [in, out] is stored
as [out, in].
"""

import contextlib
import dataclasses
import functools
import json
import math
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from jlora.train.models.layers import DecoderConfig, RopeScaling

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_SHARD_BYTES = 4 * 2**30
# Tensors some exporters write that hold nothing of their own.
_REDUNDANT = ("rotary_emb.inv_freq",)


@dataclasses.dataclass(frozen=True)
class Family:
    """What is particular to one `model_type`: how its config.json is read, and the module it describes."""

    model_type: str
    config: Callable[[dict[str, Any]], DecoderConfig]
    module: Callable[..., nn.Module]


def decoder_config(source: dict[str, Any], **switches: bool) -> DecoderConfig:
    """The fields that all families of the Llama kind share; `switches` are the ones that config.json does not name."""

    need = functools.partial(_need, source)
    if source.get("hidden_act", "silu") != "silu":
        raise ValueError(f"hidden_act is {source['hidden_act']!r}; only 'silu' is built")
    heads = need("num_attention_heads")
    rope = source.get("rope_parameters") or source.get("rope_scaling") or {}
    return DecoderConfig(
        vocab_size=need("vocab_size"),
        hidden_size=need("hidden_size"),
        intermediate_size=need("intermediate_size"),
        num_layers=need("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=source.get("num_key_value_heads") or heads,
        head_dim=source.get("head_dim") or need("hidden_size") // heads,
        max_positions=source.get("max_position_embeddings", 2048),
        norm_eps=source.get("rms_norm_eps", 1e-6),
        rope_theta=float(rope.get("rope_theta") or source.get("rope_theta", 10000.0)),
        rope_scaling=_rope_scaling(rope),
        tie_embeddings=source.get("tie_word_embeddings", False),
        init_range=source.get("initializer_range", 0.02),
        **switches,
    )


def _need(source: dict[str, Any], key: str) -> Any:
    if key not in source:
        raise ValueError(f"no {key!r} among its keys {sorted(source)}")
    return source[key]


def _rope_scaling(rope: dict[str, Any]) -> RopeScaling | None:
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return None
    if kind == "linear":
        return RopeScaling(kind, _need(rope, "factor"))
    if kind == "llama3":
        keys = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        return RopeScaling(kind, *(_need(rope, key) for key in keys))
    raise ValueError(f"rope type {kind!r} is not built; known are 'default', 'linear' and 'llama3'")


def abstract_params(module: nn.Module) -> dict[str, jax.ShapeDtypeStruct]:
    """{path: shape and dtype} of the module's parameters, without computing any."""
    variables = jax.eval_shape(module.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 2), jnp.int32))
    return flatten_dict(variables["params"], sep="/")


def tensor_names(path: str, shape: tuple[int, ...]) -> list[str]:
    """The names under which the files hold the leaf at `path`: one, or one per layer of a stacked leaf.

    >>> tensor_names("model/layers/mlp/up_proj/kernel", (2, 64, 172))
    ['model.layers.0.mlp.up_proj.weight', 'model.layers.1.mlp.up_proj.weight']
    """
    *modules, leaf = path.split("/")
    suffix = [leaf if leaf == "bias" else "weight"]
    if "layers" not in modules:
        return [".".join(modules + suffix)]
    at = modules.index("layers") + 1
    return [".".join([*modules[:at], str(i), *modules[at:], *suffix]) for i in range(shape[0])]


def build_params(
    module: nn.Module,
    shapes: Mapping[str, tuple[int, ...]],
    read: Callable[[str], np.ndarray],
    where: str,
) -> dict[str, Any]:
    """The module's parameter tree from named tensors, of which `shapes` tells what there is and `read` fetches one.

    One tensor is read at a time, straight into its slice of the stacked leaf. Names or shapes that do not fit are an
    error that lists them, before anything is read.
    """
    leaves = abstract_params(module)
    _check(leaves, shapes, where)
    params = {}
    for path, leaf in leaves.items():
        names = tensor_names(path, leaf.shape)
        buffer = np.empty(leaf.shape, leaf.dtype)
        for name, slot in zip(names, buffer if _stacked(path) else [buffer], strict=True):
            tensor = read(name)
            if not jnp.issubdtype(tensor.dtype, jnp.floating):
                raise ValueError(f"{where}: {name} is {tensor.dtype}; quantized checkpoints are not read here")
            slot[...] = _transposed(path, tensor)
        params[path] = jnp.asarray(buffer)
    return unflatten_dict(params, sep="/")


def _stacked(path: str) -> bool:
    return "layers" in path.split("/")


def _transposed(path: str, tensor: np.ndarray) -> np.ndarray:
    return tensor.T if path.endswith("/kernel") else tensor


def _stored_shape(path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    shape = shape[1:] if _stacked(path) else shape
    return shape[::-1] if path.endswith("/kernel") else shape


def _check(leaves: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], where: str) -> None:
    wanted = {n: _stored_shape(p, leaf.shape) for p, leaf in leaves.items() for n in tensor_names(p, leaf.shape)}
    ignored = _REDUNDANT if "lm_head.weight" in wanted else (*_REDUNDANT, "lm_head.weight")
    found = {n: s for n, s in shapes.items() if n in wanted or not n.endswith(ignored)}
    rows = [
        (name, str(wanted.get(name, "nothing")), str(found.get(name, "missing")))
        for name in sorted(wanted.keys() | found.keys())
        if wanted.get(name) != found.get(name)
    ]
    if rows:
        width = max(len(r[0]) for r in rows)
        table = [("tensor", "expected", "found"), *rows[:20]]
        shown = [f"  {name:<{width}}  {want:<16}  {got}" for name, want, got in table]
        more = [f"  ... and {len(rows) - 20} more"] if len(rows) > 20 else []
        title = f"{where}: {len(rows)} tensors do not fit the model that config.json describes"
        raise ValueError("\n".join([title, *shown, *more]))


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """A JSON object from a file, or an error that names the file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing: a model directory holds config.json and {WEIGHTS}") from None
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}, wanted a JSON object")
    return value


def load_params(module: nn.Module, directory: pathlib.Path) -> dict[str, Any]:
    """The module's parameters from `directory`: one model.safetensors, or the shards that the index lists."""
    with contextlib.ExitStack() as stack:
        holder = {}
        for file in _weight_files(directory):
            try:
                handle = stack.enter_context(safe_open(file, framework="numpy"))
            except FileNotFoundError:
                raise FileNotFoundError(f"{file} is missing, though {INDEX} lists it") from None
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{file} is not a whole safetensors file ({error}); fetch it again") from error
            holder |= dict.fromkeys(handle.keys(), handle)
        shapes = {name: tuple(handle.get_slice(name).get_shape()) for name, handle in holder.items()}
        return build_params(module, shapes, lambda name: holder[name].get_tensor(name), str(directory))


def _weight_files(directory: pathlib.Path) -> list[pathlib.Path]:
    if (directory / WEIGHTS).exists():
        return [directory / WEIGHTS]
    if not (directory / INDEX).exists():
        present = sorted(p.name for p in directory.iterdir())
        raise FileNotFoundError(f"{directory} has neither {WEIGHTS} nor {INDEX}; it holds {present}")
    weight_map = read_json(directory / INDEX).get("weight_map")
    if not isinstance(weight_map, dict):
        raise ValueError(f"{directory / INDEX} has no 'weight_map' from tensor names to files")
    return [directory / name for name in sorted(set(weight_map.values()))]


def save_params(params: Mapping[str, Any], directory: pathlib.Path, shard_bytes: int = _SHARD_BYTES) -> None:
    """Writes a stacked parameter tree as model.safetensors, or as shards of at most `shard_bytes` and their index."""
    leaves = flatten_dict(params, sep="/")
    names = {path: tensor_names(path, leaf.shape) for path, leaf in leaves.items()}
    entries = [(name, path, i) for path in leaves for i, name in enumerate(names[path])]
    size = {p: math.prod(_stored_shape(p, leaf.shape)) * leaf.dtype.itemsize for p, leaf in leaves.items()}
    shards: list[list[tuple[str, str, int]]] = [[]]
    used = 0
    for entry in entries:
        if shards[-1] and used + size[entry[1]] > shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(entry)
        used += size[entry[1]]
    if len(shards) == 1:
        save_file(_stored(leaves, shards[0]), directory / WEIGHTS, {"format": "pt"})
        return
    files = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    for file, shard in zip(files, shards, strict=True):
        save_file(_stored(leaves, shard), directory / file, {"format": "pt"})
    weight_map = {name: file for file, shard in zip(files, shards, strict=True) for name, _, _ in shard}
    index = {"metadata": {"total_size": sum(size[path] for _, path, _ in entries)}, "weight_map": weight_map}
    (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _stored(leaves: Mapping[str, Any], entries: Iterable[tuple[str, str, int]]) -> dict[str, np.ndarray]:
    def tensor(path: str, i: int) -> np.ndarray:
        leaf = leaves[path]
        # safetensors writes the buffer as it lies in memory, so a transposed view has to be laid out anew.
        return np.ascontiguousarray(_transposed(path, np.asarray(leaf[i] if _stacked(path) else leaf)))

    return {name: tensor(path, i) for name, path, i in entries}
