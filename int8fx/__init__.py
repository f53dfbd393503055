"""int8fx: LLM.int8() as a rewrite of FX graphs.

>>> model = int8fx.convert(model)
>>> model = torch.compile(model, fullgraph=True)
"""

from . import ops as ops
from .calibration.calibrate import Calibration, calibrate
from .calibration.plan import Plan, plan
from .conversion.convert import convert
from .conversion.packed import is_packed
from .conversion.summary import summary
from .schemes import llm_int8, rotated

__version__ = "0.1.0"
__all__ = ["Calibration", "Plan", "calibrate", "convert", "is_packed", "llm_int8", "plan", "rotated", "summary"]
