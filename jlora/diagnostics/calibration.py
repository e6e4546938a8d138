r"""How far a classifier's confidence is from its accuracy.

.. math::  \mathrm{ECE} = \sum_b \frac{n_b}{N} |\mathrm{acc}_b - \mathrm{conf}_b|, \qquad
           \mathrm{MCE} = \max_{b: n_b > 0} |\mathrm{acc}_b - \mathrm{conf}_b|

Of N examples with probabilities p [N, C], confidence max_c p_c and correct where its argmax is the label; bin b of n_b
examples has the mean confidence conf_b and the accuracy acc_b.

* ``ece`` and ``mce``: bins of equal width on [0, 1], closed on the right, 0 in the first. Naeini et al., 2015; Guo et
  al., 2017, https://arxiv.org/abs/1706.04599.
* ``ace``: bins of equal counts, of each class's own probability, mean over the classes. Nixon et al., 2019,
  https://arxiv.org/abs/1904.01685. ``top_label=True`` takes the confidence only, as the code of HypeLoRA does.
* ``cece``: ECE of each class's own probability, mean over the classes.
* ``tace``: ``ace`` of the probabilities above a threshold, all classes' together in one row of bins. In HypeLoRA's code
  the labels of a class stand beside the probabilities of another, which gives large numbers for calibrated classifiers;
  here each stands beside its own.

All run under ``jit``. Ties are binned in the order of the examples, so bins of equal counts depend on that order where
there are ties; where the bins do not divide N, the last takes the rest.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Reliability:
    """What a reliability diagram shows. Empty bins have zeros.

    Attributes:
      count: examples of a bin.
      confidence: their mean confidence.
      accuracy: the share of them that is correct.
    """

    count: Int[Array, " bins"]
    confidence: Float[Array, " bins"]
    accuracy: Float[Array, " bins"]

    @property
    def gap(self) -> Float[Array, " bins"]:
        return jnp.abs(self.accuracy - self.confidence)

    @property
    def expected(self) -> Float[Array, ""]:
        """The mean gap of an example."""
        return jnp.sum(self.count * self.gap) / jnp.maximum(jnp.sum(self.count), 1)


def reliability(
    confidence: Float[Array, " n"],
    correct: Bool[Array, " n"] | Float[Array, " n"],
    bins: int = 10,
    *,
    equal_counts: bool = False,
    where: Bool[Array, " n"] | None = None,
) -> Reliability:
    """Confidence and accuracy by bins, of equal width or of equal counts.

    Args:
      where: the examples that count; padding is False.
    """
    confidence, correct = jnp.asarray(confidence), jnp.asarray(correct)
    if confidence.ndim != 1 or confidence.shape != correct.shape:
        raise ValueError(f"reliability wants two vectors, [n]; got {confidence.shape} and {correct.shape}.")
    if not (isinstance(bins, int) and bins > 0):
        raise ValueError(f"bins={bins!r}: a positive number of bins is wanted, 10 as a rule.")
    weight = jnp.ones(confidence.shape, bool) if where is None else jnp.asarray(where, bool)
    if not isinstance(weight, jax.core.Tracer) and not isinstance(confidence, jax.core.Tracer):
        _check_numbers("confidence", confidence[weight])
    return _binned(confidence, correct, weight, bins, equal_counts)


@functools.partial(jax.jit, static_argnums=(3, 4))
def _binned(confidence: Array, correct: Array, weight: Array, bins: int, equal_counts: bool) -> Reliability:
    if equal_counts:
        order = jnp.argsort(jnp.where(weight, confidence, jnp.inf), stable=True)
        place = jnp.zeros(order.shape, int).at[order].set(jnp.arange(len(order)))
        each = jnp.sum(weight) // bins
        at = jnp.where(each > 0, jnp.minimum(place // jnp.maximum(each, 1), bins - 1), bins - 1)
    else:
        edges = jnp.arange(1, bins, dtype=confidence.dtype) / bins
        at = jnp.searchsorted(edges, confidence, side="left")
    total = lambda values: jax.ops.segment_sum(jnp.where(weight, values, 0), at, num_segments=bins)
    count = total(jnp.ones(confidence.shape, int))
    mean = lambda values: total(values) / jnp.maximum(count, 1)
    return Reliability(count, mean(confidence), mean(correct.astype(confidence.dtype)))


def ece(
    probabilities: Float[Array, "n classes"], labels: Int[Array, " n"], bins: int = 10, *, where: Array | None = None
) -> Float[Array, ""]:
    """Expected calibration error of the predicted class."""
    return _top(probabilities, labels, bins, False, where).expected


def mce(
    probabilities: Float[Array, "n classes"], labels: Int[Array, " n"], bins: int = 10, *, where: Array | None = None
) -> Float[Array, ""]:
    """The largest gap of a bin that is not empty, however few are in it."""
    return jnp.max(_top(probabilities, labels, bins, False, where).gap)


def ace(
    probabilities: Float[Array, "n classes"],
    labels: Int[Array, " n"],
    bins: int = 10,
    *,
    top_label: bool = False,
    where: Array | None = None,
) -> Float[Array, ""]:
    """Adaptive calibration error: bins of equal counts."""
    if top_label:
        return _top(probabilities, labels, bins, True, where).expected
    return _class_wise(probabilities, labels, bins, True, where)


def cece(
    probabilities: Float[Array, "n classes"], labels: Int[Array, " n"], bins: int = 10, *, where: Array | None = None
) -> Float[Array, ""]:
    """Class-wise expected calibration error."""
    return _class_wise(probabilities, labels, bins, False, where)


def tace(
    probabilities: Float[Array, "n classes"],
    labels: Int[Array, " n"],
    bins: int = 10,
    *,
    threshold: float = 0.01,
    where: Array | None = None,
) -> Float[Array, ""]:
    """Thresholded adaptive calibration error."""
    probabilities, labels, where = _checked(probabilities, labels, where)
    hits, live = _hits(probabilities, labels), (probabilities > threshold) & where[:, None]
    return reliability(probabilities.ravel(), hits.ravel(), bins, equal_counts=True, where=live.ravel()).expected


def _top(probabilities: Array, labels: Array, bins: int, equal_counts: bool, where: Array | None) -> Reliability:
    probabilities, labels, where = _checked(probabilities, labels, where)
    correct = jnp.argmax(probabilities, axis=1) == labels
    return reliability(jnp.max(probabilities, axis=1), correct, bins, equal_counts=equal_counts, where=where)


def _class_wise(probabilities: Array, labels: Array, bins: int, equal_counts: bool, where: Array | None) -> Array:
    probabilities, labels, where = _checked(probabilities, labels, where)
    each = lambda p, hit: reliability(p, hit, bins, equal_counts=equal_counts, where=where).expected
    return jnp.mean(jax.vmap(each, in_axes=1)(probabilities, _hits(probabilities, labels)))


def _hits(probabilities: Array, labels: Array) -> Bool[Array, "n classes"]:
    return labels[:, None] == jnp.arange(probabilities.shape[1])


def _checked(probabilities: Array, labels: Array, where: Array | None) -> tuple[Array, Array, Array]:
    probabilities, labels = jnp.asarray(probabilities), jnp.asarray(labels)
    if probabilities.ndim != 2 or labels.shape != probabilities.shape[:1]:
        raise ValueError(
            f"Probabilities [n, classes] and labels [n] are wanted; got {probabilities.shape} and {labels.shape}."
        )
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(f"Labels are numbers of classes, integers; got {labels.dtype}.")
    where = jnp.ones(labels.shape, bool) if where is None else jnp.asarray(where, bool)
    if not any(isinstance(each, jax.core.Tracer) for each in (probabilities, labels, where)):
        live = np.asarray(where)
        _check_numbers("probabilities", p := np.asarray(probabilities, np.float64)[live])
        sums, numbers = p.sum(axis=1), np.asarray(labels)[live]
        if np.abs(sums - 1).max() > 1e-2:
            raise ValueError(f"Probabilities sum to 1, not {sums[np.abs(sums - 1).argmax()]:.4g}: use softmax.")
        if numbers.min() < 0 or numbers.max() >= p.shape[1]:
            raise ValueError(
                f"Labels are from 0 to {p.shape[1] - 1} where there are {p.shape[1]} classes; got {numbers.min()} to "
                f"{numbers.max()}. Where an example has none, say so: where=labels >= 0."
            )
    return probabilities, labels, where


def _check_numbers(name: str, p: Array) -> None:
    numbers = np.asarray(p)
    if not numbers.size:
        raise ValueError(f"There are no examples: {name} of the shape {numbers.shape}.")
    bad = numbers[~((numbers >= 0) & (numbers <= 1 + 1e-5))]
    if bad.size:
        raise ValueError(f"Of the {name}, {bad.size} of {numbers.size} are not from 0 to 1: {bad.flat[0]}, for one.")
