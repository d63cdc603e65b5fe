"""Norms and scaling of local gradients: the only code that touches gradient-sized memory.

[Note: how a norm is summed]
Seven files sum, by device and dtype. All that is not said to be added in fp32 is added in float64, and a sum in fp32
that left its range is made again in float64. For p = inf nothing is added; NaN stays NaN in each of them.

1. native/sums.c, compiled, on the CPU: squares of fp32, bf16, fp16 and complex64. Nothing in fp32: each square is exact
   in float64.
2. sums.py, on the CPU, by torch's kernels: the same where no library was built, in rows of 64 squares in fp32 (bf16 and
   fp16 are converted to it a chunk at a time), the rows in float64. And float64, complex128 and every other p, in which
   nothing is added in fp32.
3. foreach.py, on accelerators, by torch's foreach kernels: all dtypes and every p. Nothing in fp32: numbers are
   converted to float64 as they are read, or a part at a time where no foreach kernel takes them.
4. triton/, on NVIDIA GPUs where DISTCLIP_TRITON=1 asks for it: fp32, bf16 and fp16 for p = 1, 2 and 3, of which the 4
   or 8 powers of one 16-byte load are added in fp32, and these sums in float64. float64, every other p and the ends of
   tensors: nothing in fp32. Complex tensors are pairs for p = 2, and go to foreach.py for others, as all with gaps do.
5. without_float64.py, on MPS and some XPU: squares of fp32, bf16 and fp16, in rows of 64 in fp32 on the device; the
   host adds the rows in float64. Every other p, complex tensors and rows beyond fp32 are copied to the host, where 1 or
   2 sums them.
6. each.py, one sum for each tensor or each row of one, on the CPU: by 1 what 1 reads, in one call. Other tensors by 2,
   each alone; other rows in float64, a part at a time.
7. foreach_rows.py, one sum for each row on accelerators: whole tensors and long rows by 3, others in float64, converted
   a part at a time. Devices without float64 copy the tensors to the host, where 6 sums them.

And exact.py rounds nothing at all, for p = 1 and 2: native/exact.c on the CPU, and torch's kernels on integers where no
library was built and on accelerators.
"""

from .bits import bits_of_each as bits_of_each, no_bits as no_bits
from .each import row_sums as row_sums, sums_of_each as sums_of_each, zeros_of_each as zeros_of_each
from .exact import exact_norm as exact_norm, exact_sum as exact_sum
from .fingerprint import fingerprints as fingerprints, of_whole as of_whole
from .memory import check_memory as check_memory
from .rows import Cut as Cut
from .scale import clamp_ as clamp_, scale_ as scale_
from .scale_each import scale_each_ as scale_each_, scale_rows_ as scale_rows_
from .sums import (
    add_bits as add_bits,
    largest as largest,
    local_norms as local_norms,
    power_sum as power_sum,
    sum_over_replicas as sum_over_replicas,
)
from .table import Pattern as Pattern, Table as Table
from .without_float64 import norms_on_host as norms_on_host
