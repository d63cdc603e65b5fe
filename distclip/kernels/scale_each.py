"""Scaling of each tensor, or of each row of tensors, by a factor of its own. Private torch API: ``_foreach_mul_``.

The product is in fp32 and rounded once, for bf16 and fp16 tensors too; in float64 for float64: the bits of ``scale_``
of each tensor or row alone, with complex numbers as pairs. No temporary is as large as a large tensor.
"""

from collections.abc import Iterator, Sequence
from itertools import accumulate, compress, pairwise

import torch
from torch import Tensor
from torch.nn.functional import pad

from . import foreach_rows
from .device import device_of, has_float64
from .dtypes import COMPLEX, WIDE, as_real, dtype_of
from .memory import check_memory
from .rows import Cut, Rows, rows_of, whole
from .scale import changing
from .sums import CHUNK
from .transfer import sent


def scale_each_(tensors: Sequence[Tensor], factors: Tensor) -> None:
    """Multiply each of ``tensors`` in place by its factor: (len(tensors),) float32 or float64, on their device.

    On the CPU a tensor whose factor is 1 is not touched. A host sync only where ``factors`` are on an accelerator and a
    tensor is on the CPU. RuntimeError where the memory of a tensor was freed, or two share it.
    """
    for device, here, by in _by_device(tensors, [1] * len(tensors), factors):
        group = [tensors[k] for k in here]
        with changing(group, device):
            if device.type == "cpu":
                _multiply_each(group, by)
            else:
                foreach_rows.multiply_(list(rows_of(group, list(map(whole, group)))), by)


def scale_rows_(tensors: Sequence[Tensor], cuts: Sequence[Cut], factors: Tensor) -> None:
    """The same for each row of ``tensors``: as many factors as there are rows, in the order of ``row_sums``."""
    for device, here, by in _by_device(tensors, [cut.count for cut in cuts], factors):
        group, theirs = [tensors[k] for k in here], [cuts[k] for k in here]
        with changing(group, device):
            if device.type == "cpu":
                _multiply_rows(group, theirs, by)
            else:
                foreach_rows.multiply_(list(rows_of(group, theirs)), by)


def _by_device(
    tensors: Sequence[Tensor], counts: list[int], factors: Tensor
) -> Iterator[tuple[torch.device, Sequence[int], Tensor]]:
    """Yield each device, the places of the tensors there, and their factors there, ``counts`` of each tensor."""
    assert len(tensors) == len(counts)
    assert len(factors) == sum(counts)
    check_memory(tensors)
    devices = list(map(device_of, tensors))
    different = dict.fromkeys(devices)
    for device in different:
        here: Sequence[int] = range(len(tensors))
        by = factors
        if len(different) > 1:
            here = [k for k in here if devices[k] == device]
            parts = torch.split(factors, counts)
            by = torch.cat([parts[k] for k in here])
        if by.device != device:
            by = sent(by if has_float64(device) else by.float(), device)
        yield device, here, by


def _multiply_each(tensors: Sequence[Tensor], factors: Tensor) -> None:
    changed = factors.ne(1).tolist()
    if not any(changed):
        return
    dtypes, by = list(map(dtype_of, tensors)), factors.float().unbind()
    if not set(dtypes).isdisjoint(WIDE):
        by = tuple(w if d in WIDE else n for d, w, n in zip(dtypes, factors.unbind(), by, strict=True))
    parts = tensors if set(dtypes).isdisjoint(COMPLEX) else list(map(as_real, tensors))
    torch._foreach_mul_(list(compress(parts, changed)), list(compress(by, changed)))


def _multiply_rows(tensors: Sequence[Tensor], cuts: Sequence[Cut], factors: Tensor) -> None:
    counts = [cut.count for cut in cuts]
    before = pad(factors.ne(1).cumsum(0), (1, 0))  # of the first k, how many are not 1
    changed = [a != b for a, b in pairwise(before[list(accumulate(counts, initial=0))].tolist())]
    if not any(changed):
        return
    if not all(changed):
        tensors, cuts = list(compress(tensors, changed)), list(compress(cuts, changed))
        factors = torch.cat(list(compress(torch.split(factors, counts), changed)))
    narrow, every, columns = factors.float(), [], []
    for rows in map(Rows.real, rows_of(tensors, cuts)):
        numbers = rows.numbers
        column = rows.theirs(factors if numbers.dtype in WIDE else narrow)
        if numbers.dtype.itemsize > 2:
            every.append(numbers)
            columns.append(column)
        else:
            _multiply_short(numbers, column)
    if every:
        torch._foreach_mul_(every, columns)


def _multiply_short(rows: Tensor, factors: Tensor) -> None:
    """bf16 and fp16."""
    length = rows[0].numel()
    if len(rows) == 1 or length > CHUNK:
        torch._foreach_mul_(rows.unbind(), factors.flatten().unbind())
        return
    many = max(1, CHUNK // length)
    for part, its in zip(torch.split(rows, many), torch.split(factors, many), strict=True):
        part.copy_(part.float().mul_(its))  # part.mul_(its) makes the same copies, and takes 1.6 times as long
