r"""Hot-Swap MarkBoard: a watermark of n bits in n branches, another for each copy of a model, without training.

Hot-Swap MarkBoard: An Efficient Black-box Watermarking Approach for Large-scale Model Distribution. Zhang et al., 2025.
https://arxiv.org/abs/2507.20650

.. math::  W(b) = W + s \sum_{i=1}^{n} A_{i, b_i} B_{i, b_i}, \qquad s = \alpha / r

W [in, out] frozen; for each bit i and each of its states v, A_{i,v} [in, r] and B_{i,v} [r, out] trained. Trained: r n
(in + out) times the number of states a matrix; a copy carries r n (in + out). Every pair has LoRA's start.

* Each branch is trained alone, on its bit's trigger set: ``bind(context={"branch": "bit3_1"})`` lets only that one act,
  and only it has a gradient.
* A signature is chosen by ``bind(context={"signature": bits})``: n zeros and ones, an array [n], or an array
  [batch, n] for another signature for each example. Without a context it is the method's own, ``signature``.
* ``jlora.rank.choose(adapted, {"signature": bits})`` is the copy that is handed out: a plain LoRA of rank r n without
  the other branches, the columns of bit i at i r. Another signature changes only the columns of the bits that differ.
* ``verify`` reads the bits of a suspect model from its answers to the trigger sets. No weights are needed.

* ``obfuscate(copy, key)`` ties a copy's branches to its base, so that taking them off costs the model its performance.
  With A [in, R] and B [R, out] the pair of the copy, R = r n, U and V orthonormal bases of A's columns and B's rows,
  and Q and G [R, R] random orthogonal matrices:

.. math::  \tilde W = W - c\,U Q V^\top, \qquad \tilde A = U G, \quad
    s \tilde B = G^\top (s\,U^\top A B + c\,Q V^\top), \qquad \tilde W + s \tilde A \tilde B = W + s A B

  The function, its rank and its files stay what they were. W~ alone lacks a matrix ``strength`` times as large as W,
  and every column of the pair holds a part of every bit and of what W~ lacks, which are in the same subspaces.

Derived from the abstract and unverified, since neither code nor the full text was found: two branches a bit (or one, on
or off), training each alone, and the form of the obfuscation, of which the abstract says only that it entangles the
watermark with the base. It does not hold against somebody who has W itself. Merging a copy (``jlora.merge``) ties them,
too, and leaves no branch to take off.

When to use it: many copies of one model, each of which has to be told apart from its answers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jlora import paths
from jlora.factors import Factors
from jlora.linalg import qr
from jlora.methods.base import check_rank, require
from jlora.methods.branches import Branches, Strength, pick
from jlora.methods.lora import LoRA
from jlora.storage import is_stored

if TYPE_CHECKING:
    from jlora.adapt import Adapted


@dataclasses.dataclass(frozen=True)
class MarkBoard(Branches):
    """Branches for the bits of a signature. The formula and shapes are at the top of this file.

    Parameters of a leaf: trainable ``{"bit0_0": Factors, "bit0_1": Factors, "bit1_0": ...}``; with one state a bit
    ``{"bit0_1": Factors, ...}``.

    Attributes:
      rank: r.
      bits: n.
      alpha: numerator of the scale.
      states: 2: a bit is one of two branches. 1: it is a branch, or nothing.
      signature: the bits without a context; by default ones.
      dropout: rate, as for LoRA.
    """

    rank: int = 4
    bits: int = 8
    _: dataclasses.KW_ONLY
    alpha: float = 16.0
    states: int = 2
    signature: tuple[int, ...] | None = None
    dropout: float = 0.0

    def __post_init__(self):
        require(
            isinstance(self.bits, int) and self.bits > 0,
            f"MarkBoard(bits={self.bits!r}): a positive number of bits is wanted.",
        )
        require(self.states in (1, 2), f"MarkBoard(states={self.states!r}): a bit has 1 or 2 branches.")
        if self.signature is not None:
            object.__setattr__(self, "signature", tuple(map(int, self.signature)))
            self.strengths({"signature": self.signature})
        self.require_ranks()

    @property
    def ranks(self) -> dict[str, int]:
        values = (0, 1) if self.states == 2 else (1,)
        return {f"bit{i}_{v}": self.rank for i in range(self.bits) for v in values}

    def scale_of(self, name: str) -> float:
        return float(self.alpha / self.rank)

    def strengths(self, values: Mapping[str, Any]) -> dict[str, Strength]:
        if values.get("branch") is not None:
            return pick(values["branch"], tuple(self.ranks), "branch")
        given = values.get("signature")
        if given is None:
            given = (1,) * self.bits if self.signature is None else self.signature
        names = self.ranks
        if isinstance(given, jax.Array):
            if given.ndim not in (1, 2) or given.shape[-1] != self.bits:
                raise ValueError(
                    f"context['signature'] is an array [{self.bits}] or [batch, {self.bits}]; got one of shape "
                    f"{given.shape}."
                )
            return {name: given[..., i] == v for name, (i, v) in zip(names, map(_place, names), strict=True)}
        given = np.asarray(given)
        if given.shape != (self.bits,) or not np.isin(given, (0, 1)).all():
            raise ValueError(f"A signature is {self.bits} zeros and ones; got {given.tolist()}.")
        return {name: 1.0 for name in names if given[_place(name)[0]] == _place(name)[1]}


def _place(name: str) -> tuple[int, int]:
    """(i, v) of a branch."""
    i, v = name.removeprefix("bit").split("_")
    return int(i), int(v)


def verify(
    predict: Callable[[Any], Any], triggers: Sequence[Any], marks: Sequence[Any], threshold: float = 0.5
) -> tuple[Int[np.ndarray, " n"], Float[np.ndarray, " n"]]:
    """The bits of a suspect model, from its answers alone.

    Args:
      predict: the model as anyone can call it: a batch of inputs -> answers (labels, or rows of token ids).
      triggers: the trigger set of each of n bits, a batch of inputs each.
      marks: for each trigger set, the answers that a 1 was trained to give.
      threshold: the share of such answers from which on a bit is read as 1.

    Returns:
      (bits, shares). A share far from both 0 and 1 says that the bit was not trained well, or was tampered with.
    """
    if len(triggers) != len(marks):
        raise ValueError(f"Every trigger set has its marks; got {len(triggers)} and {len(marks)}.")
    shares = []
    for inputs, wanted in zip(triggers, marks, strict=True):
        got, wanted = np.asarray(predict(inputs)), np.asarray(wanted)
        if got.shape != wanted.shape:
            raise ValueError(
                f"The answers are {got.shape} and the marks {wanted.shape}: predict gives labels, not logits."
            )
        shares.append((got == wanted).reshape(len(wanted), -1).all(axis=1).mean())
    shares = np.array(shares)
    return (shares >= threshold).astype(int), shares


def obfuscate(copy: Adapted, key: PRNGKeyArray, strength: float = 2.0) -> Adapted:
    """A copy with its branches tied to its base: the same function, from damaged weights. See the top of this file.

    >>> copy = markboard.obfuscate(jlora.rank.choose(adapted, {"signature": bits}), key)

    Hand out ``copy.base`` and the adapter (``jlora.io.save_peft``). In a base of low precision the damaged weights are
    rounded as the weights themselves were, in proportion to their size.

    Args:
      copy: what ``jlora.rank.choose`` gave: plain LoRA.
      key: of Q and G, another for each copy.
      strength: size of what is taken out over that of the weight, by Frobenius norms. It lies in R of the weight's
        directions: where few of many are adapted, only values above 1 do damage. Precision is lost in proportion.
    """
    require(strength > 0, f"obfuscate(strength={strength}): a positive number is wanted, 1 to 8 as a rule.")
    leaves, treedef = paths.flatten(copy.base)
    base, trainable = dict(leaves), dict(copy.trainable)
    for path, site in copy.sites.items():
        if type(site.method) is not LoRA or path in copy.frozen:
            raise ValueError(
                f"{path!r} has {site.method}: plain LoRA is obfuscated, as jlora.rank.choose(adapted, "
                "{'signature': bits}) makes it."
            )
        pair, problem = copy.trainable[path], check_rank(copy.trainable[path].rank, site)
        require(problem is None, f"{path!r} {site.shape}: {problem}.")
        require(
            bool(pair.a.any((-2, -1)).all() and pair.b.any((-2, -1)).all()),
            f"{path!r}: a factor of its pair is zero, and nothing can be tied to it. Train the branches first.",
        )
        if is_stored(base[path]):
            raise ValueError(
                f"{path!r} is quantized, and what is taken out of it would be rounded: dequantize it first."
            )
        entangle = lambda key, w, f: _entangled(key, w, f, strength)
        keys = paths.fold_path(key, path)
        if stack := site.canonical_shape[0]:
            keys = jax.random.split(keys, stack)
            for _ in stack:
                entangle = jax.vmap(entangle)
        w, trainable[path] = entangle(keys, site.axes.to_canonical(base[path]), pair)
        base[path] = site.axes.from_canonical(w, site.shape).astype(base[path].dtype)
    return copy.replace(base=jax.tree.unflatten(treedef, [base[path] for path, _ in leaves]), trainable=trainable)


def _entangled(key: PRNGKeyArray, w: Float[Array, "in out"], f: Factors, strength: float) -> tuple[Array, Factors]:
    """W~ and the pair beside it."""
    wide = jnp.promote_types(w.dtype, f.a.dtype)
    a, b, w = f.a.astype(wide), f.b.astype(wide), w.astype(wide)
    q, g = (jax.random.orthogonal(k, f.rank, dtype=wide) for k in jax.random.split(key))
    u, v = qr(a)[0], qr(b.T)[0]
    c = strength * jnp.linalg.norm(w) * f.rank**-0.5
    taken = c * q @ v.T
    pair = Factors((u @ g).astype(f.a.dtype), (g.T @ (u.T @ a @ b + taken / f.scale)).astype(f.b.dtype), f.scale)
    return w - u @ taken, pair
