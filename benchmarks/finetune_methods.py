"""Held-out loss of every method after the same few steps: `jlora finetune` on the shipped model and data.

    python benchmarks/finetune_methods.py --out docs/finetune_methods.md     # every method, 60 steps: half an hour
    python benchmarks/finetune_methods.py --methods lora,dora,vera --steps 20

Writes a Markdown table, on the terminal without `--out`. A row has the command that makes it again. All take the same
learning rate and the same batches and, where the model allows, their own defaults: none was tuned, counts differ, and
60 steps are few. So the table shows that each method trains, and what it comes to untuned, not which is best.
"""

import argparse
import contextlib
import io
import json
import platform
import shlex
import sys
import tempfile
from pathlib import Path

import jax

from jlora.methods import METHODS
from jlora.train import cli

# What the shipped model's sizes (64 wide, 172 in its MLPs, 32 for keys and values) or a method's nature ask for.
OPTIONS: dict[str, str] = {
    "vblora": "--method-options vector_length=4",
    "oft": "--method-options block_size=4",
    "boft": "--method-options block_size=4",
    "bat": "--rank 4",
    "c3a": "--method-options block_size=4",
    "road": "--method-options group_size=4",
    "shira": "--rank 8",
    "loldu": "--rank 32",
    "noble": "--rank 8",
    "sltrain": "--rank 32",
    "waveft": "--method-options n=512",
    "salt": "--method-options top=16",
    "vida": "--method-options high_rank=16",
    # Rows of the embedding, which is the output head as well: some of the tokens that this text uses most.
    "tokens": "--targets '**/embedding' --method-options 'indices=(1, 2, 13, 259, 261, 262, 267, 269, 275, 291)'",
    "invertible": "--targets '**/embedding'",
}


def command(method: str, *options: str) -> list[str]:
    """The arguments of `jlora` that fine-tune by a method."""
    return ["finetune", "--method", method, *shlex.split(OPTIONS.get(method, "")), *options]


def run(argv: list[str]) -> tuple[int, float, float]:
    """(trained parameters, held-out loss before and after)."""
    said = io.StringIO()
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "run"
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            code = cli.main([*argv, "--out", str(out), "--checkpoint-every", "0"])
        if code:
            raise RuntimeError(said.getvalue().strip().splitlines()[-1])
        results = json.loads((out / "results.json").read_text())
        config = json.loads((out / "config.json").read_text())
    losses = (results[when]["eval_nll"] for when in ("before", "after"))
    return config["summary"]["trainable"], *losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", default=",".join(METHODS), help="names, with commas (default: all)")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--eval-limit", type=int, default=128, help="held-out rows")
    parser.add_argument("--out", type=Path, help="file to write the table to")
    args = parser.parse_args()
    methods = [name.strip() for name in args.methods.split(",") if name.strip()]
    unknown = [name for name in methods if name not in METHODS]
    if unknown:
        parser.error(f"unknown methods {', '.join(unknown)}: known are {', '.join(METHODS)}")

    common = ["--steps", str(args.steps), "--eval-limit", str(args.eval_limit), "--eval-every", "0", "--no-generate"]
    rows = []
    for i, name in enumerate(methods, 1):
        argv = command(name, *common)
        print(f"{i}/{len(methods)} {name}", file=sys.stderr)
        shown = f"`{shlex.join(['jlora', *argv])}`"
        try:
            trained, before, after = run(argv)
            rows.append((after, f"| `{name}` | {trained:,} | {before:.3f} | **{after:.3f}** | {shown} |"))
        except Exception as error:  # the others are still of interest
            rows.append((float("inf"), f"| `{name}` | - | - | {str(error).replace('|', '/')[:200]} | {shown} |"))
        jax.clear_caches()
    rows.sort(key=lambda row: row[0])
    text = "\n".join(
        [
            f"Held-out loss (nats a token, {args.eval_limit} rows) before and after {args.steps} steps on the shipped "
            f"model and data, lowest first. {platform.machine()}, jax {jax.__version__}, made by",
            f"`{shlex.join(['python', 'benchmarks/finetune_methods.py', *sys.argv[1:]])}`.",
            "",
            "| method | trained | before | after | command |",
            "| --- | ---: | ---: | ---: | --- |",
            *(row for _, row in rows),
            "",
        ]
    )
    if args.out is None:
        print(text)
    else:
        args.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
