"""Fused operations of low-rank adaptation: an XLA reference each, hand-written gradients, and Pallas kernels."""

from jlora.kernels.column_norm import column_norm as column_norm
from jlora.kernels.lora_linear import lora_linear as lora_linear
from jlora.kernels.lora_linears import lora_linears as lora_linears
from jlora.kernels.multi_lora import Groups as Groups
from jlora.kernels.multi_lora import Slots as Slots
from jlora.kernels.multi_lora import group_rows as group_rows
from jlora.kernels.multi_lora import multi_lora as multi_lora
from jlora.kernels.product import product as product
from jlora.kernels.quantized_dot import quantized_dot as quantized_dot
