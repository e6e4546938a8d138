import gzip
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora.train import data
from jlora.train.data import DataSpec, Encoded, Example, batches, encode, load_examples

# Reading


def test_bundled_e2e():
    train, held = load_examples(DataSpec())
    assert (len(train), len(held)) == (8000, 512)
    assert not {e.prompt for e in train} & {e.prompt for e in held}
    prompt = "name Clowns, eatType pub, priceRange moderate, customer rating 1 out of 5, area riverside ="
    assert train[1].prompt == prompt
    assert train[1].completion.startswith("Clowns is a pub offering moderately priced choices.")


def test_references_gather_what_answers_the_same_prompt():
    held = load_examples(DataSpec())[1]
    grouped = data.references(held)
    assert sum(len(texts) for _, texts in grouped) == 512
    assert len({prompt for prompt, _ in grouped}) == len(grouped) < 512
    examples = [Example("a", "1"), Example("b", "2"), Example("a", "3")]
    assert data.references(examples) == [("a", ["1", "3"]), ("b", ["2"])]


def test_bundled_shakespeare_holds_out_its_last_tenth():
    train, held = (part[0].completion for part in load_examples(DataSpec("shakespeare")))
    assert (len(train), len(held)) == (1_003_854, 111_540)
    assert train.startswith("First Citizen:")


ROWS = [{"prompt": f"p{i // 2}", "completion": f'c{i}, "quoted"', "text": f"t{i}"} for i in range(20)]


def write(path, text):
    data = text.encode() if isinstance(text, str) else text
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return str(path)


def table(separator, quote):
    cell = (lambda s: '"' + s.replace('"', '""') + '"') if quote else str
    lines = [separator.join(ROWS[0])] + [separator.join(map(cell, row.values())) for row in ROWS]
    return "\n".join(lines) + "\n"


FILES = {
    "rows.jsonl": "".join(json.dumps(row) + "\n\n" for row in ROWS),
    "rows.csv": table(",", quote=True),
    "rows.tsv": table("\t", quote=False),
    "rows.tsv.gz": table("\t", quote=False),
    "rows.CSV": "\ufeff" + table(",", quote=True).replace("\n", "\r\n"),
}


@pytest.mark.parametrize("name", FILES)
def test_files_with_columns(name, tmp_path):
    path = write(tmp_path / name, FILES[name])
    train, held = load_examples(DataSpec(path, eval_fraction=0.2))
    assert sorted(train + held) == sorted(Example(row["prompt"], row["completion"]) for row in ROWS)
    assert len(held) == 4 and not {e.prompt for e in train} & {e.prompt for e in held}
    assert (train, held) == load_examples(DataSpec(path, eval_fraction=0.2))
    assert held != load_examples(DataSpec(path, eval_fraction=0.2, seed=1))[1]
    texts = load_examples(DataSpec(path, prompt_column="none", eval_path=path))[1]
    assert texts == [Example("", row["text"]) for row in ROWS]
    assert load_examples(DataSpec(path, prompt_column="text", completion_column="prompt"))[0][0].prompt[0] == "t"


def test_text_file_holds_out_its_end(tmp_path):
    path = write(tmp_path / "a.txt", "x" * 90 + "y" * 10)
    assert load_examples(DataSpec(path)) == ([Example("", "x" * 90)], [Example("", "y" * 10)])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.parquet", "x", r"unknown kind of file '.parquet'; wanted one of .txt, .jsonl, .* e2e, shakespeare"),
        ("a.txt", "", "is empty"),
        ("a.txt", " \n", "is empty"),
        ("a.jsonl", "", "is empty"),
        ("a.csv", "text\n", "is empty"),
        ("a.jsonl", '{"text": ""}\n', "'text' is blank in its one record: there is nothing to learn from"),
        ("a.jsonl", '{"prompt": "a", "completion": " "}\n' * 20, "'completion' is blank in all 20 records"),
        ("a.txt", b"one\ntwo \xff", r"not UTF-8: byte 0xff at offset 8 \(line 2\)"),
        ("a.jsonl", '{"text": "a"}\n{"text"', "line 2: not valid JSON"),
        ("a.jsonl", "[1]", "line 1: a list, wanted an object"),
        ("a.jsonl", '{"text": 3}', "line 1: column 'text' is 3, wanted text"),
        ("a.jsonl", '{"question": "a", "prompt": "b"}', r"\['question', 'prompt'\]. Name yours with --text-column"),
        ("a.csv", "mr,ref\na,b\n", r"nor both 'prompt' and 'completion', nor 'messages'; found \['mr', 'ref'\]"),
        ("a.tsv", "text\tlabel\na\tb\nc\n", r"line 3: 1 columns, but the header has 2: \['text', 'label'\]"),
        ("a.txt.gz", None, "not a whole gzip file"),
        ("a.txt", "a", "1 characters are too few to hold out 10%"),
        ("a.jsonl", '{"prompt": "a", "completion": "b"}', "one prompt cannot be split .*: give --eval-data"),
    ],
)
def test_files_that_are_not_right(name, content, message, tmp_path):
    path = tmp_path / name
    path.write_bytes(gzip.compress(b"text" * 99)[:-9]) if content is None else write(path, content)
    with pytest.raises(ValueError, match=message):
        load_examples(DataSpec(str(path)))


def test_missing_file_and_bad_fraction(tmp_path):
    with pytest.raises(FileNotFoundError, match="no data file .*nothing.txt"):
        load_examples(DataSpec(str(tmp_path / "nothing.txt")))
    with pytest.raises(ValueError, match="eval_fraction must lie between 0 and 1, got 1.0"):
        load_examples(DataSpec("shakespeare", eval_fraction=1.0))


# Encoding


def test_prompt_and_completion_become_one_sequence(stories):
    tokenizer = stories.tokenizer
    prompt, completion = tokenizer.encode("a pub ="), tokenizer.encode("It is a pub.")
    encoded = encode([Example("a pub =", "It is a pub.")], tokenizer, 32)
    n, m = 1 + len(prompt), 1 + len(prompt) + len(completion) + 1
    assert encoded.ids[0, :m].tolist() == [1, *prompt, *completion, 1]
    assert encoded.mask[0].tolist() == [0.0] * n + [1.0] * (m - n) + [0.0] * (32 - m)
    assert encoded.positions[0, :m].tolist() == list(range(m))
    assert encoded.segment_ids[0].tolist() == [1] * m + [0] * (32 - m)
    assert (encoded.ids.dtype, encoded.mask.dtype) == (np.int32, np.float32)


def test_long_completions_are_cut_and_long_prompts_dropped(stories):
    examples = [Example("a", "b " * 40), Example("a " * 40, "b"), Example("a", "b")]
    encoded = encode(examples, stories.tokenizer, 16)
    assert (len(encoded), encoded.truncated, encoded.dropped) == (2, 1, 1)
    assert encoded.segment_ids[0].all() and encoded.mask[0, -1] == 1
    with pytest.raises(ValueError, match=r"none of the 1 examples leaves a token .* --max-length 16 \(1 have a prompt"):
        encode(examples[1:2], stories.tokenizer, 16)
    with pytest.raises(ValueError, match="--max-length is 2; a sequence needs at least 3"):
        encode(examples, stories.tokenizer, 2)


@pytest.mark.parametrize("packing", [False, True])
def test_plain_text_loses_no_token(stories, packing):
    text = "To be, or not to be, that is the question. " * 9
    encoded = encode([Example("", text)], stories.tokenizer, 33, packing)
    assert (encoded.ids[:, 0] == 1).all() and not encoded.mask[:, 0].any()
    assert encoded.ids[encoded.mask == 1].tolist() == [*stories.tokenizer.encode(text), 1]


def test_packing_keeps_every_sequence_and_fills_rows(stories):
    examples = load_examples(DataSpec())[1][:200]
    loose, packed = (encode(examples, stories.tokenizer, 400, packing) for packing in (False, True))

    def sequences(encoded: Encoded):
        for row in range(len(encoded)):
            for segment in range(1, encoded.segment_ids[row].max() + 1):
                at = encoded.segment_ids[row] == segment
                assert encoded.positions[row, at].tolist() == list(range(at.sum()))
                yield tuple(encoded.ids[row, at]), tuple(encoded.mask[row, at])

    assert sorted(sequences(packed)) == sorted(sequences(loose))
    used = (loose.segment_ids > 0).sum()
    assert used / packed.ids.size > 0.95 > 0.5 > used / loose.ids.size


def test_packed_sequences_have_the_losses_of_single_ones(stories, stories_logits):
    examples = load_examples(DataSpec())[1][:12]

    def losses(packing):
        encoded = encode(examples, stories.tokenizer, 300, packing)
        logp = jax.nn.log_softmax(stories_logits(stories.params, encoded.ids, encoded.positions, encoded.segment_ids))
        scores = np.asarray(jnp.take_along_axis(logp[:, :-1], encoded.ids[:, 1:, None], axis=-1))[..., 0]
        found = {}
        for row in range(len(encoded)):
            for segment in range(1, encoded.segment_ids[row].max() + 1):
                at = encoded.segment_ids[row] == segment
                scored = (at & (encoded.mask[row] == 1))[1:]
                found[tuple(encoded.ids[row, at])] = scores[row, scored]
        return len(encoded), found

    (rows, single), (packed_rows, packed) = losses(False), losses(True)
    assert packed_rows < rows and single.keys() == packed.keys()
    for tokens in single:
        np.testing.assert_allclose(packed[tokens], single[tokens], atol=5e-5)


# Batches


@pytest.fixture(scope="module")
def numbered() -> Encoded:
    """22 rows of 3, each filled with its own number."""
    ids = np.repeat(np.arange(22, dtype=np.int32)[:, None], 3, axis=1)
    return Encoded(ids, np.ones((22, 3), np.float32), ids, ids)


def rows(iterator):
    return [batch["ids"][:, 0].tolist() for batch in iterator]


def test_each_epoch_is_another_order_of_the_same_rows(numbered):
    found = rows(batches(numbered, 5, seed=0, epochs=3))
    assert [len(batch) for batch in found] == [5] * 12
    epochs = [sum(found[i : i + 4], []) for i in (0, 4, 8)]
    assert all(len(set(epoch)) == 20 for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert found == rows(batches(numbered, 5, seed=0, epochs=3))
    assert found != rows(batches(numbered, 5, seed=1, epochs=3))


def test_endless_stream_begins_like_the_finite_one(numbered):
    finite = rows(batches(numbered, 5, seed=0, epochs=3))
    endless = batches(numbered, 5, seed=0)
    assert rows(next(endless) for _ in range(12)) == finite


@pytest.mark.parametrize("step", [0, 1, 4, 7, 11])
def test_resumed_stream_is_identical(numbered, step):
    whole = batches(numbered, 5, seed=0)
    for _ in range(step):
        next(whole)
    state = json.loads(json.dumps(whole.get_state()))
    resumed = batches(numbered, 5, seed=0)
    resumed.set_state(state)
    for _ in range(6):
        a, b = next(whole), next(resumed)
        assert a.keys() == b.keys() == {"ids", "mask", "positions", "segment_ids"}
        for key in a:
            np.testing.assert_array_equal(a[key], b[key])


def test_last_batch_is_filled_up_with_rows_that_score_nothing(numbered):
    found = list(batches(numbered, 5, seed=0, epochs=1, shuffle=False, drop_remainder=False))
    assert rows(found)[:4] == [list(range(i, i + 5)) for i in (0, 5, 10, 15)]
    assert found[-1]["ids"].shape == (5, 3)
    assert found[-1]["mask"].sum(axis=1).tolist() == [3, 3, 0, 0, 0]
    assert sum(batch["mask"].sum() for batch in found) == numbered.mask.sum()


def test_fewer_rows_than_a_batch(numbered):
    with pytest.raises(ValueError, match="22 rows do not fill one batch of 32"):
        batches(numbered, 32, seed=0)
    assert len(list(batches(numbered, 32, seed=0, epochs=1, drop_remainder=False))) == 1
