"""The table of method configurations that every law is run over, and the small model most laws use.

A new method adds a row here, and nothing else.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from jlora.methods import Method


@dataclasses.dataclass(frozen=True)
class Row:
    """One configuration.

    Attributes:
      name: what the tests are called.
      method: the configuration.
      count: its trainable parameters on the model below, worked out by hand.
      stacked: it wants a single stack axis (of three), and adapts only such leaves.
      padding: entries of the trainable arrays that are always zero, and not in the count.
      variant: it differs from the row above in its start or in a number only; the laws that cost most (every way of
        using a weight, meshes) are not repeated for it.
    """

    name: str
    method: Method
    count: int
    stacked: bool = False
    padding: int = 0
    variant: bool = False


# The model's matrices: first 8 x 16, three layers 16 x 16, last 16 x 8.
ROWS = (
    Row("lora", jlora.LoRA(2, alpha=4.0), 2 * 24 + 3 * 2 * 32 + 2 * 24),
    Row("rslora", jlora.LoRA(2, alpha=4.0, rslora=True), 288, variant=True),
    Row("lora_gaussian", jlora.LoRA(2, alpha=4.0, init_a="gaussian"), 288, variant=True),
    Row("lora_ranks", jlora.LoRA(2, ranks=(2, 1, 0), alphas=(4.0, 1.0, 1.0)), (2 + 1) * 32, True, (0 + 1 + 2) * 32),
    Row("dora", jlora.DoRA(2, alpha=3.0), 288 + 16 + 3 * 16 + 8),
    Row("vera", jlora.VeRA(5, d_initial=0.3), 5 * (1 + 3 + 1) + 16 + 3 * 16 + 8),
    Row("full", jlora.Full(), 8 * 16 + 3 * 16 * 16 + 16 * 8),
    Row("offset", jlora.Offset(scale=2.0), 1024),
)
FORMS = tuple(row for row in ROWS if not row.variant)
PRODUCTS = tuple(row for row in ROWS if not row.method.whole_leaf)  # the methods that lift has to carry
DROPOUT = tuple(row for row in PRODUCTS if "dropout" in {field.name for field in dataclasses.fields(row.method)})

over_rows = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
over_forms = pytest.mark.parametrize("row", FORMS, ids=lambda row: row.name)
over_products = pytest.mark.parametrize("row", PRODUCTS, ids=lambda row: row.name)
over_dropout = pytest.mark.parametrize("row", DROPOUT, ids=lambda row: row.name)


def model(params: dict, x: jax.Array, remat: bool = False) -> jax.Array:
    """Two dense layers around three scanned ones."""

    def layer(x: jax.Array, w: jax.Array) -> tuple[jax.Array, None]:
        return x + jnp.tanh(x @ w), None

    x = jnp.tanh(x @ params["first"]["kernel"] + params["first"]["bias"])
    x, _ = jax.lax.scan(jax.checkpoint(layer) if remat else layer, x, params["layers"]["kernel"])
    return x @ params["last"]["kernel"]


AXES = {"layers/kernel": jlora.Axes(inputs=(1,), outputs=(2,), stack=(0,))}


def normal(seed: int, shape: tuple[int, ...], dtype: Any = None) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def model_params(dtype: Any = None) -> dict:
    return {
        "first": {"kernel": normal(1, (8, 16), dtype) / 3, "bias": normal(2, (16,), dtype)},
        "layers": {"kernel": normal(3, (3, 16, 16), dtype) / 4},
        "last": {"kernel": normal(4, (16, 8), dtype) / 4},
    }


def inputs(dtype: Any = None) -> jax.Array:
    return normal(5, (4, 8), dtype)


def adapt_model(row: Row, params: Any = None, **options: Any) -> jlora.Adapted:
    params = model_params() if params is None else params
    targets = "layers/kernel" if row.stacked else "**/kernel"
    options = dict(key=jax.random.key(0), axes=AXES) | options
    return jlora.adapt(params, row.method, targets, **options)


def moved(tree: Any, seed: int = 10, size: float = 0.2) -> Any:
    """Parameters away from their start, by noise."""
    leaves, treedef = jax.tree.flatten(tree)
    return jax.tree.unflatten(
        treedef, [leaf + size * normal(seed + i, leaf.shape, leaf.dtype) for i, leaf in enumerate(leaves)]
    )


def assert_close(got: Any, wanted: Any, tolerance: float = 1e-10) -> None:
    """Equal trees; the tolerance is relative to each leaf's largest entry, absolute below 1."""
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    for (path, g), w in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(wanted), strict=True):
        g, w = np.asarray(g, np.float64), np.asarray(w, np.float64)
        bound = tolerance * max(1.0, np.abs(w).max(initial=0.0))
        np.testing.assert_allclose(g, w, rtol=0, atol=bound, err_msg=jax.tree_util.keystr(path))
