"""Checkpoints in the Hugging Face layout: config.json and safetensors, to and from stacked parameter trees.

The module's own tree decides what must be in the files. A path becomes a tensor name by one rule: "/" becomes ".", the
layer index goes after "layers" (or "layer", or "h"), and `kernel`, `embedding` and `scale` become "weight". A `kernel`
[in, out] is stored as [out, in], one of a convolution [*window, in, out] as [out, in, *window]. Where the files of a
family differ from the rule, its `Layout` says how.
"""

import contextlib
import dataclasses
import functools
import json
import math
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Sharding
from jaxtyping import Array
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from jlora.train import distributed

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_SHARD_BYTES = 4 * 2**30
# Tensors some exporters write that hold nothing of their own.
_REDUNDANT = ("rotary_emb.inv_freq",)
# Segments of a path that a layer's number follows, and leaves that the files call otherwise.
_STACKS = ("layers", "layer", "h")
_LEAVES = {"kernel": "weight", "embedding": "weight", "scale": "weight"}


Index = tuple[int | slice, ...]
Block = tuple[slice, ...]
"""Where a block of an array lies: a start and a stop for each axis."""


# Entries of config.json that have no part in what a model computes.
_ELSEWHERE = {
    "model_type", "architectures", "auto_map", "transformers_version", "dtype", "torch_dtype", "use_cache",
    "cache_implementation", "pretraining_tp", "attention_dropout", "resid_pdrop", "embd_pdrop", "hidden_dropout",
    "id2label", "label2id", "num_labels", "problem_type", "task_specific_params", "finetuning_task", "return_dict",
    "output_router_logits", "router_aux_loss_coef", "max_length", "min_length", "temperature", "top_k", "top_p",
    "repetition_penalty", "length_penalty", "num_beams", "num_return_sequences", "chunk_size_feed_forward", "prefix",
    "hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout", "attn_pdrop", "summary_first_dropout",
    "gradient_checkpointing", "output_past", "output_attentions", "output_hidden_states", "torchscript",
    "is_llama_config", "unsloth_version", "unsloth_fixed",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where the files of a family differ from the rule of this module. Patterns are regular expressions.

    Attributes:
      renames: (pattern, replacement) pairs, from the name by the rule to the one in the files.
      spellings: the same, from names that older writers used to those in the files.
      prefix: what the names of a model with a head begin with, and those of the bare model lack. Files of one are read
        for the other.
      in_out: paths whose kernels are stored [in, out], too.
      redundant: names of tensors that the module can do without.
      new_head: paths of what a new classification head has of its own, to be drawn where the files lack it.
      experts: (leaf, names) pairs: a leaf [layers, experts, in, out] of a module `experts`, of which the files hold a
        tensor for each expert and each of the names, whose outputs lie side by side in the leaf.
    """

    renames: tuple[tuple[str, str], ...] = ()
    spellings: tuple[tuple[str, str], ...] = ()
    prefix: str = ""
    in_out: str | None = None
    redundant: str | None = None
    new_head: str | None = None
    experts: tuple[tuple[str, tuple[str, ...]], ...] = ()

    def pieces(self, path: str, shape: tuple[int, ...]) -> list[tuple[str, Index]]:
        """The tensors that the leaf at `path` is made of: names in the files, and where in the leaf each one lies."""
        names, parts = tensor_names(path, shape), self._parts(path)
        if parts:
            n = shape[-1] // len(parts)
            found = [
                (f"{name.rpartition('.')[0]}.{e}.{part}.weight", (i, e, slice(None), slice(k * n, (k + 1) * n)))
                for i, name in enumerate(names)
                for e in range(shape[1])
                for k, part in enumerate(parts)
            ]
        else:
            found = [(name, (i,) if _stacked(path) else ()) for i, name in enumerate(names)]
        return [(_replaced(name, self.renames), index) for name, index in found]

    def _parts(self, path: str) -> tuple[str, ...]:
        *_, module, leaf = ("", *path.split("/"))
        return dict(self.experts).get(leaf, ()) if module == "experts" else ()

    def to_file(self, path: str, tensor: np.ndarray) -> np.ndarray:
        """A piece of a leaf as it is stored: a view."""
        return tensor.transpose(self.stored_order(path, range(tensor.ndim)))

    def stored_order(self, path: str, axes: Sequence[Any]) -> tuple[Any, ...]:
        """What there is for each axis of a piece of a leaf, such as its length, in the order of the files."""
        return (*axes[:-3:-1], *axes[:-2]) if self._turned(path) else tuple(axes)

    def _turned(self, path: str) -> bool:
        kernel = path.endswith("/kernel") or bool(self._parts(path))
        return kernel and not (self.in_out and re.search(self.in_out, path))

    def resolve(self, found: Iterable[str], wanted: Iterable[str]) -> dict[str, str]:
        """{name: name in the files}: names that are wanted if a spelling of them is, and the others as they are."""
        wanted = set(wanted)
        resolved = {}
        for name in found:
            plain = _replaced(name, self.spellings)
            spellings = (plain, self.prefix + plain, plain.removeprefix(self.prefix))
            resolved[next((s for s in spellings if s in wanted), name)] = name
        return resolved

    def needless(self, name: str) -> bool:
        """Whether a tensor that the module does not have may be passed over."""
        return name.endswith(_REDUNDANT) or bool(self.redundant and re.search(self.redundant, name))


def _replaced(name: str, pairs: Iterable[tuple[str, str]]) -> str:
    for pattern, replacement in pairs:
        name = re.sub(pattern, replacement, name)
    return name


def token_ids(config: Any) -> tuple[jax.ShapeDtypeStruct, ...]:
    """The inputs of a language model, to trace it with."""
    return (jax.ShapeDtypeStruct((1, 8), jnp.int32),)


@dataclasses.dataclass(frozen=True)
class Family:
    """What is particular to one `model_type`: how its config.json is read, the module it describes, and its files.

    `inputs` gives the shapes of an example of what the module is called with, `targets` are the patterns of the leaves
    to adapt when none are chosen, `writes_text` is whether the model predicts the next token, `statistics` are patterns
    of leaves that describe the data seen in pretraining: no method adapts or trains them.
    """

    model_type: str
    config: Callable[[dict[str, Any]], Any]
    module: Callable[..., nn.Module]
    layout: Layout = Layout()
    inputs: Callable[[Any], tuple[jax.ShapeDtypeStruct, ...]] = token_ids
    targets: tuple[str, ...] = ("all-linear",)
    writes_text: bool = True
    statistics: tuple[str, ...] = ()


def needed(source: dict[str, Any], key: str) -> Any:
    """An entry that config.json must have."""
    if key not in source:
        raise ValueError(f"no {key!r} among its keys {sorted(source)}")
    return source[key]


def refuse_unknown(source: dict[str, Any], read: Iterable[str]) -> None:
    """An error for entries of config.json that nobody reads and that may change what the model computes.

    Let pass are empty ones, and those that are known to concern something else, such as rates of dropout.
    """
    known = _ELSEWHERE | set(read)
    begins, ends = ("_", "transformers"), ("_token_id", "_token_ids")
    told = lambda key: key in known or key.startswith(begins) or key.endswith(ends)
    unknown = {key: value for key, value in source.items() if value and not told(key)}
    if "quantization_config" in unknown:
        raise ValueError("the checkpoint is quantized (quantization_config), and such files are not read here")
    if unknown:
        listed = ", ".join(f"{key}={value!r}" for key, value in unknown.items())
        raise ValueError(
            f"{listed}: not known for model_type {source.get('model_type')!r}, and it may change what the model "
            "computes. If it does not, delete it from config.json."
        )


def refuse_unless(source: dict[str, Any], key: str, built: Any) -> None:
    """An error if config.json asks for something that would change the mathematics and is not built."""
    if source.get(key, built) != built:
        raise ValueError(f"{key} is {source[key]!r}; only {built!r} is built")


def abstract_params(
    module: nn.Module, inputs: tuple[jax.ShapeDtypeStruct, ...] | None = None
) -> dict[str, jax.ShapeDtypeStruct]:
    """{path: shape and dtype} of the module's parameters, without computing any."""
    variables = jax.eval_shape(module.init, jax.random.key(0), *(token_ids(None) if inputs is None else inputs))
    return flatten_dict(variables["params"], sep="/")


Place = Callable[[Mapping[str, jax.ShapeDtypeStruct]], Mapping[str, Sharding]]
"""From the leaves of a model by path to where each of them goes."""


def draw(module: nn.Module, inputs: tuple[jax.ShapeDtypeStruct, ...], pattern: str, seed: int) -> dict[str, Array]:
    """The initial values of the leaves whose path matches, and no other's."""

    def init(key):
        params = module.init(key, *(jnp.zeros(x.shape, x.dtype) for x in inputs))["params"]
        return {path: leaf for path, leaf in flatten_dict(params, sep="/").items() if re.search(pattern, path)}

    return jax.jit(init)(jax.random.key(seed))


def tensor_names(path: str, shape: tuple[int, ...]) -> list[str]:
    """The names by the rule of the leaf at `path`: one, or one per layer of a stacked leaf.

    >>> tensor_names("model/layers/mlp/up_proj/kernel", (2, 64, 172))
    ['model.layers.0.mlp.up_proj.weight', 'model.layers.1.mlp.up_proj.weight']
    """
    *modules, leaf = path.split("/")
    suffix = [_LEAVES.get(leaf, leaf)]
    if not _stacked(path):
        return [".".join(modules + suffix)]
    at = next(i for i, name in enumerate(modules) if name in _STACKS) + 1
    return [".".join([*modules[:at], str(i), *modules[at:], *suffix]) for i in range(shape[0])]


def build_params(
    module: nn.Module,
    shapes: Mapping[str, tuple[int, ...]],
    read: Callable[[str, Block], np.ndarray],
    where: str,
    layout: Layout = Layout(),
    inputs: tuple[jax.ShapeDtypeStruct, ...] | None = None,
    drawn: Mapping[str, Array] | None = None,
    place: Place | None = None,
) -> dict[str, Any]:
    """The module's parameter tree from named tensors: `shapes` tells what there is, `read` fetches a block of one.

    `drawn` has leaves of a new head, by path: they are used where there are no such tensors. `place` says where leaves
    go; without it they go to the default device.

    A portion of a tensor is read at a time, straight into its place in the leaf, so that beside the parameters there is
    never more than that in memory. Of a leaf that is sharded, only the block of one device is read at a time, and on
    each process only those of its own devices. Names or shapes that do not fit are an error that lists them, before
    anything is read.
    """
    leaves = abstract_params(module, inputs)
    pieces = {path: layout.pieces(path, leaf.shape) for path, leaf in leaves.items()}
    wanted = {
        name: layout.stored_order(path, _shape_at(leaf.shape, index))
        for path, leaf in leaves.items()
        for name, index in pieces[path]
    }
    files = layout.resolve(shapes, wanted)
    new = {path: leaf for path, leaf in (drawn or {}).items() if not any(name in files for name, _ in pieces[path])}
    wanted = {name: shape for name, shape in wanted.items() if not any(name in dict(pieces[path]) for path in new)}
    _check(wanted, {name: tuple(shapes[file]) for name, file in files.items()}, layout, where)
    shardings = place(leaves) if place is not None else {}

    def block_of(path: str, block: Block) -> np.ndarray:
        leaf = leaves[path]
        buffer = _aligned(tuple(axis.stop - axis.start for axis in block), leaf.dtype)
        for name, index in pieces[path]:
            common = _overlap(index, block, leaf.shape)
            if common is None:
                continue
            stored = layout.to_file(path, buffer[common[0]])
            first, *others = layout.stored_order(path, common[1])
            # A row is read as a whole, also where a block has a part of it only.
            for rows in _portions(len(stored), math.prod(wanted[name][1:]) * leaf.dtype.itemsize):
                portion = read(files[name], (slice(first.start + rows.start, first.start + rows.stop), *others))
                if not jnp.issubdtype(portion.dtype, jnp.floating):
                    raise ValueError(f"{where}: {name} is {portion.dtype}; quantized checkpoints are not read here")
                stored[rows] = portion
        return buffer

    params = {}
    for path, leaf in leaves.items():
        sharding = shardings.get(path)
        if path in new:
            params[path] = new[path] if sharding is None else distributed.place(new[path], sharding)
        elif sharding is None:
            params[path] = jax.device_put(block_of(path, tuple(slice(0, n) for n in leaf.shape)))
        else:
            params[path] = _sharded(leaf.shape, sharding, functools.partial(block_of, path))
    return unflatten_dict(params, sep="/")


def _overlap(index: Index, block: Block, shape: tuple[int, ...]) -> tuple[Index, Block] | None:
    """What a piece that lies at `index` of a leaf and a block of that leaf have in common: where it is in the block,
    and where in the piece.

    >>> _overlap((3,), (slice(2, 4), slice(0, 5)), (6, 10))
    ((1, slice(0, 5, None)), (slice(0, 5, None),))
    """
    in_block, in_piece = [], []
    index += (slice(None),) * (len(shape) - len(index))
    for at, axis, n in zip(index, block, shape, strict=True):
        first, last = (at, at + 1) if isinstance(at, int) else at.indices(n)[:2]
        start, stop = max(first, axis.start), min(last, axis.stop)
        if start >= stop:
            return None
        if isinstance(at, int):
            in_block.append(at - axis.start)
        else:
            in_block.append(slice(start - axis.start, stop - axis.start))
            in_piece.append(slice(start - first, stop - first))
    return tuple(in_block), tuple(in_piece)


def _sharded(shape: tuple[int, ...], sharding: Sharding, block_of: Callable[[Block], np.ndarray]) -> Array:
    """An array with this sharding. A block is asked for once, however many devices hold it, and let go when they do."""
    holders: dict[tuple[tuple[int, int], ...], list[jax.Device]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        bounds = tuple(axis.indices(n)[:2] for axis, n in zip(index, shape, strict=True))
        holders.setdefault(bounds, []).append(device)
    arrays = []
    for bounds, devices in holders.items():
        block = block_of(tuple(slice(*axis) for axis in bounds))
        arrays += [jax.device_put(block, device) for device in devices]
    return jax.make_array_from_single_device_arrays(shape, sharding, arrays)


_PORTION_BYTES = 2**24


def _portions(rows: int, row_bytes: int) -> list[slice]:
    """Slices of about `_PORTION_BYTES` each, all rows together."""
    step = max(1, _PORTION_BYTES // max(row_bytes, 1))
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def _aligned(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An array not filled yet. `jax.device_put` takes over as it is, on the CPU, what begins at a multiple of 64 bytes,
    and copies the rest."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    memory = np.empty(size + 63, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size].view(dtype).reshape(shape)


def _shape_at(shape: tuple[int, ...], index: Index) -> tuple[int, ...]:
    return np.broadcast_to(np.zeros(()), shape)[index].shape


def _stacked(path: str) -> bool:
    return not set(_STACKS).isdisjoint(path.split("/")[:-1])


def _check(
    wanted: Mapping[str, tuple[int, ...]], shapes: Mapping[str, tuple[int, ...]], layout: Layout, where: str
) -> None:
    tied = "lm_head.weight"  # some write it although it is the embedding
    found = {n: s for n, s in shapes.items() if n in wanted or not (n == tied or layout.needless(n))}
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
        title = f"{where}: {len(rows)} tensors do not fit the model that its configuration describes"
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


def load_params(
    module: nn.Module,
    directory: pathlib.Path,
    layout: Layout = Layout(),
    inputs: tuple[jax.ShapeDtypeStruct, ...] | None = None,
    drawn: Mapping[str, Array] | None = None,
    without: str | None = None,
    place: Place | None = None,
) -> dict[str, Any]:
    """The module's parameters from `directory`: one model.safetensors, or the shards that the index lists.

    `drawn` and `place` are as for `build_params`; tensors whose name matches `without` are taken not to be there.
    """
    holder, shapes = {}, {}
    for file in _weight_files(directory):
        with _opened(file) as handle:
            names = [name for name in handle.keys() if not (without and re.search(without, name))]
            shapes |= {name: tuple(handle.get_slice(name).get_shape()) for name in names}
            holder |= dict.fromkeys(names, file)

    def read(name: str, block: Block) -> np.ndarray:
        # A file is mapped into memory as far as it was read, until it is closed.
        with _opened(holder[name]) as handle:
            return handle.get_slice(name)[block]

    return build_params(module, shapes, read, str(directory), layout, inputs, drawn, place)


@contextlib.contextmanager
def _opened(file: pathlib.Path) -> Iterator[safe_open]:
    try:
        with safe_open(file, framework="numpy") as handle:
            yield handle
    except FileNotFoundError:
        raise FileNotFoundError(f"{file} is missing, though {INDEX} lists it") from None
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is not a whole safetensors file ({error}); fetch it again") from error


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


def save_params(
    params: Mapping[str, Any],
    directory: pathlib.Path,
    layout: Layout = Layout(),
    shard_bytes: int = _SHARD_BYTES,
) -> None:
    """Writes a stacked parameter tree as model.safetensors, or as shards of at most `shard_bytes` and their index."""
    leaves = flatten_dict(params, sep="/")
    entries = [(name, path, at) for path, leaf in leaves.items() for name, at in layout.pieces(path, leaf.shape)]
    bytes_of = lambda leaf, index: math.prod(_shape_at(leaf.shape, index)) * leaf.dtype.itemsize
    size = {name: bytes_of(leaves[path], index) for name, path, index in entries}
    shards: list[list[tuple[str, str, Index]]] = [[]]
    used = 0
    for entry in entries:
        if shards[-1] and used + size[entry[0]] > shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(entry)
        used += size[entry[0]]
    if len(shards) == 1:
        save_file(_stored(leaves, shards[0], layout), directory / WEIGHTS, {"format": "pt"})
        return
    files = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    for file, shard in zip(files, shards, strict=True):
        save_file(_stored(leaves, shard, layout), directory / file, {"format": "pt"})
    weight_map = {name: file for file, shard in zip(files, shards, strict=True) for name, _, _ in shard}
    index = {"metadata": {"total_size": sum(size.values())}, "weight_map": weight_map}
    (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _stored(
    leaves: Mapping[str, Any], entries: Iterable[tuple[str, str, Index]], layout: Layout
) -> dict[str, np.ndarray]:
    def tensor(path: str, index: Index) -> np.ndarray:
        # One layer at a time leaves the device.
        piece = np.asarray(leaves[path][index[0]])[index[1:]] if index else np.asarray(leaves[path])
        # safetensors writes the buffer as it lies in memory, so a transposed view has to be laid out anew.
        return np.ascontiguousarray(layout.to_file(path, piece))

    return {name: tensor(path, index) for name, path, index in entries}
