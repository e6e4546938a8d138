"""The LoRA linear, `y = x W + s (x A) B`, as one function with interchangeable implementations.

With dropout it is `y = x W + s / (1 - p) ((m * x) A) B`, the mask m [..., in] zero with probability p. What follows
then holds with m * x in the branch, and m * (ds A^T) in dx.

Cost for T tokens (a multiplication and an addition count as 2; forward and backward) against the frozen layer alone:

    frozen layer      4 T in out
    this function     4 T in out + 6 T r (in + out)

The gradient written by hand keeps x and h = x A beside the parameters, and nothing of the size of y:

    u = dy B^T     ds = s u     dx = dy W^T + ds A^T     dA = x^T ds     dB = s h^T dy     d(scale) = sum(h * u)

Neither A B nor, for a frozen W, dW is ever formed. Where neither A nor W is trained (VeRA, LoRA-FA), x is not kept.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, PRNGKeyArray

from jlora.kernels.dropout import check_rate, keep_mask

IMPLEMENTATIONS = ("plain", "custom_vjp", "pallas", "pallas_interpret")


def lora_linear(
    x: Float[Array, "*tokens in"],
    w: Float[Array, "in out"],
    a: Float[Array, "in r"],
    b: Float[Array, "r out"],
    scale: float | Float[Array, ""],
    *,
    frozen_w: bool = True,
    implementation: str | None = None,
    precision: Any = None,
    preferred_element_type: Any = None,
    dropout: float = 0.0,
    key: PRNGKeyArray | None = None,
) -> Float[Array, "*tokens out"]:
    """A linear layer with a low-rank adapter: `y = x @ w + scale * (x @ a) @ b`.

    Products run in the result type of `x` and `w` and accumulate in float32 or wider. `a` and `b` may be wider than
    that (float32 masters under bfloat16 activations): they are cast inside, and their gradients come back in their
    own dtype, straight from the accumulator.

    **Arguments:**

    - `x`: activations, with any number of leading axes.
    - `w`: the layer's weight. It may be the transpose of a stored array; no layout is forced on it.
    - `a`, `b`: the factors.
    - `scale`: alpha / r. A Python number, or a scalar array, which may be traced and then has a gradient.
    - `frozen_w`: `w` is a constant of the differentiation, whatever the caller differentiates: its gradient is zero
        and no program contains the product that would compute it. Pass `False` where `w` is trained as well.
    - `implementation`:
        `"plain"`: the formula, differentiated by JAX. It defines the meaning, and is the only one with forward mode
        (`jvp`, `jacfwd`, `hessian`).
        `"custom_vjp"`: XLA products, with the gradient written by hand.
        `"pallas"`: fused TPU kernels, for bfloat16 and float32. The compiler partitions them with their operands; with
        explicit sharding, call it inside `jax.shard_map`.
        `"pallas_interpret"`: the same kernels emulated on any platform and in any dtype. For tests; it is slow. Under
        `jax.experimental.pallas.tpu.force_tpu_interpret_mode()` a TPU's memories and copies are simulated as well.
        `None` means `"custom_vjp"` on every platform, until the kernels have been timed on a TPU.
    - `precision`: as in `jax.lax.dot_general`; for every product, forward and backward.
    - `preferred_element_type`: dtype of the result. By default, the result type of `x` and `w`.
    - `dropout`, `key`: the rate at which the branch, and only it, sees zeros in the place of entries of `x`, the others
        being divided by `1 - dropout`; none without a key. The mask follows from the key alone and is the same in
        every implementation. XLA keeps it for the backward pass, a byte an entry. The TPU kernels make it a block at a
        time, wherever they want it, with keys of JAX's default generator and up to 2^32 entries of `x`; else they read
        it.

    **Returns:** `y`, with the leading axes of `x`.

    h = x A carries the name "lora_h": under `jax.checkpoint` with the policy `save_only_these_names("lora_h")` it is
    kept, r / in of the size of `x`, instead of being computed again.
    """
    x, w, a, b = (jnp.asarray(v) for v in (x, w, a, b))
    _check_shapes(x, w, a, b, scale)
    compute = jnp.result_type(x, w)
    pieces_class = _pieces_class(implementation, compute)
    if 0 in (x.size, w.size, a.size):
        pieces_class = Pieces  # an empty operand has nothing to put in a block
    pieces = pieces_class.of(compute, precision, preferred_element_type)
    scale = jnp.asarray(scale, pieces.accumulate)
    keep = None
    if key is not None and dropout:
        check_rate(dropout)
        pieces = dataclasses.replace(pieces, dropout=dropout)
        scale, keep = scale / (1 - dropout), pieces.keep(x, key)
    if implementation == "plain":
        return _plain(pieces, frozen_w, x, w, a, b, scale, keep)
    return _with_gradient(pieces, frozen_w, jax.typeof(x), *_varying_together(x, w, a, b, scale), keep)


def _varying_together(*arrays):
    """Inside `jax.shard_map`, mark all arrays as varying over the mesh axes that any of them varies over.

    JAX wants a hand-written gradient to vary exactly as its argument does. This cast's own gradient is the sum over the
    axes that are added, so that the factors' gradients are summed over the devices that share them.
    """
    axes = frozenset().union(*(jax.typeof(v).manual_axis_type.varying for v in arrays))
    added = [tuple(axes - jax.typeof(v).manual_axis_type.varying) for v in arrays]
    return [lax.pcast(v, new, to="varying") if new else v for v, new in zip(arrays, added, strict=True)]


def _check_shapes(x, w, a, b, scale) -> None:
    got = f"got x {x.shape}, w {w.shape}, a {a.shape}, b {b.shape}, scale {jnp.shape(scale)}"
    want = "want x [..., in], w [in, out], a [in, r], b [r, out] and a scalar scale"
    if x.ndim < 1 or not w.ndim == a.ndim == b.ndim == 2 or jnp.ndim(scale) != 0:
        raise ValueError(f"{got}; {want}. Stacked layers go through jax.vmap; several in or out axes are merged first.")
    if not (x.shape[-1] == w.shape[0] == a.shape[0] and a.shape[1] == b.shape[0] and w.shape[1] == b.shape[1]):
        raise ValueError(f"{got}, which do not fit together; {want}. A weight stored as [out, in] is passed as w.T.")


def _check_implementation(implementation: str | None, compute) -> None:
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        raise ValueError(f"got implementation={implementation!r}; want None or one of {', '.join(IMPLEMENTATIONS)}")
    if implementation != "pallas":
        return
    if jax.default_backend() != "tpu":
        raise ValueError(
            f"got implementation='pallas' on the {jax.default_backend()} platform; the kernels are written for TPU. "
            "Use None or 'custom_vjp' here, or 'pallas_interpret' to emulate the kernels in a test."
        )
    if compute not in (jnp.bfloat16, jnp.float32):
        raise ValueError(
            f"got implementation='pallas' with x and w of result type {compute}; the TPU kernels compute in bfloat16 "
            "or float32. Use None or 'custom_vjp'."
        )


def _pieces_class(implementation: str | None, compute) -> type[Pieces]:
    _check_implementation(implementation, compute)
    if implementation in (None, "plain", "custom_vjp"):
        return Pieces
    # Imported on demand: Pallas would be a large part of the time that `import jlora` takes.
    from jlora.kernels import lora_linear_tpu

    interpreted = implementation == "pallas_interpret"
    return lora_linear_tpu.InterpretedPieces if interpreted else lora_linear_tpu.PallasPieces


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pieces:
    """The products of the forward and of the backward pass, in XLA. The Pallas kernels override them.

    The leading axes of activations stay as they are. Merging them into one axis is no faster here (XLA does it after
    it has partitioned the program), and would make it gather the activations where two of them are sharded.

    Sums and multiples are written with `lax`: an operator is a jitted function of its own, and tracing one for new
    shapes takes four times as long as the equation itself.
    """

    compute: Any  # dtype of the operands of every product
    accumulate: Any  # dtype of the sums
    out: Any  # dtype of y
    precision: Any
    dropout: float = 0.0

    @classmethod
    def of(cls, compute, precision=None, preferred_element_type=None):
        """Those of products in ``compute``, the result type of x and w, which sum in float32 or wider."""
        if not jnp.issubdtype(compute, jnp.inexact):
            raise ValueError(f"got x and w of result type {compute}; one of the two must be floating point")
        out = jnp.dtype(compute if preferred_element_type is None else preferred_element_type)
        accumulate = jnp.promote_types(jnp.promote_types(compute, jnp.float32), out)
        return cls(compute=compute, accumulate=accumulate, out=out, precision=precision)

    def keep(self, x, key) -> Array:
        """What `keep` is for the other functions, where there is dropout: here the mask."""
        return keep_mask(key, self.dropout, x.shape)

    def kept(self, x, keep):
        """x, with zeros where it is dropped."""
        return x if keep is None else jnp.where(keep, x, jnp.zeros((), x.dtype))

    def forward(self, x, w, a, b, scale, keep=None) -> tuple[Float[Array, "*tokens out"], Float[Array, "*tokens r"]]:
        """(y, h): y in the output's dtype, h = x A in the accumulator's."""
        branch, h = self.branch(self.kept(x, keep), a, b, scale)
        return self.joined(self.base(x, w), branch), h

    def joined(self, base, branch) -> Float[Array, "*tokens out"]:
        return lax.convert_element_type(lax.add(base, branch), self.out)

    def base(self, x, w) -> Float[Array, "*tokens out"]:
        """x W."""
        return self.dot(x, w, -1, 0)

    def branch(self, x, a, b, scale) -> tuple[Float[Array, "*tokens out"], Float[Array, "*tokens r"]]:
        """(s h B, h)."""
        h = checkpoint_name(self.dot(x, a, -1, 0), "lora_h")
        # The scale goes on h, the smallest factor of the branch.
        return self.dot(lax.mul(scale, h), b, -1, 0), h

    def read_dy(self, dy, h, b) -> tuple[Float[Array, "*tokens r"], Float[Array, "r out"]]:
        """(u, h^T dy) with u = dy B^T: what is needed of dy for the factors."""
        return self.dot(dy, b, -1, 1, like=h), self.sum_over_tokens(h, dy, _explicit_sharding(b))

    def grad_a(self, x, ds, a, keep=None) -> Float[Array, "in r"]:
        """x^T ds, sharded as a is."""
        x = self.kept(x, keep)
        if 4 * a.shape[1] > a.shape[0]:  # a wide pair: transposing the result would cost more than it saves
            return self.sum_over_tokens(x, ds, _explicit_sharding(a))
        # On CPU, ds^T x is 4 to 9 times faster than x^T ds. XLA takes the transpose of a product into the product,
        # which undoes that; the barrier keeps it out.
        return lax.optimization_barrier(self.sum_over_tokens(ds, x, _explicit_sharding(a, reverse=True))).T

    def grad_x(self, dy, ds, w, a, x_type, keep=None) -> Float[Array, "*tokens in"]:
        """ds A^T + dy W^T, sharded as x is."""
        return lax.add(self.dot(dy, w, -1, 1, like=x_type), self.kept(self.dot(ds, a, -1, 1, like=x_type), keep))

    def grad_w(self, x, dy, w) -> Float[Array, "in out"]:
        """x^T dy, sharded as w is."""
        return self.sum_over_tokens(x, dy, _explicit_sharding(w))

    def grad_scale(self, h, u) -> Float[Array, ""]:
        """sum(h * u)."""
        products = lax.mul(lax.convert_element_type(h, u.dtype), u)
        return lax.reduce_sum(products, tuple(range(u.ndim)))

    def dot(self, lhs, rhs, lhs_axis: int, rhs_axis: int, like=None):
        """Contract one axis of each."""
        sharding = None if like is None else _explicit_sharding(like)
        return self._dot_general(lhs, rhs, (lhs_axis % lhs.ndim,), (rhs_axis % rhs.ndim,), sharding)

    def sum_over_tokens(self, lhs, rhs, sharding=None) -> Float[Array, "m n"]:
        """Contract all axes but the last."""
        axes = tuple(range(lhs.ndim - 1))
        return self._dot_general(lhs, rhs, axes, axes, sharding)

    def _dot_general(self, lhs, rhs, lhs_axes, rhs_axes, sharding=None):
        return lax.dot_general(
            lax.convert_element_type(lhs, self.compute),
            lax.convert_element_type(rhs, self.compute),
            ((lhs_axes, rhs_axes), ((), ())),
            precision=self.precision,
            preferred_element_type=self.accumulate,
            out_sharding=sharding,
        )


def _explicit_sharding(like, reverse: bool = False):
    """In JAX's explicit sharding mode, a gradient must say that it is sharded as its argument; elsewhere None."""
    sharding = jax.typeof(like).sharding if isinstance(like, jax.Array) else like.sharding
    if AxisType.Explicit not in sharding.mesh.axis_types:
        return None
    return NamedSharding(sharding.mesh, PartitionSpec(*reversed(sharding.spec))) if reverse else sharding


def _plain(pieces: Pieces, frozen_w: bool, x, w, a, b, scale, keep):
    base = _frozen_base(pieces, x, w) if frozen_w else pieces.base(x, w)
    return pieces.joined(base, pieces.branch(pieces.kept(x, keep), a, b, scale)[0])


# Not lax.stop_gradient(w): JAX takes its result for a new array, and a scan over layers would then keep a stacked copy
# of all the weights for its backward pass. Here what is kept is w itself.
@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _frozen_base(pieces: Pieces, x, w):
    return pieces.base(x, w)


@_frozen_base.defjvp
def _frozen_base_jvp(pieces, primals, tangents):
    x, w = primals
    return pieces.base(x, w), pieces.base(tangents[0], w)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _with_gradient(pieces: Pieces, frozen_w: bool, x_type, x, w, a, b, scale, keep):
    return pieces.forward(x, w, a, b, scale, keep)[0]


def _fwd(pieces, frozen_w, x_type, x, w, a, b, scale, keep):
    # Under symbolic_zeros every argument says whether it is being differentiated.
    keep_x = a.perturbed or (w.perturbed and not frozen_w)
    x, w, a, b, scale = (v.value for v in (x, w, a, b, scale))
    keep = None if keep is None else keep.value
    y, h = pieces.forward(x, w, a, b, scale, keep)
    return y, (x if keep_x else None, w, a, b, scale, keep, h.astype(pieces.compute))


def _bwd(pieces, frozen_w, x_type, residuals, dy):
    if isinstance(dy, SymbolicZero):
        return (None,) * 6
    x, w, a, b, scale, keep, h = residuals
    dy = dy.astype(pieces.compute)
    u, h_dy = pieces.read_dy(dy, h, b)
    ds = lax.mul(scale, u).astype(pieces.compute)
    dx = pieces.grad_x(dy, ds, w, a, x_type, keep).astype(x_type.dtype)
    da = None if x is None else pieces.grad_a(x, ds, a, keep).astype(a.dtype)
    db = lax.mul(scale, h_dy).astype(b.dtype)
    dw = None if frozen_w or x is None else pieces.grad_w(x, dy, w).astype(w.dtype)
    return dx, dw, da, db, pieces.grad_scale(h, u), None


_with_gradient.defvjp(_fwd, _bwd, symbolic_zeros=True)
