r"""FRoD: all directions of a weight are turned and rescaled, sparsely, in a basis that its group has in common.

FRoD: Full-Rank Efficient Fine-Tuning with Rotational Degrees for Fast Convergence, 2026.
https://doi.org/10.1609/aaai.v40i31.39813

.. math::  W' = V\,(\Lambda + S)\,U^\top = W + V\,(\Lambda - \Lambda_0 + S)\,U^\top, \qquad W = V \Lambda_0 U^\top

W [in, out]; V [in, in] frozen, one for all matrices of the group with as many inputs; U [out, in] frozen, a matrix's
own, its columns of length 1; Lambda = diag(l), l [in], and the K entries s of S [in, in] trained, K = density in^2, at
places off the diagonal that are drawn once for V, frozen. Trained: in + K a matrix.

* V is of a joint decomposition: the transposes W_i^T above each other are Q R, of which W_i^T has Q_i R; with the
  eigenvectors Z of the mean of (Q_i^T Q_i + ridge)^-1, V = R^T Z. Its columns go from what all matrices have in common
  to what few have. Where all outputs together are fewer than the inputs, V are the right singular vectors of those. The
  rows of V^-1 W have the lengths l_0 and the directions U^T.
* l starts at l_0 and s at 0. The change is added to W, so the output starts as the base's exactly, in any precision;
  PEFT puts the product in the place of W, which it is to float32 rounding.
* A direction that a matrix does not have (l_0 is zero to rounding) has a column of U that is zero, and does not train.
  PEFT scales what rounding leaves there to length 1, and its files, which are read, not written, are taken as that.
* The basis exists once for a group, U for each matrix: it takes the memory of a second base. Few rows of activations
  meet V, the core and U^T one after the other, T in (2 in + out) for T rows; for more the change is formed,
  2 in^2 out, and formed again for the gradient.
* PEFT has a group for each kind of projection ("self_attn.q_proj" in all layers): one rule for each, with names in
  ``group``. The paper's code was not seen: the formulas are PEFT's.
* Starting takes the decomposition of all weights of a group at once, O(matrices out in^2).

When to use it: a full-rank change with fewer trained numbers than LoRA's, where memory for the frozen U is there.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jlora.methods.base import Method, Site, laid_as, require, unsharded
from jlora.weight import Context, Dot, Params


@dataclasses.dataclass(frozen=True)
class FRoD(Method):
    """Full-rank adaptation with rotational degrees. The formula and shapes are at the top of this file.

    Parameters of a leaf: trainable ``{"diagonal": [*stack, in], "values": [*stack, K]}``, frozen ``{"u": [*stack, in,
    out], "start": [*stack, in]}``, U^T and l_0; of the group: frozen ``{"16": {"v": [in, in], "places": [2, K]}, ...}``
    for each number of inputs, the places as rows above columns, int32.

    Attributes:
      density: share of the entries of S that are trained, at least one if it is not 0. More is closer to full
        fine-tuning.
      ridge: what is added before inverting. Larger for layers that are much alike.
      group: name of what shares V.
    """

    density: float = 0.01
    _: dataclasses.KW_ONLY
    ridge: float = 1e-3
    group: str = "frod"

    needs_weights = True
    sliceable = frozenset({"in", "out"})

    def __post_init__(self):
        require(0.0 <= self.density <= 1.0, f"FRoD(density={self.density}): a share in [0, 1] is wanted, 0.01 usually.")
        require(self.ridge > 0.0, f"FRoD(ridge={self.ridge}): a positive number is wanted, 0.001 usually.")

    def entries(self, n_in: int) -> int:
        """K."""
        n_places = n_in * (n_in - 1)
        return min(max(int(n_in * n_in * self.density), 1 if self.density else 0), n_places)

    def check(self, site: Site) -> str | None:
        if site.axes.kind == "embedding":
            return "FRoD's basis is one of inputs, and those of an embedding are its vocabulary; use LoRA for this leaf"
        return None

    def init_shared(self, key: Any, sites: dict[str, Site], dtype: Any, *, weights: dict[str, Array]) -> Params:
        alike: dict[int, list[Array]] = {}
        for path, site in sites.items():
            alike.setdefault(site.canonical_shape[1], []).append(unsharded(weights[path]))
        return Params(
            frozen={
                str(n_in): {
                    "v": basis(of, self.ridge).astype(dtype),
                    "places": self._places(jax.random.fold_in(key, n_in), n_in),
                }
                for n_in, of in alike.items()
            }
        )

    def _places(self, key: Any, n_in: int) -> Int[Array, "2 K"]:
        """Where the largest of so many random numbers are as there are places off the diagonal."""
        count = self.entries(n_in)
        chosen = jnp.sort(jax.lax.top_k(jax.random.bits(key, (n_in * (n_in - 1),)), count)[1]).astype(jnp.int32)
        rows, columns = chosen // max(n_in - 1, 1), chosen % max(n_in - 1, 1)
        return jnp.stack([rows, columns + (columns >= rows)])

    def init(self, key: Any, w: Array, site: Site, dtype: Any, *, shared: Any) -> Params:
        v = shared[str(w.shape[0])]["v"]
        wide = jnp.promote_types(v.dtype, jnp.float32)
        with jax.default_matmul_precision("highest"):
            c = jnp.linalg.solve(v.astype(wide), unsharded(w).astype(wide))
        c = jnp.where(jnp.isfinite(c), c, 0.0)
        lengths = jnp.linalg.norm(c, axis=1)
        there = lengths > 100 * jnp.finfo(wide).eps * jnp.max(lengths)
        u = jnp.where(there, 1 / jnp.where(there, lengths, 1.0), 0.0)[:, None] * c
        diagonal = lengths.astype(dtype)
        values = jnp.zeros((self.entries(w.shape[0]),), dtype)
        return Params({"diagonal": diagonal, "values": values}, {"u": u.astype(dtype), "start": diagonal})

    def count(self, site: Site) -> int:
        n_in = site.canonical_shape[1]
        return site.stack * (n_in + self.entries(n_in))

    def dims(self, p: Params) -> Params:
        shared = None
        if p.shared is not None:
            own = str(p.trainable["diagonal"].shape[-1])
            shared = {key: {"v": "in rank" if key == own else "_ _", "places": "_ _"} for key in p.shared}
        return Params(
            trainable={"diagonal": "rank", "values": "_"}, frozen={"u": "rank out", "start": "rank"}, shared=shared
        )

    def basis_of(self, p: Params) -> Float[Array, "in n"]:
        """V, of a weight that was sliced perhaps: all its columns, of the rows that are there."""
        diagonal = p.trainable["diagonal"]
        return p.shared[str(diagonal.shape[-1])]["v"].astype(diagonal.dtype)

    def core(self, w: Array, p: Params) -> Float[Array, "n n"]:
        """Lambda - Lambda_0 + S."""
        diagonal, values = p.trainable["diagonal"], p.trainable["values"]
        rows, columns = p.shared[str(diagonal.shape[-1])]["places"]
        return jnp.diag(diagonal - p.frozen["start"].astype(diagonal.dtype)).at[rows, columns].add(values)

    def weight(self, w: Float[Array, "in out"], p: Params) -> Float[Array, "in out"]:
        v, core = self.basis_of(p), self.core(w, p)
        a, b = laid_as(w, v, core @ p.frozen["u"].astype(core.dtype))
        return (w + a @ b).astype(w.dtype)

    def forward(self, dot: Dot, x: Array, w: Array, p: Params, ctx: Context) -> tuple[Array, Any]:
        n_in, n_out = w.shape[-2:]
        n = p.trainable["diagonal"].shape[-1]
        rows = x.size // max(x.shape[-1], 1)
        if dot.features_last(x) and rows * (n_in + n + n_out) <= (n_in + n) * n_out:
            h = dot.mix(dot.inner(x, self.basis_of(p)), self.core(w, p))
            y = dot(x, w)
            return y + dot.outer(h, p.frozen["u"]).astype(y.dtype), None
        return jax.checkpoint(lambda x, w, p: dot(x, dot.per_matrix(self.weight, w, p)))(x, w, p), None

    def forward_transposed(self, dot: Dot, x: Array, wt: Float[Array, "out in"], p: Params, ctx: Context) -> Array:
        return jax.checkpoint(lambda x, wt, p: dot(x, self.weight(wt.T, p).T))(x, wt, p)

    def describe(self) -> dict[str, str]:
        return {"rank": "full"}


def basis(weights: list[Float[Array, "*stack in out"]], ridge: float) -> Float[Array, "in in"]:
    """V of matrices with as many inputs."""
    wide = jnp.result_type(jnp.float32, *weights)
    each = [w.astype(wide).reshape(-1, *w.shape[-2:]).swapaxes(1, 2) for w in weights]  # [matrices, out, in]
    n_in = each[0].shape[2]
    above = jnp.concatenate([w.reshape(-1, n_in) for w in each])
    with jax.default_matmul_precision("highest"):
        if len(above) < n_in:
            return jnp.linalg.svd(above, full_matrices=True)[2].T
        q, r = jnp.linalg.qr(above)
        # Inputs that no matrix uses would leave V singular.
        d = jnp.abs(jnp.diag(r))
        floor = jnp.finfo(wide).eps * n_in * jnp.max(d)
        r = r + jnp.diag(jnp.where(d > floor, 0.0, jnp.where(floor > 0, floor, 1.0)))
        eye, total, start = jnp.eye(n_in, dtype=wide), jnp.zeros((n_in, n_in), wide), 0
        add = lambda total, q: (total + jnp.linalg.inv(q.T @ q + ridge * eye), None)  # one after the other: n^2 each
        for w in each:
            stop = start + w.shape[0] * w.shape[1]
            total, _ = jax.lax.scan(add, total, q[start:stop].reshape(w.shape))
            start = stop
        _, z = jnp.linalg.eigh(total / sum(len(w) for w in each))
        return r.T @ z
