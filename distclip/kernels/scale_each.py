"""Scaling of each tensor, or of each row of tensors, by a factor of its own. Private torch API: ``_foreach_mul_``.

The product is in fp32 and rounded once, for bf16 and fp16 tensors too; in float64 for float64: the bits of ``scale_``
of each tensor or row alone, with complex numbers as pairs. No temporary is as large as a large tensor.
"""

from collections.abc import Iterator, Sequence
from itertools import accumulate, compress, pairwise

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.nn.functional import pad

from . import foreach_rows, native
from .device import device_of, has_float64
from .dtypes import WIDE, as_real
from .memory import check_memory
from .rows import Cut, Rows, rows_of, whole
from .scale import changing
from .sums import CHUNK
from .table import Table
from .transfer import sent

CPU = torch.device("cpu")


def scale_each_(tensors: Sequence[Tensor], factors: Tensor, table: Table | None = None) -> None:
    """Multiply each of ``tensors`` in place by its factor: (len(tensors),) float32 or float64, on their device.

    On the CPU a tensor whose factor is 1 is not touched. A host sync only where ``factors`` are on an accelerator and a
    tensor is on the CPU. RuntimeError where the memory of a tensor was freed, or two share it. ``table``: where these
    very tensors lay.
    """
    if table is not None and table.reaches_all():
        with changing(tensors, CPU):
            _multiply_each(tensors, factors, table)
        return
    for device, here, by in _by_device(tensors, [1] * len(tensors), factors):
        group = [tensors[k] for k in here]
        with changing(group, device):
            if device.type == "cpu":
                _multiply_each(group, by)
            else:
                foreach_rows.multiply_(list(rows_of(group, list(map(whole, group)))), by)


def scale_rows_(tensors: Sequence[Tensor], cuts: Sequence[Cut], factors: Tensor, table: Table | None = None) -> None:
    """The same for each row of ``tensors``: as many factors as there are rows, in the order of ``row_sums``."""
    if table is not None and table.reaches_all():
        with changing(tensors, CPU):
            _multiply_rows(tensors, cuts, factors, table)
        return
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


def _multiply_each(tensors: Sequence[Tensor], factors: Tensor, table: Table | None = None) -> None:
    changed = factors.ne(1).tolist()
    others: Sequence[int] = range(len(tensors))
    if native.kernel is not None and any(changed):
        others = (table or Table.of(tensors)).multiply_(factors.double())
        increment_version(table.tensors if table else list(compress(tensors, changed)))
    others = [k for k in others if changed[k]]
    if not others:
        return
    parts, wide, narrow = [as_real(tensors[k]) for k in others], factors.unbind(), factors.float().unbind()
    torch._foreach_mul_(parts, [(wide if p.dtype in WIDE else narrow)[k] for p, k in zip(parts, others, strict=True)])


def _multiply_rows(tensors: Sequence[Tensor], cuts: Sequence[Cut], factors: Tensor, table: Table | None = None) -> None:
    counts = [cut.count for cut in cuts]
    before = pad(factors.ne(1).cumsum(0), (1, 0))  # of the first k, how many are not 1
    changed = [a != b for a, b in pairwise(before[list(accumulate(counts, initial=0))].tolist())]
    others: Sequence[int] = range(len(tensors))
    if native.kernel is not None and any(changed):
        others = (table or Table.of(tensors, cuts)).multiply_(factors.double())
        increment_version(table.tensors if table else list(compress(tensors, changed)))
    others = [k for k in others if changed[k]]
    if not others:
        return
    if len(others) < len(tensors):
        parts = torch.split(factors, counts)
        tensors, cuts = [tensors[k] for k in others], [cuts[k] for k in others]
        factors = torch.cat([parts[k] for k in others])
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
