"""MiniLM + LoRA on SST-2 and TREC-6 over seeds: test accuracy while it is trained, and where frozen features end.

    python benchmarks/classification.py --data DIRECTORY --out docs/classification.png

DIRECTORY holds sst2.train.tsv.gz, sst2.test.tsv.gz, trec6.train.tsv.gz and trec6.test.tsv.gz, with the columns label
and sentence. The runs are those of `jlora.train.recipes`, so their options were chosen there, on held-out parts of the
training data; what is read off here is the accuracy after the last step. Prints a Markdown table.
"""

import argparse
import contextlib
import io
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from jlora.train import cli
from jlora.train.recipes import minilm_sst2, minilm_trec6

# Test accuracy of logistic regression on mean-pooled features of the frozen model.
TASKS = {"SST-2": ("sst2", minilm_sst2.OPTIONS, 0.818), "TREC-6": ("trec6", minilm_trec6.OPTIONS, 0.886)}


def run(options: list[str], out: Path) -> tuple[list[tuple[int, float]], dict, float]:
    """Test accuracies by step, the final figures, and the seconds of training; of a run that is there, its own."""
    if not (out / "adapter").is_dir():
        said = io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            code = cli.main(["finetune", *options, "--out", str(out), "--overwrite"])
        if code:
            raise RuntimeError(said.getvalue().strip().splitlines()[-1])
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    results = json.loads((out / "results.json").read_text())
    curve = [(record["step"], record["accuracy"]) for record in records if "accuracy" in record]
    return curve, results["after"], results["train_seconds"]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("classification.png"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--runs", type=Path, help="keep the runs here, and use those that are there")
    parser.add_argument("options", nargs="*", help="further options of jlora finetune, after --")
    args = parser.parse_args(argv)
    figure = Figure(figsize=(9, 3.8), dpi=150, layout="constrained")
    panels = figure.subplots(1, 2)
    print("| task | frozen features | LoRA, mean of seeds | each | F1 | minutes a run |\n|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as scratch:
        for axes, (name, (stem, options, frozen)) in zip(panels, TASKS.items(), strict=True):
            paths = [args.data / f"{stem}.{part}.tsv.gz" for part in ("train", "test")]
            command = [option.format(*paths) for option in options]
            found = []
            for seed in range(args.seeds):
                out = (args.runs or Path(scratch)) / f"{stem}-{seed}"
                found.append(run([*command, "--seed", str(seed), *args.options], out))
                axes.plot(*zip(*found[-1][0], strict=True), marker="o", markersize=3.5, label=f"seed {seed}")
            finals = [after["accuracy"] for _, after, _ in found]
            axes.axhline(frozen, color="black", linestyle="--", linewidth=1, label=f"frozen features: {frozen:.3f}")
            axes.set(xlabel="optimizer step", title=f"{name}: {np.mean(finals):.3f} after the last step")
            axes.grid(alpha=0.3)
            axes.legend(loc="lower right", fontsize="small")
            minutes = np.mean([seconds for *_, seconds in found]) / 60
            f1 = np.mean([after["f1"] for _, after, _ in found])
            each = ", ".join(f"{value:.3f}" for value in finals)
            print(f"| {name} | {frozen:.3f} | {np.mean(finals):.3f} | {each} | {f1:.3f} | {minutes:.1f} |", flush=True)
    panels[0].set_ylabel("test accuracy")
    figure.savefig(args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
