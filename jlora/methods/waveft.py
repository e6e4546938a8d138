r"""WaveFT: the change of a weight is a sum of a few wavelets, whose amplitudes are trained.

Exploring Sparsity for Parameter Efficient Fine Tuning Using Wavelets. Bilican, Yılmaz, Tekalp and Cinbiş, 2025.
https://arxiv.org/abs/2505.12532

.. math::
    \Delta W_{io} = s \sum_{k=1}^{n} c_k\, f_k(i - 2 p_k)\, g_k(o - 2 q_k)

W [in, out] frozen, c [n] trained. f_k and g_k are the lowpass or the highpass filter of an orthogonal wavelet, of L
numbers each, depending on the quarter of the coefficient matrix that coefficient k lies in; the n different places are
drawn from a seed, the same for all weights of a shape, and stored nowhere. Trained: n a matrix, whatever its size. The
change is s times one level of the inverse wavelet transform of a matrix of zeros with c in the n places.

* A coefficient changes L x L entries of the weight, four of them for the Haar wavelet. The effective weight is formed
  by a scatter of those, n L^2 numbers at most, and no transform is run: where they meet and what they weigh is known
  beforehand. The gradient of c is made of sums of entries of the gradient of W, which is formed for it, as in full
  training: 2 T in out FLOPs for T tokens.
* With ``wavelet=None`` c are entries of the weight themselves: SHiRA with places that follow from the seed.
* c starts at zero, so the output starts as the base's.
* The places are PyTorch's own numbers, so that PEFT's files, which hold the seed alone, mean the same here. As there,
  two of the four quarters are swapped against the usual transform; places are random, and nothing depends on it.
* Filters longer than Haar's reach over the edges of the weight, and want a coefficient matrix larger by L - 2. The
  places are drawn from its middle, and what reaches over an edge is cut off.

When to use it: where SHiRA or FourierFT would be: a change of high rank of a few thousand numbers that is local in the
weight.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from jlora.methods.base import Method, Site, require
from jlora.torch_random import randperm
from jlora.wavelets import NAMES, highpass, lowpass
from jlora.weight import Params


@dataclasses.dataclass(frozen=True)
class WaveFT(Method):
    """Wavelet fine-tuning. The formula and shapes are at the top of this file.

    Parameters of a leaf: trainable ``{"spectrum": [*stack, n]}``.

    Attributes:
      n: number of trained amplitudes.
      scaling: s.
      seed: of the places.
      wavelet: "db1" (the Haar wavelet) to "db10", "sym2" to "sym10", or None for no transform.
    """

    n: int = 2592
    scaling: float = 25.0
    _: dataclasses.KW_ONLY
    seed: int = 777
    wavelet: str | None = "db1"

    def __post_init__(self):
        require(
            isinstance(self.n, int) and self.n > 0,
            f"WaveFT(n={self.n!r}): a positive number of wavelets is wanted, 500 to 10000 as a rule.",
        )
        require(
            self.wavelet is None or self.wavelet in NAMES,
            f"WaveFT(wavelet={self.wavelet!r}): None or one of {', '.join(NAMES)} is wanted.",
        )

    def check(self, site: Site) -> str | None:
        _, n_in, n_out = site.canonical_shape
        if self.n > n_in * n_out:
            return f"n={self.n} is above in * out = {n_in * n_out}; choose at most {n_in * n_out}"

    def init(self, key: Any, w: Array, site: Site, dtype: Any) -> Params:
        return Params(trainable={"spectrum": jnp.zeros((self.n,), dtype)})

    def count(self, site: Site) -> int:
        return site.stack * self.n

    def dims(self, p: Params) -> Params:
        return Params(trainable={"spectrum": "_"})

    def weight(self, w: Float[Array, "in out"], p: Params) -> Float[Array, "in out"]:
        c = p.trainable["spectrum"]
        rows, columns, which, of, size = entries(self.n, self.seed, self.wavelet, *w.shape)
        values = jnp.zeros(rows.shape, c.dtype).at[of].add(c[which] * size.astype(c.dtype), indices_are_sorted=True)
        spec = jax.typeof(w).sharding.spec
        sharding = None if all(axis is None for axis in spec) else PartitionSpec(*spec)
        return w.at[rows, columns].add(
            (self.scaling * values).astype(w.dtype),
            indices_are_sorted=True,
            unique_indices=True,
            out_sharding=sharding,
        )

    def describe(self) -> dict[str, str]:
        return {"rank": f"{self.n} wavelets", "scale": f"{self.scaling:g}"}


@functools.lru_cache(maxsize=64)
def entries(n: int, seed: int, wavelet: str | None, n_in: int, n_out: int) -> tuple[np.ndarray, ...]:
    """Which entries of the weight the coefficients change: (rows [m], columns [m]), in order and none twice; and terms
    of their sums, by entry: the coefficient [t], the entry in 0..m [t], and what the coefficient is times [t]."""
    at_out, at_in = np.divmod(randperm(n_in * n_out, n, seed), n_in)  # drawn from [out, in], row by row
    if wavelet is None:
        rows, columns, size = at_in[:, None], at_out[:, None], np.ones((n, 1))
    else:
        low = lowpass(wavelet)
        filters = np.stack([low, highpass(low)])
        place_in, second_in = _place(at_in, n_in, len(low))
        place_out, second_out = _place(at_out, n_out, len(low))
        size = filters[second_out][:, :, None] * filters[second_in][:, None, :]
        rows = np.broadcast_to(place_in[:, :, None], size.shape).reshape(n, -1)
        columns = np.broadcast_to(place_out[:, None, :], size.shape).reshape(n, -1)
        size = size.reshape(n, -1)
    inside = (rows >= 0) & (rows < n_in) & (columns >= 0) & (columns < n_out)
    which = np.broadcast_to(np.arange(n)[:, None], size.shape)[inside]
    places, of = np.unique(rows[inside] * n_out + columns[inside], return_inverse=True)
    order = np.argsort(of, kind="stable")
    return places // n_out, places % n_out, which[order], of[order], size[inside][order]


def _place(at: np.ndarray, size: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """For coefficients at places of an axis: the entries [n, length] that each changes, and whether it is in the second
    half [n]."""
    half = (size + length - 1) // 2  # of an even number of coefficients, at least size + length - 2
    second, place = np.divmod(at + (2 * half - size) // 2, half)
    return 2 * place[:, None] + np.arange(length) - (length - 2), second
