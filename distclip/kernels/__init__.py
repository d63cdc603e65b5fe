"""Norms and scaling of local gradients: the only code that touches gradient-sized memory.

On the CPU sums go block by block; on accelerators through torch's foreach kernels, or Triton's where it is asked for.
"""

from .apply import clamp_ as clamp_, scale_ as scale_
from .sums import largest as largest, local_norms as local_norms, power_sum as power_sum
