from . import ops
from .packing import is_packed
