"""What the studies of optimizers share: cells that are done once, rates from a grid, a table and a figure.

A cell is one run: a method, a learning rate, a seed. It is a line of a .jsonl file as soon as it is done, and is not
run again: an interrupted study goes on where it was.
"""

import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

import jlora

Cell = dict[str, Any]


def with_rate(make: Callable[[Any], optax.GradientTransformation]) -> optax.GradientTransformation:
    """``make(rate)`` behind a clipping by norm, the rate a number in its state: one compiled step has all rates."""
    return optax.inject_hyperparams(lambda rate: optax.chain(optax.clip_by_global_norm(1.0), make(rate)))(rate=0.0)


def rate_at(step: int, steps: int, peak: float) -> float:
    """Up in a line over a tenth of the steps, then down by half a cosine to a twentieth."""
    warmup = max(1, steps // 10)
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (0.05 + 0.95 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup))) / 2)


def train(
    step: Callable,
    tx: optax.GradientTransformation,
    adapted: jlora.Adapted,
    batches: Iterator[dict[str, np.ndarray]],
    steps: int,
    rate: float,
    look: Callable[[jlora.Adapted, int], None] = lambda adapted, step: None,
) -> tuple[jlora.Adapted, list[float]]:
    """The adapters after training, and the loss of each step; it ends early where that is not finite. `step` is one of
    `make_train_step`; `look(adapted, steps taken)` is called after each."""
    trainable = jax.tree.map(lambda leaf: leaf.copy(), adapted.trainable)  # the step donates it
    fixed, state, key = adapted.replace(trainable={}), tx.init(trainable), jax.random.key(1)
    losses: list[float] = []
    for number in range(steps):
        state = state._replace(hyperparams={"rate": np.float32(rate_at(number, steps, rate))})
        batch = jax.tree.map(lambda x: x[None], next(batches))
        trainable, state, metrics = step(trainable, state, fixed, batch, key, np.int32(number))
        losses.append(float(metrics["loss"]))
        if not math.isfinite(losses[-1]):
            break
        look(fixed.replace(trainable=trainable), number + 1)
    return fixed.replace(trainable=trainable), losses


def smoothed(losses: Sequence[float], every: int) -> list[float]:
    """Means over so many steps."""
    return [statistics.fmean(losses[i : i + every]) for i in range(0, len(losses), every)]


def run_all(cells: list[Cell], results: Path, run: Callable[[Cell], Cell]) -> list[Cell]:
    """All cells with what ``run`` adds to each, from the file where they are there."""
    results.parent.mkdir(parents=True, exist_ok=True)
    done = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    found = []
    for i, cell in enumerate(cells, 1):
        same = [one for one in done if cell.items() <= one.items()]
        if not same:
            began = time.monotonic()
            same = [cell | run(cell)]
            same[0]["seconds"] = round(time.monotonic() - began, 1)
            with results.open("a") as file:
                file.write(json.dumps(same[0]) + "\n")
            shown = ", ".join(f"{name} {value}" for name, value in cell.items())
            print(f"{i}/{len(cells)} {shown}: {same[0]['validation']:.4f} in {same[0]['seconds']} s", file=sys.stderr)
        found.append(same[-1])
    return found


def tuned(
    methods: Sequence[str],
    rates: Sequence[float],
    seeds: int,
    setting: Cell,
    results: Path,
    run: Callable[[Cell], Cell],
) -> dict[str, list[Cell]]:
    """Method -> its cells, a seed each, at the rate whose validation loss was lowest with the first seed."""
    cell = lambda method, rate, seed: {"method": method, "rate": rate, "seed": seed, **setting}
    grid = run_all([cell(method, rate, 0) for method in methods for rate in rates], results, run)
    best = {m: min((c for c in grid if c["method"] == m), key=lambda c: c["validation"]) for m in methods}
    others = [cell(method, best[method]["rate"], seed) for method in methods for seed in range(1, seeds)]
    others = run_all(others, results, run)
    return {method: [best[method], *(c for c in others if c["method"] == method)] for method in methods}


def table(best: dict[str, list[Cell]], rates: Sequence[float], columns: dict[str, Callable[[list[Cell]], str]]) -> str:
    """A row for each method, the lowest test loss first. A rate at the end of the grid is marked: there may be a better
    one beyond."""
    mean = lambda cells, name: statistics.fmean(cell[name] for cell in cells)
    spread = lambda cells: statistics.stdev(c["test"] for c in cells) if len(cells) > 1 else 0.0
    apart = any(cell["validation"] != cell["test"] for cells in best.values() for cell in cells)
    losses = ["validation", "test"] if apart else ["loss"]
    lines = [
        f"| method | rate | {' | '.join(losses)} | {' | '.join(columns)} |",
        "| --- " + "| ---: " * (1 + len(losses) + len(columns)) + "|",
    ]
    for method, cells in sorted(best.items(), key=lambda item: mean(item[1], "test")):
        rate = cells[0]["rate"]
        edge = " (end of the grid)" if rate in (min(rates), max(rates)) else ""
        own = " | ".join(show(cells) for show in columns.values())
        chosen = f"{mean(cells, 'validation'):.4f} | " if apart else ""
        lines.append(f"| {method} | {rate:g}{edge} | {chosen}{mean(cells, 'test'):.4f} ± {spread(cells):.4f} | {own} |")
    return "\n".join(lines)


def figure(best: dict[str, list[Cell]], x: Callable[[int], float], xlabel: str, ylabel: str, path: Path) -> None:
    """One panel of curves, as a file."""
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(7, 4.4), dpi=150, layout="constrained")
    axes = drawing.subplots()
    draw(axes, best, x)
    axes.set(xlabel=xlabel, ylabel=ylabel)
    path.parent.mkdir(parents=True, exist_ok=True)
    drawing.savefig(path)


def draw(axes: Any, best: dict[str, list[Cell]], x: Callable[[int], float]) -> None:
    """The mean curve of each method at its best rate, and the range over seeds. `x` is of the curve's i-th number, from
    1."""
    for method, cells in best.items():
        curves = [cell["curve"] for cell in cells if cell["curve"]]
        length = min(map(len, curves), default=0)
        if not length:
            continue
        values = np.array([curve[:length] for curve in curves])
        at = [x(i + 1) for i in range(length)]
        (line,) = axes.plot(at, values.mean(0), linewidth=1.4, label=f"{method}, {cells[0]['rate']:g}")
        axes.fill_between(at, values.min(0), values.max(0), color=line.get_color(), alpha=0.15, linewidth=0)
    axes.grid(alpha=0.3)
    axes.legend()
