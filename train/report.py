"""What the user sees of a run: progress while it goes, loss.png and README.md after it."""

import dataclasses
import io
import math
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    track,
)

from jlora.train import distributed
from jlora.train.models.packaged import hub_name
from jlora.train.run import RunDirectory, write_file


class Reporter:
    """Training progress: a live bar with loss, tokens/s and remaining time on a terminal, plain lines elsewhere.

    Of several processes the first one speaks."""

    unit = "tokens"
    """What speed is counted in."""

    def __init__(self, console: Console | None = None):
        # highlight and markup off: texts of the data may hold anything, brackets included
        self.console = console or Console(
            file=sys.stdout, highlight=False, markup=False, soft_wrap=True, quiet=not distributed.first()
        )
        self._progress: Progress | None = None

    def say(self, text: str = "") -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def track(self, batches: Sequence, what: str) -> Iterable:
        """The batches, with a bar on a terminal and a line elsewhere."""
        if self.console.is_terminal:
            return track(batches, what, console=self.console, transient=True)
        self.say(f"{what}: {len(batches)} batches")
        return batches

    def start(self, step: int, total: int) -> None:
        """Begin at `step` of `total` steps."""
        self._first, self._total, self._began = step, total, time.monotonic()
        if self.console.is_terminal:
            self._progress = Progress(
                TextColumn("training"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("loss {task.fields[loss]}  {task.fields[speed]} " + self.unit + "/s"),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=self.console,
            )
            self._task = self._progress.add_task("training", total=total, completed=step, loss="...", speed="...")
            self._progress.start()

    def tick(self, step: int) -> None:
        """`step` is done; its loss may not be known yet."""
        if self._progress is not None:
            self._progress.update(self._task, completed=step)

    def update(self, step: int, loss: float, tokens_per_second: float | None) -> None:
        """The mean loss of the last steps is known, and their speed unless they were spent on compiling."""
        speed = "..." if tokens_per_second is None else f"{tokens_per_second:,.0f}"
        if self._progress is not None:
            self._progress.update(self._task, completed=step, loss=f"{loss:.3f}", speed=speed)
        else:
            remaining = (time.monotonic() - self._began) / max(step - self._first, 1) * (self._total - step)
            width = len(str(self._total))
            speed = f"{speed} {self.unit}/s"
            self.say(f"step {step:{width}}/{self._total}  loss {loss:.3f}  {speed}  eta {_clock(remaining)}")

    def stop(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def plot_losses(records: Sequence[dict[str, Any]], path: Path, title: str, unit: str = "nats per token") -> None:
    """Training loss (mean over each logged interval) and held-out loss over optimizer steps, as a PNG."""
    from matplotlib.figure import Figure  # without pyplot: no backend to choose, no global state

    figure = Figure(figsize=(7, 4.2), dpi=150, layout="constrained")
    axes = figure.subplots()
    trained = [(record["step"], float(record["loss"])) for record in records if "loss" in record]
    held_out = [(record["step"], found) for record in records if (found := held_out_loss(record)) is not None]
    if trained:
        axes.plot(*zip(*trained, strict=True), color="tab:blue", linewidth=1.4, label="training")
    if held_out:
        axes.plot(*zip(*held_out, strict=True), color="tab:orange", marker="o", linewidth=1.8, label="held out")
        # Above the first point, from where the lines fall; right of the last one, where there are none.
        ends = [(held_out[0], (8, 6), "baseline"), (held_out[-1], (7, 0), "center")]
        for (step, loss), offset, align in ends[: len(held_out)]:
            axes.annotate(
                f"{loss:.2f}", (step, loss), xytext=offset, textcoords="offset points", ha="left", va=align,
                color="tab:orange",
            )  # fmt: skip
        axes.margins(x=0.09)
    axes.set(xlabel="optimizer step", ylabel=f"loss ({unit})", title=title)
    finite = [loss for _, loss in trained + held_out if math.isfinite(loss)]
    axes.set_ylim(0, 1.12 * max(finite, default=1.0))
    axes.grid(alpha=0.3)
    if trained or held_out:
        axes.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    write_file(path, buffer.getvalue())


@dataclasses.dataclass(frozen=True)
class Figure:
    """How a figure of results.json is shown: in a line, in a table, and with how many digits."""

    short: str
    long: str
    digits: str


FIGURES = {
    "eval_nll": Figure("held-out loss", "held-out loss (nats/token)", ".3f"),
    "eval_loss": Figure("held-out loss", "held-out loss", ".3f"),
    "perplexity": Figure("perplexity", "held-out perplexity", ".2f"),
    "accuracy": Figure("accuracy", "accuracy", ".4f"),
    "f1": Figure("F1", "F1", ".4f"),
    "matthews": Figure("Matthews", "Matthews' correlation", ".4f"),
    "pearson": Figure("Pearson", "Pearson's correlation", ".4f"),
    "spearman": Figure("Spearman", "Spearman's correlation", ".4f"),
    "reward_margin": Figure("reward margin", "reward of chosen less rejected", ".3f"),
    "reward_accuracy": Figure("reward accuracy", "share with the chosen ahead", ".4f"),
    "chosen_reward": Figure("chosen", "reward of chosen", ".3f"),
    "rejected_reward": Figure("rejected", "reward of rejected", ".3f"),
    "bleu": Figure("BLEU", "corpus BLEU", ".1f"),
    "rouge1": Figure("ROUGE-1", "ROUGE-1 (F1)", ".1f"),
    "rouge2": Figure("ROUGE-2", "ROUGE-2 (F1)", ".1f"),
    "rougeL": Figure("ROUGE-L", "ROUGE-L (F1)", ".1f"),
    "exact_match": Figure("exact match", "exact match", ".4f"),
}


def held_out_loss(figures: dict[str, Any]) -> float | None:
    """The held-out loss of a record of metrics.jsonl, whatever the task; None where it has none."""
    found = figures.get("eval_nll", figures.get("eval_loss"))
    return None if found is None else float(found)


def figures_line(figures: dict[str, Any]) -> str:
    """Held-out figures in a line."""
    shown = [(figure, float(figures[name])) for name, figure in FIGURES.items() if name in figures]
    return ", ".join(f"{figure.short} {value:{figure.digits}}" for figure, value in shown)


def figures_table(before: dict[str, Any], after: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Rows (figure, before, after) for the terminal and the run's README."""
    shown = [(name, figure) for name, figure in FIGURES.items() if name in after]
    return [(f.long, *(f"{float(each[name]):{f.digits}}" for each in (before, after))) for name, f in shown]


def one_line(text: str, width: int = 300) -> str:
    """A sample on one line: newlines shown as such, cut at `width` characters."""
    text = text.strip().replace("\n", "\\n")
    return text if len(text) <= width else text[: width - 3] + "..."


def run_readme(run: RunDirectory, config: dict[str, Any], results: dict[str, Any], task: Any, data: Any) -> str:
    """README.md of a run: what was run, what came out, how to load it."""
    options, summary = config["options"], config["summary"]
    rows = "\n".join(f"| {name} | {b} | {a} |" for name, b, a in figures_table(results["before"], results["after"]))
    model, seconds = options["model"]["model"], results["train_seconds"]
    lines = [
        f"# {summary['model_name']} on {Path(options['data']['data']).name}, {options['method']['method']}",
        "",
        f"    {config['command']}",
        "",
        f"{summary['trainable']:,} trainable parameters beside {summary['parameters']:,} of the base; "
        f"{options['train']['steps']} steps{', resumed on the way' if seconds is None else f' in {seconds:.0f} s'}; "
        f"{summary['train_rows']:,} rows to train on, {summary['eval_rows']:,} held out.",
        "",
        "| | before | after |",
        "|---|---|---|",
        rows,
        "",
    ]
    if "bleu_signature" in results["after"]:
        lines += [
            f"BLEU over {results['after']['bleu_prompts']} prompts, sacrebleu `{results['after']['bleu_signature']}`.",
            "",
        ]
    lines += ["![training and held-out loss](loss.png)", ""]
    if results.get("samples"):
        lines += ["## Held-out samples", ""]
        for sample in results["samples"]:
            lines += [
                f"- `{one_line(sample['prompt'])}`",
                *([f"  - label: {one_line(sample['label'])}"] if "label" in sample else []),
                f"  - before: {one_line(sample['before'])}",
                f"  - after: {one_line(sample['after'])}",
            ]
        lines.append("")
    if run.adapter.exists():
        quantize = options["model"].get("quantize", "none")
        lines += _loading(model, quantize, task.auto_class, task.inputs, *task.head(data))
    else:
        lines += ["The trained model as a plain directory: `jlora merge --run . --out DIRECTORY`", ""]
    lines += ["All options, also those left at their default: config.json. Figures: results.json, metrics.jsonl.", ""]
    return "\n".join(lines)


def _loading(model: str, quantize: str, auto_class: str, inputs: str, ours: str, theirs: str) -> list[str]:
    load = f'models.load("{model}"{ours})'
    if quantize != "none":
        load = f'loading.load_model("{model}", quantize="{quantize}"{ours})'
    export = (
        ["The base in Hugging Face layout, for PEFT: `jlora merge --model stories260k --out stories260k`", ""]
        if model == "stories260k"
        else []
    )
    return [
        "## Load the adapter",
        "",
        "```python",
        "import jlora",
        "from jlora.io import load_peft",
        f"from jlora.train import {load.partition('.')[0]}",
        "",
        f"base = {load}",
        'adapted = load_peft("adapter", base.params)',
        "apply = jlora.lift(base.module.apply)",
        f'logits = apply({{"params": adapted.bind()}}, {inputs})',
        "```",
        "",
        *export,
        "```python",
        "from peft import PeftModel",
        f"from transformers import {auto_class}",
        "",
        f'model = PeftModel.from_pretrained({auto_class}.from_pretrained("{hub_name(model)}"{theirs}), "adapter")',
        "```",
        "",
    ]
