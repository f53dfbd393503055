"""int8fx: LLM.int8() as a rewrite of FX graphs.

>>> model = int8fx.convert(model)
>>> model = torch.compile(model, fullgraph=True)
"""

from . import ops as ops
from .calibrate import Calibration, calibrate
from .convert import convert
from .mixed import Plan, plan
from .packing import is_packed
from .schemes import llm_int8, rotated
from .summary import summary

__version__ = "0.1.0"
__all__ = ["Calibration", "Plan", "calibrate", "convert", "is_packed", "llm_int8", "plan", "rotated", "summary"]
