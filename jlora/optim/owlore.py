r"""OwLore: LISA with layers drawn by their outliers, and GaLore for those that are drawn.

OwLore: Outlier-weighed Layerwise Sampled Low-Rank Projection for Memory-Efficient LLM Fine-tuning. Li et al., 2024.
https://arxiv.org/abs/2405.18380
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree

from jlora.optim.galore import galore
from jlora.optim.lisa import LAYERS, lisa
from jlora.optim.projection import Pattern
from jlora.weight import Axes


def owlore(
    inner: optax.GradientTransformation,
    rank: int = 256,
    *,
    layers: Pattern = LAYERS,
    scores: Sequence[float] | None = None,
    active: int = 5,
    interval: int = 50,
    period: int = 100,
    scale: float = 1.0,
    side: str = "smaller",
    solver: str = "randomized",
    rest: optax.GradientTransformation | None = None,
    seed: int = 0,
    axes: Mapping[Pattern, Axes] | None = None,
    where: Pattern = "**",
    dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """``lisa(galore(inner, rank), weights=scores, rest=inner)``: projected moments, of gamma of the layers.

    A layer with many outliers is drawn often: its change matters most. When layers are drawn their bases are made anew
    from the next gradient, and their moments begin at zero.

    Args:
      inner: the optimizer, ``optax.adamw(3e-4)``, say; of what is outside the layers it is the ordinary one.
      scores: ``outlier_ratios(...)``, one number a layer. None: all layers the same.
      rank, period, scale, side, solver, axes, where, dtype: as for ``galore``.
      layers, active, interval, rest, seed: as for ``lisa``.

    >>> scores = jlora.optim.outlier_ratios(params["layers"], norms)
    >>> tx = jlora.optim.owlore(optax.adamw(3e-4), scores=scores)

    Defaults are those of the authors' scripts; their code was read. Departure: it keeps a layer's basis and moments
    while it is frozen, and goes on with them when the layer is drawn again.
    """
    options = dict(period=period, scale=scale, side=side, solver=solver, axes=axes, where=where, dtype=dtype)
    projected = galore(inner, rank, **options)
    others = inner if rest is None else rest
    return lisa(projected, active, layers=layers, interval=interval, rest=others, weights=scores, seed=seed)


def outlier_ratios(kernels: PyTree, norms: PyTree, threshold: float = 13.0) -> Float[Array, " layers"]:
    r"""For every layer the share of its weights that stand out, |W_ij| |X_i| > M mean(|W| |X|), over all its matrices.

    Outlier Weighed Layerwise Sparsity (OWL). Yin et al., 2023. https://arxiv.org/abs/2310.05175

    Args:
      kernels: a tree of stacks W [L, in, out].
      norms: the same tree of |X_i| [L, in], the root mean squares (or any multiple) of the features that each matrix
        multiplies, over calibration data: ``jlora.calibrate`` collects them.
      threshold: M.

    The mean is that of each matrix. OWL's formula, which OwLore's repository takes from a file of numbers, is from
    memory.
    """

    def one(path: tuple, w: Float[Array, "layers m n"], x: Float[Array, "layers m"]) -> tuple[Array, int]:
        if w.ndim != 3 or w.shape[:2] != x.shape:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            raise ValueError(
                f"outlier_ratios wants W [L, in, out] and norms [L, in]; {name or 'the leaf'} has {w.shape}, {x.shape}."
            )
        q = jnp.abs(w.astype(jnp.float32)) * jnp.abs(x.astype(jnp.float32))[..., None]
        return jnp.sum(q > threshold * q.mean((1, 2), keepdims=True), (1, 2)), w[0].size

    found = jax.tree_util.tree_map_with_path(one, kernels, norms)
    counts = jax.tree.leaves(found, is_leaf=lambda x: isinstance(x, tuple))
    return sum(count for count, _ in counts) / sum(size for _, size in counts)
