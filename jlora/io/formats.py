"""Every ``peft_type`` that is read and written."""

from jlora.io.format import Format
from jlora.io.lora import LoraFormat
from jlora.io.vera import VeraFormat

FORMATS: dict[str, Format] = {format.peft_type: format for format in (LoraFormat(), VeraFormat())}
