"""Scaling of each tensor, or of each row of tensors, by a factor of its own. Private torch API: ``_foreach_mul_``."""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import foreach_rows
from .dtypes import WIDE, as_real
from .memory import check_memory
from .rows import Cut, Rows, rows_of, whole
from .scale import changing
from .sums import CHUNK
from .transfer import sent


def scale_each_(tensors: Sequence[Tensor], factors: Tensor) -> None:
    """Multiply each of ``tensors`` in place by its factor: (len(tensors),) float32 or float64; no host sync if they are
    on the device of the tensors.

    The product is in fp32 and rounded once, for bf16 and fp16 tensors too; in float64 for float64: the bits of
    ``scale_`` of each alone. Complex numbers are pairs. On the CPU a tensor whose factor is 1 is not touched. No
    temporary is as large as a large tensor. RuntimeError where the memory of a tensor was freed, or two share it.
    """
    scale_rows_(tensors, list(map(whole, tensors)), factors)


def scale_rows_(tensors: Sequence[Tensor], cuts: Sequence[Cut], factors: Tensor) -> None:
    """The same for each row of ``tensors``: (number of rows,) factors, as ``row_sums`` orders its sums."""
    assert len(factors) == sum(cut.count for cut in cuts)
    rows = list(rows_of(tensors, cuts))
    for device in dict.fromkeys(t.device for t in tensors):
        here = [k for k, t in enumerate(tensors) if t.device == device]
        group = [tensors[k] for k in here]
        check_memory(group)
        theirs = [each for each in rows if each.numbers.device == device]
        by = factors if factors.device == device else sent(factors, device)
        with changing(group, device):
            if device.type == "cpu":
                _multiply_on_cpu_(theirs, by)
            else:
                foreach_rows.multiply_(theirs, by)


def _multiply_on_cpu_(rows: Sequence[Rows], factors: Tensor) -> None:
    changed = factors.ne(1).cumsum(0).tolist()
    changed.append(0)  # before the first
    narrow = factors.float()
    alone: list[Tensor] = []
    by: list[Tensor] = []
    for numbers, first in rows:
        if changed[first + len(numbers) - 1] == changed[first - 1]:
            continue
        real = as_real(numbers)
        its = (factors if real.dtype in WIDE else narrow)[first : first + len(numbers)]
        if len(real) == 1 or real[0].numel() > CHUNK:
            alone += real.unbind()
            by += its.unbind()
        else:
            # torch would convert a whole copy of bf16 and fp16 to multiply it by fp32.
            at_once = len(real) if real.dtype.itemsize > 2 else max(1, CHUNK // real[0].numel())
            for part, few in zip(torch.split(real, at_once), torch.split(its, at_once), strict=True):
                part.mul_(few.view(-1, *[1] * (real.ndim - 1)))
    if alone:
        torch._foreach_mul_(alone, by)
