"""Low-rank adaptation of any JAX model, as pure functions over parameter pytrees."""

from jlora.adapt import Adapted as Adapted
from jlora.adapt import adapt as adapt
from jlora.adapt import summary as summary
from jlora.factors import Factors as Factors
from jlora.lift import LeafUsage as LeafUsage
from jlora.lift import MaterializeWarning as MaterializeWarning
from jlora.lift import Stats as Stats
from jlora.lift import capture as capture
from jlora.lift import lift as lift
from jlora.lift import usage as usage
from jlora.merge import merge as merge
from jlora.methods import DoRA as DoRA
from jlora.methods import Full as Full
from jlora.methods import LoRA as LoRA
from jlora.methods import Offset as Offset
from jlora.methods import VeRA as VeRA
from jlora.weight import Axes as Axes

__version__ = "0.1.0"
