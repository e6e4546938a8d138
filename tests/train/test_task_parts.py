"""The parts of tasks: names of classes, splits, scores, masks, trimmed batches; MiniLM."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora.train import data, metrics, models
from jlora.train.models import packaged
from jlora.train.tasks import Rows, labels, masked_lm, text
from jlora.train.tasks.labels import Label


def some(*texts: object) -> list[Label]:
    return [Label(str(text), f"line {i}") for i, text in enumerate(texts)]


@pytest.mark.parametrize(
    "found, given, checkpoint, names, numbers",
    [
        (("b", "a", "b", "a"), (), (), ("a", "b"), [1, 0, 1, 0]),
        ((10, 2, 2, 10, 3, 3), (), (), ("2", "3", "10"), [2, 0, 0, 2, 1, 1]),  # by number, not by alphabet
        ((0, 1, 1, 0), ("no", "yes"), (), ("no", "yes"), [0, 1, 1, 0]),
        (("yes", "no", "no", "yes"), ("no", "yes"), (), ("no", "yes"), [1, 0, 0, 1]),
        ((1, 0, 1, 0), ("1", "0"), (), ("1", "0"), [0, 1, 0, 1]),  # names that are numbers are names
        ((0, 1, 1, 0), (), ("NEG", "POS"), ("NEG", "POS"), [0, 1, 1, 0]),
        (("a", "b", "b", "a"), (), ("b", "a"), ("b", "a"), [1, 0, 0, 1]),
        ((1, 2, 2, 1), (), ("NEG", "POS"), ("1", "2"), [0, 1, 1, 0]),
    ],
)
def test_names_and_numbers_of_classes(found, given, checkpoint, names, numbers):
    got, train, held_out = labels.number_classes(some(*found), some(*found[:2]), given, checkpoint)
    assert got == names and train.tolist() == numbers and held_out.tolist() == numbers[:2]


@pytest.mark.parametrize("value, text", [(True, "true"), (2.0, "2"), (" x ", "x"), (7, "7"), ("-1", "-1")])
def test_labels_of_files(value, text):
    assert labels.read_label(value, "label", "here").text == text


def test_split_keeps_shares_and_equal_texts_together():
    keys = [f"text {i % 90}" for i in range(100)]  # ten texts occur twice
    kinds = [i % 90 % 3 for i in range(100)]
    train, held_out = labels.split(keys, kinds, 0.2, seed=0)
    assert sorted(train + held_out) == list(range(100))
    assert not {keys[i] for i in train} & {keys[i] for i in held_out}
    assert np.bincount([kinds[i] for i in set(held_out) if i < 90]).tolist() == [6, 6, 6]
    assert labels.split(keys, kinds, 0.2, seed=0) == (train, held_out) != labels.split(keys, kinds, 0.2, seed=1)


def test_a_rare_class_is_never_held_out_altogether():
    train, held_out = labels.split(range(21), [0] * 20 + [1], 0.9, seed=0)
    assert 20 in train and len(held_out) == 18


def test_scores_by_hand():
    """TP 2, FN 1, FP 1, TN 2."""
    wanted, told = np.array([1, 1, 1, 0, 0, 0]), np.array([1, 1, 0, 1, 0, 0])
    logits = np.where(np.eye(2)[told], np.log(3.0), 0.0)
    found = metrics.classification_scores(wanted, logits)
    loss = -np.mean(np.log(np.where(wanted == told, 0.75, 0.25)))
    assert found == pytest.approx({"eval_loss": loss, "accuracy": 4 / 6, "f1": 2 / 3, "matthews": (4 - 1) / 9})


def test_f1_of_more_classes_is_their_mean():
    wanted, told = np.array([0, 0, 1, 2]), np.array([0, 1, 1, 2])
    found = metrics.classification_scores(wanted, 5.0 * np.eye(3)[told])
    assert found["f1"] == pytest.approx(np.mean([2 / 3, 2 / 3, 1.0]))


def test_scores_of_one_answer_for_all():
    assert metrics.classification_scores(np.array([1, 1]), np.zeros((2, 2)))["matthews"] == 0.0
    assert np.isnan(metrics.regression_scores(np.array([1.0, 2.0]), np.zeros(2))["pearson"])


def test_correlations_by_hand():
    wanted, found = np.array([1.0, 2.0, 3.0, 4.0]), np.array([1.0, 4.0, 9.0, 30.0])
    got = metrics.regression_scores(wanted, found)
    centered = [x - x.mean() for x in (wanted, found)]
    pearson = centered[0] @ centered[1] / np.sqrt(np.prod([c @ c for c in centered]))
    assert got == pytest.approx({"eval_loss": np.mean((found - wanted) ** 2), "pearson": pearson, "spearman": 1.0})


def test_hidden_tokens_are_of_the_stated_shares():
    ids = jnp.full((200, 100), 7)
    real = jnp.ones(ids.shape).at[:, 0].set(0).at[:, 60:].set(0)
    read, hidden = masked_lm.hide(jax.random.key(0), ids, real, 0.15, 4, 1000)
    assert not (hidden * (1 - real)).any() and (read == jnp.where(hidden > 0, read, ids)).all()
    chosen = np.asarray(read)[np.asarray(hidden) > 0]
    n = len(chosen)
    for found, share, of in ((n, 0.15, real.sum()), ((chosen == 4).sum(), 0.8, n), ((chosen == 7).sum(), 0.1, n)):
        assert abs(found - share * of) < 4 * np.sqrt(of * share * (1 - share))
    other, _ = masked_lm.hide(jax.random.key(1), ids, real, 0.15, 4, 1000)
    assert (other != read).any()


def test_trimmed_batches_lose_only_padding():
    segment_ids = np.zeros((2, 3, 40), np.int32)
    segment_ids[1, 2, :20] = 1
    batch = {"segment_ids": segment_ids, "ids": segment_ids * 5, "labels": np.arange(6).reshape(2, 3)}
    trimmed = text.trim_padding(batch)
    assert trimmed["ids"].shape == (2, 3, 24) and trimmed["labels"].shape == (2, 3)
    np.testing.assert_array_equal(trimmed["ids"], batch["ids"][..., :24])


def test_batches_are_of_similar_lengths_and_of_every_row():
    lengths = np.random.default_rng(0).integers(1, 60, 203)
    epochs = [data.grouped_by_length(lengths, 5, seed=3, epoch=epoch) for epoch in (0, 1)]
    for batches in epochs:
        assert batches.shape == (40, 5) and len(np.unique(batches)) == 200
        assert np.ptp(lengths[batches], axis=1).mean() < 0.25 * np.ptp(lengths)
    assert (epochs[0] != epochs[1]).any()
    np.testing.assert_array_equal(epochs[0], data.grouped_by_length(lengths, 5, seed=3, epoch=0))
    mean = lengths[epochs[0]].mean(axis=1)
    assert abs(np.corrcoef(mean[1:], mean[:-1])[0, 1]) < 0.5  # not one length after the other


def test_grouped_stream_can_be_resumed_in_a_later_epoch():
    n = 23
    rows = Rows({"id": np.arange(n), "mask": np.ones(n, np.float32)}, lengths=np.arange(n) % 7)
    stream = data.batches(rows, 4, seed=0)
    first = [next(stream)["id"] for _ in range(13)]  # 5 batches an epoch
    assert len(np.unique(np.concatenate(first[:5]))) == 20
    state = stream.get_state()
    want = [next(stream)["id"] for _ in range(6)]
    again = data.batches(rows, 4, seed=0)
    again.set_state(state)
    np.testing.assert_array_equal([next(again)["id"] for _ in range(6)], want)
    assert [len(batch["id"]) for batch in data.batches(rows, 4, seed=0, epochs=2)] == [4] * 10


# MiniLM


@pytest.fixture(scope="module")
def minilm() -> models.LoadedModel:
    pytest.importorskip(packaged.PACKAGES["minilm"].module)
    return models.load("minilm")


def sentence_vectors(model: models.LoadedModel, sentences: list[str]) -> np.ndarray:
    """Means over the tokens of each sentence, of length 1: what the model was trained to give."""
    ids, segment_ids, types, _ = text.encode_texts(model.tokenizer, sentences, [None] * len(sentences), 128)
    hidden, _ = jax.jit(model.module.apply)({"params": model.params}, ids, None, segment_ids, types)
    means = np.asarray((hidden * segment_ids[..., None]).sum(axis=1) / segment_ids.sum(axis=1)[:, None])
    return means / np.linalg.norm(means, axis=1, keepdims=True)


@pytest.mark.slow
def test_cosines_of_minilm_are_those_of_its_authors(minilm):
    """The similarities that the documentation of sentence-transformers prints for this model."""
    sentences = ["The weather is lovely today.", "It's so sunny outside!", "He drove to the stadium."]
    vectors = sentence_vectors(minilm, sentences)
    wanted = [[1.0000, 0.6660, 0.1046], [0.6660, 1.0000, 0.1411], [0.1046, 0.1411, 1.0000]]
    np.testing.assert_allclose(vectors @ vectors.T, wanted, atol=1e-4)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_hidden_states_of_minilm_are_those_of_transformers(minilm):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    sentences = ["A man is eating food.", "A man is eating a piece of bread."]
    encoded = transformers.AutoTokenizer.from_pretrained(minilm.directory)(sentences, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = transformers.AutoModel.from_pretrained(minilm.directory)(**encoded).last_hidden_state.numpy()
    mask = encoded["attention_mask"].numpy()[..., None]
    means = (hidden * mask).sum(axis=1) / mask.sum(axis=1)
    wanted = means / np.linalg.norm(means, axis=1, keepdims=True)
    np.testing.assert_allclose(sentence_vectors(minilm, sentences), wanted, atol=1e-5)
