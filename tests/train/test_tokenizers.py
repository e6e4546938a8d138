import functools
import gzip
import re
import struct

import pytest
import tokenizers

from jlora.train import assets
from jlora.train.tokenizers import Tokenizer, read_tokenizer, stories_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return stories_tokenizer()


def plain_encoder():
    """Score-driven merging written out, as the format's description says it; words are independent of each other."""
    data, at, pieces = assets.read("tok512.bin"), 4, []
    while at < len(data):
        score, length = struct.unpack_from("<fi", data, at)
        pieces.append((data[at + 8 : at + 8 + length].decode(), score))
        at += 8 + length
    table = {piece: (i, score) for i, (piece, score) in enumerate(pieces) if i >= 259}

    @functools.cache
    def word(text):
        parts = [c if c in table else c.encode() for c in text]
        while True:
            pairs = [(table[a + b][1], -i) for i, (a, b) in enumerate(zip(parts, parts[1:], strict=False))
                     if isinstance(a, str) and isinstance(b, str) and a + b in table]  # fmt: skip
            if not pairs:
                break
            i = -max(pairs)[1]
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        return [i for part in parts for i in ([table[part][0]] if isinstance(part, str) else [b + 3 for b in part])]

    return lambda text: [i for w in re.findall(" [^ ]*", " " + text) for i in word(w)]


def test_stories_tokenizer_merges_as_its_description_says(tokenizer):
    encode = plain_encoder()
    lines = gzip.decompress(assets.read("e2e_small_dev.tsv.gz")).decode().split("\n")
    lines += gzip.decompress(assets.read("tinyshakespeare.txt.gz")).decode()[:20000].split("\n\n")
    lines += ["£20 — café ☃", "  two  spaces ", "tab\there", "<s> is text, and so is <0x0A>"]
    assert tokenizer.encode_batch(lines) == [encode(line) if line else [] for line in lines]


@pytest.mark.parametrize("text", ["Once upon a time", "£20 — café ☃\n", "  two  spaces ", "", "<s>"])
def test_decoding_inverts_encoding(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode([tokenizer.bos_id, *ids, tokenizer.eos_id]) == text


def test_special_ids(tokenizer):
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.vocab_size) == (1, 1, 0, 512)
    assert tokenizer.encode("\n")[-1] == 13


def test_saved_tokenizer_reads_back(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    again = read_tokenizer(tmp_path, {})
    text = "name The Vaults, priceRange £20-25 ="
    assert again.encode(text) == tokenizer.encode(text)
    assert again.decode(again.encode(text)) == text
    assert (again.bos_id, again.eos_id, again.pad_id) == (1, 1, 0)


def word_tokenizer(directory):
    vocab = {"<pad>": 0, "<s>": 1, "</s>": 2, "<|end|>": 3, "hello": 4}
    tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, "<pad>")).save(str(directory / "tokenizer.json"))


def test_special_tokens_come_from_the_configuration(tmp_path):
    assert read_tokenizer(tmp_path, {}) is None
    word_tokenizer(tmp_path)
    bare = read_tokenizer(tmp_path, {})
    assert (bare.bos_id, bare.eos_id, bare.pad_id) == (None, None, 0)
    listed = read_tokenizer(tmp_path, {"bos_token_id": 1, "eos_token_id": [3, 2]})
    assert (listed.bos_id, listed.eos_id, listed.pad_id) == (1, 3, 3)
    named = '{"bos_token": null, "eos_token": {"content": "</s>"}, "pad_token": "<pad>"}'
    (tmp_path / "tokenizer_config.json").write_text(named)
    assert (read_tokenizer(tmp_path, {"bos_token_id": 1}).bos_id, read_tokenizer(tmp_path, {}).eos_id) == (None, 2)
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<s>", "add_bos_token": false}')
    assert read_tokenizer(tmp_path, {}).bos_id is None


def test_unreadable_tokenizer_is_named(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="tokenizer.json is not a tokenizer"):
        read_tokenizer(tmp_path, {})
