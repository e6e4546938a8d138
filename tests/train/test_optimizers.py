"""The optimizers of the command line: each is on offer, takes steps, and refuses what it cannot use."""

import typing

import numpy as np
import pytest
from test_loop import batch_of, setting

import jlora
from jlora.train.config import OptimizerOptions, UserError
from jlora.train.optimizers import OPTIMIZERS, learning_rate_schedule, make_optimizer

PROJECTED = ("galore", "fira", "apollo", "dct")


def test_every_one_is_on_offer():
    offered = typing.get_args(typing.get_type_hints(OptimizerOptions)["optimizer"])
    assert set(offered) == set(OPTIMIZERS)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_takes_steps(name):
    method = jlora.Full() if name in PROJECTED else jlora.LoRA(3)
    extra = ("rank=4", "period=2") if name in PROJECTED else ()
    rate = {"sgd": 0.5, "scaled_gd": 0.05, "altlora": 0.05, "altlora_plus": 1e-3, "lion": 1e-2}.get(name, 2e-2)
    options = OptimizerOptions(name, extra, learning_rate=rate, warmup_steps=2)
    optimizer = make_optimizer(options, learning_rate_schedule(options, 10))
    adapted, trainable, optimizer, step = setting(method, optimizer=optimizer)
    state, losses = optimizer.init(trainable), []
    fixed, batch = adapted.replace(trainable={}), batch_of(1, 4)
    key = np.zeros(2, np.uint32)
    for number in range(8):
        trainable, state, metrics = step(trainable, state, fixed, batch, key, np.int32(number))
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0]
    assert step._cache_size() == 1


REFUSED = {
    "no such option": (OptimizerOptions("lora_plus", ("ratios=3",)), "it has ratio"),
    "the command's own": (OptimizerOptions("lion", ("b1=0.3",)), "no option 'b1'"),
    "no equals sign": (OptimizerOptions("lora_plus", ("ratio",)), "wants NAME=VALUE"),
    "no decay": (OptimizerOptions("scaled_gd", weight_decay=0.1), "--weight-decay is not available"),
    "value": (OptimizerOptions("lora_pro", ("mode=none",)), "--optimizer lora_pro: .*sylvester"),
}


@pytest.mark.parametrize("options, message", REFUSED.values(), ids=REFUSED)
def test_refused(options, message):
    with pytest.raises(UserError, match=message):
        make_optimizer(options, 0.1)
