"""Quantized bases: weights stored in 4 or 8 bits that any method adapts (QLoRA).

>>> params = jlora.quant.quantize(params, jlora.quant.NF4, fn=apply, args=(batch,))
>>> adapted = jlora.adapt(params, jlora.LoRA(16), key=key)
>>> logits = jlora.lift(apply)(adapted.bind(trainable), batch)

A quantized weight is one leaf of the tree. ``jlora.lift`` forms its matrix in the product that uses it, in the body of
a scan that of one layer, and forms it again for the backward pass: there is never a dense copy of the base.

Why not a library's array: the one that is kept for JAX (qwix.QArray) holds its values in the shape and layout of the
weight, has no double quantization (4.5 bits a weight in place of 4.127) and not the order of bitsandbytes' blocks, so
that weights would not be those that QLoRA's checkpoints were trained beside; and it brings Flax along.
"""

from jlora.quant.int8 import Int8 as Int8
from jlora.quant.leaf import Quantized as Quantized
from jlora.quant.loftq import loftq as loftq
from jlora.quant.nf4 import NF4 as NF4
from jlora.quant.tree import dequantize as dequantize
from jlora.quant.tree import quantize as quantize
