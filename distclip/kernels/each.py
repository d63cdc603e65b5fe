"""Sums of |x| ** p of each tensor, or of each row of tensors: one pass, whatever their number.

Added in the same precision as the sum of all of them: [Note: how a norm is summed] in kernels/__init__.py.
"""

from collections.abc import Sequence
from itertools import accumulate
from math import inf

import torch
from torch import Tensor

from . import foreach, foreach_rows, native
from .device import has_float64
from .dtypes import as_real
from .memory import check_memory
from .rows import Cut, Rows, rows_of
from .sums import CHUNK, largest, power_sum
from .table import Table


def sums_of_each(
    tensors: Sequence[Tensor], p: float, table: Table | None = None, zeros: Tensor | None = None
) -> Tensor:
    """The sum of |x| ** p of each of ``tensors`` on the CPU, for p = inf max(|x|), NaN if any is: float64,
    (len(tensors),); 0 for empty ones.

    ``table``: where they lie, if that is known. ``zeros``: how many elements of each are 0 is written to it,
    (len(tensors),) float64; what the compiled kernel does not read is read once more for that.
    """
    sums = torch.zeros(len(tensors), dtype=torch.float64, device="cpu")
    others: Sequence[int] = range(len(tensors))
    if p == 2 and native.kernel is not None:
        others = (table or Table.of(tensors)).add_squares(sums, zeros)
    if others:
        _count(tensors, others, zeros)
        found = [largest([tensors[k]]) if p == inf else power_sum([tensors[k]], p) for k in others]
        sums[list(others)] = torch.tensor(found, dtype=torch.float64, device="cpu")
    return sums


def row_sums(
    tensors: Sequence[Tensor], cuts: Sequence[Cut], p: float, table: Table | None = None, zeros: Tensor | None = None
) -> Tensor:
    """The sum of |x| ** p of each row of ``tensors``, for p = inf max(|x|), NaN if any is: float64, the rows of one
    tensor after those of the other, on their common device, or on the CPU if that has no float64. 0 for empty rows.

    What is not finite stays in its row. No temporary is as large as a large tensor. No host sync, but on a device
    without float64, whose tensors are copied to the host one by one. ``table``: where the rows lie, if that is known;
    ``zeros``: of each tensor, on the CPU, as in :func:`sums_of_each`.
    """
    if tensors and not tensors[0].is_cpu:
        if has_float64(tensors[0].device):
            check_memory(tensors)
            return foreach_rows.sums(list(rows_of(tensors, cuts)), sum(cut.count for cut in cuts), tensors[0], p)
        parts = [row_sums([tensor.cpu()], [cut], p) for tensor, cut in zip(tensors, cuts, strict=True)]
        return torch.cat(parts)
    *first, total = accumulate((cut.count for cut in cuts), initial=0)
    sums = torch.zeros(total, dtype=torch.float64, device="cpu")
    others: Sequence[int] = range(len(tensors))
    if p == 2 and native.kernel is not None:
        others = (table or Table.of(tensors, cuts)).add_squares(sums, zeros)
    else:
        check_memory(tensors)
    _count(tensors, others, zeros)
    for k in others:
        for rows in rows_of([tensors[k]], [cuts[k]]):
            _write_sums(rows, p, sums[first[k] :])
    return sums


def zeros_of_each(tensors: Sequence[Tensor]) -> list[Tensor]:
    """How many elements of each are 0, or -0: 0-d int64 where it is. A pass of its own; no host sync."""
    return [
        tensor.numel() - torch.count_nonzero(tensor) if tensor.is_cpu else foreach.zeros(tensor) for tensor in tensors
    ]


def _count(tensors: Sequence[Tensor], places: Sequence[int], zeros: Tensor | None) -> None:
    if zeros is not None and places:
        zeros[list(places)] = torch.stack(zeros_of_each([tensors[k] for k in places])).double()


def _write_sums(rows: Rows, p: float, sums: Tensor) -> None:
    """Write the sum of each of the rows to its place, by torch's kernels."""
    numbers, length = as_real(rows.numbers) if p == 2 else rows.numbers, rows.length
    at = rows.first
    for part in torch.split(numbers, max(1, CHUNK // length)):
        if length > CHUNK:
            sums[at] = largest([part]) if p == inf else power_sum([part], p)
        else:
            sums[at : at + len(part)] = _in_float64(part.flatten(1), p)
        at += len(part)


def _in_float64(rows: Tensor, p: float) -> Tensor:
    x = rows.to(torch.complex128 if rows.is_complex() else torch.float64)
    if p == inf:
        return x.abs().amax(1)
    return (x * x if p == 2 else x.abs().pow_(p)).sum(1)
