"""The helpers for Flax: a linen train state, and an nnx module whose adapters are LoRAParams."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import jlora
import jlora.flax

X = jax.random.normal(jax.random.key(0), (16, 5))
Y = jnp.sin(X @ jax.random.normal(jax.random.key(1), (5, 3)))


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(nn.tanh(nn.Dense(8)(x)))


def test_train_state_trains_the_adapters_and_nothing_else():
    model = Linen()
    params = model.init(jax.random.key(2), X)["params"]
    adapted = jlora.adapt(params, jlora.LoRA(2), key=jax.random.key(3))
    state = jlora.flax.TrainState.create(apply_fn=model.apply, adapted=adapted, tx=optax.adam(1e-2))

    @jax.jit
    def step(state):
        def loss_fn(trainable):
            return jnp.mean(jnp.square(state.apply_fn({"params": state.bind(trainable)}, X) - Y))

        loss, grads = jax.value_and_grad(loss_fn)(state.trainable)
        return state.apply_gradients(grads=grads), loss

    losses = []
    for _ in range(30):
        state, loss = step(state)
        losses.append(float(loss))
    assert losses[-1] < 0.7 * losses[0]
    assert state.step == 30
    assert step._cache_size() == 1, "a step must not compile again"
    jax.tree.map(np.testing.assert_array_equal, state.adapted.base, params)


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(5, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.down = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
        return self.down(self.dropout(self.norm(nnx.tanh(self.up(x)))))


def test_nnx_optimizer_with_lora_param_trains_the_adapters_only():
    base = Nnx(nnx.Rngs(0))
    kernel = np.asarray(base.up.kernel[...])
    model = jlora.flax.AdaptedModule(base, jlora.LoRA(2), args=(X,), key=jax.random.key(0))
    assert set(model.adapters) == {"up/kernel", "down/kernel"}
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.LoRAParam)

    @nnx.jit
    def step(model, optimizer):
        loss_fn = lambda model: jnp.mean(jnp.square(model(X) - Y))
        loss, grads = nnx.value_and_grad(loss_fn, argnums=nnx.DiffState(0, nnx.LoRAParam))(model)
        optimizer.update(model, grads)
        return loss

    mean = np.asarray(model.model.norm.mean[...])
    losses = [float(step(model, optimizer)) for _ in range(60)]
    assert np.mean(losses[-10:]) < 0.8 * np.mean(losses[:10])
    np.testing.assert_array_equal(model.model.up.kernel[...], kernel)
    assert not np.allclose(model.model.norm.mean[...], mean), "batch statistics are the model's own and move"

    model.eval()
    merged = model.merged()
    merged.eval()
    np.testing.assert_allclose(model(X), merged(X), rtol=1e-4, atol=1e-5)
    assert not np.allclose(merged.up.kernel[...], kernel)
    assert "up/kernel" in jlora.summary(model.adapted())
