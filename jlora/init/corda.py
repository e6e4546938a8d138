r"""CorDA: the factors start at components of the weight as the inputs of a task see it.

CorDA: Context-Oriented Decomposition Adaptation of Large Language Models for Task-Aware Parameter-Efficient
Fine-tuning. Yang et al., 2024. https://arxiv.org/abs/2406.05223

.. math::
    \tilde C^p W = P\,\mathrm{diag}(\sigma)\,Q^\top, \qquad
    A_0 = \tilde C^{-p} P_I\,\mathrm{diag}\sqrt{\sigma_I / s}, \qquad
    B_0 = \mathrm{diag}\sqrt{\sigma_I / s}\;Q_I^\top

W [in, out]; C [in, in] the mean over the batches of X^T X, each X divided by the size of its largest entry (the
largest, not the largest in size); C~ = C + d mean(diag C) I. I: the first r components for a task that is to be learned
("ipm", instruction-previewed, with inputs of that task), the last r for knowledge that is to be kept ("kpm", with
inputs that ask for it). d = 0.01, doubled while C~ times its inverse is 0.05 or more from I.

* p = 1 is the authors' code. p = 1/2 is what minimizes the error of the outputs, the Frobenius norm of
  C~^(1/2) (W - s A0 B0): ``power=0.5``.
* The authors leave W - s A0 B0 as the base. Here W stays, and s A0 B0 is subtracted: the same function.
* The division makes C depend on how tokens are grouped into batches.

When to use it: "kpm" to fine-tune with less forgetting of what the calibration data asks for; "ipm" for a start on a
task of few tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jlora.linalg import fixed_signs
from jlora.methods.base import Site, Start, require

_DAMP, _LARGEST_ERROR = 0.01, 0.05


@dataclasses.dataclass(frozen=True)
class CorDA(Start):
    """Context-oriented decomposition. The formula and shapes are at the top of this file.

    Attributes:
      mode: "ipm" or "kpm".
      power: p, 1 or 0.5.
    """

    mode: str = "ipm"
    _: dataclasses.KW_ONLY
    power: float = 1.0

    needs = ("n", "scaled_xx")

    def __post_init__(self):
        require(self.mode in ("ipm", "kpm"), f"CorDA(mode={self.mode!r}): 'ipm' or 'kpm' is wanted.")
        require(self.power in (0.5, 1.0), f"CorDA(power={self.power}): 1 (the authors') or 0.5 (the best) is wanted.")

    def check(self, rank: int, site: Site) -> str | None:
        most = min(site.canonical_shape[1:])
        return f"rank {rank} is above the {most} components there are" if rank > most else None

    def check_stats(self, rank: int, site: Site, stats: Mapping[str, Array]) -> str | None:
        few = float(np.min(stats["n"]))
        if few < rank:
            return f"rank {rank} is wanted of a covariance of {few:g} tokens; calibrate on more of them"

    def pair(self, key: Any, w: Array, rank: int, scale: float, stats: Any) -> tuple[Array, Array]:
        c, inverse = _damped(stats["scaled_xx"].astype(w.dtype), self.power)
        u, s, vh = jnp.linalg.svd(c @ w, full_matrices=False)
        chosen = slice(rank) if self.mode == "ipm" else slice(len(s) - rank, None)
        u, s, vh = fixed_signs(u[:, chosen], s[chosen], vh[chosen])
        root = jnp.sqrt(s / scale)
        return inverse @ u * root, root[:, None] * vh


def _damped(c: Float[Array, "in in"], power: float) -> tuple[Float[Array, "in in"], Float[Array, "in in"]]:
    """C~ to the power, and its inverse."""
    eye = jnp.eye(len(c), dtype=c.dtype)
    at = lambda damp: c + damp * jnp.mean(jnp.diagonal(c)) * eye

    def off(damp):  # not a number counts as near: no damping mends it
        error = jnp.linalg.norm(at(damp) @ jnp.linalg.inv(at(damp)) - eye)
        return error >= _LARGEST_ERROR

    c = at(jax.lax.while_loop(off, lambda damp: 2 * damp, jnp.asarray(_DAMP, c.dtype)))
    if power == 1:
        return c, jnp.linalg.inv(c)
    values, vectors = jnp.linalg.eigh(c)
    root = jnp.sqrt(values)
    return vectors * root @ vectors.T, vectors / root @ vectors.T
