"""The tasks of `jlora finetune --task`."""

from jlora.train.config import DataOptions
from jlora.train.tasks.base import HeldOut as HeldOut
from jlora.train.tasks.base import Measured as Measured
from jlora.train.tasks.base import Rows as Rows
from jlora.train.tasks.base import Task as Task
from jlora.train.tasks.causal_lm import CausalLM
from jlora.train.tasks.dpo import DPO
from jlora.train.tasks.images import ImageClassification
from jlora.train.tasks.masked_lm import MaskedLM
from jlora.train.tasks.text import Classification, Regression

TASKS: dict[str, type[Task]] = {
    task.name: task for task in (CausalLM, DPO, Classification, Regression, MaskedLM, ImageClassification)
}


def make(options: DataOptions) -> Task:
    """The task that the options name."""
    return TASKS[options.task](options)
