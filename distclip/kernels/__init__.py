"""Norms and scaling of local gradients: the only code that touches gradient-sized memory.

On the CPU squares are summed by a compiled kernel where the install built one, all else block by block; on accelerators
torch's foreach kernels do it, or Triton's where it is asked for.
"""

from .memory import check_memory as check_memory
from .narrow import norms_on_host as norms_on_host
from .scale import clamp_ as clamp_, scale_ as scale_
from .sums import largest as largest, local_norms as local_norms, power_sum as power_sum
