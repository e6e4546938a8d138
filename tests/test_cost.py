"""What an adapted step costs, as facts of the program: the same on every machine, and never a time.

FLOPs and temporary memory are XLA's own counts. They must not grow beyond those of LoRA written into the model by hand,
nor beyond the frozen model and the adapters' terms: for T tokens, 4 T in out + 6 T r (in + out) a linear layer.
"""

import functools
import math
import re

import jax
import jax.numpy as jnp
import pytest
from jaxprs import equations

import jlora

pytestmark = pytest.mark.optimized

DIM, FFN, LAYERS, VOCAB, RANK, HEADS = 32, 56, 2, 40, 4, 2
IDS = jnp.arange(2 * 24).reshape(2, 24) % VOCAB  # 48 tokens: no activation has the shape of a weight
SHAPES = {"q": (DIM, DIM), "k": (DIM, DIM), "v": (DIM, DIM), "o": (DIM, DIM), "up": (DIM, FFN), "down": (FFN, DIM)}
FROZEN = set(SHAPES.values()) | {(n_out, n_in) for n_in, n_out in SHAPES.values()} | {(DIM, VOCAB), (VOCAB, DIM)}
TOKENS = IDS.size
ADAPTER_FLOPS = LAYERS * sum(6 * TOKENS * RANK * (n_in + n_out) for n_in, n_out in SHAPES.values())


def make_params(stacked: bool):
    keys = iter(jax.random.split(jax.random.key(0), 100))
    normal = lambda shape: 0.1 * jax.random.normal(next(keys), shape)
    layers = [{name: normal(shape) for name, shape in SHAPES.items()} for _ in range(LAYERS)]
    if stacked:
        layers = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
    return {"embed": normal((VOCAB, DIM)), "layers": layers, "lm_head": normal((DIM, VOCAB))}


def model(params, ids, *, linear=jnp.matmul, offset=0.0):
    """A transformer: layers in a list, or stacked, scanned and checkpointed. `linear(x, w)` runs its linear layers."""

    def block(x, layer):
        heads = lambda name: linear(x, layer[name]).reshape(*x.shape[:2], HEADS, -1)
        y = jax.nn.dot_product_attention(heads("q"), heads("k"), heads("v"), is_causal=True)
        x = x + linear(y.reshape(x.shape), layer["o"])
        return x + linear(jax.nn.silu(linear(x, layer["up"])), layer["down"])

    x = params["embed"][ids] + offset
    if isinstance(params["layers"], list):
        for layer in params["layers"]:
            x = block(x, layer)
    else:
        body = jax.checkpoint(lambda x, layer: (block(x, layer), None), prevent_cse=False)
        x, _ = jax.lax.scan(body, x, params["layers"])
    logits = x @ params["lm_head"]
    return -jax.nn.log_softmax(logits[:, :-1])[..., 0].mean()


def adapt(params, method):
    return jlora.adapt(params, method, key=jax.random.key(1), fn=model, args=(IDS,))


def lifted_step(method, stacked: bool):
    """(value_and_grad of the lifted model, its arguments)."""
    adapted = adapt(make_params(stacked), method)
    lifted = jlora.lift(model, on_materialize="error")
    step = jax.value_and_grad(lambda trainable, adapted, ids: lifted(adapted.bind(trainable), ids))
    return step, (adapted.trainable, adapted.replace(trainable=None), IDS)


def floor_step(stacked: bool):
    """The frozen model: a gradient that passes through every layer and is of no weight."""
    step = jax.value_and_grad(lambda offset, params, ids: model(params, ids, offset=offset))
    return step, (jnp.zeros(DIM), make_params(stacked), IDS)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def lora_by_hand(x, w, a, b, scale):
    return x @ w + scale * (x @ a) @ b


def _forward(x, w, a, b, scale):
    h = scale * (x @ a)
    return x @ w + h @ b, (x, w, a, b, h)


def _backward(scale, residuals, dy):
    x, w, a, b, h = residuals
    ds = scale * (dy @ b.T)
    sum_over_tokens = lambda u, v: jnp.einsum("bti,bto->io", u, v)
    return dy @ w.T + ds @ a.T, None, sum_over_tokens(x, ds), sum_over_tokens(h, dy)


lora_by_hand.defvjp(_forward, _backward)


def by_hand_step(stacked: bool):
    """The model with LoRA written into it."""
    params = make_params(stacked)
    stack = (LAYERS,) if stacked else ()
    pair = lambda shape: (jnp.ones((*stack, shape[0], RANK)), jnp.zeros((*stack, RANK, shape[1])))
    pairs = {name: pair(shape) for name, shape in SHAPES.items()}
    pairs = pairs if stacked else [pairs] * LAYERS

    def loss(pairs, params, ids):
        join = lambda pairs, layer: {name: (layer[name], *pairs[name]) for name in layer}
        layers = join(pairs, params["layers"]) if stacked else list(map(join, pairs, params["layers"]))
        return model(params | {"layers": layers}, ids, linear=lambda x, wab: lora_by_hand(x, *wab, 2.0))

    return jax.value_and_grad(loss), (pairs, params, IDS)


@functools.cache
def step_of(kind: str, stacked: bool):
    """(step, its arguments): "floor", "hand", "full" or a method of `METHODS`."""
    if kind == "floor":
        return floor_step(stacked)
    if kind == "hand":
        return by_hand_step(stacked)
    if kind == "full":
        return jax.value_and_grad(model), (make_params(stacked), IDS)
    return lifted_step(METHODS[kind], stacked)


@functools.cache
def traced(kind: str, stacked: bool = False):
    step, args = step_of(kind, stacked)
    return jax.make_jaxpr(step)(*args).jaxpr


@functools.cache
def compiled(kind: str, stacked: bool = False):
    step, args = step_of(kind, stacked)
    return jax.jit(step).lower(*args).compile()


METHODS = {"lora": jlora.LoRA(RANK), "dora": jlora.DoRA(RANK), "vera": jlora.VeRA(RANK)}


def products(jaxpr) -> list[tuple[tuple[int, ...], float]]:
    """(shape of the result, FLOPs) of every matrix product, scans multiplied out."""
    out = []
    for eqn, repeat in equations(jaxpr):
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            shape = eqn.outvars[0].aval.shape
            size = math.prod(eqn.invars[0].aval.shape[axis] for axis in contracted)
            out.append((shape, 2.0 * math.prod(shape) * size * repeat))
    return out


def flops(jaxpr) -> float:
    return sum(count for _, count in products(jaxpr))


def of_frozen_shape(jaxpr) -> list:
    return [shape for shape, _ in products(jaxpr) if shape in FROZEN]


def temporary(program) -> int:
    return program.memory_analysis().temp_size_in_bytes


def test_flops_are_those_of_the_frozen_model_and_the_adapters():
    count = lambda kind: compiled(kind).cost_analysis()["flops"]
    assert count("lora") <= 1.02 * (count("floor") + ADAPTER_FLOPS)
    assert count("lora") <= 1.02 * count("hand")
    assert count("lora") < 0.9 * count("full")


@pytest.mark.parametrize("stacked", [False, True], ids=["unrolled", "scanned"])
def test_products_are_those_of_the_frozen_model_and_the_adapters(stacked):
    # Of the jaxpr: exact for a scan as well. Its checkpoint runs the forward again, the adapters' 2 T r (in + out) too.
    count = lambda kind: flops(traced(kind, stacked))
    terms = ADAPTER_FLOPS * (4 / 3 if stacked else 1)
    assert count("lora") <= count("floor") + terms
    assert count("lora") <= count("hand")


@pytest.mark.parametrize("stacked", [False, True], ids=["unrolled", "scanned"])
def test_temporary_memory_is_that_of_a_hand_written_layer(stacked):
    assert temporary(compiled("lora", stacked)) <= 1.05 * temporary(compiled("hand", stacked))


@pytest.mark.parametrize("stacked", [False, True], ids=["unrolled", "scanned"])
@pytest.mark.parametrize("kind", METHODS)
def test_no_product_has_the_shape_of_a_frozen_weight(kind, stacked):
    assert of_frozen_shape(traced(kind, stacked)) == []
    text = compiled(kind, stacked).as_text()
    in_hlo = {tuple(map(int, shape.split(","))) for shape in re.findall(r" = \w+\[([\d,]+)\]\S* dot\(", text)}
    assert in_hlo, "the text of the program is read in vain"
    assert not in_hlo & FROZEN
    assert set(of_frozen_shape(traced("full", stacked))) >= {(DIM, DIM), (DIM, FFN)}, "the walk is blind"


def test_dora_norms_take_no_temporary_of_the_weight():
    n_in, n_out, rank = 256, 384, 4
    params = {"kernel": jax.random.normal(jax.random.key(0), (n_in, n_out))}
    adapted = jlora.adapt(params, jlora.DoRA(rank), key=jax.random.key(1))
    lifted = jlora.lift(lambda params, x: jnp.square(x @ params["kernel"]).sum(), on_materialize="error")
    step = jax.value_and_grad(lambda trainable, adapted, x: lifted(adapted.bind(trainable), x))
    program = jax.jit(step).lower(adapted.trainable, adapted, jnp.ones((8, n_in))).compile()
    assert temporary(program) < 4 * n_in * n_out / 2


@pytest.mark.parametrize("differentiated", [False, True])
def test_vera_closes_over_the_shared_pair(differentiated):
    rank = 5
    step, args = lifted_step(jlora.VeRA(rank), stacked=True)
    adapted = args[1].replace(trainable=args[0])
    lifted = jlora.lift(model, on_materialize="error")
    jaxpr = jax.make_jaxpr(step)(*args) if differentiated else jax.make_jaxpr(lifted)(adapted.bind(), IDS)
    scans = [eqn for eqn, _ in equations(jaxpr.jaxpr) if eqn.primitive.name == "scan"]
    shared = {(FFN, rank), (rank, FFN)}
    assert len(scans) == 1 + differentiated
    for scan in scans:
        n_consts = scan.params["num_consts"]
        shapes = [v.aval.shape for v in scan.invars]
        assert shared <= set(shapes[:n_consts])
        assert not {(LAYERS, *shape) for shape in shared} & set(shapes[n_consts:])


def test_a_jitted_step_is_traced_and_compiled_once():
    traces = 0

    def counted(params, ids):
        nonlocal traces
        traces += 1
        return model(params, ids)

    adapted = adapt(make_params(stacked=True), METHODS["lora"])
    lifted = jlora.lift(counted)

    @jax.jit
    def step(adapted, ids):
        grads = jax.grad(lambda trainable: lifted(adapted.bind(trainable), ids))(adapted.trainable)
        return adapted.replace(trainable=jax.tree.map(lambda p, g: p - 0.1 * g, adapted.trainable, grads))

    for _ in range(3):
        adapted = step(adapted, IDS)
    assert step._cache_size() == 1
    assert traces == 1
    again = adapt(make_params(stacked=True), jlora.LoRA(RANK))  # equal configuration, equal structure
    step(again, IDS)
    assert step._cache_size() == 1


def test_eager_calls_do_not_trace_again():
    traces = 0

    def counted(params, ids):
        nonlocal traces
        traces += 1
        return model(params, ids)

    adapted = adapt(make_params(stacked=True), METHODS["lora"])
    lifted = jlora.lift(counted)
    for _ in range(3):
        lifted(adapted.bind(), IDS)
    assert traces == 1
    grad = jax.grad(lambda trainable: lifted(adapted.bind(trainable), IDS))
    moved = grad(adapted.trainable)
    grad(jax.tree.map(jnp.add, adapted.trainable, moved))
    assert traces == 1
    lifted(adapted.bind(), IDS[:1])
    assert traces == 2  # another shape
