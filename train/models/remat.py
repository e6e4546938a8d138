"""What of a layer is kept for the backward pass, and what is computed again: `--remat`.

none        everything is kept
products    the results of products with weights, the adapters' too; norms, attention and activations are computed
            again, which costs little
layers      the inputs of each layer; every product is computed again. A step with a frozen base then takes 3 in
            place of 2 products with each weight, as full fine-tuning does
"""

from typing import Any, Literal, get_args

import flax.linen as nn
import jax

Remat = Literal["none", "products", "layers"]


def rematerialized(layer: type[nn.Module], remat: Remat, **options: Any) -> type[nn.Module]:
    """The class of a layer, or one whose backward pass computes again what `remat` says. `options` are nn.remat's."""
    if remat not in get_args(Remat):
        raise ValueError(f"got remat={remat!r}; want one of {', '.join(get_args(Remat))}")
    if remat == "none":
        return layer
    keep = None if remat == "layers" else jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    return nn.remat(layer, policy=keep, **options)
