"""Text to token ids and back: a thin wrapper over `tokenizers`, and the bundled model's tokenizer."""

import dataclasses
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
    """

    inner: tokenizers.Tokenizer
    bos_id: int | None
    eos_id: int | None
    pad_id: int

    @property
    def vocab_size(self) -> int:
        return self.inner.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        return self.inner.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self.inner.encode_batch_fast(texts, add_special_tokens=False)]

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

    bos = special("bos") if named.get("add_bos_token", True) else None
    eos, pad = special("eos"), special("pad")
    return Tokenizer(inner, bos, eos, pad if pad is not None else eos or 0)


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
    text_pieces = set(pieces[259:])
    merges = [
        (piece[:cut], piece[cut:])
        for piece in pieces[259:]
        for cut in range(1, len(piece))
        if piece[:cut] in text_pieces and piece[cut:] in text_pieces
    ]
    inner = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True))
    inner.normalizer = tokenizers.normalizers.Prepend(" ")
    inner.decoder = tokenizers.decoders.Sequence(
        [tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse(), tokenizers.decoders.Strip(" ", 1, 0)]
    )
    return Tokenizer(inner, bos_id=1, eos_id=1, pad_id=0)
