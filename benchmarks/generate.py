"""Tokens a second of greedy generation with a key-value cache, beside transformers on torch.

    python benchmarks/generate.py                                  # SmolLM2-135M, float32, batches of 1 and 8
    python benchmarks/generate.py --model stories260k --batch 1 32 --new-tokens 128 --rounds 5

Both have the same weights and prompts of equal length, generate as many tokens for each, and take turns, so that what
disturbs the machine disturbs both; the figures are of the fastest round, and of the one that took the least CPU time,
which says more on a machine that is shared. What is compiled is compiled before. The last column is the share of
prompts for which both find the same tokens: float32 sums in another order may decide a close race otherwise, and the
rest of that text is then another.

SmolLM2-135M, `--threads 1 --prompt-tokens 31 --new-tokens 32`, torch 2.13 and transformers 5.24, on two cores of which
one was used by others: per CPU second 1.08 times the tokens of transformers (18.4 against 17.0), in batches of 8 1.07
times (77 against 72), and the same ones.
"""

import argparse
import pathlib
import tempfile
import time
from collections.abc import Callable

import numpy as np
import torch
import transformers
from rich.console import Console
from rich.table import Table

from jlora.train import models
from jlora.train.generate import generate


def jlora_generation(model: models.LoadedModel, new: int) -> Callable[[np.ndarray], np.ndarray]:
    def run(prompts):
        rows = generate(
            model.module.apply, model.params, prompts.tolist(), config=model.config, max_new_tokens=new, eos_id=None,
            batch_size=len(prompts),
        )  # fmt: skip
        return np.array(rows)

    return run


def torch_generation(model: models.LoadedModel, new: int) -> Callable[[np.ndarray], np.ndarray]:
    with tempfile.TemporaryDirectory() as directory:
        models.save_hf(model, model.params, directory)
        peer = transformers.AutoModelForCausalLM.from_pretrained(pathlib.Path(directory), dtype=torch.float32).eval()
    peer.generation_config.eos_token_id = None

    def run(prompts):
        ids = torch.tensor(prompts)
        options = {"max_new_tokens": new, "do_sample": False, "attention_mask": torch.ones_like(ids), "pad_token_id": 0}
        with torch.inference_mode():
            return peer.generate(ids, **options)[:, prompts.shape[1] :].numpy()

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, help="of torch; 1 where others use the machine, too")
    args = parser.parse_args()
    if args.threads is not None:
        torch.set_num_threads(args.threads)

    model = models.load(args.model)
    contenders = {
        "jlora": jlora_generation(model, args.new_tokens),
        "transformers": torch_generation(model, args.new_tokens),
    }
    table = Table(
        "batch", "jlora, tokens/s", "transformers", "ratio", "per CPU second", "transformers", "ratio", "same"
    )
    for batch in args.batch:
        prompts = np.random.default_rng(batch).integers(3, model.config.vocab_size, (batch, args.prompt_tokens))
        found = {name: run(prompts) for name, run in contenders.items()}
        seconds, cpu = ({name: [] for name in contenders} for _ in range(2))
        for _ in range(args.rounds):
            for name, run in contenders.items():
                began = time.perf_counter(), time.process_time()
                run(prompts)
                seconds[name].append(time.perf_counter() - began[0])
                cpu[name].append(time.process_time() - began[1])
        cells = []
        for times in (seconds, cpu):
            ours, theirs = (batch * args.new_tokens / min(times[name]) for name in contenders)
            cells += [f"{ours:.1f}", f"{theirs:.1f}", f"{ours / theirs:.2f}"]
        same = (found["jlora"] == found["transformers"]).all(axis=1).mean()
        table.add_row(str(batch), *cells, f"{same:.0%}")
    Console().print(
        f"{args.model}, float32, prompts of {args.prompt_tokens} tokens, {args.new_tokens} new ones; "
        f"torch {torch.__version__}, transformers {transformers.__version__}, {torch.get_num_threads()} threads"
    )
    Console().print(table)


if __name__ == "__main__":
    main()
