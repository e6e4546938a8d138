"""ALLoRA: its gradients by the formula however a weight is used, what the optimizer's approximation misses, its cost,
and its files."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jlora
import jlora.io

pytestmark = pytest.mark.usefixtures("x64")
RANDOM = np.random.default_rng(0)
X, W, C = (RANDOM.normal(size=shape) for shape in ((2, 5, 10), (10, 6), (2, 5, 6)))
A, B = RANDOM.normal(size=(10, 3)), RANDOM.normal(size=(3, 6)) * np.geomspace(0.01, 10, 6)
KEY = jax.random.key(0)


def linear(params, x):
    return x @ params["w"]


def setting(fn=linear, w=W, **options):
    adapted = jlora.adapt({"w": w}, jlora.ALLoRA(3, **options), "w", key=KEY)
    trainable = {"w": jlora.Factors(jnp.asarray(A), jnp.asarray(B), adapted.trainable["w"].scale)}
    lifted = jlora.lift(fn, on_materialize="silent")
    return trainable, lambda trainable, *args: lifted(adapted.bind(trainable), *args)


def written(g: np.ndarray, s: float = 1.0, eta: float = 2.0) -> tuple[np.ndarray, np.ndarray]:
    """The gradients of A and B for a gradient ``g`` of the weight, column by column."""
    rates = np.array([1 / np.sqrt(np.linalg.norm(s * A @ B[:, j]) + 1 / eta**2) for j in range(6)])
    return s * g @ np.diag(rates) @ B.T, s * A.T @ g @ np.diag(rates)


@pytest.mark.parametrize("options, s, eta", [({}, 1.0, 2.0), (dict(alpha=6.0, eta=0.7), 2.0, 0.7)])
def test_gradients_by_the_formula(options, s, eta):
    trainable, f = setting(**options)
    y, gradients = jax.vjp(f, trainable, jnp.asarray(X))
    got, got_x = gradients(jnp.asarray(C))
    x, c = X.reshape(-1, 10), C.reshape(-1, 6)
    a, b = written(x.T @ c, s, eta)
    np.testing.assert_allclose(y.reshape(-1, 6), x @ (W + s * A @ B), rtol=1e-12)
    np.testing.assert_allclose(got["w"].a, a, rtol=1e-11)
    np.testing.assert_allclose(got["w"].b, b, rtol=1e-11)
    np.testing.assert_allclose(got_x.reshape(-1, 10), c @ (W + s * A @ B).T, rtol=1e-11)


USES = {  # all of them sum(x W * c)
    "transposed": lambda params, x, c: jnp.sum((c @ params["w"].T) * x),
    "arithmetic": lambda params, x, c: jnp.sum((x @ (2.0 * params["w"])) * c) / 2.0,
    "cut_inputs": lambda params, x, c: jnp.sum((x[..., :4] @ params["w"][:4] + x[..., 4:] @ params["w"][4:]) * c),
    "cut_outputs": lambda params, x, c: sum(
        jnp.sum((x @ params["w"][:, part]) * c[..., part]) for part in (slice(2), slice(2, 6))
    ),
}


@pytest.mark.parametrize("use", USES)
def test_gradients_of_other_uses(use):
    """Formed or not, whole or in parts: the weight's gradient reaches the factors by the same rule."""
    trainable, f = setting(USES[use])
    got, got_x = jax.jit(jax.grad(f, (0, 1)))(trainable, X, C)
    x, c = X.reshape(-1, 10), C.reshape(-1, 6)
    a, b = written(x.T @ c)
    np.testing.assert_allclose(got["w"].a, a, rtol=1e-11)
    np.testing.assert_allclose(got["w"].b, b, rtol=1e-11)
    np.testing.assert_allclose(got_x.reshape(-1, 10), c @ (W + A @ B).T, rtol=1e-11)


def test_gradients_of_lookups():
    ids = np.array([[1, 4, 4], [0, 9, 1]])
    c = RANDOM.normal(size=(2, 3, 6))
    trainable, f = setting(lambda params, ids: params["w"][ids])
    got = jax.grad(lambda t: jnp.sum(f(t, ids) * c))(trainable)
    g = np.zeros((10, 6))
    np.add.at(g, ids.reshape(-1), c.reshape(-1, 6))
    a, b = written(g)
    np.testing.assert_allclose(got["w"].a, a, rtol=1e-11, atol=1e-14)
    np.testing.assert_allclose(got["w"].b, b, rtol=1e-11, atol=1e-14)


def test_at_the_start_it_is_lora_with_gradients_eta_times_as_large():
    loss = lambda adapted: lambda t: jnp.sum(jnp.sin(jlora.lift(linear)(adapted.bind(t), X)))
    ours = jlora.adapt({"w": W}, jlora.ALLoRA(3, eta=1.7), key=KEY)
    lora = jlora.adapt({"w": W}, jlora.LoRA(3, 3.0), key=KEY)
    got, wanted = (jax.grad(loss(adapted))(adapted.trainable)["w"] for adapted in (ours, lora))
    np.testing.assert_allclose(got.b, 1.7 * wanted.b, rtol=1e-12)
    assert not np.any(got.a)


def test_what_the_optimizer_approximates():
    """B's gradient it has exactly; A's where all channels have one rate, and here they do not."""
    trainable, f = setting()
    exact = jax.grad(lambda t: jnp.sum(f(t, X) * C))(trainable)["w"]
    lora = jlora.adapt({"w": W}, jlora.LoRA(3, 3.0), key=KEY)
    plain = jax.grad(lambda t: jnp.sum(jlora.lift(linear)(lora.bind(t), X) * C))(trainable)
    tx = jlora.optim.scale_by_allora_approx(2.0)
    near = tx.update(plain, tx.init(trainable), trainable)[0]["w"]
    np.testing.assert_allclose(near.b, exact.b, rtol=1e-11)
    assert np.linalg.norm(near.a - exact.a) > np.linalg.norm(exact.a)  # B's columns are a thousandfold apart

    even = {"w": jlora.Factors(jnp.asarray(A), jnp.asarray(A[:6].T) * 0)}
    near = tx.update(plain, tx.init(even), even)[0]["w"]
    np.testing.assert_allclose(near.a, 2.0 * plain["w"].a, rtol=1e-12)


@pytest.mark.optimized
def test_costs_one_product_more_than_lora():
    """Compiled, forward and backward: LoRA's FLOPs, those of ybar and B once more (2 T r out), and the norms."""
    t, n_in, n_out, r = 256, 96, 64, 8
    x, w = jnp.ones((t, n_in), jnp.float32), jnp.ones((n_in, n_out), jnp.float32)

    def flops(method: jlora.LoRA) -> float:
        adapted = jlora.adapt({"w": w}, method, key=KEY)
        loss = lambda t, x: jnp.sum(jnp.square(jlora.lift(linear)(adapted.bind(t), x)))
        compiled = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(adapted.trainable, x).compile()
        return compiled.cost_analysis()["flops"]

    more = flops(jlora.ALLoRA(r)) - flops(jlora.LoRA(r))
    assert 2 * t * r * n_out < more < 2 * t * r * n_out + 2 * r * r * (n_in + n_out) + 8 * t * n_out


def test_learns_as_a_method():
    """B leaves zero eta times as fast under gradient descent."""
    steps = []
    for method in (jlora.LoRA(3, 3.0), jlora.ALLoRA(3)):
        adapted = jlora.adapt({"w": W}, method, key=KEY)
        loss = lambda t, adapted=adapted: jnp.mean((jlora.lift(linear)(adapted.bind(t), X) - C) ** 2)
        tx, trainable = optax.sgd(0.1), adapted.trainable
        updates, _ = tx.update(jax.grad(loss)(trainable), tx.init(trainable), trainable)
        steps.append(updates["w"].b)
    np.testing.assert_allclose(steps[1], 2.0 * steps[0], rtol=1e-12)


def test_files_are_those_of_lora(tmp_path):
    pair, params = (jnp.asarray(A), jnp.asarray(B)), {"layer": {"kernel": W}}
    for name, method in (("a", jlora.ALLoRA(3, rslora=True)), ("b", jlora.ALLoRA(3, 6.0))):
        adapted = jlora.adapt(params, method, key=KEY)
        adapted = adapted.replace(trainable={"layer/kernel": jlora.Factors(*pair, method.scale)})
        jlora.io.save_peft(adapted, tmp_path / name)
        again = jlora.io.load_peft(tmp_path / name, params)
        assert type(again.sites["layer/kernel"].method) is jlora.LoRA
        wanted = {"layer": {"kernel": W + (2.0 if name == "b" else 1.0) * A @ B}}
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5), jlora.merge(again), wanted)


def test_refusals():
    with pytest.raises(ValueError, match=r"ALLoRA\(eta=0\): a positive number"):
        jlora.ALLoRA(eta=0)
    with pytest.raises(ValueError, match="no ranks and alphas"):
        jlora.ALLoRA(2, ranks=(2, 1))
