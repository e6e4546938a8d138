"""For every method: sizes that it cannot serve are refused before anything is made, in words that name the leaf, its
shape and a way out; what is not refused runs."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import pytest
from registry import PRODUCTS, Row, over

import jlora
from jlora.methods import Method, Site

Axes = jlora.Axes
MATRIX = Axes((0,), (1,))
PATH = "block/w"


def matrix(w, x):
    return x @ w


def table(w, x):
    return w[jnp.arange(2)] @ w.T


def convolution(w, x):
    return jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


# Shape, axes and use. Ones and primes: nothing divides them, and little is below them.
LEAVES = {
    "1x1": ((1, 1), MATRIX, matrix),
    "1x7": ((1, 7), MATRIX, matrix),
    "7x1": ((7, 1), MATRIX, matrix),
    "7x11": ((7, 11), MATRIX, matrix),
    "stack": ((2, 3, 5), Axes((1,), (2,), (0,)), lambda w, x: jnp.einsum("ebi,eio->ebo", x, w)),
    "two_stacks": ((2, 2, 3, 5), Axes((2,), (3,), (0, 1)), lambda w, x: jnp.einsum("cdbi,cdio->cdbo", x, w)),
    "embedding": ((7, 5), dataclasses.replace(MATRIX, kind="embedding"), table),
    "convolution": ((3, 3, 2, 5), Axes((0, 1, 2), (3,), kind="conv"), convolution),
}
FEW = ("1x1", "7x11", "embedding", "convolution")
# What a message tells one to do: a number that is right, another method, or which leaf to leave alone.
WAY_OUT = re.compile(
    r"choose|adapts it|at most \d|the last is \d|nearest[a-z ]*[:]? \d|\d+ does|does, and|try \d|which allow \d"
    r"|use [A-Z]\w+|leave .* out|are wanted here"
)
SIZES = ("rank", "blocks", "block_size", "levels", "terms", "subspaces", "groups", "splits", "n", "size", "top", "kept")


def outcome(method: Method, name: str) -> str | None:
    """The error, or None where the method takes the leaf and a model can be traced with it."""
    shape, axes, use = LEAVES[name]
    given = (1, 4, 4, shape[2]) if axes.kind == "conv" else (*shape[: len(axes.stack)], 3, shape[axes.inputs[0]])
    params = {"block": {"w": jax.ShapeDtypeStruct(shape, jnp.float32)}}
    x = jax.ShapeDtypeStruct(given, jnp.float32)
    try:
        adapted = jlora.adapt(params, method, PATH, axes={PATH: axes}, key=jax.random.key(0))
        lifted = jlora.lift(lambda p, x: use(p["block"]["w"], x), on_materialize="silent")
        jax.eval_shape(lambda adapted, x: lifted(adapted.bind(), x), adapted, x)
    except ValueError as error:  # anything else is a defect
        return str(error)


def assert_helps(message: str | None, name: str) -> None:
    if message is not None:
        assert repr(PATH) in message and str(LEAVES[name][0]) in message, message
        assert WAY_OUT.search(message), message
        assert len(message) < 1000


is_own = lambda row: not row.variant


@over(PRODUCTS, is_own)
def test_sizes_that_do_not_fit(row: Row) -> None:
    for name in FEW:
        assert_helps(outcome(row.method, name), name)


@pytest.mark.slow
@over(PRODUCTS)
def test_more_sizes_that_do_not_fit(row: Row) -> None:
    for name in LEAVES.keys() - set(FEW):
        assert_helps(outcome(row.method, name), name)


def larger(method: Method, field: str, value: int) -> Method | None:
    """The method with another size; None where that makes no sense, which its own error says."""
    try:
        return dataclasses.replace(method, **{field: value})
    except ValueError as error:
        assert field in str(error) and re.search(r"for instance|nearest|at most|wanted|largest|give it to", str(error))


@over(PRODUCTS, is_own)
def test_options_that_are_too_large(row: Row) -> None:
    for field in dataclasses.fields(row.method):
        if field.name in SIZES and type(getattr(row.method, field.name)) is int:
            method = larger(row.method, field.name, 1000)
            if method is not None:
                assert_helps(outcome(method, "7x11"), "7x11")


@over(tuple(row for row in PRODUCTS if type(getattr(row.method, "rank", None)) is int and not row.stacked))
def test_the_largest_rank_that_is_named_is_the_largest(row: Row) -> None:
    for name in ("7x1", "7x11", "stack"):
        shape, axes, _ = LEAVES[name]
        problem = lambda method, axes=axes, shape=shape: method.check(Site(method, axes, shape))
        method = larger(row.method, "rank", 1000)
        found = re.search(r"choose a rank of at most (\d+)", (method and problem(method)) or "")
        if found is None:
            continue
        most = int(found[1])
        right, wrong = (larger(row.method, "rank", rank) for rank in (most, most + 1))
        assert right is None or f"rank {most} " not in (problem(right) or "")
        assert wrong is None or problem(wrong)


@over(PRODUCTS, is_own)
def test_leaves_that_are_no_matrices(row: Row) -> None:
    floats = r"block/w \w+\[.*Use Full\(\)"
    for leaf, why in (
        (jnp.ones(4), floats),
        (jnp.ones((), jnp.float32), floats),
        (jnp.ones((4, 4), jnp.int32), r"not of floats: block/w int32\["),
    ):
        with pytest.raises(ValueError, match=why) as error:
            jlora.adapt({"block": {"w": leaf}}, row.method, PATH, key=jax.random.key(0))
        assert str(list(leaf.shape)) in str(error.value)
