import jax.numpy as jnp
import numpy as np
import pytest

from jlora.train.metrics import (
    check_metrics,
    corpus_bleu,
    exact_match,
    perplexity,
    rouge,
    text_scores,
    token_nll,
)


def test_token_nll_is_the_sum_over_scored_tokens():
    rng = np.random.default_rng(0)
    logits, ids = rng.normal(size=(2, 5, 7)).astype(np.float32), rng.integers(0, 7, (2, 5))
    mask = np.array([[1, 1, 0, 1, 0], [1, 0, 0, 0, 1]], np.float32)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    # the token at t is predicted from t - 1; that at 0 from nothing, so its mask has no say
    wanted = -sum(log_p[b, t - 1, ids[b, t]] for b, t in [(0, 1), (0, 3), (1, 4)])
    nll, tokens = token_nll(jnp.asarray(logits), jnp.asarray(ids), jnp.asarray(mask))
    np.testing.assert_allclose(nll, wanted, rtol=1e-6)
    assert tokens == 3


def test_padding_with_infinite_loss_does_not_count():
    logits = jnp.zeros((1, 3, 2)).at[0, 1, 1].set(-jnp.inf)
    nll, tokens = token_nll(logits, jnp.array([[0, 1, 1]]), jnp.array([[0.0, 1.0, 0.0]]))
    np.testing.assert_allclose(nll, np.log(2), rtol=1e-6)
    assert tokens == 1


def test_perplexity_of_a_huge_loss_is_infinite():
    assert perplexity(0.0) == 1.0
    assert perplexity(1e6) == float("inf")


def test_bleu_takes_a_varying_number_of_references():
    texts = ["the cat sat on the mat today", "a dog ran"]
    score, signature = corpus_bleu(texts, [["no match here", texts[0]], [texts[1]]])
    assert score == pytest.approx(100.0)
    assert "nrefs:var" in signature
    worse, _ = corpus_bleu(texts, [["no match here"], [texts[1]]])
    assert worse < score


def test_exact_match_is_that_of_final_answers():
    marked = ["8 x 150 = 1200\n#### 1,200"]
    right = ["so #### 1200", "####1,200\nand more", "a #### 7 b #### $1200.", "#### 1200 eggs"]
    wrong = ["1200", "#### 120", "#### ", "#### twelve", "#### 1200.5", "#### -1200"]
    assert exact_match(right, [marked] * 4) == 1.0
    assert exact_match(wrong, [marked] * 6) == 0.0
    assert exact_match([" Paris ", "paris"], [["London", "Paris"]] * 2) == 0.5
    assert text_scores(("exact-match",), right + wrong, [marked] * 10) == {"exact_match": 0.4}


def test_rouge_takes_the_reference_that_fits_best():
    pytest.importorskip("rouge_score")
    texts, references = ["the cats sat", "a dog"], [["nothing", "the cat sat on it"], ["a dog"]]
    # 3 of 3 and 3 of 5 words, 2 of 2 and 2 of 4 pairs, when "cats" is taken for "cat"; the second text is its reference
    want = {"rouge1": (2 * 0.6 / 1.6 + 1) / 2, "rouge2": (2 * 0.5 / 1.5 + 1) / 2, "rougeL": (2 * 0.6 / 1.6 + 1) / 2}
    assert rouge(texts, references) == pytest.approx({name: 100 * value for name, value in want.items()})


def test_missing_rouge_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'jlora\[rouge\]'"):
        check_metrics(["bleu", "rouge"])
    check_metrics(["bleu"])
