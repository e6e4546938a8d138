"""The ways in which a model's code uses a weight."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from jlora import Axes


@dataclasses.dataclass(frozen=True)
class Use:
    """One way to use a weight.

    Attributes:
      fn: ``fn(w, *args)``.
      shape, axes: of the weight.
      args: shapes of the other arguments; None stands for ids of a vocabulary of the weight's first axis.
      sliced: the group ("in" or "out") that the code cuts into parts. Not every method is sliced exactly.
    """

    fn: Callable
    shape: tuple[int, ...]
    axes: Axes
    args: tuple[tuple[int, ...] | None, ...]
    sliced: str | None = None


def conv(dimension_numbers, strides=(1, 1), padding="SAME", **options) -> Callable:
    return lambda w, x: lax.conv_general_dilated(x, w, strides, padding, dimension_numbers=dimension_numbers, **options)


def loop(w, x):
    for i in range(w.shape[0]):
        x = x + jnp.tanh(x @ w[i])
    return x


def scan(w, x):
    return lax.scan(lambda x, w: (x + jnp.tanh(x @ w), None), x, w)[0]


def scan_of_remat(w, x):
    return lax.scan(jax.checkpoint(lambda x, w: (x + jnp.tanh(x @ w.T), None)), x, w, reverse=True)[0]


def fori(w, x):
    return lax.fori_loop(0, w.shape[0], lambda i, x: x + jnp.tanh(x @ lax.dynamic_index_in_dim(w, i, 0, False)), x)


def layers_of_experts(w, x):
    return lax.scan(lambda x, w: (x + jnp.tanh(jnp.einsum("bi,eio->beo", x, w)).sum(1), None), x, w)[0]


def tied(w, ids):
    return jnp.tanh(w[ids]) @ w.T


def fused_qkv(w, x):
    q, k, v = jnp.split(x @ w, 3, axis=-1)
    return q * k + v


def split_weight(w, x):
    gate, up = jnp.split(w, 2, axis=1)
    return jnp.tanh(x @ gate) * (x @ up)


def sliced_out(w, x):
    return jnp.concatenate([x @ w[:, 4:], x @ w[:, 1:4:2]], axis=-1)


def sliced_in(w, x):
    return x[..., :2] @ w[:2] + jnp.tanh(x[..., 2:] @ w[2:])


def branches(w, x):
    return lax.cond(x[0, 0] > 0, lambda w, x: x @ w, lambda w, x: jnp.tanh(x @ w), w, x)


def ragged(w, x):
    return lax.ragged_dot(x, w, jnp.array([2, 0, 3]))


def custom_derivative(w, x):
    @jax.custom_vjp
    def clip(x):
        return x

    clip.defvjp(lambda x: (x, None), lambda _, g: (jnp.clip(g, -0.1, 0.1),))
    return clip(x @ w)


MATRIX, LAYERS = Axes((0,), (1,)), Axes((1,), (2,), stack=(0,))
WINDOW = Axes((0, 1, 2), (3,), kind="conv")
HWIO = ("NHWC", "HWIO", "NHWC")

USES = {
    "linear": Use(lambda w, x: x @ w, (6, 4), MATRIX, ((2, 3, 6),)),
    "linear_of_a_vector": Use(lambda w, x: x @ w, (6, 4), MATRIX, ((6,),)),
    "weight_first": Use(lambda w, x: w.T @ x, (6, 4), MATRIX, ((6, 3),)),
    "transposed": Use(lambda w, x: x @ w.T, (6, 4), MATRIX, ((3, 4),)),
    "stored_transposed": Use(lambda w, x: x @ w.T, (4, 6), Axes((1,), (0,)), ((3, 6),)),
    "heads": Use(
        lambda w, x: lax.dot_general(x, w, (((1,), (0,)), ((), ()))), (6, 2, 4), Axes((0,), (1, 2)), ((3, 6),)
    ),
    "heads_merged": Use(
        lambda w, x: lax.dot_general(x, w, (((1, 2), (0, 1)), ((), ()))), (2, 3, 5), Axes((0, 1), (2,)), ((4, 2, 3),)
    ),
    "einsum_weight_first": Use(
        lambda w, x: jnp.einsum("dhk,btd->bthk", w, x), (6, 2, 4), Axes((0,), (1, 2)), ((2, 3, 6),)
    ),
    "einsum_any_order": Use(lambda w, x: jnp.einsum("kdh,bhk->bd", w, x), (3, 5, 2), Axes((2, 0), (1,)), ((4, 2, 3),)),
    "reshaped": Use(lambda w, x: x @ w.reshape(6, 8), (6, 2, 4), Axes((0,), (1, 2)), ((3, 6),)),
    "conv": Use(conv(HWIO, padding=((1, 1), (0, 2))), (3, 2, 4, 5), WINDOW, ((2, 5, 6, 4),)),
    "conv_strided_dilated": Use(
        conv(("NCHW", "OIHW", "NCHW"), strides=(2, 1), padding="VALID", rhs_dilation=(1, 2)),
        (5, 4, 3, 2),
        Axes((1, 2, 3), (0,), kind="conv"),
        ((2, 4, 7, 6),),
    ),
    "conv_grouped": Use(conv(HWIO, feature_group_count=2), (3, 2, 2, 6), WINDOW, ((1, 4, 4, 4),)),
    "conv_of_one_axis": Use(
        conv(("NWC", "WIO", "NWC"), (1,)), (3, 4, 5), Axes((0, 1), (2,), kind="conv"), ((2, 6, 4),)
    ),
    "lookup": Use(lambda w, ids: w[ids], (7, 4), Axes((0,), (1,), kind="embedding"), (None,)),
    "lookup_and_tied_head": Use(tied, (7, 4), Axes((0,), (1,), kind="embedding"), (None,)),
    "experts": Use(lambda w, x: jnp.einsum("ebi,eio->ebo", x, w), (3, 6, 4), LAYERS, ((3, 5, 6),)),
    "every_expert": Use(lambda w, x: jnp.einsum("bi,eio->beo", x, w), (3, 6, 4), LAYERS, ((5, 6),)),
    "every_expert_transposed": Use(lambda w, x: jnp.einsum("eio,bo->ieb", w, x), (3, 6, 4), LAYERS, ((5, 4),)),
    "ragged": Use(ragged, (3, 6, 4), LAYERS, ((5, 6),)),
    "loop": Use(loop, (3, 5, 5), LAYERS, ((4, 5),)),
    "scan": Use(scan, (3, 5, 5), LAYERS, ((4, 5),)),
    "scan_of_remat": Use(scan_of_remat, (3, 5, 5), LAYERS, ((4, 5),)),
    "scan_in_the_middle": Use(
        lambda w, x: scan(w.transpose(1, 0, 2), x), (5, 3, 5), Axes((0,), (2,), stack=(1,)), ((4, 5),)
    ),
    "fori_loop": Use(fori, (3, 5, 5), LAYERS, ((4, 5),)),
    "some_layers": Use(lambda w, x: scan(w[1:], x), (3, 5, 5), LAYERS, ((4, 5),)),
    "layers_of_experts": Use(layers_of_experts, (3, 2, 5, 5), Axes((2,), (3,), stack=(0, 1)), ((4, 5),)),
    "remat": Use(jax.checkpoint(lambda w, x: jnp.tanh(x @ w)), (6, 4), MATRIX, ((3, 6),)),
    "jit": Use(jax.jit(lambda w, x: jnp.tanh(x @ w)), (6, 4), MATRIX, ((3, 6),)),
    "cond": Use(branches, (6, 4), MATRIX, ((3, 6),)),
    "custom_vjp": Use(custom_derivative, (6, 4), MATRIX, ((3, 6),)),
    "fused_qkv": Use(fused_qkv, (4, 6), MATRIX, ((3, 4),)),
    "split_weight": Use(split_weight, (4, 6), MATRIX, ((3, 4),), sliced="out"),
    "sliced_out": Use(sliced_out, (4, 6), MATRIX, ((3, 4),), sliced="out"),
    "one_head": Use(lambda w, x: x @ w[:, 1], (6, 2, 4), Axes((0,), (1, 2)), ((3, 6),), sliced="out"),
    "parts_of_heads": Use(
        lambda w, x: jnp.einsum("dhk,bd->bhk", w[..., 1:3], x), (6, 2, 4), Axes((0,), (1, 2)), ((3, 6),), sliced="out"
    ),
    "heads_merged_one_by_one": Use(
        lambda w, x: sum(jnp.tanh(x[:, i] @ w[i]) for i in range(2)),
        (2, 3, 5),
        Axes((0, 1), (2,)),
        ((4, 2, 3),),
        sliced="in",
    ),
    "sliced_in": Use(sliced_in, (5, 4), MATRIX, ((3, 5),), sliced="in"),
}
