r"""IA3: one trained factor for each output, or each input, of a weight.

Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning. Liu et al., 2022.
https://arxiv.org/abs/2205.05638

.. math::  W' = W\,\mathrm{diag}(l) \text{ on outputs}, \qquad W' = \mathrm{diag}(l)\,W \text{ on inputs}

W [in, out] frozen; l [out], or [in], trained. Of a convolution, inputs are its input features, [features]. Trained:
out, or in, a matrix.

* l starts at ones, so the output starts as the base's.
* The paper scales the outputs of the key and value projections and the inputs of the last layer of each MLP.
* The bias of a layer is a leaf of its own, and this is about the weight: y = (x W) l + bias. PEFT scales the bias with
  the outputs; so does ``Follow(group=path of the weight, method=IA3())`` on the bias, and that is what PEFT's files are
  read as.
* Scaled are the activations, not the weight; only the inputs of a convolution are scaled in its kernel. With feature
  groups its groups share the factors of their inputs; PEFT, which has one for each of the layer's inputs, differs.

When to use it: a handful of examples, or very many adapters, at a hundredth of LoRA's parameters and no more than they
can carry.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jlora.methods.base import Method, Site, require
from jlora.weight import Context, Dot, Params


@dataclasses.dataclass(frozen=True)
class IA3(Method):
    """Trained factors of outputs or inputs. The formula and shapes are at the top of this file.

    Parameters of a leaf: trainable ``{"scale": [*stack, out]}``, or ``[*stack, in]``, or for the inputs of a
    convolution ``[*stack, features]`` and frozen ``{"feature": [*stack, in]}``, the feature of every row of the kernel.

    Attributes:
      on: "outputs" or "inputs".
    """

    on: str = "outputs"

    sliceable = frozenset({"in", "out"})

    def __post_init__(self):
        require(self.on in ("outputs", "inputs"), f"IA3(on={self.on!r}): 'outputs' or 'inputs' is wanted.")

    def _shares(self, site: Site) -> bool:
        """Whether several rows of a matrix share a factor."""
        return self.on == "inputs" and site.axes.kind == "conv"

    def size(self, site: Site) -> int:
        _, n_in, n_out = site.canonical_shape
        return n_out if self.on == "outputs" else site.window[1] if self._shares(site) else n_in

    def init(self, key: Any, w: Array, site: Site, dtype: Any) -> Params:
        return Params(trainable={"scale": jnp.ones(self.size(site), dtype)})

    def init_stack(self, p: Params, site: Site, dtype: Any) -> Params:
        if not self._shares(site):
            return p
        before, features, after = site.window
        feature = np.tile(np.repeat(np.arange(features, dtype=np.int32), after), before)
        return p._replace(frozen={"feature": jnp.broadcast_to(feature, (*site.canonical_shape[0], len(feature)))})

    def count(self, site: Site) -> int:
        return site.stack * self.size(site)

    def dims(self, p: Params) -> Params:
        if p.frozen:
            return Params(trainable={"scale": "_"}, frozen={"feature": "in"})
        return Params(trainable={"scale": "out" if self.on == "outputs" else "in"})

    def gain(self, w: Array, p: Params) -> Array:
        """l, one for each row or column."""
        scale = p.trainable["scale"]
        return scale[p.frozen["feature"]] if p.frozen else scale

    def weight(self, w: Float[Array, "in out"], p: Params) -> Float[Array, "in out"]:
        gain = self.gain(w, p).astype(w.dtype)
        return w * (gain if self.on == "outputs" else gain[:, None])

    def forward(self, dot: Dot, x: Array, w: Array, p: Params, ctx: Context) -> tuple[Array, Any]:
        gain = dot.per_matrix(self.gain, w, p)
        if self.on == "outputs":
            return dot.per_output(dot(x, w), gain), None
        if dot.kind == "conv":
            return dot(x, self.weight(w, p)), None
        if dot.kind == "lookup":  # the factors of the rows that are looked up
            y = dot(x, w)
            return y * dot.inner(x, gain[:, None]).astype(y.dtype), None
        return dot(dot.per_output(x, gain), w), None  # features of x as of an output

    def forward_transposed(self, dot: Dot, x: Array, wt: Float[Array, "out in"], p: Params, ctx: Context) -> Array:
        gain = self.gain(wt.T, p)
        if self.on == "outputs":
            return dot(dot.per_output(x, gain), wt)
        return dot.per_output(dot(x, wt), gain)

    def describe(self) -> dict[str, str]:
        return {"scale": self.on}
