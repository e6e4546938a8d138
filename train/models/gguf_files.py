"""GGUF files, the single-file checkpoints of llama.cpp: weights, configuration, tokenizer and chat template in one.

The `gguf` package reads the file and undoes its quantization. Here the metadata become a config.json of the family, and
the tensors get the names and the row order of the Hugging Face layout, so that everything after is as for a directory.

A tensor of `out` rows is stored [out, in] as there. Files of the architecture "llama" hold the rows of each head of W_q
and W_k for rotary pairs (2i, 2i + 1); `hf` wants the pairs (i, i + d/2), which is the order 0, 2, .., 1, 3, .. of them.
"""

import pathlib
import re
from typing import Any, NamedTuple

import numpy as np

from jlora.train.tokenizers import Tokenizer, metadata_tokenizer

# Architecture -> (model_type, class in transformers, whether the rotary pairs are interleaved).
_ARCHITECTURES = {
    "llama": ("llama", "LlamaForCausalLM", True),
    "qwen2": ("qwen2", "Qwen2ForCausalLM", False),
    "qwen3": ("qwen3", "Qwen3ForCausalLM", False),
}
_OUTSIDE = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_IN_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# Divisors of the rotary frequencies, which are configuration.
_ROPE_FACTORS = "rope_freqs.weight"


class _Stored(NamedTuple):
    """A tensor in the file."""

    kind: Any
    """How it is quantized: gguf.GGMLQuantizationType."""
    shape: tuple[int, ...]
    """(in, out), as the file has it."""
    size: int
    offset: int
    """Both in bytes."""


class File:
    """An open GGUF file: `source` is its metadata as the content of config.json, `tensors` are named as in `hf`."""

    def __init__(self, path: pathlib.Path):
        try:
            import gguf
        except ModuleNotFoundError:
            raise ValueError(f"{path}: reading GGUF files needs the gguf package: pip install 'jlora[gguf]'") from None
        self._gguf, self.path = gguf, path
        try:
            reader = gguf.GGUFReader(path)
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise ValueError(f"{path} is not a whole GGUF file ({error}); fetch it again") from error
        if reader.byte_order != "I":
            raise ValueError(f"{path} was written for machines of the other byte order; convert it first")
        # The reader has an object for each word of the vocabulary: what is needed of it is kept, and it is let go.
        self._metadata = {name: self._value(field) for name, field in reader.fields.items()}
        self._stored = {
            t.name: _Stored(t.tensor_type, tuple(t.shape.tolist()), int(t.n_bytes), int(t.data_offset))
            for t in reader.tensors
        }
        del reader
        if self._get("split.count", 1) > 1:
            raise ValueError(f"{path} is one part of several: join them first, with llama-gguf-split --merge")
        self._interleaved = False
        self.source = self._read_source()
        self.tensors = {_hf_name(name): name for name in self._stored if name != _ROPE_FACTORS}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """{name in the Hugging Face layout: shape}."""
        return {name: self._stored[stored].shape[::-1] for name, stored in self.tensors.items()}

    def read(self, name: str, block: tuple[slice, ...]) -> np.ndarray:
        """A block of a tensor, dequantized. Its rows are read, not mapped, so that they do not stay in memory."""
        rows, *others = block
        return self._rows(name, rows)[:, *others]

    def _rows(self, name: str, rows: slice) -> np.ndarray:
        tensor = self._stored[self.tensors[name]]
        heads = self._rotated_heads(name)
        if len(tensor.shape) == 1:
            whole = self._dequantized(tensor, 0, 1)[0]
            return (whole if heads is None else whole[_half_split(len(whole), heads)])[rows]
        if heads is not None:
            count = tensor.shape[1]
            return self._dequantized(tensor, 0, count)[_half_split(count, heads)[rows]]
        return self._dequantized(tensor, rows.start, rows.stop)

    def _dequantized(self, tensor: _Stored, start: int, stop: int) -> np.ndarray:
        count = tensor.shape[1] if len(tensor.shape) > 1 else 1
        size = tensor.size // count
        data = np.fromfile(self.path, np.uint8, (stop - start) * size, offset=tensor.offset + start * size)
        try:
            return self._gguf.dequantize(data.reshape(stop - start, size), tensor.kind)
        except NotImplementedError:
            raise ValueError(
                f"{self.path}: a tensor is {tensor.kind.name}, which the gguf package does not dequantize; "
                "get the file in another quantization, for example Q4_K_M or Q8_0"
            ) from None

    def read_tokenizer(self) -> Tokenizer | None:
        """The tokenizer of the metadata; None where there is none."""
        model = self._get("tokenizer.ggml.model", None)
        if model in (None, "none", "no_vocab"):
            return None
        prefix = "tokenizer.ggml."
        fields = {name.removeprefix(prefix): self._get(name) for name in self._metadata if name.startswith(prefix)}
        try:
            return metadata_tokenizer(fields, self._get("tokenizer.chat_template", None))
        except ValueError as error:
            raise ValueError(f"{self.path}: {error}") from error

    def _rotated_heads(self, name: str) -> int | None:
        """How many heads the rows of a tensor are of, if their pairs are interleaved."""
        if not self._interleaved:
            return None
        if re.search(r"\.q_proj\.(weight|bias)$", name):
            return self.source["num_attention_heads"]
        return self.source["num_key_value_heads"] if re.search(r"\.k_proj\.(weight|bias)$", name) else None

    _NEEDED = object()

    def _value(self, field: Any) -> Any:
        value = field.contents()
        # float32: 1e-05 shall not become 9.999999747378752e-06
        return float(str(np.float32(value))) if field.types == [self._gguf.GGUFValueType.FLOAT32] else value

    def _get(self, name: str, default: Any = _NEEDED) -> Any:
        value = self._metadata.get(name, default)
        if value is self._NEEDED:
            raise ValueError(f"{self.path} has no {name!r} in its metadata; it is needed to know the model's shape")
        return value

    def _read_source(self) -> dict[str, Any]:
        architecture = self._get("general.architecture")
        if architecture not in _ARCHITECTURES:
            raise ValueError(
                f"{self.path}: GGUF files of the architecture {architecture!r} are not read; known are "
                f"{sorted(_ARCHITECTURES)}. Get the model as a directory in Hugging Face layout instead"
            )
        model_type, architecture_class, self._interleaved = _ARCHITECTURES[architecture]
        get = lambda key, *default: self._get(f"{architecture}.{key}", *default)
        if get("expert_count", 0):
            raise ValueError(f"{self.path}: a mixture of experts; of GGUF files, only dense models are read")
        if get("attention.sliding_window", 0):
            raise ValueError(f"{self.path}: its attention has a sliding window, which is not read from GGUF files")
        for key in ("attention.head_count", "attention.head_count_kv", "feed_forward_length"):
            if isinstance(get(key, 0), list):
                raise ValueError(f"{self.path}: layers differ in {key}; only equal layers are built")
        width, heads = get("embedding_length"), get("attention.head_count")
        head_dim = get("attention.key_length", width // heads)
        rotated = get("rope.dimension_count", head_dim)
        if rotated != head_dim:
            raise ValueError(f"{self.path}: {rotated} of {head_dim} entries of a head are rotated; only all are built")
        source = {
            "architectures": [architecture_class],
            "model_type": model_type,
            "vocab_size": self._vocab_size(),
            "hidden_size": width,
            "intermediate_size": get("feed_forward_length"),
            "num_hidden_layers": get("block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": get("attention.head_count_kv", heads),
            "head_dim": head_dim,
            "max_position_embeddings": get("context_length"),
            "rms_norm_eps": get("attention.layer_norm_rms_epsilon"),
            "rope_theta": get("rope.freq_base", 10000.0),
            "hidden_act": "silu",
            "tie_word_embeddings": "output.weight" not in self._stored,
        }
        if model_type == "llama":
            source["attention_bias"] = "blk.0.attn_q.bias" in self._stored
            source["mlp_bias"] = "blk.0.ffn_up.bias" in self._stored
        for key in ("bos", "eos", "padding"):
            token = self._get(f"tokenizer.ggml.{key}_token_id", None)
            if token is not None:
                source[f"{key.removesuffix('ding')}_token_id"] = token
        return source | self._rope_scaling(get, source)

    def _vocab_size(self) -> int:
        if "token_embd.weight" not in self._stored:
            raise ValueError(f"{self.path} has no tensor 'token_embd.weight': it is not the first part of a model")
        return self._stored["token_embd.weight"].shape[1]

    def _rope_scaling(self, get, source: dict[str, Any]) -> dict[str, Any]:
        kind, factor = get("rope.scaling.type", "none"), get("rope.scaling.factor", 1.0)
        if _ROPE_FACTORS in self._stored:
            # What Llama 3.1 calls "llama3" is stored as a divisor for each frequency, whatever the length.
            factors = self._dequantized(self._stored[_ROPE_FACTORS], 0, 1)[0].tolist()
            length = source["max_position_embeddings"]
            scaling = {"rope_type": "longrope", "short_factor": factors, "long_factor": factors, "factor": 1.0}
            scaling |= {"attention_factor": 1.0, "original_max_position_embeddings": length}
        elif kind == "linear" and factor != 1:
            scaling = {"rope_type": "linear", "factor": factor}
        elif kind in ("none", "linear"):
            return {}
        else:
            raise ValueError(f"{self.path}: rotary positions are scaled by {kind!r}, which is not read from GGUF files")
        return {"rope_scaling": scaling}


def _half_split(rows: int, heads: int) -> np.ndarray:
    """Where the rows for half-split rotary pairs are among those for interleaved ones: 0, 2, .., 1, 3, .. of each head.

    >>> _half_split(8, 2)
    array([0, 2, 1, 3, 4, 6, 5, 7])
    """
    return np.arange(rows).reshape(heads, rows // heads // 2, 2).swapaxes(1, 2).reshape(rows)


def _hf_name(name: str) -> str:
    """The name of a tensor in the Hugging Face layout; one that is not known stays as it is.

    >>> _hf_name("blk.3.attn_q.weight")
    'model.layers.3.self_attn.q_proj.weight'
    """
    module, _, leaf = name.rpartition(".")
    if module in _OUTSIDE:
        return f"{_OUTSIDE[module]}.{leaf}"
    block = re.fullmatch(r"blk\.(\d+)\.(\w+)", module)
    if block and block[2] in _IN_BLOCK:
        return f"model.layers.{block[1]}.{_IN_BLOCK[block[2]]}.{leaf}"
    return name
