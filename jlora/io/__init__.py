"""Adapters as files that other libraries read and write."""

from jlora.io.load import load_peft as load_peft
from jlora.io.save import save_peft as save_peft
from jlora.io.xlora import load_xlora as load_xlora
from jlora.io.xlora import save_xlora as save_xlora
