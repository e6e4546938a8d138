"""Texts to batches: reading files, encoding to token ids, and a deterministic stream that can be resumed.

An example is a prompt and a completion, of which only the completion is learnt; plain text is one without a prompt.
"""

import csv
import dataclasses
import functools
import gzip
import io
import json
import pathlib
import re
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import grain
import numpy as np
from jaxtyping import Float, Int

from jlora.train import assets, chat
from jlora.train.tokenizers import Tokenizer


class Example(NamedTuple):
    """Text to learn; `prompt` is "" for plain text."""

    prompt: str
    completion: str


@dataclasses.dataclass(frozen=True)
class DataSpec:
    """Where the texts come from.

    `path` is "e2e" or "shakespeare" (shipped), or a .txt, .jsonl, .csv or .tsv file, each also with .gz. A .txt file is
    one text. A file with columns is read as prompts and completions when it has both of these columns, as conversations
    when it has a column `messages` (.jsonl), and otherwise as plain texts; records whose completion or text is blank
    are passed over.
    """

    path: str = "e2e"
    text_column: str = "text"
    prompt_column: str = "prompt"
    completion_column: str = "completion"
    eval_path: str | None = None
    """File of held-out examples; without it, `eval_fraction` of the data is held out."""
    eval_fraction: float = 0.1
    seed: int = 0
    """Chooses which examples are held out. Of a .txt file the end is held out, whatever the seed."""


@dataclasses.dataclass(frozen=True)
class Encoded:
    """N rows of T tokens. Rows are padded at the end, with segment 0; segments count from 1."""

    ids: Int[np.ndarray, "N T"]
    mask: Float[np.ndarray, "N T"]
    """1 where the token is a target to be scored: never the first of a segment, a prompt or padding."""
    positions: Int[np.ndarray, "N T"]
    segment_ids: Int[np.ndarray, "N T"]
    truncated: int = 0
    """Completions cut off at the end because prompt and completion exceed T tokens; dialogues that lose an answer."""
    dropped: int = 0
    """Examples left out because what comes before the completion fills T tokens."""

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def fields(self) -> dict[str, np.ndarray]:
        """What a batch has of each row."""
        return {name: getattr(self, name) for name in ("ids", "mask", "positions", "segment_ids")}


Examples = list[Example] | list[chat.Conversation]
Learnable = tuple[list[int], np.ndarray]
"""Token ids, and which of them are targets."""


def load_examples(spec: DataSpec) -> tuple[Examples, Examples]:
    """The examples to train on and those held out."""
    if spec.path == "e2e" and spec.eval_path is None:
        return _e2e("e2e_small_train.tsv.gz"), _e2e("e2e_small_dev.tsv.gz")
    if spec.path == "shakespeare" and spec.eval_path is None:
        examples = [Example("", gzip.decompress(assets.read("tinyshakespeare.txt.gz")).decode())]
    else:
        examples = _read(spec, pathlib.Path(spec.path))
    if spec.eval_path is not None:
        return examples, _read(spec, pathlib.Path(spec.eval_path))
    return split(examples, spec)


def references(examples: Sequence[Example]) -> list[tuple[str, list[str]]]:
    """Each distinct prompt, in order of first appearance, with all completions that the examples give for it."""
    grouped = defaultdict(list)
    for example in examples:
        grouped[example.prompt].append(example.completion)
    return list(grouped.items())


def meaning_to_prompt(meaning: str) -> str:
    """The prompt of the E2E task.

    >>> meaning_to_prompt("name[The Vaults], eatType[pub]")
    'name The Vaults, eatType pub ='
    """
    return re.sub(r"\[([^\]]*)\]", r" \1", meaning) + " ="


def _e2e(name: str) -> list[Example]:
    rows = _tsv_rows(pathlib.Path(name), gzip.decompress(assets.read(name)).decode())
    return [Example(meaning_to_prompt(row["mr"]), row["ref"]) for _, row in rows]


def split(examples: list, spec: DataSpec) -> tuple[list, list]:
    """Examples to train on, and those to hold out."""
    if not 0.0 < spec.eval_fraction < 1.0:
        raise ValueError(f"eval_fraction must lie between 0 and 1, got {spec.eval_fraction}")
    if len(examples) == 1 and not examples[0].prompt:  # one text
        text = examples[0].completion
        cut = int((1.0 - spec.eval_fraction) * len(text))
        parts = [Example("", text[:cut])], [Example("", text[cut:])]
        if not (text[:cut].strip() and text[cut:].strip()):
            raise ValueError(f"{spec.path}: {len(text)} characters are too few to hold out {spec.eval_fraction:.0%}")
        return parts
    # Examples that share a prompt stay together: a held-out prompt is one that was never trained on.
    keys = [e.prompt or str(i) for i, e in enumerate(examples)]
    unique = list(dict.fromkeys(keys))
    if len(unique) < 2:
        raise ValueError(f"{spec.path}: one prompt cannot be split into training and held-out: give --eval-data")
    count = min(max(1, round(spec.eval_fraction * len(unique))), len(unique) - 1)
    held = {unique[i] for i in np.random.default_rng(spec.seed).permutation(len(unique))[:count]}
    train = [e for key, e in zip(keys, examples, strict=True) if key not in held]
    return train, [e for key, e in zip(keys, examples, strict=True) if key in held]


def _kind(path: pathlib.Path) -> str:
    return (pathlib.Path(path.stem).suffix if path.suffix == ".gz" else path.suffix).lower()


def read_table(path: pathlib.Path) -> "Rows":
    """(line number, columns) of each record of a file with columns."""
    kind = _kind(path)
    if kind not in _ROWS:
        raise ValueError(f"{path}: unknown kind of file {kind!r}; wanted one of {', '.join(_ROWS)}, which may be .gz")
    return _ROWS[kind](path, _text(path))


def _read(spec: DataSpec, path: pathlib.Path) -> list[Example]:
    kind = _kind(path)
    if kind == ".txt":
        text = _text(path)
        examples = [Example("", text)] if text.strip() else []
    elif kind in _ROWS:
        examples = _examples(spec, path, _ROWS[kind](path, _text(path)))
    else:
        known = ", ".join([".txt", *_ROWS])
        raise ValueError(f"{path}: unknown kind of file {kind!r}; wanted one of {known} (or any of them with .gz), "
                         "or the name of a shipped data set: e2e, shakespeare")  # fmt: skip
    if not examples:
        raise ValueError(f"{path} is empty: there is nothing to learn from")
    return examples


def _text(path: pathlib.Path) -> str:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise FileNotFoundError(f"no data file {path}") from None
    if path.suffix == ".gz":
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{path} is not a whole gzip file: {error}") from error
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{path} is not UTF-8: byte {data[error.start]:#04x} at offset {error.start} (line {line}); convert it"
        ) from error


Rows = Iterator[tuple[int, dict[str, Any]]]
"""(line number, columns) of each record."""


def _jsonl_rows(path: pathlib.Path, text: str) -> Rows:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: not valid JSON ({error})") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number}: a {type(row).__name__}, wanted an object with named columns")
        yield number, row


def _csv_rows(path: pathlib.Path, text: str) -> Rows:
    reader = csv.reader(io.StringIO(text, newline=""))
    try:
        yield from _table_rows(path, ((reader.line_num, cells) for cells in reader))
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: not valid CSV ({error})") from error


def _tsv_rows(path: pathlib.Path, text: str) -> Rows:
    """Tab-separated as in most data sets: no quoting, so a quotation mark is only a character."""
    lines = enumerate(text.replace("\r\n", "\n").split("\n"), 1)
    return _table_rows(path, ((number, line.split("\t")) for number, line in lines))


def _table_rows(path: pathlib.Path, rows: Iterator[tuple[int, list[str]]]) -> Rows:
    header = next(rows, (0, []))[1]
    for number, cells in rows:
        if cells in ([], [""]):
            continue
        if len(cells) != len(header):
            raise ValueError(f"{path}, line {number}: {len(cells)} columns, but the header has {len(header)}: {header}")
        yield number, dict(zip(header, cells, strict=True))


_ROWS: dict[str, Callable[[pathlib.Path, str], Rows]] = {".jsonl": _jsonl_rows, ".csv": _csv_rows, ".tsv": _tsv_rows}


def _examples(spec: DataSpec, path: pathlib.Path, rows: Rows) -> list[Example]:
    examples, blank = [], []
    pair = (spec.prompt_column, spec.completion_column)
    for number, row in rows:
        if all(column in row for column in pair):
            columns = pair
        elif "messages" in row:
            examples.append(chat.read_messages(row["messages"], f"{path}, line {number}"))
            continue
        elif spec.text_column in row:
            columns = (spec.text_column,)
        else:
            raise ValueError(
                f"{path}, line {number}: no column {spec.text_column!r}, nor both {pair[0]!r} and {pair[1]!r}, nor "
                f"'messages'; found {list(row)}. Name yours with --text-column, or --prompt-column and "
                "--completion-column"
            )
        values = [row[column] for column in columns]
        for column, value in zip(columns, values, strict=True):
            if not isinstance(value, str):
                raise ValueError(f"{path}, line {number}: column {column!r} is {value!r}, wanted text")
        if values[-1].strip():
            examples.append(Example(*values) if len(values) == 2 else Example("", values[0]))
        else:
            blank.append(columns[-1])
    if blank and not examples:
        raise ValueError(
            f"{path}: {' or '.join(map(repr, dict.fromkeys(blank)))} is blank in "
            f"{f'all {len(blank)} records' if len(blank) > 1 else 'its one record'}: there is nothing to learn from"
        )
    return examples


def encode(
    examples: Sequence[Example | chat.Dialogue], tokenizer: Tokenizer, max_length: int, packing: bool = False
) -> Encoded:
    """Rows of `max_length` tokens.

    A prompt and its completion give one sequence, BOS prompt completion EOS, cut at `max_length`. Plain text gives
    text EOS, cut into as many pieces as it needs, each with BOS before it. A tokenizer without BOS or EOS adds none.
    A dialogue is encoded as it stands, for its template knows what begins and what ends it, and cut at `max_length`.
    With `packing` several sequences share a row, each a segment of its own, so that less is padding.
    """
    found = cut(examples, tokenizer, max_length)
    sequences = [sequence for each in found for sequence in each.sequences]
    truncated, dropped = (sum(getattr(each, name) for each in found) for name in ("truncated", "dropped"))
    if not sequences:
        raise ValueError(
            f"none of the {len(examples)} examples leaves a token to learn within --max-length {max_length} "
            f"({dropped} have a prompt that fills it)"
        )
    rows = _pack([len(s) for s, _ in sequences], max_length) if packing else [[i] for i in range(len(sequences))]
    return fill(rows, sequences, max_length, tokenizer.pad_id, truncated, dropped)


class Cut(NamedTuple):
    """What there is to learn of an example within a length."""

    sequences: list[Learnable]
    truncated: bool = False
    dropped: bool = False


def cut(examples: Sequence[Example | chat.Dialogue], tokenizer: Tokenizer, max_length: int) -> list[Cut]:
    """The sequences of each example, as `encode` describes them."""
    bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    eos = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    if max_length < len(bos) + 2:
        raise ValueError(f"--max-length is {max_length}; a sequence needs at least {len(bos) + 2} tokens")
    texts = [Example("", "") if isinstance(e, chat.Dialogue) else e for e in examples]
    prompts = tokenizer.encode_batch([e.prompt for e in texts])
    completions = tokenizer.encode_batch([e.completion for e in texts])
    found = []
    for example, prompt, completion in zip(examples, prompts, completions, strict=True):
        if isinstance(example, chat.Dialogue):
            tokens, learnt = chat.encode(example, tokenizer)
            learnt[0] = False  # nothing comes before it that could predict it
            kept = learnt[:max_length]
            if any(kept):
                found.append(Cut([(tokens[:max_length], np.array(kept))], truncated=sum(kept) < sum(learnt)))
            else:
                found.append(Cut([], dropped=True))
            continue
        target = completion + eos
        if example.prompt:
            before = bos + prompt
            room = max_length - len(before)
            if room > 0:
                sequence = _learn_from(before + target[:room], max(len(before), 1))
                found.append(Cut([sequence], truncated=room < len(target)))
            else:
                found.append(Cut([], dropped=True))
        else:
            step = max_length - len(bos)
            pieces = [bos + target[i : i + step] for i in range(0, len(target), step)]
            found.append(Cut([_learn_from(piece, 1) for piece in pieces if len(piece) > 1]))
    return found


def _learn_from(tokens: list[int], first: int) -> Learnable:
    return tokens, np.arange(len(tokens)) >= first


def _pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Best fit, longest first: each sequence goes to the row with the least room that still holds it."""
    rows: list[list[int]] = []
    by_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        room = next((r for r in range(lengths[i], capacity + 1) if by_room[r]), None)
        if room is None:
            room = capacity
            by_room[room].append(len(rows))
            rows.append([])
        row = by_room[room].pop()
        rows[row].append(i)
        by_room[room - lengths[i]].append(row)
    return rows


def fill(
    rows: Sequence[Sequence[int]],
    sequences: Sequence[Learnable],
    length: int,
    pad_id: int,
    truncated: int = 0,
    dropped: int = 0,
) -> Encoded:
    """Rows of `length` tokens; each is given as the numbers of the sequences in it."""
    shape = (len(rows), length)
    ids, mask = np.full(shape, pad_id, np.int32), np.zeros(shape, np.float32)
    positions, segment_ids = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    for n, row in enumerate(rows):
        start = 0
        for segment, i in enumerate(row, 1):
            tokens, learnt = sequences[i]
            stop = start + len(tokens)
            ids[n, start:stop] = tokens
            mask[n, start:stop] = learnt
            positions[n, start:stop] = np.arange(len(tokens))
            segment_ids[n, start:stop] = segment
            start = stop
    return Encoded(ids, mask, positions, segment_ids, truncated, dropped)


def grouped_by_length(lengths: Int[np.ndarray, "n"], batch_size: int, seed: int, epoch: int) -> np.ndarray:
    """Rows [batches, batch_size] of an epoch in random order, sorted by length within every 16 batches of it.

    So each batch is of rows that need about as much padding, drawn at random but for that, and batches of all lengths
    follow each other at random. An incomplete batch is left out, before the sorting.
    """
    rng = np.random.default_rng((seed, epoch))
    order = rng.permutation(len(lengths))[: len(lengths) // batch_size * batch_size]
    windows = np.split(order, range(16 * batch_size, len(order), 16 * batch_size))
    order = np.concatenate([window[np.argsort(lengths[window], kind="stable")] for window in windows])
    return rng.permutation(order.reshape(-1, batch_size))


def batches(
    encoded: Any,
    batch_size: int,
    seed: int,
    epochs: int | None = None,
    shuffle: bool = True,
    drop_remainder: bool = True,
) -> grain.DatasetIterator:
    """An iterator of {"ids", "mask", "positions", "segment_ids"}, each [batch_size, T]; or whatever `encoded` has for
    its `fields`, {name: array of as many rows}, "mask" among them. If it has `lengths`, batches are of similar ones.

    Each epoch has its own order, a function of `seed` alone; `epochs=None` never ends. `get_state()` and
    `set_state(state)` resume the stream anywhere. With `drop_remainder=False` the last batch of an epoch is filled up
    with rows that score nothing (mask 0), so that all batches have one shape; otherwise an incomplete one is left out.
    """
    if drop_remainder and len(encoded) < batch_size:
        raise ValueError(f"{len(encoded)} rows do not fill one batch of {batch_size}; choose a smaller batch size")
    fields = encoded.fields

    def gather(rows: Int[np.ndarray, "b"]) -> dict[str, np.ndarray]:
        batch = {key: values[rows] for key, values in fields.items()}
        missing = batch_size - len(rows)
        if missing:
            batch = {k: np.concatenate([v, np.repeat(v[-1:], missing, axis=0)]) for k, v in batch.items()}
            batch["mask"][-missing:] = 0.0
        return batch

    if shuffle and getattr(encoded, "lengths", None) is not None:
        order = functools.lru_cache(2)(functools.partial(grouped_by_length, encoded.lengths, batch_size, seed))
        count = len(encoded) // batch_size
        dataset = grain.MapDataset.range(count).repeat(epochs)
        dataset = dataset.map_with_index(lambda i, _: gather(order(i // count)[i % count]))
    else:
        dataset = grain.MapDataset.range(len(encoded))
        if shuffle:
            dataset = dataset.shuffle(seed=seed)
        dataset = dataset.batch(batch_size, drop_remainder=drop_remainder).map(gather).repeat(epochs)
    # Gathering rows of arrays is cheap: threads that read ahead would only take cores from the computation.
    return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)))
