"""Statistics of the activations that meet each weight, and the weight's gradient, in one backward pass.

A tap is an identity on x whose hand-written gradient returns, as the "gradient" of an accumulator that adds nothing,
the statistics of this call. So one ordinary ``jax.grad`` collects them: per layer inside a scan, under remat, summed
over uses and microbatches and reduced over devices like any gradient.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from jlora import paths
from jlora.lift.core import lift
from jlora.lift.usage import LeafUsage
from jlora.lift.usage import usage as trace_usage
from jlora.storage import is_stored
from jlora.weight import AdaptedWeight, Context, Dot, MethodLike, Params


class Stats(NamedTuple):
    """Sums over the tokens of a call, float32 (or wider). Add those of several calls; divide by ``n``.

    Attributes:
      xx: sum of x^T x. None for convolutions, experts by ragged products, and lookups.
      x: sum of x.
      absx: sum of the absolute value of x.
      n: sum of the token weights.
      g: the gradient of the loss with respect to the weight; or, sketched, that gradient times ``omega``.
      omega: the random matrix of the sketch, normal with deviation 1/sqrt(q).
    """

    xx: Float[Array, "*stack in in"] | None
    x: Float[Array, "*stack in"] | None
    absx: Float[Array, "*stack in"] | None
    n: Float[Array, "*stack"] | None
    g: Float[Array, "*stack in out"] | Float[Array, "*stack in q"] | None
    omega: Float[Array, "*stack out q"] | None


@jax.custom_vjp
def _tap(x: Array, weights: Array | None, sums: dict[str, Array]) -> Array:
    return x


def _tap_fwd(x, weights, sums):
    return x, (x, weights, sums)


def _tap_bwd(residuals, dx):
    x, weights, sums = residuals
    wide = sums["x"].dtype
    x = x.reshape(-1, x.shape[-1]).astype(wide)
    w = jnp.ones(x.shape[0], wide) if weights is None else weights.reshape(-1).astype(wide)
    weighted = x * w[:, None]
    stats = {"xx": weighted.T @ x, "x": weighted.sum(0), "absx": jnp.abs(weighted).sum(0), "n": w.sum()}
    return dx, None if weights is None else jnp.zeros_like(weights), stats


_tap.defvjp(_tap_fwd, _tap_bwd)


@dataclasses.dataclass(frozen=True)
class _Tap(MethodLike):
    """A method whose parameters are accumulators of zeros and whose output is the base's."""

    sliceable = frozenset()
    lookup_only = False

    def forward(self, dot: Dot, x: Array, w: Array, p: Params, ctx: Context) -> tuple[Array, Any]:
        sums, omega = p.trainable, (p.frozen or {}).get("omega")
        if dot.kind == "linear" and "xx" in sums:
            weights = (ctx.values or {}).get("token_weights")
            weights = None if weights is None else input_weights(weights, x)
            x = _tap(x, weights, {name: sums[name] for name in ("xx", "x", "absx", "n")})
        if "g" in sums and omega is None:
            w = w + sums["g"].astype(w.dtype)
        y = dot(x, w)
        if omega is not None:
            y = y + dot.outer(dot.inner(x, sums["g"]), omega.swapaxes(-1, -2)).astype(y.dtype)
        return y, None

    def forward_transposed(self, dot: Dot, x: Array, wt: Array, p: Params, ctx: Context) -> Array:
        g = p.trainable.get("g")
        if p.frozen:
            return dot(x, wt) + dot.outer(dot.inner(x, p.frozen["omega"]), g.T).astype(x.dtype)
        return dot(x, wt if g is None else wt + g.T.astype(wt.dtype))

    def weight_in(self, w: Array, p: Params, values: Any) -> Array:
        g = p.trainable.get("g")
        return w if g is None or p.frozen else w + g.astype(w.dtype)

    def dims(self, p: Params) -> Params:
        raise NotImplementedError("a tapped weight is not sliced along its inputs or outputs")


def input_weights(weights: Array, x: Float[Array, "*tokens in"]) -> Float[Array, "*tokens"]:
    """The weight of each input. One that stands for several tokens has the largest of theirs."""
    lead = x.shape[:-1]
    if weights.ndim > len(lead) > 0 and weights.shape[: len(lead)] == lead:
        weights = weights.max(tuple(range(len(lead), weights.ndim)))
    if weights.size != math.prod(lead):
        raise ValueError(
            f"token_weights has shape {weights.shape}, and an input of the weights {x.shape}: one number for each "
            "token is wanted. Leave out weights whose inputs are no tokens."
        )
    return weights.reshape(lead)


def capture(
    loss_fn: Callable,
    params: PyTree,
    *args: Any,
    targets: Any = "**",
    usage: dict[str, LeafUsage] | None = None,
    inputs: bool = True,
    gradient: str | int | None = "full",
    token_weights: Float[Array, "batch seq"] | None = None,
    key: jax.Array | None = None,
) -> dict[str, Stats]:
    """Collect, for every targeted weight, the statistics of its inputs and its gradient.

    Args:
      loss_fn: ``loss_fn(params, *args)``, a scalar. It may jit, scan and remat; under ``jax.jit`` capture is compiled.
      targets: pattern of the leaves to capture.
      usage: what ``jlora.usage`` found, if it is known already.
      inputs: collect xx, x, absx and n. Memory: in^2 floats a weight.
      gradient: "full" [in, out]; a number q for the sketch G @ omega [in, q], which forms no [in, out] gradient; or
        None.
      token_weights: weights of the tokens (0 for padding) in the statistics of the inputs, of the shape of the
        activations' leading axes; an input that is one for several tokens (a pooler's) has the largest of theirs. They
        do not act on the gradient: mask the loss for that.
      key: random key of the sketch.

    Returns:
      ``{path: Stats}``. A weight that no product used, or whose output does not reach the loss, has n = 0: an error
      outside of ``jit``.
    """
    if gradient not in ("full", None) and not (isinstance(gradient, int) and gradient > 0):
        raise ValueError(f"gradient is 'full', the number of columns of a sketch, or None; got {gradient!r}.")
    if isinstance(gradient, int) and key is None:
        raise ValueError("A sketch is random: pass key=jax.random.key(seed).")
    found = trace_usage(loss_fn, params, *args) if usage is None else usage
    named, treedef = paths.flatten(params)
    leaves = dict(named)
    chosen = {
        path: leaves[path].axes if is_stored(leaves.get(path)) else use.axes
        for path, use in found.items()
        if use.axes is not None and path in leaves and paths.matches(targets, path, leaves[path])
    }
    if not chosen:
        raise ValueError(f"targets={targets!r} selects none of the weights in use: {list(found)[:10]}.")
    sums, frozen = {}, {}
    for path, axes in chosen.items():
        stack, n_in, n_out = axes.canonical_shape(leaves[path].shape)
        wide = jnp.promote_types(leaves[path].dtype, jnp.float32)
        zeros = partial(jnp.zeros, dtype=wide)
        sums[path] = {}
        if inputs and "linear" in found[path].kinds and axes.kind == "linear":
            sums[path] |= {
                "xx": zeros((*stack, n_in, n_in)),
                "x": zeros((*stack, n_in)),
                "absx": zeros((*stack, n_in)),
                "n": zeros(stack),
            }
        if gradient == "full":
            sums[path]["g"] = zeros((*stack, n_in, n_out))
        elif gradient is not None:
            sums[path]["g"] = zeros((*stack, n_in, gradient))
            omega = jax.random.normal(paths.fold_path(key, path), (*stack, n_out, gradient), wide)
            frozen[path] = {"omega": omega / gradient**0.5}
    values = None if token_weights is None else {"token_weights": token_weights}

    def loss(sums: dict) -> Array:
        tapped = [
            AdaptedWeight(
                leaf,
                Params(sums[path], frozen.get(path)),
                None,
                None,
                values,
                _Tap(),
                chosen[path].labels(leaf.shape),
                path,
            )
            if path in chosen
            else leaf
            for path, leaf in named
        ]
        return lift(loss_fn, on_materialize="silent")(jax.tree.unflatten(treedef, tapped), *args)

    stats = {
        path: Stats(*(got.get(name) for name in ("xx", "x", "absx", "n", "g")), frozen.get(path, {}).get("omega"))
        for path, got in jax.grad(loss)(sums).items()
    }
    for path, s in stats.items():
        if s.n is not None and not isinstance(s.n, jax.core.Tracer) and not bool(jnp.all(s.n > 0)):
            raise ValueError(
                f"No tokens were captured at {path!r}: its output does not reach the loss, or every token weight is 0."
            )
    return stats
