r"""X-LoRA: trained LoRAs mixed anew for every token and every weight, by what the model itself made of the text.

X-LoRA: Mixture of Low-Rank Adapter Experts, a Flexible Framework for Large Language Models with Applications in Protein
Mechanics and Design. Buehler and Buehler, 2024. https://arxiv.org/abs/2402.07148

.. math::  y_t = x_t W + \sum_e g_{tle}\, s_e\,(\mathrm{drop}(x_t) A_e) B_e, \qquad
    g_{tl} = \mathrm{softmax}(c(h_t)_l / \tau)

W [in, out] of the l-th adapted matrix, t a token; A_e [in, r_e], B_e [r_e, out] and the static scale s_e of each of E
adapters; g the scalings; h [batch, seq, H] the hidden states behind the model's last norm in a first pass without
adapters, which carry no gradient; c a classifier: one linear layer H -> L E (or H -> E, the same for all L matrices),
or several of a width with ReLU and dropout between them. Trained: the classifier alone, H E + E numbers at the least.
It is no parameter of a weight, so it is not in ``adapted.trainable``: differentiate with respect to its own. With
respect to ``adapted.trainable``, too, to go on training the adapters.

The two passes, once ``combine`` has made one ``Adapted`` of several (``jlora.io.load_xlora`` reads all of it)::

    adapted = xlora.combine(math, code)
    classifier = xlora.Classifier(features=2048, adapters=2, layers=xlora.layers(adapted))
    params = classifier.init(key)
    hidden = hidden_states(adapted.base, ids)                  # the model's own function, plain
    scalings = classifier(params, hidden)                      # [batch, seq, layers, adapters]
    logits = lifted(adapted.bind(context={"scalings": xlora.spread(adapted, scalings)}), ids)

``context={"scalings": ...}`` is one of

* ``{path: [*stack, batch, seq, E]}``, what ``spread`` makes: for each matrix its own, sliced with it by a scan over the
  layers;
* an array [batch, seq, E]: the same for all matrices;
* E numbers, or an array [E], or one number: the same for all tokens, too. ``jlora.rank.choose`` makes one plain LoRA of
  such, of scalings averaged over a corpus, say. Without a context they are 1: all adapters added up.

For each token the activation must have its axes in front, [batch, seq, ..., in]. The scaling of a token depends on
what its hidden state does, so in a causal model a cache stays valid, one for each of the two passes.

Departures: the adapters share one dropout mask. PEFT lets the first pass see the adapters, all with one weight
(``scaling_pass_value``, 0 by default); for that, bind the number. The authors' own code takes its softmax over what
top_k kept of the whole tensor at once; here, as in PEFT, it is of each token.

When to use it: a handful of adapters for different fields and texts that mix them. It costs two forward passes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from jlora import paths
from jlora.factors import Factors
from jlora.methods.base import Site, dropout, require
from jlora.methods.branches import Branches, Strength
from jlora.methods.lora import LoRA
from jlora.weight import Context, Dot, Params

if TYPE_CHECKING:
    from jlora.adapt import Adapted

_VALUE = "scalings"


@dataclasses.dataclass(frozen=True)
class XLoRA(Branches):
    """Several LoRA pairs, scaled token by token. The formula and shapes are at the top of this file.

    Parameters of a leaf: trainable ``{"0": Factors, "1": Factors, ...}``, one for each adapter that adapts it.

    Attributes:
      rank: r_e of each adapter, 0 for one that does not adapt the leaf; an integer stands for a single adapter.
      scale: s_e, one for all or one for each; alpha / r as a rule.
      dropout: rate, as for LoRA.
      lookup_only: as for LoRA.
    """

    rank: int | tuple[int, ...] = (8, 8)
    scale: float | tuple[float, ...] = 2.0
    _: dataclasses.KW_ONLY
    dropout: float = 0.0
    lookup_only: bool = False

    def __post_init__(self):
        object.__setattr__(self, "rank", (self.rank,) if isinstance(self.rank, int) else tuple(self.rank))
        scales = self.scale if isinstance(self.scale, (tuple, list)) else (self.scale,) * len(self.rank)
        object.__setattr__(self, "scale", tuple(map(float, scales)))
        require(
            len(self.scale) == len(self.rank) and any(self.rank),
            f"XLoRA(rank={self.rank}, scale={self.scale}): a rank for each adapter, one of them above 0, and a scale "
            "for each.",
        )
        self.require_ranks()

    @property
    def ranks(self) -> dict[str, int]:
        return {str(e): r for e, r in enumerate(self.rank) if r != 0}

    def scale_of(self, name: str) -> float:
        return self.scale[int(name)]

    def strengths(self, values: Mapping[str, Any]) -> dict[str, Strength]:
        given = values.get(_VALUE)
        given = 1.0 if given is None else given
        if _ndim(given) == 0:
            return dict.fromkeys(self.ranks, given)
        require(_ndim(given) == 1, f"XLoRA was bound with {_VALUE} for each token: there is no one weight to form.")
        self._require_adapters(len(given))
        return {name: given[int(name)] for name in self.ranks}

    def _require_adapters(self, n: int) -> None:
        require(
            n == len(self.rank),
            f"context[{_VALUE!r}] holds a number for each of {len(self.rank)} adapters, along the last axis; got {n}.",
        )

    def enter(self, path: str, site: Site, p: Params, values: dict[str, Any]) -> tuple[Params, dict[str, Any]]:
        given = values.get(_VALUE)
        if not isinstance(given, Mapping):
            return p, values
        stack = site.canonical_shape[0]
        shape = jnp.shape(given[path]) if path in given else None
        require(
            shape is not None and len(shape) > len(stack) + 1 and shape[: len(stack)] == stack,
            f"context[{_VALUE!r}][{path!r}]: an array {[*stack, 'batch', 'seq', len(self.rank)]} is wanted, got "
            f"{shape}. xlora.spread(adapted, scalings) makes them for all leaves.",
        )
        return p._replace(frozen={_VALUE: given[path]}), {k: v for k, v in values.items() if k != _VALUE}

    def dims(self, p: Params) -> Params:
        pairs = super().dims(p).trainable
        if p.frozen is None:
            return Params(pairs)
        n_stack = next(iter(p.trainable.values())).a.ndim - 2
        return Params(pairs, {_VALUE: " ".join("_" * (p.frozen[_VALUE].ndim - n_stack))})

    def _of_tokens(self, p: Params, values: Mapping[str, Any]) -> Float[Array, "batch seq adapters"] | None:
        if p.frozen is not None:
            return p.frozen[_VALUE]
        given = values.get(_VALUE)
        return given if given is not None and _ndim(given) > 1 else None

    def _gains(
        self, scalings: Float[Array, "batch seq adapters"], dot: Dot, x: Array
    ) -> Float[Array, "batch seq ... r"]:
        """What multiplies the concatenated rank. The rows that are looked up are [batch, seq, 1] as well."""
        *lead, n = scalings.shape
        self._require_adapters(n)
        if dot.kind not in ("linear", "transposed", "lookup") or x.ndim <= len(lead) or [*x.shape[: len(lead)]] != lead:
            raise ValueError(
                f"XLoRA was bound with {_VALUE} for {lead} tokens, and is used in a {dot.kind} product of an "
                f"activation {x.shape}, where {[*lead, '...', 'features']} is wanted. Bind those of this batch, and "
                "adapt only weights whose activations keep the axes of examples and tokens."
            )
        columns = [jnp.broadcast_to(scalings[..., int(e), None], (*lead, r)) for e, r in self.ranks.items()]
        return jnp.expand_dims(jnp.concatenate(columns, axis=-1), range(len(lead), x.ndim - 1))

    def weight_in(self, w: Float[Array, "in out"], p: Params, values: Mapping[str, Any]) -> Float[Array, "in out"]:
        require(p.frozen is None, f"XLoRA was bound with {_VALUE} for each token: there is no one weight to form.")
        return super().weight_in(w, p, values)

    def forward(self, dot: Dot, x: Array, w: Array, p: Params, ctx: Context) -> tuple[Array, Any]:
        scalings = self._of_tokens(p, ctx.values or {})
        if scalings is None:
            return super().forward(dot, x, w, p, ctx)
        f, gains = self.joined(p, dict.fromkeys(self.ranks, 1.0)), self._gains(scalings, dot, x)
        y = dot(x, w)
        h = dot.inner(x if dot.kind == "lookup" else dropout(x, self.dropout, ctx.key), f.a)
        return y + dot.outer(h * (f.scale * gains).astype(h.dtype), f.b).astype(y.dtype), None

    def forward_transposed(self, dot: Dot, x: Array, wt: Float[Array, "out in"], p: Params, ctx: Context) -> Array:
        scalings = self._of_tokens(p, ctx.values or {})
        if scalings is None:
            return super().forward_transposed(dot, x, wt, p, ctx)
        f, gains = self.joined(p, dict.fromkeys(self.ranks, 1.0)).swap(), self._gains(scalings, dot, x)
        h = dot.inner(x, f.a)
        return dot(x, wt) + dot.outer(h * (f.scale * gains).astype(h.dtype), f.b)


def _ndim(given: Any) -> int:
    return 1 if isinstance(given, (tuple, list)) else jnp.ndim(given)


# Several adapters as one.


def combine(*each: Adapted) -> Adapted:
    """One ``Adapted`` with the adapters of several, all of plain LoRA and over the same base, in the order given.

    A leaf that some of them leave alone has rank 0 for those. Alphas that differ from layer to layer go into the pairs,
    and of several dropout rates the largest is kept.
    """
    require(len(each) > 0, "combine(*adapted): at least one is wanted.")
    leaves = [dict(paths.flatten(adapted.base)[0]) for adapted in each]
    for path, leaf in leaves[0].items():
        require(
            all(other.get(path) is leaf for other in leaves),
            f"combine wants adapters over one base, and {path!r} is not the same array in all of them. Load each onto "
            "the same parameters.",
        )
    trainable, sites = {}, {}
    for path in leaves[0]:
        here = {e: adapted.sites[path] for e, adapted in enumerate(each) if path in adapted.sites}
        if not here:
            continue
        methods = {e: site.method for e, site in here.items()}
        first = next(iter(here.values()))
        other = next((method for method in methods.values() if type(method) is not LoRA), None)
        require(other is None, f"{path!r} has {other}: X-LoRA mixes plain LoRA.")
        require(
            all((s.axes, s.method.lookup_only) == (first.axes, first.method.lookup_only) for s in here.values()),
            f"{path!r} is adapted with different axes, or by some for its lookups only.",
        )
        pairs = {e: _plain(each[e].trainable[path], each[e].frozen.get(path)) for e in here}
        method = XLoRA(
            tuple(methods[e].rank if e in here else 0 for e in range(len(each))),
            tuple(pairs[e].scale if e in here else 1.0 for e in range(len(each))),
            dropout=max(method.dropout for method in methods.values()),
            lookup_only=first.method.lookup_only,
        )
        trainable[path] = {str(e): pair for e, pair in pairs.items()}
        sites[path] = Site(method, first.axes, first.shape)
    return each[0].replace(trainable=trainable, frozen={}, _sites=tuple(sites.items()))


def split(adapted: Adapted) -> list[Adapted]:
    """The adapters of ``combine``, each by itself: plain LoRA over the same base."""
    other = next((path for path, site in adapted.sites.items() if not isinstance(site.method, XLoRA)), None)
    require(other is None, f"{other!r} is not adapted by XLoRA, and is no part of the adapters that are mixed.")
    numbers = {len(site.method.rank) for site in adapted.sites.values()}
    require(len(numbers) == 1, f"The leaves mix different numbers of adapters: {sorted(numbers)}.")
    each = []
    for e in range(*numbers):
        trainable, sites = {}, {}
        for path, site in adapted.sites.items():
            f = adapted.trainable[path].get(str(e))
            if f is not None:
                method = LoRA(
                    f.rank,
                    alpha=f.scale * f.rank,
                    dropout=site.method.dropout,
                    lookup_only=site.method.lookup_only,
                )
                trainable[path] = Factors(f.a, f.b, method.scale)
                sites[path] = dataclasses.replace(site, method=method)
        require(len(sites) > 0, f"Adapter {e} adapts nothing.")
        each.append(adapted.replace(trainable=trainable, frozen={}, _sites=tuple(sites.items())))
    return each


def _plain(f: Factors, frozen: Any) -> Factors:
    if frozen is None:
        return f
    return Factors(f.a, f.b * frozen["scale"][..., None, None].astype(f.b.dtype), f.scale)


def layers(adapted: Adapted) -> int:
    """L: the matrices that are mixed, every index of a stack counted."""
    return sum(site.stack for site in adapted.sites.values() if isinstance(site.method, XLoRA))


def spread(
    adapted: Adapted, scalings: Float[Array, "batch seq layers adapters"]
) -> dict[str, Float[Array, "*stack batch seq adapters"]]:
    """The scalings of all matrices, leaf by leaf: the matrices are those of ``adapted.sites`` in their order, and the
    indices of a leaf's stack after each other."""
    n = layers(adapted)
    require(
        jnp.ndim(scalings) > 2 and scalings.shape[-2] == n,
        f"spread(adapted, scalings): [batch, seq, {n}, adapters] is wanted for {n} adapted matrices; got "
        f"{jnp.shape(scalings)}.",
    )
    out, start = {}, 0
    for path, site in adapted.sites.items():
        if isinstance(site.method, XLoRA):
            part = jnp.moveaxis(scalings[..., start : start + site.stack, :], -2, 0)
            out[path] = part.reshape(*site.canonical_shape[0], *part.shape[1:])
            start += site.stack
    return out


# Where the scalings come from.


@dataclasses.dataclass(frozen=True)
class Classifier:
    """From hidden states to scalings. Its parameters are a tuple of ``{"kernel": [in, out], "bias": [out]}``, one for
    each linear layer; the last one's outputs are [layers, adapters] in order.

    Attributes:
      features: H.
      adapters: E.
      layers: L, ``layers(adapted)``; None: the same scalings for all matrices.
      depth: linear layers.
      width: outputs of all but the last.
      dropout: rate between them, active when a key is given.
      temperature: above 1 evens the scalings out, below 1 sharpens them.
      softmax: over the adapters; without it the last layer's outputs are the scalings.
      top_k: keep the largest k of a token and a matrix and set the others to zero; None keeps all. What is kept does
        not sum to 1.
      softmax_top_k: a softmax of the values kept, which then sum to 1 again, but are far more even.
      weight: multiplies all scalings in the end.
    """

    features: int
    adapters: int
    layers: int | None = None
    _: dataclasses.KW_ONLY
    depth: int = 1
    width: int = 2048
    dropout: float = 0.2
    temperature: float = 1.0
    softmax: bool = True
    top_k: int | None = None
    softmax_top_k: bool = False
    weight: float = 1.0

    def __post_init__(self):
        require(self.depth > 0, f"Classifier(depth={self.depth}): at least one linear layer is wanted.")
        require(self.temperature > 0, f"Classifier(temperature={self.temperature}): a positive number is wanted.")
        require(
            self.top_k is None or 0 < self.top_k <= self.adapters,
            f"Classifier(top_k={self.top_k}): from 1 to {self.adapters}, the number of adapters, is wanted.",
        )

    @property
    def sizes(self) -> tuple[int, ...]:
        """Of what enters the linear layers, and of what leaves the last."""
        return self.features, *(self.width,) * (self.depth - 1), (self.layers or 1) * self.adapters

    def init(self, key: PRNGKeyArray, dtype: Any = jnp.float32) -> tuple[dict[str, Array], ...]:
        """Kernels and biases uniform in +-1/sqrt(in), PyTorch's start."""

        def layer(key: PRNGKeyArray, n_in: int, n_out: int) -> dict[str, Array]:
            draw = lambda key, *shape: jax.random.uniform(key, shape, dtype, -(n_in**-0.5), n_in**-0.5)
            of_kernel, of_bias = jax.random.split(key)
            return {"kernel": draw(of_kernel, n_in, n_out), "bias": draw(of_bias, n_out)}

        return tuple(map(layer, jax.random.split(key, self.depth), self.sizes, self.sizes[1:]))

    def predict(
        self, params: tuple[dict[str, Array], ...], hidden: Float[Array, "batch seq features"], key: Any = None
    ) -> Float[Array, "batch seq layers adapters"]:
        """The scalings before ``select``, in at least float32; [batch, seq, adapters] if they are the same for all
        matrices."""
        x = jax.lax.stop_gradient(hidden)
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        for i, layer in enumerate(params):
            if i > 0:
                own = None if key is None else jax.random.fold_in(key, i)
                x = dropout(jax.nn.relu(x), self.dropout, own)
            x = x @ layer["kernel"] + layer["bias"]
        x = x.reshape(*x.shape[:-1], *(() if self.layers is None else (self.layers,)), self.adapters)
        return jax.nn.softmax(x / self.temperature, axis=-1) if self.softmax else x

    def select(self, scalings: Float[Array, "... adapters"]) -> Float[Array, "... adapters"]:
        """What acts: ``top_k`` of them, and ``weight``. Equal ones are kept from the first on."""
        if self.top_k is not None:
            _, kept = jax.lax.top_k(scalings, self.top_k)
            scalings = scalings * jax.nn.one_hot(kept, self.adapters, dtype=scalings.dtype).sum(-2)
        if self.softmax_top_k:
            acts = scalings != 0
            scalings = jax.nn.softmax(scalings, axis=-1, where=acts) * acts
        return self.weight * scalings

    def __call__(
        self, params: tuple[dict[str, Array], ...], hidden: Float[Array, "batch seq features"], key: Any = None
    ) -> Float[Array, "batch seq layers adapters"]:
        return self.select(self.predict(params, hidden, key))
