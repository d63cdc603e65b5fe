"""Norms and scaling of local gradients: the only code that touches gradient-sized memory.

On the CPU a compiled kernel sums squares if the install built one, and torch's kernels do the rest block by block; on
accelerators torch's foreach kernels do it, or Triton's on request.
"""

from .memory import check_memory as check_memory
from .scale import clamp_ as clamp_, scale_ as scale_
from .sums import (
    largest as largest,
    local_norms as local_norms,
    power_sum as power_sum,
    sum_over_replicas as sum_over_replicas,
)
from .without_float64 import norms_on_host as norms_on_host
