"""AdaMSS against PEFT's numbers from PEFT's own start, and its groups."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from recorded import arrays, cases

import jlora
from jlora.io import load_peft, save_peft
from jlora.methods.adamss import clusters

pytestmark = pytest.mark.usefixtures("x64")

LAYERS = ("lin0", "lin1")


@pytest.mark.parametrize("case", cases("adamss.npz"))
def test_peft_from_its_own_start(case: str) -> None:
    """A bias is one more row of the weight to PEFT, and so it is here."""
    z = arrays("adamss.npz", case)
    config, biased = json.loads(str(z["config_json"])), "base/lin0.bias" in z
    subspaces, r = config["num_subspaces"], config["subspace_rank"]
    part = lambda prefix, layer, name: [z[f"{prefix}{layer}.adamss_{name}.{k}"] for k in range(subspaces)]

    def of(prefix: str) -> dict:
        trees = {}
        for layer in LAYERS:
            a, b, at = part(prefix, layer, "A"), part(prefix, layer, "B"), z[f"frozen/{layer}.scatter_index"]
            rows = np.zeros((len(at), r))
            rows[at] = np.concatenate(b)
            trees[f"{layer}/kernel"] = {"a": jnp.asarray(np.stack(a).swapaxes(1, 2)), "b": jnp.asarray(rows)}
        return trees

    rows = lambda prefix, layer: np.concatenate(
        [z[f"{prefix}{layer}.weight"].T, *([z[f"{prefix}{layer}.bias"][None]] if biased else [])]
    )
    base, frozen = {layer: {"kernel": jnp.asarray(rows("base/", layer))} for layer in LAYERS}, {}
    for layer in LAYERS:
        sizes = [len(b) for b in part("adapter/base_model.model.", layer, "B")]
        group_of = np.zeros(sum(sizes), np.int32)
        group_of[z[f"frozen/{layer}.scatter_index"]] = np.repeat(np.arange(subspaces), sizes)
        basis = jnp.asarray(z[f"adapter/base_model.model.{layer}.adamss_newB"].T)
        frozen[f"{layer}/kernel"] = {"basis": basis, "group_of": jnp.asarray(group_of)}
    rank = frozen["lin0/kernel"]["basis"].shape[1]
    method = jlora.AdaMSS(rank, subspaces=subspaces, subspace_rank=r)
    adapted = jlora.adapt(base, method, "**/kernel", key=jax.random.key(0))
    assert jax.tree.map(jnp.shape, frozen) == jax.tree.map(jnp.shape, adapted.frozen)
    assert jax.tree.map(jnp.shape, of("init/base_model.model.")) == jax.tree.map(jnp.shape, adapted.trainable)
    adapted = adapted.replace(frozen=frozen)

    def model(p, x):
        one = lambda x: jnp.concatenate([x, jnp.ones((len(x), 1))], axis=1) if biased else x
        return one(jnp.tanh(one(x) @ p["lin0"]["kernel"])) @ p["lin1"]["kernel"]

    apply, x = jlora.lift(model, on_materialize="error"), jnp.asarray(z["x"])
    loss = jax.jit(lambda t, x, y: 0.5 * jnp.sum(jnp.square(apply(adapted.bind(t), x) - y)))
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-10 * max(1.0, np.abs(b).max()))
    start = of("adapter/base_model.model.")
    close(apply(adapted.bind(of("init/base_model.model.")), x), z["y_init"])
    close(apply(adapted.bind(start), x), z["y"])
    for layer, leaves in jlora.merge(adapted.replace(trainable=start)).items():
        close(leaves["kernel"], rows("merged/", layer))
    grads, grad_x = jax.grad(loss, (0, 1))(start, x, 0.0)
    jax.tree.map(close, grads, of("grad/"))
    close(grad_x, z["grad_x"])
    for wanted in z["train/losses"]:
        close(loss(start, x, z["train/target"]) / z["train/target"].size, wanted)
        last, mean = start, jax.grad(loss)(start, x, z["train/target"])
        start = jax.tree.map(lambda p, g: p - z["train/lr"] * g / z["train/target"].size, start, mean)
    jax.tree.map(close, last, of("train/final/"))


def test_groups_and_the_start_of_their_directions() -> None:
    rng = np.random.default_rng(0)
    wanted = rng.integers(0, 4, 60)
    rows = 3 * rng.normal(size=(4, 5))[wanted] + 0.05 * rng.normal(size=(60, 5))
    found = np.asarray(clusters(jnp.asarray(rows), 4))
    assert len(set(zip(wanted, found, strict=True))) == 4
    assert len(set(np.asarray(clusters(jnp.ones((6, 2)), 3)))) == 1  # some empty, and no nan

    w = jnp.asarray(rng.normal(size=(9, 12)))
    adapted = jlora.adapt({"w": w}, jlora.AdaMSS(6, subspaces=3, subspace_rank=2), "w", key=jax.random.key(0))
    np.testing.assert_array_equal(jlora.merge(adapted)["w"], w)
    basis, group_of = (np.asarray(adapted.frozen["w"][name]) for name in ("basis", "group_of"))
    u, s, _ = np.linalg.svd(w)
    np.testing.assert_allclose(np.abs(basis.T @ u[:, :6]), np.eye(6), atol=1e-10)
    for k in range(3):
        own = (np.asarray(w).T @ basis / s[:6])[group_of == k]  # rows of Q, with the signs of the basis
        values = np.linalg.svd(own, compute_uv=False)
        a = np.asarray(adapted.trainable["w"]["a"][k])
        np.testing.assert_allclose(a.T @ a, np.eye(2), atol=1e-12)
        np.testing.assert_allclose(np.linalg.norm(own @ a), np.linalg.norm(values[:2]), atol=1e-10)


def test_what_does_not_fit() -> None:
    params = {"w": jnp.ones((6, 4))}
    with pytest.raises(ValueError, match="at most 4 subspaces"):
        jlora.adapt(params, jlora.AdaMSS(2, subspaces=5), "w", key=jax.random.key(0))
    with pytest.raises(ValueError, match="above the 4 singular vectors"):
        jlora.adapt(params, jlora.AdaMSS(subspaces=2, subspace_rank=5), "w", key=jax.random.key(0))
    wide = jlora.adapt(params, jlora.AdaMSS(subspaces=2), "w", key=jax.random.key(0))
    assert wide.trainable["w"]["a"].shape == (2, 4, 1)


def test_a_file_is_refused(tmp_path: pathlib.Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "ADAMSS"}))
    with pytest.raises(ValueError, match="does not say which outputs a subspace has.* Merge it"):
        load_peft(tmp_path, {"w": {"kernel": jnp.ones((6, 4))}})
    adapted = jlora.adapt({"w": {"kernel": jnp.ones((6, 4))}}, jlora.AdaMSS(2, subspaces=2), key=jax.random.key(0))
    with pytest.raises(ValueError, match="'w/kernel' has AdaMSS, which is not written .* clusters .* --to lora"):
        save_peft(adapted, tmp_path / "out")
    lora, report = jlora.to_lora(adapted, rank=2)  # what the error says to do
    assert report.error == 0
    save_peft(lora, tmp_path / "out")
