"""Text to token ids and back: a thin wrapper over `tokenizers`, and the bundled model's tokenizer."""

import dataclasses
import functools
import json
import os
import pathlib
import struct
from collections.abc import Iterable, Sequence
from typing import Any

import tokenizers

from jlora.train import assets


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """A `tokenizers.Tokenizer` with the ids of its special tokens; `encode` adds none of them, `decode` drops them.

    `bos_id` begins a sequence, `eos_id` ends it; either may be absent. `pad_id` fills places that nothing reads.
    `chat_template` is the Jinja source by which the model was taught conversations, of models that were.
    """

    inner: tokenizers.Tokenizer
    bos_id: int | None
    eos_id: int | None
    pad_id: int
    chat_template: str | None = None
    bos_token: str | None = None
    """What chat templates begin with, also of models whose other texts begin without."""

    @property
    def vocab_size(self) -> int:
        return self.inner.get_vocab_size()

    @functools.cached_property
    def largest_id(self) -> int:
        return max(self.inner.get_vocab().values())

    def encode(self, text: str) -> list[int]:
        return self.inner.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self.inner.encode_batch_fast(texts, add_special_tokens=False)]

    def encode_spans(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids, and for each the characters of the text that it stands for: start, and end."""
        encoding = self._plain.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    @functools.cached_property
    def _plain(self) -> tokenizers.Tokenizer:
        """Without the last stage, which takes the white space out of the characters of a token."""
        content = json.loads(self.inner.to_str()) | {"post_processor": None}
        return tokenizers.Tokenizer.from_str(json.dumps(content))

    def decode(self, ids: Iterable[int]) -> str:
        special = {self.bos_id, self.eos_id, self.pad_id}
        return self.inner.decode([i for i in map(int, ids) if i not in special])

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Writes tokenizer.json, and tokenizer_config.json with the special tokens."""
        directory = pathlib.Path(directory)
        self.inner.save(str(directory / "tokenizer.json"))
        ids = {"bos_token": self.bos_id, "eos_token": self.eos_id, "pad_token": self.pad_id}
        tokens = {key: None if i is None else self.inner.id_to_token(i) for key, i in ids.items()}
        content = {"tokenizer_class": "PreTrainedTokenizerFast", **tokens}
        if self.chat_template is not None:
            content["chat_template"] = self.chat_template
        (directory / "tokenizer_config.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def read_tokenizer(directory: pathlib.Path, config: dict[str, Any]) -> Tokenizer | None:
    """The tokenizer of a model directory, None when it has none.

    Its special tokens are those of tokenizer_config.json, and otherwise those of `config`, the content of config.json.
    """
    path = directory / "tokenizer.json"
    if not path.exists():
        return None
    try:
        inner = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"{path} is not a tokenizer that the `tokenizers` library reads: {error}") from error
    inner.no_truncation()
    inner.no_padding()
    extra = directory / "tokenizer_config.json"
    named = json.loads(extra.read_text(encoding="utf-8")) if extra.exists() else {}

    def special(kind: str) -> int | None:
        if f"{kind}_token" in named:
            token = named[f"{kind}_token"]
            token = token["content"] if isinstance(token, dict) else token
            return None if token is None else inner.token_to_id(token)
        value = config.get(f"{kind}_token_id")
        return value[0] if isinstance(value, list) else value

    bos, eos, pad = (special(kind) for kind in ("bos", "eos", "pad"))
    bos_token = None if bos is None else inner.id_to_token(bos)
    bos = bos if named.get("add_bos_token", True) else None
    template = _chat_template(directory, named)
    return Tokenizer(inner, bos, eos, pad if pad is not None else eos or 0, template, bos_token)


def _chat_template(directory: pathlib.Path, named: dict[str, Any]) -> str | None:
    """A file of its own, or an entry of tokenizer_config.json: one template, or several by name."""
    file = directory / "chat_template.jinja"
    if file.exists():
        return file.read_text(encoding="utf-8")
    template = named.get("chat_template")
    if isinstance(template, list):
        return {each["name"]: each["template"] for each in template}.get("default")
    return template


# How text is cut before pairs are merged, by the names that llama.cpp gives these ways.
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_DIGITS = ("smollm", "starcoder", "refact", "command-r")
_PATTERNS = {
    "llama-bpe": _CONTRACTIONS + "|" + _WORDS % r"\p{N}{1,3}",
    "qwen2": _CONTRACTIONS + "|" + _WORDS % r"\p{N}",
}
_PATTERNS |= {"llama3": _PATTERNS["llama-bpe"], "llama-v3": _PATTERNS["llama-bpe"]}
_PATTERNS |= {"deepseek-r1-qwen": _PATTERNS["qwen2"]}
# Kinds of tokens in GGUF files, beside ordinary ones.
_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4


def metadata_tokenizer(fields: dict[str, Any], chat_template: str | None = None) -> Tokenizer:
    """The tokenizer that a GGUF file describes: byte-level BPE ("gpt2"), or BPE of SentencePiece ("llama").

    Args:
      fields: the metadata whose names begin with "tokenizer.ggml.", without that.
      chat_template: the Jinja source of the file, if there is one.
    """
    model, tokens = fields["model"], fields["tokens"]
    kinds = fields.get("token_type") or [1] * len(tokens)
    if model == "gpt2":
        inner = _byte_level(fields, tokens)
    elif model == "llama":
        inner = _sentencepiece(fields, tokens, kinds)
    else:
        raise ValueError(
            f"tokenizers of the kind {model!r} are not read from GGUF files; known are 'gpt2' and 'llama'. Get the "
            "model as a directory in Hugging Face layout, with tokenizer.json"
        )
    added = [
        tokenizers.AddedToken(token, special=kind != _USER_DEFINED, normalized=False)
        for token, kind in zip(tokens, kinds, strict=True)
        if kind in (_UNKNOWN, _CONTROL, _USER_DEFINED)
    ]
    inner.add_tokens(added)
    bos, eos, pad = (fields.get(f"{name}_token_id") for name in ("bos", "eos", "padding"))
    bos_token = None if bos is None else tokens[bos]
    bos = bos if fields.get("add_bos_token", model == "llama") else None
    return Tokenizer(inner, bos, eos, pad if pad is not None else eos or 0, chat_template, bos_token)


def _byte_level(fields: dict[str, Any], tokens: list[str]) -> tokenizers.Tokenizer:
    cut = fields.get("pre", "default")
    splits = tokenizers.pre_tokenizers
    if cut in _PATTERNS:
        pattern = tokenizers.Regex(_PATTERNS[cut])
        first, whole = [splits.Split(pattern, "isolated")], splits.ByteLevel(add_prefix_space=False, use_regex=False)
    elif cut in ("default", "gpt-2", *_DIGITS):
        first = [splits.Digits(individual_digits=True)] if cut in _DIGITS else []
        whole = splits.ByteLevel(add_prefix_space=False)
    else:
        known = sorted({"default", "gpt-2", *_DIGITS, *_PATTERNS})
        raise ValueError(
            f"the tokenizer cuts text in the way {cut!r} (tokenizer.ggml.pre), which is not known here; known are "
            f"{', '.join(known)}. Get the model as a directory in Hugging Face layout, with tokenizer.json"
        )
    merges = [tuple(merge.split(" ")) for merge in fields["merges"]]
    vocab = {token: i for i, token in enumerate(tokens)}
    ignore_merges = cut in ("llama-bpe", "llama3", "llama-v3")
    inner = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, merges, ignore_merges=ignore_merges))
    if cut == "qwen2":
        inner.normalizer = tokenizers.normalizers.NFC()
    inner.pre_tokenizer = splits.Sequence([*first, whole])
    inner.decoder = tokenizers.decoders.ByteLevel()
    return inner


def _sentencepiece(fields: dict[str, Any], tokens: list[str], kinds: list[int]) -> tokenizers.Tokenizer:
    vocab = {token: i for i, token in enumerate(tokens)}
    text = [i for i, kind in enumerate(kinds) if kind == 1]
    # The pair of highest score is merged first; of equal ones that of the lower number.
    order = sorted(text, key=lambda i: (-fields["scores"][i], i))
    merges = _merges([tokens[i] for i in order])
    unknown = fields.get("unknown_token_id")
    unk = None if unknown is None else tokens[unknown]
    inner = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, merges, unk_token=unk, fuse_unk=True, byte_fallback=True))
    prefix = fields.get("add_space_prefix", True)
    normalizers, decoders = tokenizers.normalizers, tokenizers.decoders
    space = normalizers.Replace(" ", "\u2581")
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), space]) if prefix else space
    stages = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    inner.decoder = decoders.Sequence([*stages, decoders.Strip(" ", 1, 0)] if prefix else stages)
    return inner


def _merges(pieces: Sequence[str]) -> list[tuple[str, str]]:
    """All ways to put a piece together from two others, in the order of the pieces."""
    known = set(pieces)
    return [
        (piece[:cut], piece[cut:])
        for piece in pieces
        for cut in range(1, len(piece))
        if piece[:cut] in known and piece[cut:] in known
    ]


def stories_tokenizer() -> Tokenizer:
    """The 512-piece tokenizer of stories260K.

    SentencePiece BPE: a space is put before the text; characters that are no piece become bytes; then the adjacent pair
    whose concatenation is the piece of highest score is merged, again and again. A story begins and ends with id 1.
    """
    data = assets.read("tok512.bin")
    pieces, at = [], 4
    while at < len(data):
        length = struct.unpack_from("<i", data, at + 4)[0]
        pieces.append(data[at + 8 : at + 8 + length].decode())
        at += 8 + length
    pieces[:3] = ["<unk>", "<s>", "</s>"]  # the file writes the last two on lines of their own
    vocab = {piece: i for i, piece in enumerate(pieces)}
    # After the specials and the bytes come the pieces of text by falling score, which is the order of merging.
    inner = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab, _merges(pieces[259:]), unk_token="<unk>", byte_fallback=True)
    )
    inner.normalizer = tokenizers.normalizers.Prepend(" ")
    inner.decoder = tokenizers.decoders.Sequence(
        [tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse(), tokenizers.decoders.Strip(" ", 1, 0)]
    )
    return Tokenizer(inner, bos_id=1, eos_id=1, pad_id=0)
