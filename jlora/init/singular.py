r"""PiSSA and MiLoRA: the factors start at singular components of the weight.

PiSSA: Principal Singular Values and Singular Vectors Adaptation of Large Language Models. Meng et al., 2024.
https://arxiv.org/abs/2404.02948
MiLoRA: Harnessing Minor Singular Components for Parameter-Efficient LLM Finetuning. Wang et al., 2024.
https://arxiv.org/abs/2406.09044

.. math::
    W = P\,\mathrm{diag}(\sigma)\,Q^\top, \qquad
    A_0 = P_I\,\mathrm{diag}\sqrt{\sigma_I / s}, \qquad B_0 = \mathrm{diag}\sqrt{\sigma_I / s}\;Q_I^\top

W [in, out], P [in, k], Q [out, k], k = min(in, out), sigma descending, s the scale of LoRA: s A0 B0 are the components
I of W. I: the first r (PiSSA), the last r (MiLoRA), r in the middle, or r at random.

* The authors leave W - s A0 B0 as the base. Here W stays, and s A0 B0 is subtracted: the same function.
* Both papers have alpha = r. Dropout, which both have none of, acts here on the change alone.
* ``iterations``: subspace iteration in the place of the full decomposition, which at 4096 x 4096 takes a small part of
  its time. The authors' (and PEFT's ``pissa_niter_k``) has columns for exactly r components; here it has ten more,
  which brings what is found within a fraction of a percent of the best. Small matrices are decomposed in full anyway.

When to use them: PiSSA where plain LoRA is slow to start, at the price of a learning rate of its own: smaller, since
the factors are large. MiLoRA to stay close to what the base knows: the components it moves are those that matter least.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jlora.linalg import fixed_signs, truncated_svd
from jlora.methods.base import Site, Start, require

_PARTS = ("first", "last", "middle", "random")


@dataclasses.dataclass(frozen=True)
class SingularSlice(Start):
    """A slice of the singular value decomposition. The formula and shapes are at the top of this file.

    Attributes:
      part: "first", "last", "middle" or "random".
      iterations: of the subspace iteration; None decomposes in full. Only with "first".
    """

    part: str = "first"
    iterations: int | None = None

    def __post_init__(self):
        require(self.part in _PARTS, f"SingularSlice(part={self.part!r}): one of {', '.join(_PARTS)} is wanted.")
        require(
            self.iterations is None or (isinstance(self.iterations, int) and self.iterations > 0),
            f"iterations={self.iterations!r}: a positive number of subspace iterations is wanted, 4 to 16 as a rule, or"
            " None for the full decomposition.",
        )
        require(
            self.iterations is None or self.part == "first",
            f"iterations={self.iterations}: subspace iteration finds the first components, not the {self.part} ones.",
        )

    def check(self, rank: int, site: Site) -> str | None:
        most = min(site.canonical_shape[1:])
        return f"rank {rank} is above the {most} singular components there are" if rank > most else None

    def pair(self, key: Any, w: Array, rank: int, scale: float, stats: Any) -> tuple[Array, Array]:
        if self.iterations is not None:
            u, s, vh = truncated_svd(w, rank, key=key, iterations=self.iterations)
        else:
            u, s, vh = jnp.linalg.svd(w, full_matrices=False)
            match self.part:
                case "first":
                    chosen = slice(rank)
                case "last":
                    chosen = slice(len(s) - rank, None)
                case "middle":
                    chosen = slice((len(s) - rank) // 2, (len(s) - rank) // 2 + rank)
                case _:
                    chosen = jnp.sort(jax.random.permutation(key, len(s))[:rank])
            u, s, vh = fixed_signs(u[:, chosen], s[chosen], vh[chosen])
        root = jnp.sqrt(s / scale)
        return u * root, root[:, None] * vh


@dataclasses.dataclass(frozen=True)
class PiSSA(SingularSlice):
    """The principal components of the weight. The formula and shapes are at the top of this file.

    >>> jlora.LoRA(64, alpha=64, start=jlora.init.PiSSA(iterations=4))
    """

    part: str = dataclasses.field(default="first", init=False, repr=False)


@dataclasses.dataclass(frozen=True)
class MiLoRA(SingularSlice):
    """The minor components of the weight. The formula and shapes are at the top of this file."""

    part: str = dataclasses.field(default="last", init=False, repr=False)
    iterations: int | None = dataclasses.field(default=None, init=False, repr=False)
