"""Which matrices keep an adapter: DiffoRA's gates and LoRA-drop's outputs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from models import adapt, data, effective, loss_of, model, moved, train

import jlora

pytestmark = pytest.mark.usefixtures("x64")
close = functools.partial(np.testing.assert_allclose, atol=1e-10)


def test_diffora_follows_the_gradient_of_its_gates() -> None:
    """What it takes from the gradient of e, against the loss differentiated by the gates themselves."""
    ranks = jlora.rank.diffora(0.4, total_steps=3, learning_rate=0.5)
    logits, adapted = ranks.init(moved(adapt(jlora.AdaLoRA(3))))
    logits = jax.tree.map(lambda w: w + 0.3, logits)

    def loss(logits):
        gate = lambda path, w: {"mask": jnp.broadcast_to(jax.nn.sigmoid(w)[..., None], (*w.shape, 3))}
        return loss_of(adapted.trainable, adapted.replace(frozen={path: gate(path, w) for path, w in logits.items()}))

    wanted = jax.jit(jax.grad(loss))(logits)
    gated = adapted.replace(
        frozen={p: {"mask": jnp.full((*w.shape, 3), jax.nn.sigmoid(0.3))} for p, w in logits.items()}
    )
    grads = jax.jit(jax.grad(loss_of))(gated.trainable, gated)
    new, now = jax.jit(ranks.update)(logits, gated, grads, 0)
    largest = max(float(jnp.abs(g).max()) for g in wanted.values())
    for path, w in new.items():
        close(w, logits[path] - 0.5 * wanted[path] / largest)
        close(now.frozen[path]["mask"], np.broadcast_to(jax.nn.sigmoid(w)[..., None], (*w.shape, 3)))


def test_diffora_chooses() -> None:
    ranks, tx = jlora.rank.diffora(0.4, total_steps=4), optax.adam(0.03)
    state, adapted = ranks.init(moved(adapt(jlora.AdaLoRA(3))))
    close(adapted.frozen["layers"]["mask"], np.full((3, 3), 0.5))
    masked, opt_state, state, traces = train(adapted, tx, tx.init(adapted.trainable), ranks, state, range(6))
    assert traces == 1
    flat = np.concatenate([np.ravel(w) for w in state.values()])
    kept = np.concatenate([np.ravel(own["mask"][..., 0]) for own in masked.frozen.values()])
    assert set(np.flatnonzero(kept)) == set(np.argsort(-flat)[:2]) and set(kept) == {0.0, 1.0}
    repacked = jlora.repack(masked)
    jax.tree.map(close, effective(masked), effective(repacked))
    with pytest.raises(ValueError, match="keeps none of 5 matrices"):
        jlora.rank.diffora(0.1, total_steps=4).init(adapted)


def test_lora_drop() -> None:
    """The squares of what each adapter puts out, computed from the inputs that it met."""
    adapted, (x, _) = moved(adapt(jlora.LoRA(2))), data()
    plain = adapted.base
    stats = jlora.calibrate(model, plain, [x[:8], x[8:]], jlora.LoRA(2), "**", collect=("n", "xx"))
    inputs = [x, jnp.tanh(x @ plain["first"])]
    for w in plain["layers"]:
        inputs.append(jnp.tanh(inputs[-1] @ w))
    change = jax.tree.map(jnp.subtract, effective(adapted), plain)
    squares = np.array(
        [
            jnp.sum(jnp.square(h @ d))
            for h, d in zip(inputs, [change["first"], *change["layers"], change["last"]], strict=True)
        ]
    )
    wanted = squares / squares.sum()
    for share in (0.5, 0.9, 1.0):
        kept, found = jlora.rank.lora_drop(adapted, stats, share)
        close([found["first"], *found["layers"], found["last"]], wanted)
        ranked = np.sort(wanted)[::-1]
        number = int(np.searchsorted(np.cumsum(ranked), share - 1e-12)) + 1
        left = [np.any(np.asarray(own.b) != 0, axis=(-1, -2)).sum() for own in kept.trainable.values()]
        assert sum(left) == number
    with pytest.raises(ValueError, match="1 tokens are fewer than the rank, 2"):
        one = {path: own | {"n": jnp.ones_like(own["n"])} for path, own in stats.leaves.items()}
        jlora.rank.lora_drop(adapted, jlora.Calibration(one, 1))
    with pytest.raises(ValueError, match='collect=\\("n", "xx"\\)'):
        jlora.rank.lora_drop(adapted, jlora.Calibration({}, 1))
    with pytest.raises(ValueError, match="puts anything out"):
        jlora.rank.lora_drop(adapt(jlora.LoRA(2)), stats)
