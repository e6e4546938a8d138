"""EGGROLL against the same strategy with every perturbation formed."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jlora
from jlora import evolve


def normal(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def params():
    return {
        "layers": normal(0, 3, 6, 6) / 3,
        "head": {"kernel": normal(1, 4, 6) / 3, "bias": normal(2, 4)},
        "n": jnp.ones(2),
    }


def model(p, x):
    x, _ = jax.lax.scan(lambda x, w: (x + jnp.tanh(x @ w), None), x, p["layers"])
    return x @ p["head"]["kernel"].T + p["head"]["bias"]


def search(**options):
    tree = params()
    options = dict(population=8, sigma=0.1, rank=2, whole="**/bias", fn=model, args=(jnp.ones((5, 6)),)) | options
    return tree, evolve.eggroll(tree, targets=["layers", "**/kernel"], **options)


def formed(s: evolve.EGGROLL, tree, members: evolve.Members):
    """The perturbed parameters of every member, as arrays."""
    every = jlora.lift(lambda p: jax.tree.map(lambda leaf: leaf * 1, p), on_materialize="silent")
    return jax.vmap(lambda member: every(s.perturb(tree, member)))(members)


def test_perturbations(x64):
    tree, s = search()
    members = s.ask(jax.random.key(1))
    moved = jax.tree.map(lambda new, old: np.asarray(new - old), formed(s, tree, members), tree)
    for leaf in jax.tree.leaves(moved):
        np.testing.assert_allclose(leaf[::2] + leaf[1::2], 0, atol=1e-12)  # the two of a pair
    assert not moved["n"].any() and len(np.unique(moved["layers"].round(9)[:, 0, 0, 0])) == 8
    ranks = np.linalg.matrix_rank(moved["layers"], tol=1e-9)
    assert (ranks == 2).all() and not np.allclose(moved["layers"][0, 0], moved["layers"][0, 1])
    again = formed(s, tree, s.ask(jax.random.key(1)))
    jax.tree.map(np.testing.assert_array_equal, again, formed(s, tree, members))
    many = search(population=1000)[1]
    moved = jax.tree.map(lambda new, old: np.asarray(new - old), formed(many, tree, many.ask(jax.random.key(0))), tree)
    for leaf in (moved["layers"], moved["head"]["kernel"], moved["head"]["bias"]):
        assert np.std(leaf, axis=0) == pytest.approx(0.1, abs=0.025)


@pytest.mark.parametrize("options", [{}, {"scale": "textbook"}, {"groups": 4}, {"shape": False}], ids=str)
def test_update_is_the_sum_over_formed_perturbations(x64, options):
    tree, s = search(**options)
    members, f = s.ask(jax.random.key(2)), np.random.default_rng(0).normal(size=8) ** 3
    z = f
    if options.get("shape", True):
        means = np.repeat(f.reshape(2, 4).mean(1), 4) if "groups" in options else f.mean()
        z = (f - means) / np.sqrt(f.var() + 1e-5)
    size = -1 / (8 * 0.1**2) if options.get("scale") == "textbook" else -(8**0.5) / 8
    each = jax.tree.map(lambda new, old: new - old, formed(s, tree, members), tree)
    wanted = jax.tree.map(lambda e: size * np.tensordot(z, e, 1), each)
    got = s.tell(members, f, tree)
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, atol=1e-12), got, wanted)
    assert jax.tree.map(jnp.shape, got) == jax.tree.map(jnp.shape, tree)


@pytest.mark.parametrize("rank", [1, 3])
def test_expectation_is_the_gradient_of_a_linear_fitness(x64, rank):
    """E[E tr(G^T E)] / sigma^2 = G. The estimate's deviation is that of the dense estimator at the same N, and a little
    more; both are summed here."""
    w, g, n = {"w": normal(3, 5, 4)}, normal(4, 5, 4), 40_000
    s = evolve.eggroll(w, population=n, sigma=0.3, rank=rank, targets="w", scale="textbook", shape=False)
    members = s.ask(jax.random.key(0))
    each = (formed(s, w, members)["w"] - w["w"]) / 0.3
    fitness = 0.3 * jnp.einsum("nio,io->n", each, g)  # less that of w itself, which antithetic pairs take away
    got = -s.tell(members, fitness, w)["w"]
    noise = np.random.default_rng(1).normal(size=(n // 2, 5, 4))
    dense = np.einsum("nio,n->io", noise, np.einsum("nio,io->n", noise, g)) / (n // 2)
    deviation = float(jnp.linalg.norm(g)) / (n // 2) ** 0.5
    assert np.abs(dense - g).max() < 6 * deviation and np.abs(got - g).max() < 12 * deviation
    np.testing.assert_allclose(got, jnp.einsum("nio,n->io", each, fitness) / n / 0.3, atol=1e-9)


@pytest.mark.optimized
def test_a_member_costs_what_its_factors_do():
    """FLOPs of the compiled evaluation: the base's for every row, the two thin products, and drawing the normals."""
    n, rows, n_in, n_out = 32, 64, 128, 96
    w, x = {"w": jnp.ones((n_in, n_out))}, jnp.ones((rows, n_in))
    s = evolve.eggroll(w, population=n, sigma=0.1, targets="w")
    apply = jlora.lift(lambda p, x: x @ p["w"], on_materialize="error")
    evaluate = lambda w, members: jax.vmap(lambda member: jnp.sum(apply(s.perturb(w, member), x) ** 2))(members)
    compiled = jax.jit(evaluate).lower(w, s.ask(jax.random.key(0))).compile()
    base, thin = 2 * n * rows * n_in * n_out, 2 * n * rows * (n_in + n_out)
    drawing = 100 * n * (n_in + n_out)
    # The base's product of the same rows for all members may be taken once.
    assert base / n <= compiled.cost_analysis()["flops"] < base / n + 3 * thin + drawing + 8 * n * rows * n_out
    assert f"[{n},{n_in},{n_out}]" not in compiled.as_text()
    tell = jax.jit(s.tell).lower(s.ask(jax.random.key(0)), jnp.ones(n), w).compile()
    assert f"[{n // 2},{n_in},{n_out}]" not in tell.as_text() and f"[{n},{n_in},{n_out}]" not in tell.as_text()
    assert tell.cost_analysis()["flops"] < 2 * n / 2 * n_in * n_out + 2 * drawing + 8 * n_in * n_out


def test_learns_without_a_gradient():
    """A network of steps, whose gradient is zero everywhere, in one compilation."""
    x, w = jnp.asarray(normal(5, 128, 6), jnp.float32), jnp.asarray(normal(6, 6, 3), jnp.float32)
    y = jnp.argmax(x @ w, -1)
    tree = {"a": jnp.asarray(normal(7, 6, 24) / 3, jnp.float32), "b": jnp.asarray(normal(8, 24, 3) / 5, jnp.float32)}
    net = lambda p, x: jnp.sign(x @ p["a"]) @ p["b"]
    accuracy = lambda out: jnp.mean(jnp.argmax(out, -1) == y)
    s, apply, tx, traces = (
        evolve.eggroll(tree, population=128, sigma=0.15, targets="**"),
        jlora.lift(net),
        optax.adam(0.05),
        [],
    )

    @jax.jit
    def step(tree, state, key):
        traces.append(1)
        members = s.ask(key)
        fitness = jax.vmap(lambda member: accuracy(apply(s.perturb(tree, member), x)))(members)
        updates, state = tx.update(s.tell(members, fitness, tree), state, tree)
        return optax.apply_updates(tree, updates), state

    before, state = accuracy(net(tree, x)), tx.init(tree)
    for i in range(100):
        tree, state = step(tree, state, jax.random.key(i))
    assert before < 0.6 and accuracy(net(tree, x)) > 0.85 and len(traces) == 1


def test_an_adapter_is_searched_as_any_tree(x64):
    adapted = jlora.adapt(
        {"w": normal(0, 6, 5)}, jlora.LoRA(3), "w", axes={"w": jlora.Axes((0,), (1,))}, key=jax.random.key(0)
    )
    x = normal(1, 4, 6)
    inner = jlora.lift(lambda p, x: x @ p["w"], implementation="plain")  # in which the factors' products are seen
    fn = lambda trainable, x: inner(adapted.bind(trainable), x)
    s = evolve.eggroll(adapted.trainable, population=4, sigma=0.1, targets=["w/a", "w/b"], fn=fn, args=(x,))
    members = s.ask(jax.random.key(0))
    got = jax.vmap(lambda member: jlora.lift(fn, on_materialize="error")(s.perturb(adapted.trainable, member), x))(
        members
    )
    wanted = jax.vmap(lambda trainable: fn(trainable, x))(formed(s, adapted.trainable, members))
    np.testing.assert_allclose(got, wanted, atol=1e-12)
    update = s.tell(members, jnp.arange(4.0), adapted.trainable)
    assert jax.tree.structure(update) == jax.tree.structure(adapted.trainable) and update["w"].a.any()


def test_errors():
    tree, s = search()
    members = s.ask(jax.random.key(0))
    with pytest.raises(ValueError, match=r"One fitness a member is wanted, \(8,\); got \(4,\)"):
        s.tell(members, jnp.ones(4), tree)
    with pytest.raises(ValueError, match="fitness of member 3 is nan"):
        s.tell(members, jnp.ones(8).at[3].set(jnp.nan), tree)
    for options, match in (
        ({"population": 7}, "positive even number"),
        ({"sigma": 0.0}, "a positive number"),
        ({"scale": "unit"}, "'reference' or 'textbook'"),
        ({"groups": 3}, "does not divide"),
        ({"whole": "**/gain"}, "matches no leaf that targets leave over"),
        ({"rank": 5}, "choose a rank of at most 4"),
    ):
        with pytest.raises(ValueError, match=match):
            search(**options)
    quantized = jlora.quant.quantize(
        {"w": jnp.ones((64, 64))}, jlora.quant.NF4, "w", axes={"w": jlora.Axes((0,), (1,))}
    )
    with pytest.raises(ValueError, match=r"search adapted\.trainable"):
        evolve.eggroll(quantized, population=2, sigma=0.1, targets="w")
