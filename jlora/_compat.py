"""What differs between versions of JAX, in one place. Everything here is public API of the version it is for."""

from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp

# Names that a primitive has had; rules are registered under every one of them.
REMAT_NAMES = ("remat2", "checkpoint", "remat")
JIT_NAMES = ("jit", "pjit")


def closed(jaxpr: Any) -> jex.ClosedJaxpr:
    """A sub-jaxpr parameter as a closed jaxpr: some primitives hold it open."""
    return jaxpr if isinstance(jaxpr, jex.ClosedJaxpr) else jex.ClosedJaxpr(jaxpr, ())


def sub_jaxpr(invars, outvars, eqns) -> jex.ClosedJaxpr:
    """The closed jaxpr of some equations."""
    effects = frozenset().union(*(eqn.effects for eqn in eqns))
    info = jex.DebugInfo("lift", "jlora.lift", None, None)
    return jex.ClosedJaxpr(jex.Jaxpr((), invars, outvars, eqns, effects, info), ())


def manual_axes(params: dict[str, Any]) -> frozenset:
    """The mesh axes that a shard_map equation makes manual."""
    return frozenset(params["newly_manual_axes"] if "newly_manual_axes" in params else params["manual_axes"])


def is_staging() -> bool:
    """Whether operations are being recorded (under ``jit``, in the body of a scan) rather than executed: a constant is
    then a tracer as well. Under ``grad`` or ``vmap`` alone they are executed."""
    return isinstance(jnp.zeros(()), jax.core.Tracer)
