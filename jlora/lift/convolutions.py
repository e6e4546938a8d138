"""The rule for convolutions, of any number of axes, with strides, dilations and groups."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jlora.lift.core import Run, is_adapted, plain, rule
from jlora.lift.products import Branch, atoms_of, consume, observe
from jlora.storage import is_stored
from jlora.weight import IN, OUT, AdaptedWeight, turned


@dataclasses.dataclass(frozen=True)
class ConvDot(Branch):
    """x convolved with a kernel whose canonical form is [window * in / groups, out]."""

    weight: AdaptedWeight
    canonical: Array
    params: dict[str, Any]
    kind: str = "conv"

    def _conv(self, x: Array, kernel: Array, preferred: Any, groups: int | None = None) -> Array:
        p = self.params
        return lax.conv_general_dilated(
            x,
            kernel,
            p["window_strides"],
            p["padding"],
            lhs_dilation=p["lhs_dilation"],
            rhs_dilation=p["rhs_dilation"],
            dimension_numbers=p["dimension_numbers"],
            feature_group_count=p["feature_group_count"] if groups is None else groups,
            precision=p["precision"],
            preferred_element_type=preferred,
        )

    @property
    def _features(self) -> int:
        """The axis of the result that holds the output features."""
        return self.params["dimension_numbers"].out_spec[1]

    def __call__(self, x: Array, w: Array) -> Array:
        kept = w is self.canonical and not is_stored(self.weight.base)
        kernel = self.weight.base if kept else self._kernel(w)
        return self._conv(x, kernel, self.params["preferred_element_type"])

    def _kernel(self, w: Array) -> Array:
        """A matrix [window * in, k] in the layout of the kernel, k in the place of the output features."""
        labels = self.weight.labels
        flat = [atom for label in labels for atom in label if atom.group == IN]
        order = sorted(flat)
        w = w.reshape(*(atom.size for atom in order), w.shape[-1])
        w = turned(w.transpose(*(order.index(atom) for atom in flat), w.ndim - 1), flat)
        out_axis = self.params["dimension_numbers"].rhs_spec[0]
        sizes = [size for axis, size in enumerate(self.weight.shape) if axis != out_axis]
        return jnp.moveaxis(w.reshape(*sizes, w.shape[-1]), -1, out_axis)

    def inner(self, x: Array, a: Array) -> Array:
        groups = self.params["feature_group_count"]
        return self._conv(x, self._kernel(jnp.tile(a.astype(x.dtype), (1, groups))), None)

    def outer(self, h: Array, b: Array) -> Array:
        groups, (r, n_out) = self.params["feature_group_count"], b.shape
        h = jnp.moveaxis(h, self._features, -1)
        h = h.reshape(*h.shape[:-1], groups, r)
        b = b.astype(h.dtype).reshape(r, groups, n_out // groups)
        y = jnp.einsum(
            "...gr,rgo->...go",
            h,
            b,
            precision=self.params["precision"],
            preferred_element_type=self.params["preferred_element_type"],
        )
        return jnp.moveaxis(y.reshape(*y.shape[:-2], n_out), -1, self._features)

    def along(self, y: Array, g: Array) -> Array:
        shape = [1] * y.ndim
        shape[self._features] = y.shape[self._features]
        return jnp.tile(g.astype(y.dtype), y.shape[self._features] // g.shape[0]).reshape(shape)

    def mix(self, y: Array, m: Array, axis: int | None = None) -> Array:
        axis = self._features if axis is None else axis
        y = jnp.moveaxis(y, axis, -1)
        parts = y.reshape(*y.shape[:-1], -1, m.shape[0])
        parts = jnp.einsum("...gk,kl->...gl", parts, m.astype(y.dtype), precision=self.params["precision"])
        return jnp.moveaxis(parts.reshape(*y.shape[:-1], -1), -1, axis)

    @property
    def features_axis(self) -> int | None:
        """Which of the weight's input axes, in canonical order, holds the features. None where the model's code has
        cut or merged these axes."""
        labels = [self.weight.labels[axis] for axis in self.params["dimension_numbers"].rhs_spec[1:]]
        inputs = self.weight.group(IN)
        if any(len(label) != 1 for label in labels) or any(len(atom.pos) != 1 for atom in inputs):
            return None
        return inputs.index(labels[0][0])

    def staged(self, x: Array, a: Array, core: Array) -> Array | None:
        """``inner`` in two steps: x times ``a`` [features, n] at every place, then a convolution of the n features with
        ``core`` [*window, q, r], in groups of q and with r results for all of them. The window's axes are in canonical
        order. None where the one convolution costs less."""
        numbers, groups = self.params["dimension_numbers"], self.params["feature_group_count"]
        (features, n), (*window, q, r) = a.shape, core.shape
        places = math.prod(self.params["window_strides"]) / math.prod(self.params["lhs_dilation"])  # of x, for a result
        if places * a.size + core.size >= features * math.prod(window) * r:
            return None
        h = self.mix(x, a, numbers.lhs_spec[1])
        out_axis, in_axis, *spatial = numbers.rhs_spec
        inputs = self.weight.group(IN)
        inputs.pop(self.features_axis)
        order = {out_axis: len(window) + 1, in_axis: len(window)}
        order |= {axis: inputs.index(self.weight.labels[axis][0]) for axis in spatial}
        kernel = jnp.tile(core.astype(x.dtype), groups).transpose([order[axis] for axis in range(core.ndim)])
        kernel = jnp.flip(kernel, list(self.weight.backwards)) if self.weight.backwards else kernel
        return self._conv(h, kernel, None, groups * n // q)


@rule("conv_general_dilated")
def conv_general_dilated(run: Run, eqn: Any, values: list) -> list | None:
    x, w = values
    if is_adapted(x) or not is_adapted(w):
        return None
    spec = eqn.params["dimension_numbers"].rhs_spec
    out_axis, in_axes = spec[0], sorted(spec[1:])
    if run.observe is not None:
        flops = 2.0 * math.prod(eqn.outvars[0].aval.shape) * math.prod(w.shape[a] for a in in_axes)
        observe(run, w, "conv", in_axes, (), (out_axis,), flops, features=spec[1:2])
        return plain(eqn, [x, w.base])
    fits = set(atoms_of(w, (out_axis,))) == set(w.group(OUT)) and set(atoms_of(w, in_axes)) == set(w.group(IN))
    if not fits or w.stack_shape or eqn.params["batch_group_count"] != 1 or not w.backwards <= set(spec[2:]):
        return None
    forward = lambda w, x, base, p, ctx: w.method.forward(ConvDot(w, base, eqn.params), x, base, p, ctx)
    return [consume(run, w, x, forward)]
