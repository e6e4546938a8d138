"""Running a model's function with adapted weights in the places of its weights. ``core.py`` explains how."""

from jlora.lift import control, convolutions, layout, lookups, matrices, ragged  # noqa: F401  (they register the rules)
from jlora.lift.capture import Stats as Stats
from jlora.lift.capture import capture as capture
from jlora.lift.core import MaterializeWarning as MaterializeWarning
from jlora.lift.core import lift as lift
from jlora.lift.usage import LeafUsage as LeafUsage
from jlora.lift.usage import usage as usage
