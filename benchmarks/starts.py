"""Do starts and rank schedules learn faster? LoRA, LoRA-GA, PiSSA, EVA, LoRA-SB, AdaLoRA, each at its best rate.

    python benchmarks/starts.py --data DIRECTORY --figure docs/starts.png
    python benchmarks/starts.py --tasks E2E --steps 10 --seeds 1 --rates 3e-3      # does it run

Two tasks: the shipped model on the shipped E2E, and MiniLM on TREC-6, whose trec6.train.tsv.gz and trec6.test.tsv.gz
(columns label and sentence) are in DIRECTORY. A run is `jlora finetune` with rank 8 and alpha 16 on all linear weights
of the layers, batches of 16 rows, the schedule that it has by default; its options are printed. All methods see the
same batches. The learning rate of each is the one of the grid whose held-out loss is lowest at the end of the first
seed; then come the other seeds, on the same held-out rows. Curves are of these losses. LoRA-SB trains r^2 numbers a
weight; AdaLoRA starts at rank 12 and comes to 8 on the average. Prints Markdown tables; what is done is kept in
--results, and not done again.
"""

import argparse
import contextlib
import io
import json
import shlex
import sys
import tempfile
from pathlib import Path

import jax
import study
from matplotlib.figure import Figure

from jlora.train import cli

COMMON = "finetune --batch-size 16 --eval-batch-size 64 --checkpoint-every 0 --no-generate"
TASKS = {
    "E2E": "--eval-limit 128",
    "TREC-6": "--task classification --model minilm --data {0} --eval-data {1} --text-column sentence",
}
METHODS = {
    "LoRA": "--rank 8 --alpha 16",
    "PiSSA": "--rank 8 --alpha 16 --init pissa",
    "LoRA-GA": "--rank 8 --alpha 16 --init lora_ga",
    "EVA": "--rank 8 --alpha 16 --init eva",
    "LoRA-SB": "--method lora_xs --rank 8 --alpha 8 --init lora_sb --init-options learning_rate={rate}",
    "AdaLoRA": "--method adalora --rank 12 --alpha 24 --rank-schedule adalora --rank-schedule-options target_rank=8",
}
RATES = {"E2E": [1e-3, 3e-3, 1e-2, 3e-2], "TREC-6": [3e-4, 1e-3, 3e-3, 1e-2]}
POINTS = 8  # of a curve


def command(cell: study.Cell, data: Path) -> list[str]:
    paths = [data / f"trec6.{part}.tsv.gz" for part in ("train", "test")]
    words = [COMMON, METHODS[cell["method"]].format(rate=cell["rate"]), TASKS[cell["task"]].format(*paths)]
    steps, every = cell["steps"], max(1, cell["steps"] // POINTS)
    numbers = f"--steps {steps} --eval-every {every} --learning-rate {cell['rate']} --seed {cell['seed']}"
    return shlex.split(" ".join([*words, numbers]))


def run(cell: study.Cell, data: Path) -> study.Cell:
    said = io.StringIO()
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "run"
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            code = cli.main([*command(cell, data), "--out", str(out)])
        if code not in (0, 1):  # wrong options, or stopped
            raise RuntimeError(said.getvalue().strip().splitlines()[-1])
        records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        trained = json.loads((out / "config.json").read_text())["summary"]["trainable"]
    key = "eval_nll" if cell["task"] == "E2E" else "eval_loss"
    looks = [record for record in records if key in record]
    # What is not finite any more is worse than anything that is.
    last = {key: 20.0, "accuracy": 0.0} if code else looks[-1]
    found = {"validation": last[key], "test": last[key], "curve": [] if code else [look[key] for look in looks]}
    return found | {"trained": trained, "accuracy": last.get("accuracy")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("."), help="where the files of TREC-6 are")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--rates", nargs="+", type=float, help="in the place of each task's grid")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=48)
    parser.add_argument("--results", type=Path, default=Path("runs/starts.jsonl"))
    parser.add_argument("--figure", type=Path, default=Path("runs/starts.png"))
    args = parser.parse_args()

    scratch = tempfile.TemporaryDirectory()  # the runs of a method compile the same programs
    jax.config.update("jax_compilation_cache_dir", scratch.name)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    drawing = Figure(figsize=(5 * len(args.tasks), 4), dpi=150, layout="constrained")
    panels = drawing.subplots(1, len(args.tasks), squeeze=False)[0]
    for axes, task in zip(panels, args.tasks, strict=True):
        setting, rates = {"task": task, "steps": args.steps}, args.rates or RATES[task]
        found = study.tuned(args.methods, rates, args.seeds, setting, args.results, lambda cell: run(cell, args.data))
        columns = {"trained": lambda cells: f"{cells[0]['trained']:,}"}
        if task == "TREC-6":
            columns["accuracy"] = lambda cells: f"{sum(c['accuracy'] for c in cells) / len(cells):.3f}"
        example = {"method": "LoRA", "rate": rates[0], "seed": 0, **setting}
        print(f"{task}: jlora {shlex.join(command(example, Path('DIRECTORY')))}\n")
        print(study.table(found, rates, columns), end="\n\n", flush=True)
        every = max(1, args.steps // POINTS)
        study.draw(axes, found, lambda i, every=every: (i - 1) * every)  # the first is that of the start
        axes.set(title=task, xlabel="optimizer step", ylabel="held-out loss")
    args.figure.parent.mkdir(parents=True, exist_ok=True)
    drawing.savefig(args.figure)


if __name__ == "__main__":
    sys.exit(main())
