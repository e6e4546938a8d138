"""Flax on top of jlora: a train state for linen, and a module for nnx whose adapters are ``nnx.LoRAParam``.

Nothing here is needed to adapt a Flax model, ``adapt`` and ``lift`` do that; these fit the habits of Flax programs.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from flax import nnx

from jlora.adapt import Adapted, adapt
from jlora.lift import lift
from jlora.lift import usage as trace_usage
from jlora.merge import merge


class TrainState(flax.struct.PyTreeNode):
    """``flax.training.train_state.TrainState`` for adapted parameters.

    >>> state = jlora.flax.TrainState.create(apply_fn=model.apply, adapted=adapted, tx=optax.adamw(1e-3))
    >>> loss_fn = lambda trainable: loss(state.apply_fn({"params": state.bind(trainable)}, x), y)
    >>> state = state.apply_gradients(grads=jax.grad(loss_fn)(state.trainable))

    Attributes:
      step: number of updates so far.
      adapted: the base and its adapters. A pytree: pass the whole state to jitted functions, so that the base is an
        argument of theirs and not a constant.
      opt_state: of the trainable parameters alone.
      apply_fn: the model's apply, lifted.
      tx: any optax transformation.
    """

    step: jax.Array
    adapted: Adapted
    opt_state: optax.OptState
    apply_fn: Callable = flax.struct.field(pytree_node=False)
    tx: optax.GradientTransformation = flax.struct.field(pytree_node=False)

    @classmethod
    def create(
        cls, *, apply_fn: Callable, adapted: Adapted, tx: optax.GradientTransformation, **kwargs
    ) -> "TrainState":
        """A state at step 0. ``apply_fn`` is the model's own: it is lifted here."""
        opt_state = tx.init(adapted.trainable)
        step = jnp.zeros((), jnp.int32)  # a Python 0 would compile the first step for itself
        return cls(step=step, adapted=adapted, opt_state=opt_state, apply_fn=lift(apply_fn), tx=tx, **kwargs)

    @property
    def trainable(self) -> dict[str, Any]:
        return self.adapted.trainable

    def bind(self, trainable: dict[str, Any] | None = None, context: Mapping[str, Any] | None = None) -> Any:
        """See ``Adapted.bind``."""
        return self.adapted.bind(trainable, context)

    def apply_gradients(self, *, grads: Any, **kwargs: Any) -> "TrainState":
        """One update. ``grads`` is the gradient with respect to ``state.trainable``."""
        updates, opt_state = self.tx.update(grads, self.opt_state, self.trainable)
        adapted = self.adapted.replace(trainable=optax.apply_updates(self.trainable, updates))
        return self.replace(step=self.step + 1, adapted=adapted, opt_state=opt_state, **kwargs)


class AdaptedModule(nnx.Module):
    """An nnx model with adapters, called like the model.

    >>> model = jlora.flax.AdaptedModule(model, jlora.LoRA(8), args=(x,), key=jax.random.key(0))
    >>> optimizer = nnx.Optimizer(model, optax.adamw(1e-3), wrt=nnx.LoRAParam)
    >>> grads = nnx.grad(loss_fn, argnums=nnx.DiffState(0, nnx.LoRAParam))(model, x, y)
    >>> optimizer.update(model, grads)

    The adapters are variables of type ``nnx.LoRAParam``, one for each array. In Flax ``LoRAParam`` is a kind of
    ``Param``: the filter ``nnx.Param`` would select the base with them, ``nnx.LoRAParam`` the adapters alone. Whatever
    else the model holds (batch statistics, random streams, caches) is updated by a call as it is in the model.

    Attributes:
      model: the model that was given, its parameters frozen by convention: they are the base.
      adapters: path -> that leaf's trainable parameters, ``LoRAParam`` for arrays.
    """

    def __init__(
        self,
        model: nnx.Module,
        methods: Any,
        targets: Any = None,
        *,
        key: jax.Array,
        args: Sequence[Any] = (),
        **adapt_kwargs: Any,
    ):
        """``args`` are arguments of a call of the model, which is traced once to learn how it uses its weights; the
        rest is as for ``jlora.adapt``."""
        graphdef, params, rest = nnx.split(model, nnx.Param, ...)
        usage = adapt_kwargs.pop("usage", None)
        if usage is None and args:
            usage = trace_usage(lambda p, rest, *args: nnx.merge(graphdef, p, rest)(*args), params, rest, *args)
        adapted = adapt(params, methods, targets, key=key, usage=usage, **adapt_kwargs)
        self.model = model
        self.adapters = nnx.data(jax.tree.map(nnx.LoRAParam, adapted.trainable))
        self.buffers = nnx.data(jax.tree.map(nnx.Variable, adapted.frozen))
        self._sites = nnx.static(adapted._sites)

    def adapted(self) -> Adapted:
        """The same as jlora's container, for ``summary``, ``merge``, ``jlora.io``. Its base is the params' state."""
        is_variable = lambda x: isinstance(x, nnx.Variable)
        values = lambda tree: jax.tree.map(lambda v: v.get_value(), dict(tree), is_leaf=is_variable)
        return Adapted(nnx.state(self.model, nnx.Param), values(self.adapters), values(self.buffers), self._sites)

    def merged(self) -> nnx.Module:
        """A copy of the plain model with the adapters folded in."""
        graphdef, _, rest = nnx.split(self.model, nnx.Param, ...)
        return nnx.merge(graphdef, merge(self.adapted()), rest, copy=True)

    def __call__(self, *args: Any, context: Mapping[str, Any] | None = None, **kwargs: Any) -> Any:
        """The model's call. ``context`` as in ``Adapted.bind``."""
        graphdef, _, rest = nnx.split(self.model, nnx.Param, ...)

        def call(params, rest, *args, **kwargs):
            model = nnx.merge(graphdef, params, rest)
            out = model(*args, **kwargs)
            return out, nnx.state(model, nnx.Not(nnx.Param))

        out, rest = lift(call)(self.adapted().bind(context=context), rest, *args, **kwargs)
        nnx.update(self.model, rest)
        return out
