"""Fused operations of low-rank adaptation: an XLA reference each, hand-written gradients, and Pallas kernels."""

from jlora.kernels.lora_linear import lora_linear as lora_linear
from jlora.kernels.product import product as product
