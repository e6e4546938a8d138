"""What is measured: the token loss and perplexity; BLEU, ROUGE and exact match of texts; scores of classifiers and of
regressions."""

import importlib.util
import math
import re
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int


def token_nll(
    logits: Float[Array, "*b t vocab"], ids: Int[Array, "*b t"], mask: Float[Array, "*b t"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Summed negative log-likelihood of the scored tokens in nats, and their number.

        sum_t mask[t] * -log p(ids[t] | ids[:t]),   sum_t mask[t]        for t >= 1

    `mask` is 1 where the token itself is a target; the logits at t-1 predict the token at t. The two sums are returned
    apart so that batches of unequal length add up to the exact mean over tokens.
    """
    return jnp.sum(_scored_nll(logits, ids, mask)), jnp.sum(mask[..., 1:])


def sequence_log_probs(
    logits: Float[Array, "*b t vocab"], ids: Int[Array, "*b t"], mask: Float[Array, "*b t"]
) -> Float[Array, "*b"]:
    """The log-probability of the scored tokens of each row together, as in `token_nll`."""
    return -jnp.sum(_scored_nll(logits, ids, mask), axis=-1)


def _scored_nll(logits: Array, ids: Array, mask: Array) -> Float[Array, "*b t-1"]:
    targets, weights = ids[..., 1:], mask[..., 1:]
    nll = optax.softmax_cross_entropy_with_integer_labels(logits[..., :-1, :].astype(jnp.float32), targets)
    # A padding token may have a loss of inf (or its product with 0 be NaN) in low precision: select, do not multiply.
    return jnp.where(weights > 0, nll * weights, 0.0)


def next_token_loss(call: Callable, batch: dict[str, Any], key: Any = None, chunk: int = 0):
    """`token_nll` of a causal model on a batch; `call` is the model with its parameters bound. With a `chunk`, logits
    are there for so many positions at a time (`LanguageModel.nll`)."""
    ids, mask = batch["ids"], batch["mask"]
    if not chunk:
        return token_nll(call(ids, batch["positions"], batch["segment_ids"]), ids, mask)
    targets, weights = jnp.roll(ids, -1, axis=-1), jnp.roll(mask, -1, axis=-1).at[..., -1].set(0)
    nll = call(ids, batch["positions"], batch["segment_ids"], targets, chunk, method="nll")
    return jnp.sum(jnp.where(weights > 0, nll * weights, 0.0)), jnp.sum(weights)


def perplexity(nll: float) -> float:
    """exp(nll), inf where that overflows."""
    return math.inf if nll >= 700 else math.exp(nll)


def corpus_bleu(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[float, str]:
    """Corpus BLEU (0 to 100) with any number of references per hypothesis, and sacrebleu's signature of the setting."""
    import sacrebleu

    most = max(len(refs) for refs in references)
    streams = [[refs[i] if i < len(refs) else None for refs in references] for i in range(most)]
    # `force` only silences the advice to detokenize, which a text that ends in " ." would bring up.
    metric = sacrebleu.BLEU(force=True)
    return metric.corpus_score(list(hypotheses), streams).score, str(metric.get_signature())


def rouge(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Mean F1 (0 to 100) of ROUGE-1, -2 and -L with stemming, each with the reference that fits best."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    scores = [scorer.score_multi(list(refs), text) for text, refs in zip(hypotheses, references, strict=True)]
    return {name: 100 * float(np.mean([score[name].fmeasure for score in scores])) for name in scores[0]}


_ANSWER_MARK = "####"


def final_answer(text: str) -> str:
    """What a text comes to: the number or else the line after the last "####"; without that mark, all of it.

    GSM8K's own evaluation is stricter: it wants one space before the number, and takes a full stop after it for a part.

    >>> final_answer("8 * 150 = 1200\n#### 1,200 eggs"), final_answer(" Paris ")
    ('1200', 'Paris')
    """
    before, mark, after = text.rpartition(_ANSWER_MARK)
    if not mark:
        return text.strip()
    line = next(iter(after.strip().splitlines()), "").strip().removeprefix("$")
    number = re.match(r"-?[0-9][0-9,.]*", line)
    return number[0].replace(",", "").rstrip(".") if number else line


def exact_match(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Share of texts whose final answer is that of one of their references.

    Where a reference marks its answer ("#### 42"), a text that does not is wrong, as in the evaluation of GSM8K.
    """
    right = 0
    for text, refs in zip(hypotheses, references, strict=True):
        comparable = [ref for ref in refs if (_ANSWER_MARK in ref) <= (_ANSWER_MARK in text)]
        right += final_answer(text) in [final_answer(ref) for ref in comparable]
    return right / len(hypotheses)


def check_metrics(names: Sequence[str]) -> None:
    """An error for metrics whose library is not there: before anything is trained."""
    if "rouge" in names and importlib.util.find_spec("rouge_score") is None:
        raise ValueError("--metrics rouge needs the rouge-score package: pip install 'jlora[rouge]'")


def text_scores(names: Sequence[str], hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, Any]:
    """The chosen scores ("bleu", "rouge", "exact-match") of texts, by their names in results.json."""
    figures: dict[str, Any] = {}
    if "bleu" in names:
        figures["bleu"], figures["bleu_signature"] = corpus_bleu(hypotheses, references)
        figures["bleu_prompts"] = len(hypotheses)
    if "rouge" in names:
        figures |= rouge(hypotheses, references)
    if "exact-match" in names:
        figures["exact_match"] = exact_match(hypotheses, references)
    return figures


def classification_scores(labels: Int[np.ndarray, "n"], logits: Float[np.ndarray, "n classes"]) -> dict[str, float]:
    """Mean cross-entropy, and the scores of the GLUE tasks: accuracy, F1, Matthews' correlation.

    F1 is that of the second class where there are two, as in GLUE, otherwise the mean of all classes' (macro).
    """
    from scipy.special import log_softmax
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    predicted, two = logits.argmax(axis=1), logits.shape[1] == 2
    loss = -log_softmax(logits, axis=1)[np.arange(len(labels)), labels].mean()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a model that has one answer for all is scored like any other
        return {
            "eval_loss": float(loss),
            "accuracy": float(accuracy_score(labels, predicted)),
            "f1": float(f1_score(labels, predicted, average="binary" if two else "macro", zero_division=0.0)),
            "matthews": float(matthews_corrcoef(labels, predicted)),
        }


def classification_table(labels: Sequence[str], predicted: Sequence[str]) -> str:
    """Precision, recall and F1 of each class, as a text."""
    from sklearn.metrics import classification_report

    return classification_report(labels, predicted, digits=3, zero_division=0.0)


def regression_scores(wanted: Float[np.ndarray, "n"], found: Float[np.ndarray, "n"]) -> dict[str, float]:
    """Mean squared error, and the correlations of Pearson and Spearman; these are NaN of a constant."""
    from scipy.stats import pearsonr, spearmanr

    wanted = np.asarray(wanted, np.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a constant has no correlation: NaN says so
        return {
            "eval_loss": float(np.mean(np.square(found - wanted))),
            "pearson": float(pearsonr(wanted, found).statistic),
            "spearman": float(spearmanr(wanted, found).statistic),
        }
