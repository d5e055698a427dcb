"""A slow float64 decoder written from the formulas alone: the independent reference of the test suite.

Nothing here imports `eabf_cli`, nor any rotary or attention code of transformers. A model enters as two plain
things: its configuration's numbers and its weights as arrays.
"""

from .decoder import ReferenceOutput, reference_forward
from .extension import Extension

__all__ = ["Extension", "ReferenceOutput", "reference_forward"]
