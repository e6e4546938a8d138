"""Where the factors of LoRA start, other than at random and zero.

>>> adapted = jlora.adapt(params, jlora.LoRA(16, alpha=16, start=jlora.init.PiSSA()), key=key)

From the weight: ``PiSSA``, ``MiLoRA``, ``SingularSlice``, ``OLoRA``; from random numbers: ``Orthogonal``; from data,
what ``jlora.calibrate`` found: ``EVA``, ``CorDA``, ``LoRAGA``, and ``LoRASB`` for ``jlora.LoRAXS``:

>>> rules = jlora.LoRA(16, start=jlora.init.EVA())
>>> stats = jlora.calibrate(loss_fn, params, batches, rules)
>>> adapted = jlora.adapt(params, rules, stats=stats, key=key)

They serve every method that is LoRA with something more: ``DoRA``, ``ALoRA``. The base stays what it is, quantized or
not, and so does the output at the start (but LoRA-SB's): what the factors start at is taken away again by the method,
at twice the rank (``jlora/methods/lora.py``). Merging, ``to_lora`` and ``jlora.io.save_peft`` give what fits the
original weights.

``MagnitudeMask``, ``GradientMask`` and ``SNIPMask`` choose which entries of a weight ``jlora.SHiRA`` trains, the last
two from data.

Other starts are methods or functions of their own: Nystrom blocks ``NLoRA``, LDU ``LoLDU``, Kronecker ``SoKA``, the
leading subspace ``LoRAXS``, and what quantizing lost ``jlora.quant.loftq``.
"""

from jlora.init.corda import CorDA as CorDA
from jlora.init.eva import EVA as EVA
from jlora.init.lora_ga import LoRAGA as LoRAGA
from jlora.init.lora_sb import LoRASB as LoRASB
from jlora.init.masks import GradientMask as GradientMask
from jlora.init.masks import MagnitudeMask as MagnitudeMask
from jlora.init.masks import SNIPMask as SNIPMask
from jlora.init.olora import OLoRA as OLoRA
from jlora.init.orthogonal import Orthogonal as Orthogonal
from jlora.init.singular import MiLoRA as MiLoRA
from jlora.init.singular import PiSSA as PiSSA
from jlora.init.singular import SingularSlice as SingularSlice
from jlora.methods.base import Start as Start

STARTS: dict[str, type[Start]] = {
    "pissa": PiSSA,
    "milora": MiLoRA,
    "singular_slice": SingularSlice,
    "olora": OLoRA,
    "orthogonal": Orthogonal,
    "eva": EVA,
    "corda": CorDA,
    "lora_ga": LoRAGA,
    "lora_sb": LoRASB,
    "magnitude_mask": MagnitudeMask,
    "gradient_mask": GradientMask,
    "snip_mask": SNIPMask,
}
"""By the names of the command line."""
