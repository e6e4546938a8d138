"""Masks of SHiRA: the places that numpy finds in weights and gradients, and only those are trained."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from jlora import init

pytestmark = pytest.mark.usefixtures("x64")

RNG = np.random.default_rng(0)
PARAMS = {"layers": RNG.normal(size=(3, 10, 10)) / 3, "last": RNG.normal(size=(10, 14))}
BATCHES = [(RNG.normal(size=(6, 10)), RNG.normal(size=(6, 14))) for _ in range(3)]
AXES = {"layers": jlora.Axes((1,), (2,), (0,)), "last": jlora.Axes((0,), (1,))}
RANK = 2


def loss(p, batch):
    h, _ = jax.lax.scan(lambda h, w: (h + jnp.tanh(h @ w), None), batch[0], p["layers"])
    return jnp.mean((h @ p["last"] - batch[1]) ** 2)


GRADS = {"MagnitudeMask": lambda w, g: w, "GradientMask": lambda w, g: g, "SNIPMask": lambda w, g: w * g}


def adapted_with(start, params=PARAMS):
    method = jlora.SHiRA(RANK, start=start)
    stats = jlora.calibrate(loss, params, BATCHES, method, "**") if method.needs else None
    return jlora.adapt(params, method, "**", axes=AXES, key=jax.random.key(0), stats=stats)


@pytest.mark.parametrize("start", [init.MagnitudeMask(), init.GradientMask(), init.SNIPMask()], ids=str)
def test_the_largest_entries_of_each_matrix(start):
    grads = [jax.grad(loss)(PARAMS, batch) for batch in BATCHES]
    adapted = adapted_with(start)
    for path, w in PARAMS.items():
        mean = np.mean([g[path] for g in grads], axis=0)
        scores = np.abs(GRADS[type(start).__name__](w, mean)).reshape(-1, *w.shape[-2:])
        at = np.asarray(adapted.frozen[path]["places"]).reshape(-1, 2, RANK * sum(w.shape[-2:]))
        for score, (rows, columns) in zip(scores, at, strict=True):
            mask = np.zeros(score.shape, bool)
            mask[rows, columns] = True
            assert mask.sum() == RANK * sum(score.shape) and score[mask].min() > score[~mask].max()
            assert np.all(np.diff(rows * score.shape[1] + columns) > 0)  # in order, as the scatter promises
        np.testing.assert_array_equal(jlora.merge(adapted)[path], w)  # the output starts as the base's
    moved = adapted.replace(trainable=jax.tree.map(lambda v: v + 1.0, adapted.trainable))
    changed = jax.tree.map(lambda got, w: int((got != w).sum()), jlora.merge(moved), PARAMS)
    assert changed == {"layers": 3 * RANK * 20, "last": RANK * 24}


def test_the_gradient_falls_fastest_along_its_mask():
    """Of all choices of K entries, the first step of gradient descent lowers the loss most on those of GradientMask."""
    falls, total = {}, jlora.lift(lambda p: sum(loss(p, batch) for batch in BATCHES) / len(BATCHES))
    for start in (None, init.MagnitudeMask(), init.SNIPMask(), init.GradientMask()):
        adapted = adapted_with(start)
        grads = jax.grad(lambda t, a=adapted: total(a.bind(t)))(adapted.trainable)
        falls[str(start)] = sum(float(jnp.sum(g**2)) for g in jax.tree.leaves(grads))
    assert max(falls, key=falls.get) == str(init.GradientMask())


def test_quantized_and_abstract():
    params = jax.tree.map(lambda w: jnp.asarray(w, jnp.float32), PARAMS)
    stored = jlora.quant.quantize(params, jlora.quant.Int8, "**", fn=loss, args=(BATCHES[0],))
    adapted = adapted_with(init.MagnitudeMask(), stored)
    for w, (rows, columns) in zip(stored["layers"].dequantize(), adapted.frozen["layers"]["places"], strict=True):
        assert np.abs(w)[rows, columns].min() >= np.sort(np.abs(w), axis=None)[-RANK * 20]
    planned = jlora.adapt(
        jax.eval_shape(lambda: PARAMS), jlora.SHiRA(RANK, start=init.MagnitudeMask()), axes=AXES, targets="**",
        key=jax.random.key(0),
    )  # fmt: skip
    shapes = lambda of: jax.tree.map(jnp.shape, (of.trainable, of.frozen))
    assert shapes(planned) == shapes(adapted)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: jlora.SHiRA(2, start="snip"), "one of jlora.init is wanted"),
        (lambda: jlora.SHiRA(2, start=init.PiSSA()), "jlora.init.MagnitudeMask.., GradientMask"),
        (
            lambda: jlora.adapt(PARAMS, jlora.LoRA(2, start=init.SNIPMask()), "last", axes=AXES),
            "give it to jlora.SHiRA",
        ),
        (lambda: jlora.adapt(PARAMS, jlora.SHiRA(2, start=init.SNIPMask()), "last", axes=AXES), "Collect it first"),
        (lambda: adapted_with(init.GradientMask(), PARAMS | {"last": 0 * PARAMS["last"]}), "gradient of 3 of its 3"),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()
