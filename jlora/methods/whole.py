r"""Methods that replace a leaf as a whole, whatever its shape: biases, norms, heads, embeddings.

BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked Language-models (``Full`` on biases). Ben
Zaken, Ravfogel and Goldberg, 2021. https://arxiv.org/abs/2106.10199
Tuning LayerNorm in Attention: Towards Efficient Multi-Modal LLM Finetuning (``Full`` on norms). Zhao et al., 2023.
https://arxiv.org/abs/2312.11420

.. math::  \text{Full: } w' = v, \qquad \text{Offset: } w' = w + s\,\delta

w, of any shape, frozen; v or delta, of the same shape, trained. Trained: the leaf's size.

They need no interpreter: ``bind`` puts the effective leaf where the leaf was.

When to use them: beside adapters, for the small leaves that adapters pass over, or for a head that is new. On all
leaves ``Full`` is full fine-tuning, with its cost.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jlora.methods.base import Method, Site
from jlora.weight import Params


@dataclasses.dataclass(frozen=True)
class Full(Method):
    """Train the leaf itself. What PEFT calls ``modules_to_save``; with ``"**/bias"``, BitFit; on norms, LN tuning.

    Parameters of a leaf: trainable, an array of the leaf's shape that starts as a copy of it, in float32 or wider: the
    small updates of a bfloat16 leaf would round to nothing. The base keeps the original. Trained: the leaf's size.
    """

    whole_leaf = True

    def init(self, key: Any, w: Array, site: Site, dtype: Any) -> Params:
        return Params(trainable=jnp.array(w, dtype, copy=True))  # a copy: training may donate its buffers

    def count(self, site: Site) -> int:
        return math.prod(site.shape)

    def weight(self, w: Array, p: Params) -> Array:
        return p.trainable.astype(w.dtype)


@dataclasses.dataclass(frozen=True)
class Follow(Method):
    """Change a bias as a method changes the outputs of the weight before it: bias -> [bias] adapted, as one more row of
    inputs. For methods that act on outputs alone and have no frozen parameters. PEFT's RoAd does this to biases.

    No parameters of its own. Trained: nothing.

    Attributes:
      group: path of the weight, whose parameters it uses.
      method: the weight's.
      n_stack: how many leading axes of the leaf are stacked, as they are in the weight.
    """

    _: dataclasses.KW_ONLY
    group: str
    method: Method
    n_stack: int = 0

    whole_leaf = True

    @property
    def follows_weight(self) -> bool:
        return self.method.follows_weight

    def init(self, key: Any, w: Array, site: Site, dtype: Any) -> Params:
        return Params()

    def count(self, site: Site) -> int:
        return 0

    def weight(self, w: Array, p: Params) -> Array:
        fn = lambda row, own: self.method.follow(row, Params(trainable=own))
        for _ in range(self.n_stack):
            fn = jax.vmap(fn)
        return fn(w.reshape(*w.shape[: self.n_stack], 1, -1), p.shared).reshape(w.shape).astype(w.dtype)


@dataclasses.dataclass(frozen=True)
class Offset(Method):
    """Train a difference: leaf + scale * delta, delta starting at zero. PEFT's ``lora_bias`` is this on a bias.

    So is BEFT, on the biases of the values, ``{"**/v_proj/bias": Offset()}`` (BEFT: Bias-Efficient Fine-Tuning of
    Language Models. Huang et al., 2025. https://arxiv.org/abs/2509.15974), and PEFT's files of it are read as that.

    Parameters of a leaf: trainable ``{"delta": an array of the leaf's shape}``. Trained: the leaf's size.

    Attributes:
      scale: what multiplies delta.
    """

    scale: float = 1.0

    whole_leaf = True

    def init(self, key: Any, w: Array, site: Site, dtype: Any) -> Params:
        return Params(trainable={"delta": jnp.zeros(w.shape, dtype)})

    def count(self, site: Site) -> int:
        return math.prod(site.shape)

    def weight(self, w: Array, p: Params) -> Array:
        return w + self.scale * p.trainable["delta"].astype(w.dtype)

    def describe(self) -> dict[str, str]:
        return {"scale": f"{self.scale:g}"}
