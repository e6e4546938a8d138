"""TeRA against the sum over its network, its rank, and VeRA as the smallest one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from jlora.methods.tera import split

apply = jlora.lift(lambda params, x: x @ params["kernel"], on_materialize="error")
transposed = jlora.lift(lambda params, x: x @ params["kernel"].T, on_materialize="error")


def adapted(method, shape=(12, 10)):
    rng = np.random.default_rng(0)
    params = {"kernel": jnp.asarray(rng.normal(size=shape)), "wide": {"kernel": jnp.asarray(rng.normal(size=(20, 30)))}}
    tera = jlora.adapt(params, method, "**", key=jax.random.key(0))
    d = jnp.asarray(rng.normal(size=tera.trainable["kernel"]["d"].shape))
    return tera.replace(trainable=tera.trainable | {"kernel": {"d": d}}), d, rng


def test_is_the_network(x64):
    tera, d, rng = adapted(jlora.TeRA(3))
    g = tera.frozen["tera"]
    f1, f2, h1, h2 = (
        g["f1"][:3] * d[0],
        g["f2"][:4] * d[1],
        d[2][:, None] * g["h1"][:, :2],
        d[3][:, None] * g["h2"][:, :5],
    )
    core = g["core"].reshape(3, 3, 3, 3)
    change = np.einsum("ip,jq,pqst,sk,tl->ijkl", f1, f2, core, h1, h2).reshape(12, 10)
    wanted = tera.base["kernel"] + change
    np.testing.assert_allclose(jlora.merge(tera)["kernel"], wanted, atol=1e-12)
    x, y = (jnp.asarray(rng.normal(size=(2, n))) for n in (12, 10))
    np.testing.assert_allclose(apply(tera.bind(), x), x @ wanted, atol=1e-12)
    np.testing.assert_allclose(transposed(tera.bind(), y), y @ wanted.T, atol=1e-12)


@pytest.mark.parametrize(
    ("modes", "rank", "wanted"), [((2, 2), 2, 4), ((1, 3), 2, 2), ((3, 1), 2, 2), ((1, 1), 5, 5), ((2, 2), 9, 10)]
)
def test_rank_of_the_change(modes, rank, wanted, x64):
    tera, _, rng = adapted(jlora.TeRA(rank, modes=modes))
    change = np.asarray(jlora.merge(tera)["kernel"] - tera.base["kernel"])
    assert np.linalg.matrix_rank(change) == wanted
    x = jnp.asarray(rng.normal(size=(2, 12)))
    np.testing.assert_allclose(apply(tera.bind(), x), x @ (tera.base["kernel"] + change), atol=1e-11)


def test_one_mode_a_side_is_vera_with_a_core(x64):
    tera, d, _ = adapted(jlora.TeRA(4, modes=(1, 1)))
    g = tera.frozen["tera"]
    pair = (g["f1"][:12] * d[0]) @ g["core"] @ (d[1][:, None] * g["h1"][:, :10])
    np.testing.assert_allclose(jlora.merge(tera)["kernel"], tera.base["kernel"] + pair, atol=1e-12)


def test_sizes_and_refusals():
    assert split(4096, 2) == (64, 64) and split(24, 3) == (2, 3, 4) and split(7, 2) == (1, 7)
    assert all(np.prod(split(n, m)) == n for n in range(1, 200) for m in (1, 2, 3, 4))
    with pytest.raises(ValueError, match="rank of at most 128"):
        jlora.TeRA(200)
