"""The diagnostics of whole adapters against the merged model's weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from jlora import diagnostics as d

pytestmark = pytest.mark.usefixtures("x64")


def normal(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def model(p, x):
    x, _ = jax.lax.scan(lambda x, w: (x + jnp.tanh(x @ w), None), x, p["layers"]["q_proj"]["kernel"])
    return (x @ p["up"]["kernel"] + p["up"]["bias"]) @ p["down"]["kernel"]


X = np.random.default_rng(9).normal(size=(2, 5, 12))
METHODS = {
    "layers/q_proj/kernel": jlora.LoRA(3, alpha=6),
    "up/kernel": jlora.DoRA(2),
    "up/bias": jlora.Full(),
    "down/kernel": jlora.NOBLE(2),
}


def adapted(seed: int = 0, methods=METHODS) -> jlora.Adapted:
    params = {
        "layers": {"q_proj": {"kernel": normal(1, 3, 12, 12) / 4}},
        "up": {"kernel": normal(2, 12, 20) / 4, "bias": normal(3, 20)},
        "down": {"kernel": normal(4, 20, 6)},
    }
    made = jlora.adapt(params, methods, fn=model, args=(jnp.asarray(X),), key=jax.random.key(seed))
    leaves, treedef = jax.tree.flatten(made.trainable)
    leaves = [leaf + 0.3 * normal(seed + 10 + i, *leaf.shape) for i, leaf in enumerate(leaves)]
    return made.replace(trainable=jax.tree.unflatten(treedef, leaves))


def without_noble() -> dict:
    return {path: method for path, method in METHODS.items() if path != "down/kernel"}


def test_report():
    a = adapted(methods=without_noble())
    report, merged = d.report(a, intruders=4, threshold=0.7), jlora.merge(a)
    assert list(report.leaves) == ["layers/q_proj/kernel", "up/kernel"]
    for path, change in report.leaves.items():
        before, after = (dict(jlora.paths.flatten(tree)[0])[path] for tree in (a.base, merged))
        delta = np.asarray(after - before)
        s = np.linalg.svd(delta, compute_uv=False)
        np.testing.assert_allclose(change.spectrum, s[..., : change.spectrum.shape[-1]], atol=1e-10)
        np.testing.assert_allclose(change.norm, np.linalg.norm(delta, axis=(-2, -1)))
        np.testing.assert_allclose(change.relative, change.norm / np.linalg.norm(before, axis=(-2, -1)))
        for index in np.ndindex(before.shape[:-2]):
            alone = d.intruders(before[index], after[index], k=4, threshold=0.7)
            np.testing.assert_allclose(change.intruders.similarity[index], alone.similarity, atol=1e-8)
    assert report.leaves["layers/q_proj/kernel"].spectrum.shape == (3, 3)
    assert report.leaves["layers/q_proj/kernel"].intruders.count.shape == (3,)
    lines = str(report).splitlines()
    assert lines[2].startswith("layers/q_proj/kernel[0]  LoRA") and len(lines) == 2 + 3 + 1 + 1
    assert lines[-1].startswith("up/bias: Full, trained as a whole, moved by")
    assert d.plot(report).axes[0].get_title() == "size of the change / size of the weight"


def test_what_has_no_spectrum_is_named():
    report = d.report(adapted())
    assert "acts on activations" in report.others["down/kernel"] and report.leaves["up/kernel"].intruders is None
    start = jlora.adapt(
        {"w": normal(0, 6, 4)}, jlora.LoRA(2), "w", axes={"w": jlora.Axes((0,), (1,))}, key=jax.random.key(0)
    )
    change = d.report(start).leaves["w"]
    assert change.norm == 0 and change.effective_rank() == 0 and change.energy_rank() == 0


def test_similarity():
    a, b = adapted(0), adapted(50)
    same = d.similarity(a, a, rank=2)
    assert list(same.leaves) == ["layers/q_proj/kernel", "up/kernel"]
    assert all(np.allclose(phi[..., -1, -1], 1) for phi in same.leaves.values())
    got = d.similarity(a, b, of="out", rank=2).leaves["layers/q_proj/kernel"]
    for i in range(3):
        q, r = (np.linalg.svd(x.trainable["layers/q_proj/kernel"].product()[i])[2][:2].T for x in (a, b))
        assert got[i, 1, 1] == pytest.approx(np.trace(q @ q.T @ r @ r.T) / 2)
    assert "layers/q_proj/kernel[2]" in str(same)


def test_attention_norms_are_those_of_the_inputs():
    a = adapted(methods=without_noble())
    got = d.attention_norms(model, a, (jnp.asarray(X),), 5, head_dim=16)
    assert list(got) == ["layers/q_proj/kernel"]
    x, merged = X, jlora.merge(a)["layers"]["q_proj"]["kernel"]
    for i in range(3):
        base = a.base["layers"]["q_proj"]["kernel"][i]
        wanted = d.entry_norms(x, base, merged[i] - base, head_dim=16)
        for name in ("base", "change", "adapted", "ratio"):
            assert getattr(got["layers/q_proj/kernel"], name)[i] == pytest.approx(float(getattr(wanted, name)))
        x = x + np.tanh(x @ merged[i])


def test_bad_adapters():
    a = adapted()
    broken = a.trainable["layers/q_proj/kernel"]
    broken = jlora.Factors(broken.a.at[1, 0, 0].set(jnp.nan), broken.b, broken.scale)
    broken = a.replace(trainable=a.trainable | {"layers/q_proj/kernel": broken})
    for call in (d.report, lambda broken: d.similarity(broken, a, rank=2)):
        with pytest.raises(ValueError, match=r"'layers/q_proj/kernel'\[1\]: the change is not finite"):
            call(broken)
    fewer = adapted(methods={"up/kernel": jlora.LoRA(2)})
    with pytest.raises(ValueError, match="only one of them has down/kernel, layers/q_proj/kernel"):
        d.similarity(a, fewer)
    with pytest.raises(ValueError, match="is no pair, so say how many directions: rank=8"):
        d.similarity(a, a)
    with pytest.raises(ValueError, match="No adapted leaf is a query's or key's"):
        d.attention_norms(model, fewer, (jnp.asarray(X),), 5)
    with pytest.raises(ValueError, match="without numbers"):
        d.report(jax.eval_shape(lambda: a))
    with pytest.raises(ValueError, match="a positive number of vectors"):
        d.report(a, intruders=3, threshold=2.0)
