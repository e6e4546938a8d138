r"""MonteCLoRA: LoRA with a distribution over A, of which each training step sees a mixture of draws.

Robust and Efficient Fine-tuning of LLMs with Bayesian Reparameterization of Low-Rank Adaptation. Sengupta et al., 2024.
https://arxiv.org/abs/2411.04358

.. math::  y = x W + s\,\mathrm{drop}(x) \Bigl(A + \varepsilon \sum_{n=1}^{N} \pi_n Z_n \Sigma^{1/2}\Bigr) B, \qquad
           \Sigma = \mathrm{diag}\bigl(e^{2 \tau_j} \chi_j\bigr), \quad
           \pi = \mathrm{softmax}\bigl(\log \beta - \overline{\log \beta} + \sqrt{D}\,\zeta\bigr), \quad
           \beta = e^{\gamma}

W [in, out] frozen; A [in, r], B [r, out], tau [r] and gamma [N] trained; s = alpha / r. Drawn at each use: Z_n [in, r]
and zeta [N] normal, chi [r] chi-squared with r degrees of freedom (the diagonal of a Wishart matrix); D_n = (1 - 2/N) /
beta_n + (sum 1/beta) / N^2, so that pi is near a Dirichlet draw. Trained: r (in + out) + r + N a matrix.

* Draws are made exactly when the tree was bound with a key. Without, and merged, it is LoRA: the mean.
* Only the sum of the N draws is seen, and given pi it is one normal matrix of the deviation \|pi\|: that is what is
  drawn, N times less.
* The start is LoRA's, with tau and gamma uniform in [0, 1]: with B = 0 the output starts as the base's.
* The variational terms are reported, not added: ``jlora.lift(f, aux=True)``, and ``variational_loss`` of what it
  reports is what PEFT adds to the loss.

Read in PEFT's code. Departures: its Dirichlet divergence has the sign of one term wrong, here it is the divergence.

When to use it: where calibration or robustness to the learning rate matters more than the last digit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.scipy.special import digamma, gammaln
from jaxtyping import Array, Float

from jlora.factors import Factors
from jlora.methods.base import Method, Site, require, sharded_as
from jlora.methods.lora import LoRA
from jlora.weight import Context, Dot, Params


@dataclasses.dataclass(frozen=True)
class MonteCLoRA(Method):
    """LoRA with a distribution over A. The formula and shapes are at the top of this file.

    Parameters of a leaf: trainable ``{"factors": Factors(a [*stack, in, r], b [*stack, r, out]), "log_std": [*stack,
    r], "log_mixture": [*stack, N]}``, tau and gamma.

    Attributes:
      rank, alpha, rslora, dropout: as of LoRA.
      samples: N, at least 2.
      noise: epsilon.
      prior: concentration of the Dirichlet prior of the mixture; it matters to ``variational_loss`` only.
    """

    rank: int = 8
    alpha: float = 16.0
    _: dataclasses.KW_ONLY
    rslora: bool = False
    dropout: float = 0.0
    samples: int = 8
    noise: float = 1e-4
    prior: float = 0.1

    sliceable = frozenset({"in", "out"})
    draws = True

    def __post_init__(self):
        self.lora  # its own checks  # noqa: B018
        require(self.samples > 1, f"MonteCLoRA(samples={self.samples}): at least 2 draws make a mixture.")
        require(self.prior > 0, f"MonteCLoRA(prior={self.prior}): a positive concentration is wanted.")

    @property
    def lora(self) -> LoRA:
        """The mean."""
        return LoRA(self.rank, self.alpha, rslora=self.rslora, dropout=self.dropout)

    @property
    def scale(self) -> float:
        return self.lora.scale

    def check(self, site: Site) -> str | None:
        if site.axes.kind == "embedding":
            return "the rows of an embedding that no token looks up would be drawn as well; use LoRA"
        return self.lora.check(site)

    def init(self, key: Any, w: Array, site: Site, dtype: Any) -> Params:
        pair = self.lora.init(key, w, site, dtype).trainable
        key_std, key_mixture = jax.random.split(jax.random.fold_in(key, 1))
        own = {
            "log_std": jax.random.uniform(key_std, (self.rank,), dtype),
            "log_mixture": jax.random.uniform(key_mixture, (self.samples,), dtype),
        }
        return Params({"factors": pair, **own})

    def count(self, site: Site) -> int:
        return self.lora.count(site) + site.stack * (self.rank + self.samples)

    def dims(self, p: Params) -> Params:
        pair = Factors("in rank", "rank out", p.trainable["factors"].scale)
        return Params({"factors": pair, "log_std": "rank", "log_mixture": "_"})

    def factors(self, w: Array, p: Params) -> Factors:
        return p.trainable["factors"]

    def forward(self, dot: Dot, x: Array, w: Array, p: Params, ctx: Context) -> tuple[Array, Any]:
        if ctx.key is None:
            return super().forward(dot, x, w, p, ctx)
        key_drop, *keys = jax.random.split(ctx.key, 4)
        drawn, report = self.draw(keys, p.trainable)
        return dot.factored(x, w, drawn, dataclasses.replace(ctx, key=key_drop), self.dropout), report

    def draw(self, keys: list[Any], own: Mapping[str, Any]) -> tuple[Factors, dict[str, Array]]:
        """The pair with a drawn A, and the terms of ``variational_loss``; experts have an axis in front."""
        f, tau, gamma = own["factors"], own["log_std"], own["log_mixture"]
        n = self.samples
        chi = jax.random.chisquare(keys[0], self.rank, tau.shape, jnp.promote_types(tau.dtype, jnp.float32))
        variance = jnp.maximum(jnp.exp(2 * tau) * chi.astype(tau.dtype), 1e-3)
        inverse = jnp.exp(-gamma)
        spread = jnp.sqrt(inverse * (1 - 2 / n) + inverse.sum(-1, keepdims=True) / n**2)
        logits = gamma - gamma.mean(-1, keepdims=True) + spread * jax.random.normal(keys[1], gamma.shape, gamma.dtype)
        mixture = jax.nn.softmax(logits)
        squares = jnp.sum(jnp.square(mixture), axis=-1)
        deviation = self.noise * jnp.sqrt(squares[..., None] * variance)
        z = sharded_as(f.a, jax.random.normal(keys[2], f.a.shape, f.a.dtype))
        drawn = Factors(f.a + z * deviation.astype(f.a.dtype)[..., None, :], f.b, f.scale)
        return drawn, {"kl": self.divergence(tau, gamma, variance), "squares": squares}

    def divergence(self, tau: Array, gamma: Array, variance: Array) -> Float[Array, "*experts"]:
        """Of the mixture from its Dirichlet prior, of the Wishart matrix, and of the N normals, from standard ones."""
        beta, r, n = jnp.exp(gamma), self.rank, self.samples
        prior = jnp.full_like(beta, self.prior)
        log_norm = lambda c: gammaln(c.sum(-1)) - gammaln(c).sum(-1)
        apart = jnp.sum((beta - prior) * (digamma(beta) - digamma(beta.sum(-1, keepdims=True))), axis=-1)
        dirichlet = log_norm(beta) - log_norm(prior) + apart
        wishart = 0.5 * r * jnp.sum(jnp.exp(2 * tau) - 2 * tau - 1, axis=-1)
        normal = 0.5 * n * jnp.sum(variance - jnp.log(variance) - 1, axis=-1)
        return dirichlet + wishart + normal

    def describe(self) -> dict[str, str]:
        return self.lora.describe()


def variational_loss(
    reported: Mapping[str, list[Any]], kl_weight: float = 1e-5, squares_weight: float = 0.0
) -> Float[Array, ""]:
    """The mean over all matrices of ``kl_weight`` times the divergence, plus ``squares_weight`` |pi|^2, which keeps the
    mixture from collapsing (PEFT's ``use_entropy`` gives it 1).

    >>> y, reported = jlora.lift(f, aux=True)(adapted.bind(trainable, context={"key": key}), x)
    >>> loss = task_loss(y) + variational_loss(reported)
    """
    reports = [
        r for uses in reported.values() for r in uses if isinstance(r, Mapping) and r.keys() == {"kl", "squares"}
    ]
    if not reports:
        raise ValueError(
            "nothing of MonteCLoRA was reported: lift with aux=True, and bind with a key, context={'key': key}."
        )
    terms = [jnp.ravel(kl_weight * r["kl"] + squares_weight * r["squares"]) for r in reports]
    return jnp.mean(jnp.concatenate(terms))
