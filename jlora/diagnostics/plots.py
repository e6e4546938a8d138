"""A report as a figure."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from jlora.diagnostics.adapters import Change, Report

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def plot(report: Report) -> Figure:
    """What ``report`` found, as a matplotlib figure: how large the change of every matrix is beside the weight, its
    singular values, how many directions it uses, and how well the strongest directions after the change were there
    before, if intruders were looked for.

    >>> jlora.diagnostics.plot(report).savefig("adapter.png")

    Leaves that differ in a number of their path only are the layers of one kind, as the matrices of a stacked leaf are.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure  # without pyplot: no backend to choose, no global state

    if not report.leaves:
        raise ValueError("There is nothing to plot: no leaf has a change that has a spectrum.")
    kinds = _kinds(report)
    names = dict(zip(kinds, _short(list(kinds)), strict=True))
    searched = all(leaf.intruders is not None for leaf in report.leaves.values())
    palette = colormaps["tab10"].colors if len(kinds) <= 10 else colormaps["turbo"](np.linspace(0.05, 0.95, len(kinds)))
    colors = dict(zip(kinds, palette, strict=False))
    height = max(3.4, 1.2 + 0.26 * len(kinds))
    figure = Figure(figsize=(10.5, 2 * height), dpi=150, layout="constrained")
    axes = figure.subplots(2, 2)
    _sizes(axes[0, 0], figure, kinds, names)
    _over_directions(axes[0, 1], kinds, colors, lambda leaf, index: leaf.spectrum[index])
    axes[0, 1].set(xlabel="direction", ylabel="singular value of the change", yscale="log")
    axes[0, 1].set_title("spectra: layers (dots) and their mean")
    _over_layers(axes[1, 0], kinds, colors, lambda leaf, index: leaf.effective_rank()[index])
    most = max(leaf.spectrum.shape[-1] for leaf in report.leaves.values())
    axes[1, 0].set(ylabel=f"effective rank, of at most {most}", ylim=(0, 1.04 * most))
    axes[1, 0].set_title("directions in use")
    if searched:
        (threshold,) = {leaf.intruders.threshold for leaf in report.leaves.values()}
        _over_directions(axes[1, 1], kinds, colors, lambda leaf, index: np.asarray(leaf.intruders.similarity)[index])
        axes[1, 1].axhline(threshold, color="black", linestyle="--", linewidth=1)
        axes[1, 1].text(
            0.02, threshold - 0.02, "below: intruders", transform=axes[1, 1].get_yaxis_transform(), va="top", fontsize=8
        )
        axes[1, 1].set(xlabel="direction after the change", ylabel="largest cosine with one before", ylim=(0, 1.04))
        axes[1, 1].set_title("intruder dimensions: layers (dots) and their mean")
    else:
        _over_layers(axes[1, 1], kinds, colors, lambda leaf, index: leaf.stable_rank()[index])
        axes[1, 1].set(ylabel="stable rank")
        axes[1, 1].set_title("squared Frobenius norm / squared spectral norm")
    for each in axes.flat[1:]:
        each.grid(alpha=0.3)
    handles, _ = axes[0, 1].get_legend_handles_labels()
    figure.legend(handles, names.values(), loc="outside lower center", ncols=min(4, len(kinds)), fontsize=8)
    return figure


Kinds = dict[str, dict[int, tuple[Change, tuple[int, ...]]]]  # kind of leaf -> layer -> (Change, place in its stack)


def _kinds(report: Report) -> Kinds:
    """The matrices by kind and layer."""
    kinds: Kinds = {}
    for path, leaf in report.leaves.items():
        segments = path.split("/")
        numbered = [i for i, segment in enumerate(segments) if re.search(r"(^|\D)\d+$", segment)]
        kind, layer = path, 0
        if numbered:
            i = numbered[0]
            layer = int(re.search(r"\d+$", segments[i]).group())
            kind = "/".join([*segments[:i], re.sub(r"\d+$", "*", segments[i]), *segments[i + 1 :]])
        for at, index in enumerate(np.ndindex(leaf.base.shape)):
            row = kinds.setdefault(kind if leaf.base.size == 1 else path, {})
            row[layer if leaf.base.size == 1 else at] = (leaf, index)
    return kinds


def _short(kinds: list[str]) -> list[str]:
    """Paths without the segments that all of them have in front or at the end."""
    parts = [kind.split("/") for kind in kinds]
    shortest = min(map(len, parts))
    front = next((i for i in range(shortest - 1) if len({part[i] for part in parts}) > 1), shortest - 1)
    parts = [part[front:] for part in parts]
    shortest = min(map(len, parts))
    back = next((i for i in range(shortest - 1) if len({part[-1 - i] for part in parts}) > 1), shortest - 1)
    return ["/".join(part[: len(part) - back]) for part in parts]


def _sizes(axes: Axes, figure: Figure, kinds: Kinds, names: dict[str, str]) -> None:
    layers = sorted({layer for row in kinds.values() for layer in row})
    sizes = np.full((len(kinds), len(layers)), np.nan)
    for i, row in enumerate(kinds.values()):
        for layer, (leaf, index) in row.items():
            sizes[i, layers.index(layer)] = leaf.relative[index]
    image = axes.imshow(sizes, cmap="viridis", vmin=0, aspect="auto")
    axes.set(xlabel="layer", xticks=_few(range(len(layers))), xticklabels=_few(layers))
    axes.set_yticks(range(len(kinds)), names.values(), fontsize=8)
    if len(layers) <= 8:
        for (i, j), value in np.ndenumerate(sizes):
            dark = value < 0.6 * np.nanmax(sizes)
            if np.isfinite(value):
                axes.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=7, color="w" if dark else "k")
    axes.set_title("size of the change / size of the weight")
    figure.colorbar(image, ax=axes)


def _few(ticks: Sequence[int]) -> Sequence[int]:
    return ticks[:: math.ceil(len(ticks) / 16)]


def _over_layers(axes: Axes, kinds: Kinds, colors: dict, of: Callable[[Change, tuple], float]) -> None:
    for kind, row in kinds.items():
        layers = sorted(row)
        values = [of(*row[layer]) for layer in layers]
        axes.plot(layers, values, marker="o", markersize=4, linewidth=1.2, color=colors[kind], label=kind)
    axes.set(xlabel="layer", ylim=(0, None), xticks=_few(sorted({layer for row in kinds.values() for layer in row})))


def _over_directions(axes: Axes, kinds: Kinds, colors: dict, of: Callable[[Change, tuple], np.ndarray]) -> None:
    """Means over the layers, of as many directions as all of them have; each layer by dots."""
    for kind, row in kinds.items():
        values = [of(*place) for place in row.values()]
        shortest = min(map(len, values))
        x, values = range(1, shortest + 1), np.stack([each[:shortest] for each in values])
        for each in values:
            axes.plot(x, each, ".", markersize=2.5, alpha=0.5, color=colors[kind])
        axes.plot(x, values.mean(0), marker="o", markersize=4, linewidth=1.2, color=colors[kind], label=kind)
    axes.xaxis.get_major_locator().set_params(integer=True)
