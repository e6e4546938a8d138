"""What an adapter did, in numbers: spectra, ranks, intruder dimensions, subspaces in common, calibration.

Functions of arrays; ``report``, ``similarity`` and ``attention_norms`` go through the leaves of an ``Adapted``.
"""

from jlora.diagnostics.adapters import Change as Change
from jlora.diagnostics.adapters import Report as Report
from jlora.diagnostics.adapters import Similarity as Similarity
from jlora.diagnostics.adapters import attention_norms as attention_norms
from jlora.diagnostics.adapters import report as report
from jlora.diagnostics.adapters import similarity as similarity
from jlora.diagnostics.calibration import Reliability as Reliability
from jlora.diagnostics.calibration import ace as ace
from jlora.diagnostics.calibration import cece as cece
from jlora.diagnostics.calibration import ece as ece
from jlora.diagnostics.calibration import mce as mce
from jlora.diagnostics.calibration import reliability as reliability
from jlora.diagnostics.calibration import tace as tace
from jlora.diagnostics.intruder import Intruders as Intruders
from jlora.diagnostics.intruder import intruders as intruders
from jlora.diagnostics.norms import EntryNorms as EntryNorms
from jlora.diagnostics.norms import entry_norms as entry_norms
from jlora.diagnostics.norms import entry_threshold as entry_threshold
from jlora.diagnostics.plots import plot as plot
from jlora.diagnostics.spectra import aurac as aurac
from jlora.diagnostics.spectra import effective_rank as effective_rank
from jlora.diagnostics.spectra import energy_rank as energy_rank
from jlora.diagnostics.spectra import nuclear_rank as nuclear_rank
from jlora.diagnostics.spectra import singular_values as singular_values
from jlora.diagnostics.spectra import stable_rank as stable_rank
from jlora.diagnostics.subspaces import directions as directions
from jlora.diagnostics.subspaces import subspace_similarity as subspace_similarity
