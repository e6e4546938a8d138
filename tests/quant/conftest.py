"""The ways of using a weight and the comparison are those of the conformance suite."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "conformance"))
