"""What Q-GaLore adds to GaLore, as options of ``galore``: bases in 8 or 4 bits, and refreshes that become rare where
the subspace stays what it is.

Q-GaLore: Quantized GaLore with INT4 Projection and Layer-Adaptive Low-Rank Gradients. Zhang et al., 2024.
https://arxiv.org/abs/2407.08296
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from jlora.optim.projection import Basis, Plan, Source
from jlora.optim.quantized import Blocks, is_blocks
from jlora.storage import one_by_one
from jlora.weight import Axes

WINDOW = 5  # refreshes whose similarities are averaged


@dataclasses.dataclass(frozen=True)
class Quantized:
    """The basis of another source in blocks of 256 entries along r that share a magnitude, in 8 or 4 bits."""

    source: Source
    bits: int

    def _encode(self, basis: Basis) -> PyTree:
        return {side: Blocks.encode(p, f"int{self.bits}", -1, min(256, p.shape[-1])) for side, p in basis.items()}

    def _decode(self, plan: Plan, stored: PyTree) -> Basis:
        return jax.tree.map(lambda p: p.decode().astype(plan.dtype), stored, is_leaf=is_blocks)

    def init(self, plan: Plan) -> PyTree:
        return self._encode(self.source.init(plan))

    def refresh(self, plan: Plan, stored: PyTree, g: Array, count: Array) -> tuple[PyTree, None]:
        return self._encode(self.source.refresh(plan, self._decode(plan, stored), g, count)[0]), None

    def basis(self, plan: Plan, stored: PyTree, count: Array) -> Basis:
        return self._decode(plan, stored)

    def overlap(self, plan: Plan, new: PyTree, old: PyTree) -> Basis:
        return self.source.overlap(plan, self._decode(plan, new), self._decode(plan, old))


@dataclasses.dataclass(frozen=True)
class Lazy:
    """Another source, each matrix renewed when its own period has passed. The period doubles at a refresh when, on the
    average of the last five, the first basis vector was similar to the one before: the absolute value of their cosine.

    The periods are multiples of the first one, so only then is it looked which matrices are due; those of a stack are
    gone through one by one, so that what is not due is not computed.
    """

    source: Source
    similarity: float
    period: int

    def init(self, plan: Plan) -> PyTree:
        if any(axis is not None for axis in plan.spec[:-2]):
            raise ValueError(
                f"lazy goes through the matrices of a stack one by one, which their sharding {plan.spec} does not "
                "allow: leave the stack's axes unsharded, or leave lazy out."
            )
        full = lambda shape, value, dtype: plan.put(jnp.full(shape, value, dtype), (None,) * len(shape))
        return {
            "basis": self.source.init(plan),
            "period": full(plan.stack, self.period, jnp.int32),
            "similar": full((*plan.stack, WINDOW), -jnp.inf, jnp.float32),  # no mean before there are five
        }

    def refresh(self, plan: Plan, stored: PyTree, g: Array, count: Array) -> tuple[PyTree, None]:
        alone = dataclasses.replace(plan, axes=Axes((0,), (1,)), shape=g.shape[-2:], spec=plan.spec[-2:])

        def one(matrix: tuple[PyTree, Array]) -> PyTree:
            stored, g = matrix
            due = count % stored["period"] == 0
            return jax.lax.cond(due, lambda: self._renewed(alone, stored, g, count), lambda: stored)

        return one_by_one(one, plan.stack)((stored, g)), None

    def _renewed(self, plan: Plan, stored: PyTree, g: Array, count: Array) -> PyTree:
        new, _ = self.source.refresh(plan, stored["basis"], g, count)
        first = lambda basis: plan.whole(next(iter(self.source.basis(plan, basis, count).values())))[:, 0]
        a, b = (first(basis).astype(jnp.float32) for basis in (stored["basis"], new))
        cosine = jnp.abs(a @ b) / jnp.maximum(jnp.linalg.norm(a) * jnp.linalg.norm(b), 1e-12)
        similar = jnp.concatenate([stored["similar"][1:], cosine[None]])
        similar = jnp.where(count == 0, stored["similar"], similar)  # the first one has none before it
        longer = jnp.minimum(stored["period"], 2**29) * 2
        period = jnp.where(similar.mean() >= self.similarity, longer, stored["period"])
        return {"basis": new, "period": period, "similar": similar}

    def basis(self, plan: Plan, stored: PyTree, count: Array) -> Basis:
        return self.source.basis(plan, stored["basis"], count)

    def overlap(self, plan: Plan, new: PyTree, old: PyTree) -> Basis:
        return self.source.overlap(plan, new["basis"], old["basis"])
