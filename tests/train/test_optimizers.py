"""The optimizers of the command line: each is on offer, takes steps, and refuses what it cannot use."""

import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_loop import batch_of, setting

import jlora
from jlora.train.config import OptimizerOptions, UserError
from jlora.train.optimizers import OPTIMIZERS, learning_rate_schedule, make_optimizer

PROJECTED = ("galore", "fira", "apollo", "dct", "trion")
OF_LAYERS = {"lisa": ("active=1", "interval=3"), "owlore": ("rank=4", "active=1", "scores=(1, 2, 3)")}


def test_every_one_is_on_offer():
    offered = typing.get_args(typing.get_type_hints(OptimizerOptions)["optimizer"])
    assert set(offered) == set(OPTIMIZERS)


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name not in OF_LAYERS])
def test_takes_steps(name):
    method = jlora.Full() if name in PROJECTED else jlora.LoRA(3)
    extra = ("rank=4", "period=2")[: 1 if name == "trion" else 2] if name in PROJECTED else ()
    rates = {"sgd": 0.5, "adagrad_norm": 0.5, "scaled_gd": 0.05, "altlora": 0.05, "altlora_plus": 1e-3, "lion": 1e-2}
    rate = rates.get(name, 2e-2)
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


def test_stacked_norms_are_no_matrix():
    """Of the leaves of a model, projected optimizers take the kernels, as long as nothing else is said."""
    params = {"layers": {"norm": {"scale": jnp.ones((8, 16))}, "proj": {"kernel": jnp.ones((3, 8, 16))}}}
    shapes = lambda *given: {
        leaf.shape
        for leaf in jax.tree.leaves(make_optimizer(OptimizerOptions("galore", ("rank=4", *given)), 0.1).init(params))
    }
    assert (8, 16) in shapes() and (3, 4, 16) in shapes() and (4, 16) not in shapes()
    assert (4, 16) in shapes("where='**'")


@pytest.mark.parametrize("name", OF_LAYERS)
def test_moves_layers(name):
    """Of a tree with stacked layers, named as those of the models are; one without is refused."""
    optimizer = make_optimizer(OptimizerOptions(name, OF_LAYERS[name], state_bits=8), 0.1)
    params = {"model": {"layers": {"w": {"kernel": jnp.ones((3, 8, 8))}}, "norm": jnp.ones(8)}}
    grads = jax.tree.map(lambda x: jnp.arange(x.size, dtype=x.dtype).reshape(x.shape), params)
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    assert np.any(updates["model"]["layers"]["w"]["kernel"], axis=(1, 2)).sum() == 1 and np.any(
        updates["model"]["norm"]
    )
    with pytest.raises(ValueError, match="wants the layers stacked"):
        optimizer.init({"kernel": jnp.ones((8, 8))})


def test_states_in_8_bits():
    """Of AdamW, and of the AdamW that another is around; no other has one."""
    large = {"kernel": jnp.ones((64, 4096))}
    bytes_of = lambda tree: sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
    for name, extra in (("adamw", ()), ("galore", ("rank=4",))):
        make = lambda bits: make_optimizer(OptimizerOptions(name, extra, state_bits=bits), 0.1)  # noqa: B023
        sizes = [bytes_of(make(bits).init(large)) for bits in (32, 8)]
        assert sizes[1] < 0.7 * sizes[0]


def test_adafactor_moves_what_is_zero():
    """By the rate, as a factor that starts at zero needs it, unless it is asked for steps in proportion."""
    zero = {"b": jnp.zeros((8, 4))}
    for extra, size in (((), 0.1), (("multiply_by_parameter_scale=True",), 1e-4)):
        optimizer = make_optimizer(OptimizerOptions("adafactor", extra, clip_norm=0.0), 0.1)
        updates, _ = optimizer.update({"b": jnp.ones((8, 4))}, optimizer.init(zero), zero)
        np.testing.assert_allclose(updates["b"], -size, rtol=1e-3)


REFUSED = {
    "no 8 bits": (OptimizerOptions("lion", state_bits=8), "--state-bits 8 is AdamW's"),
    "none of adafactor's": (OptimizerOptions("adafactor", ("rank=3",)), "it has min_dim_size_to_factor, decay_rate"),
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
