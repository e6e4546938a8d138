"""What is measured: the token loss, perplexity and corpus BLEU."""

import math
from collections.abc import Sequence

import jax.numpy as jnp
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
    targets, weights = ids[..., 1:], mask[..., 1:]
    nll = optax.softmax_cross_entropy_with_integer_labels(logits[..., :-1, :].astype(jnp.float32), targets)
    # A padding token may have a loss of inf (or its product with 0 be NaN) in low precision: select, do not multiply.
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
