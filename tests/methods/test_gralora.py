"""GraLoRA against the formula of its blocks: what they come to, their rank, and what they cost."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora

pytestmark = pytest.mark.usefixtures("x64")


def adapted(method, n_in: int, n_out: int) -> jlora.Adapted:
    rng = np.random.default_rng(0)
    made = jlora.adapt({"w": jnp.asarray(rng.normal(size=(n_in, n_out)))}, method, "w", key=jax.random.key(0))
    return made.replace(trainable=jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape)), made.trainable))


@pytest.mark.parametrize("hybrid", [0, 3])
def test_is_the_blocks(hybrid: int) -> None:
    k, r, n_in, n_out = 3, 6, 12, 18
    made = adapted(jlora.GraLoRA(r, alpha=2.0, blocks=k, hybrid_rank=hybrid), n_in, n_out)
    own = jax.tree.map(np.asarray, made.trainable["w"])
    delta = np.zeros((n_in, n_out))
    cut = lambda i, n: slice(i * n // k, (i + 1) * n // k)
    for j in range(k):
        for i in range(k):
            delta[cut(j, n_in), cut(i, n_out)] = own["a"][cut(j, n_in), cut(i, r)] @ own["b"][cut(j, r), cut(i, n_out)]
    assert np.linalg.matrix_rank(delta) > r
    if hybrid:
        delta += own["hybrid"].a @ own["hybrid"].b
    wanted = np.asarray(made.base["w"]) + 2.0 / (r + hybrid) * delta
    np.testing.assert_allclose(jlora.merge(made)["w"], wanted, atol=1e-12)
    got = jlora.lift(lambda p, x: x @ p["w"], on_materialize="error")(made.bind(), jnp.eye(n_in))
    np.testing.assert_allclose(got, wanted, atol=1e-12)


@pytest.mark.optimized
def test_costs_what_lora_costs() -> None:
    x, flops = jnp.ones((64, 128)), []
    for method in (jlora.LoRA(16), jlora.GraLoRA(16, blocks=4)):
        lifted = jlora.lift(lambda p, x: x @ p["w"], on_materialize="error")
        made = adapted(method, 128, 128)
        run = jax.jit(lambda made, x, lifted=lifted: lifted(made.bind(), x)).lower(made, x).compile()
        flops.append(run.cost_analysis()["flops"])
    assert flops[1] < 1.05 * flops[0]


def test_bad_sizes() -> None:
    with pytest.raises(ValueError, match="multiple of the blocks"):
        jlora.GraLoRA(5, blocks=2)
    with pytest.raises(ValueError, match=r"blocks=4 does not divide both in = 12 and out = 18; 2 does"):
        adapted(jlora.GraLoRA(4, blocks=4), 12, 18)
