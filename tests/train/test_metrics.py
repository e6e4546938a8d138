import jax.numpy as jnp
import numpy as np
import pytest

from jlora.train.metrics import corpus_bleu, perplexity, token_nll


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
