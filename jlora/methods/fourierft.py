r"""FourierFT: the change of a weight is a sum of a few waves, whose amplitudes are trained.

Parameter-Efficient Fine-Tuning with Discrete Fourier Transform. Gao et al., 2024. https://arxiv.org/abs/2405.03003

.. math::
    \Delta W_{io} = \frac{s}{\mathrm{in}\,\mathrm{out}} \sum_{k=1}^{n} c_k
    \cos 2\pi\Bigl(\frac{p_k i}{\mathrm{in}} + \frac{q_k o}{\mathrm{out}}\Bigr)

W [in, out] frozen, c [n] trained; the n different frequencies (p_k, q_k) are drawn from a seed, the same for all
weights of a shape, and stored nowhere. Trained: n a matrix, whatever its size. The change is s times the real part of
the inverse discrete Fourier transform of a matrix of zeros with c in the n places.

* cos(u + v) = cos u cos v - sin u sin v: the change is a pair of factors of rank 2 n. It is used as such where that
  takes fewer FLOPs in a step, 5 n (in + out) <= in out. Otherwise (n = 1000 in most weights of today) the change is
  formed by a real transform, O(in out log(in out)), and the gradient of the weight is formed for it: 2 T in out FLOPs
  for T tokens. Where the weight is sharded, this transform brings its gradient together on every device.
* c starts at zero, so the output starts as the base's. (The paper and PEFT's default draw c from a normal distribution
  and start off the base: ``start="normal"``.)
* The frequencies are PyTorch's own numbers, so that PEFT's files, which hold the seed alone, mean the same here.

When to use it: adapters of a few kilobytes. s is large, 100 to 300, since waves are spread over the whole weight.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jlora.factors import Factors
from jlora.methods.base import Method, Site, require, sharded_as
from jlora.torch_random import randperm
from jlora.weight import Params


@dataclasses.dataclass(frozen=True)
class FourierFT(Method):
    """Fourier transform for fine-tuning. The formula and shapes are at the top of this file.

    Parameters of a leaf: trainable ``{"spectrum": [*stack, n]}``.

    Attributes:
      n: number of trained amplitudes.
      scaling: s.
      seed: of the frequencies.
      start: "zeros", or "normal" for amplitudes of deviation 1, which is not the base.
    """

    n: int = 1000
    scaling: float = 150.0
    _: dataclasses.KW_ONLY
    seed: int = 777
    start: str = "zeros"

    def __post_init__(self):
        require(
            isinstance(self.n, int) and self.n > 0,
            f"FourierFT(n={self.n!r}): a positive number of frequencies is wanted, 200 to 10000 as a rule.",
        )
        require(self.start in ("zeros", "normal"), f"FourierFT(start={self.start!r}): 'zeros' or 'normal' is wanted.")

    def check(self, site: Site) -> str | None:
        _, n_in, n_out = site.canonical_shape
        if self.n > n_in * n_out:
            return f"n={self.n} is above in * out = {n_in * n_out}; choose at most {n_in * n_out}"

    def init(self, key: Any, w: Array, site: Site, dtype: Any) -> Params:
        normal = self.start == "normal"
        return Params(trainable={"spectrum": jax.random.normal(key, (self.n,), dtype) * normal})

    def count(self, site: Site) -> int:
        return site.stack * self.n

    def dims(self, p: Params) -> Params:
        return Params(trainable={"spectrum": "_"})

    def frequencies(self, n_in: int, n_out: int) -> tuple[np.ndarray, np.ndarray]:
        """(p, q), each [n]. They are drawn as places in [out, in], row by row."""
        q, p = np.divmod(randperm(n_in * n_out, self.n, self.seed), n_in)
        return p, q

    def factors(self, w: Float[Array, "in out"], p: Params) -> Factors | None:
        n_in, n_out = w.shape
        if 5 * self.n * (n_in + n_out) > n_in * n_out or max(n_in, n_out) > 2**16:
            return None
        c = p.trainable["spectrum"]
        of_in, of_out = (
            2 * jnp.pi / n * (jnp.arange(n, dtype=jnp.uint32)[:, None] * jnp.uint32(f) % jnp.uint32(n)).astype(c.dtype)
            for n, f in zip(w.shape, self.frequencies(n_in, n_out), strict=True)
        )
        a = jnp.concatenate([jnp.cos(of_in), jnp.sin(of_in)], axis=1)
        b = jnp.concatenate([jnp.cos(of_out) * c, -jnp.sin(of_out) * c], axis=1).T
        return Factors(a, b, self.scaling / (n_in * n_out))

    def weight(self, w: Float[Array, "in out"], p: Params) -> Float[Array, "in out"]:
        if self.factors(w, p) is not None:
            return super().weight(w, p)
        (n_in, n_out), c = w.shape, p.trainable["spectrum"]
        wide = jnp.promote_types(c.dtype, jnp.float32)
        p_k, q_k = self.frequencies(n_in, n_out)
        # The real part of a transform is the transform of the part that is even in the frequency, of which a real
        # transform wants the half with q up to out / 2.
        rows, columns = np.concatenate([p_k, -p_k % n_in]), np.concatenate([q_k, -q_k % n_out])
        here = np.flatnonzero(columns <= n_out // 2)
        halves = jnp.zeros((n_in, n_out // 2 + 1), wide)
        halves = halves.at[rows[here], columns[here]].add(c.astype(wide)[here % self.n] / 2)
        change = self.scaling * jnp.fft.irfft2(halves, s=w.shape)
        return w + sharded_as(w, change.astype(w.dtype))

    def describe(self) -> dict[str, str]:
        return {"rank": f"{self.n} waves", "scale": f"{self.scaling:g}"}
