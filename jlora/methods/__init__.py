"""Every method, by name. A new one is a file beside this one and a line here."""

from jlora.methods.base import Method as Method
from jlora.methods.base import Site as Site
from jlora.methods.dora import DoRA as DoRA
from jlora.methods.lora import LoRA as LoRA
from jlora.methods.vera import VeRA as VeRA
from jlora.methods.whole import Full as Full
from jlora.methods.whole import Offset as Offset

METHODS: dict[str, type[Method]] = {"lora": LoRA, "dora": DoRA, "vera": VeRA, "full": Full, "offset": Offset}
