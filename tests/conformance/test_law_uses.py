"""For every method and every way of using a weight: at the start the lifted function is the plain one; later it is the
plain one on the merged weights, in value and in all gradients; and no weight is formed on the way."""

import contextlib
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from registry import EACH_FORM, ROWS, Row, assert_close, effective, moved, normal
from uses import USES, Use

import jlora
from jlora.methods import Site

# Every method is tried in a matrix product and a scan, and in half of the other kinds of products, the methods taking
# turns. All kinds, and the uses that try what the interpreter does, whatever the method, run for one method of each
# form, and for all in the slow suite (`pytest -m slow tests/conformance`).
ALWAYS = ("linear", "scan")
KINDS = ("heads_merged", "conv", "experts", "conv_grouped", "lookup_and_tied_head", "ragged")
# The uses that multiply by ``x @ w``: the laws of a method with a reference compare with it there.
PLAIN_PRODUCTS = frozenset("linear loop scan some_layers remat jit cond custom_vjp".split())


def pairs() -> Iterator:
    for number, row in enumerate(ROWS):
        kinds = (*ALWAYS, *KINDS[number % 2 :: 2])
        for name, use in USES.items():
            if row.stacked and len(use.axes.stack) != 1:
                continue
            if not row.method.whole_leaf and row.method.check(Site(row.method, use.axes, use.shape)):
                continue  # sizes that the method refuses, with a reason
            if row.reference and name not in PLAIN_PRODUCTS:
                continue
            if row.variant or row.method.whole_leaf:  # what differs is not what lift sees: one use of each kind
                if name not in ("linear", "lookup_and_tied_head", "conv"):
                    continue
            often = name == "linear" if row.variant else name in kinds
            slow = [] if row.name in EACH_FORM or often else [pytest.mark.slow]
            yield pytest.param(row, use, id=f"{row.name}-{name}", marks=slow)


@pytest.mark.parametrize(("row", "use"), list(pairs()))
def test_lifted_is_merged(row: Row, use: Use) -> None:
    params = {"w": normal(1, use.shape) / 2}
    ids = jnp.asarray(np.random.default_rng(2).integers(0, use.shape[0], (2, 3)))
    args = [ids if shape is None else normal(3 + i, shape) for i, shape in enumerate(use.args)]
    adapted = jlora.adapt(params, row.method, "w", axes={"w": use.axes}, key=jax.random.key(0))

    sliced_otherwise = use.sliced is not None and not row.method.whole_leaf and use.sliced not in row.method.sliceable
    plain = lambda params, *args: use.fn(params["w"], *args)
    lifted = jlora.lift(plain, on_materialize="warn" if sliced_otherwise else "error")
    wrt = (0,) if None in use.args else (0, 1)

    @jax.jit
    def run(adapted, trainable, args):
        def with_gradients(fn):
            def loss(trainable, *args):
                y = fn(trainable, *args)
                return jnp.sum(jnp.sin(y)), y

            (_, y), grads = jax.value_and_grad(loss, wrt, has_aux=True)(trainable, *args)
            return y, grads

        return (
            (plain(adapted.base, *args), lifted(adapted.bind(), *args)),
            with_gradients(lambda trainable, *args: lifted(adapted.bind(trainable), *args)),
            with_gradients(lambda trainable, *args: plain(effective(adapted.replace(trainable=trainable)), *args)),
        )

    expected = pytest.warns(jlora.MaterializeWarning) if sliced_otherwise else contextlib.nullcontext()
    with expected:
        (base, start), got, wanted = run(adapted, moved(adapted.trainable), args)
    if row.starts_as_base:
        assert_close(start, base)
    assert_close(got, wanted)
    assert np.abs(np.asarray(wanted[0]) - np.asarray(base)).max() > 1e-3, "the adapter changes nothing"
