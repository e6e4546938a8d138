"""The model of the benchmarks: a Llama in plain JAX whose linear layer is an argument.

It is as thin as a model can be, so that what the benchmarks compare is how its linear layers are adapted. Layers are a
list, or one tree of stacked arrays that is scanned.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PyTree

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclasses.dataclass(frozen=True)
class Config:
    """Shapes. The default has 33.7 million parameters."""

    dim: int = 512
    ffn: int = 1376
    layers: int = 8
    heads: int = 8
    vocab: int = 8192

    def shapes(self) -> dict[str, tuple[int, int]]:
        """[in, out] of the linear weights of a layer."""
        d, f = self.dim, self.ffn
        return {name: (d, d) for name in LINEAR[:4]} | {"gate_proj": (d, f), "up_proj": (d, f), "down_proj": (f, d)}


def init(config: Config, key: jax.Array) -> PyTree:
    """Parameters with the layers in a list."""
    normal = lambda key, shape: 0.02 * jax.random.normal(key, shape)
    d, vocab = config.dim, config.vocab

    def layer(key):
        keys = jax.random.split(key, len(LINEAR))
        kernels = {name: normal(k, s) for k, (name, s) in zip(keys, config.shapes().items(), strict=True)}
        return kernels | {"attention_norm": jnp.ones(d), "mlp_norm": jnp.ones(d)}

    embed, head, *keys = jax.random.split(key, config.layers + 2)
    return {
        "embed": normal(embed, (vocab, d)),
        "layers": [layer(k) for k in keys],
        "norm": jnp.ones(d),
        "lm_head": normal(head, (d, vocab)),
    }


def stack(params: PyTree) -> PyTree:
    """The same parameters with the layers as one tree of arrays [L, ...], for a scan."""
    return params | {"layers": jax.tree.map(lambda *leaves: jnp.stack(leaves), *params["layers"])}


def forward(
    params: PyTree,
    ids: Int[Array, "b t"],
    *,
    heads: int,
    linear: Callable[[Array, Any], Array] = jnp.matmul,
    offset: Float[Array, "d"] | float = 0.0,
    remat: bool = False,
) -> Float[Array, "b t vocab"]:
    """Logits. `linear(x, w)` runs every linear layer of the blocks; `offset` is added to the embeddings."""

    one = functools.partial(block, heads=heads, linear=linear)
    if remat:
        one = jax.checkpoint(one, prevent_cse=isinstance(params["layers"], list))
    x = params["embed"][ids] + offset
    if isinstance(params["layers"], list):
        for layer in params["layers"]:
            x = one(x, layer)
    else:
        x, _ = jax.lax.scan(lambda x, layer: (one(x, layer), None), x, params["layers"])
    return logits(params, x)


def block(x, layer, *, heads: int, linear: Callable[[Array, Any], Array] = jnp.matmul):
    """One layer."""
    h = _norm(x, layer["attention_norm"])
    q, k, v = (_heads(linear(h, layer[name]), heads) for name in LINEAR[:3])
    y = jax.nn.dot_product_attention(_rotate(q), _rotate(k), v, is_causal=True)
    x = x + linear(y.reshape(x.shape), layer["o_proj"])
    h = _norm(x, layer["mlp_norm"])
    h = jax.nn.silu(linear(h, layer["gate_proj"])) * linear(h, layer["up_proj"])
    return x + linear(h, layer["down_proj"])


def logits(params, x):
    return _norm(x, params["norm"]) @ params["lm_head"]


def cross_entropy(logits: Float[Array, "b t vocab"], ids: Int[Array, "b t"]) -> Float[Array, ""]:
    """Mean over the next tokens."""
    return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], ids[:, 1:]).mean()


def _norm(x, scale):
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + 1e-5) * scale


def _heads(x, heads):
    return x.reshape(*x.shape[:2], heads, -1)


def _rotate(x):
    t, half = x.shape[1], x.shape[3] // 2
    angles = jnp.arange(t)[:, None] * 10000.0 ** (-jnp.arange(half) / half)
    cos, sin = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]
    a, b = x[..., :half], x[..., half:]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
