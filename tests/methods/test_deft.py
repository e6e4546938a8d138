"""DEFT: what is taken, what is given, and that neither needs the weight."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora

pytestmark = pytest.mark.usefixtures("x64")


def random(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def adapted(method: jlora.DEFT) -> jlora.Adapted:
    made = jlora.adapt({"kernel": random(0, 9, 6)}, method, "kernel", key=jax.random.key(0))
    moved = {name: random(i, *leaf.shape) for i, (name, leaf) in enumerate(sorted(made.trainable["kernel"].items()))}
    return made.replace(trainable={"kernel": moved})


def test_outputs_lose_a_subspace_and_get_another_part_there() -> None:
    made = adapted(jlora.DEFT(2, alpha=3.0, directions="qr"))
    w, p = np.asarray(made.base["kernel"]), jax.tree.map(np.asarray, made.trainable["kernel"])
    q = np.linalg.qr(p["b"].T)[0]
    merged = np.asarray(jlora.merge(made)["kernel"])
    np.testing.assert_allclose(merged @ q, 1.5 * p["a"], atol=1e-12)
    np.testing.assert_allclose(merged - merged @ q @ q.T, w - w @ q @ q.T, atol=1e-12)


def test_para_only_takes() -> None:
    made = adapted(jlora.DEFT(2, directions="qr", inject=False))
    assert set(made.trainable["kernel"]) == {"b"}
    assert np.linalg.matrix_rank(jlora.merge(made)["kernel"]) == 6 - 2


def test_no_more_directions_than_outputs() -> None:
    made = adapted(jlora.DEFT(8))
    assert made.trainable["kernel"]["b"].shape == (6, 6)
    assert made.sites["kernel"].method.count(made.sites["kernel"]) == 6 * (9 + 6)


def test_the_weight_meets_the_inputs_once() -> None:
    made = adapted(jlora.DEFT(2))
    apply = jlora.lift(lambda p, x: x @ p["kernel"], on_materialize="error")
    text = str(jax.make_jaxpr(lambda x: apply(made.bind(), x))(random(5, 4, 9)))
    shapes = re.findall(r"f64\[(\d+),(\d+)\] = dot_general", text)
    assert sorted(shapes) == [("4", "2"), ("4", "2"), ("4", "6"), ("4", "6")]
