"""Sums of |x| ** p of each tensor, or of each row of tensors: one pass, whatever their number.

Added in the same precision as the sum of all of them: [Note: how a norm is summed] in kernels/__init__.py.
"""

from array import array
from collections.abc import Sequence
from itertools import accumulate, chain
from math import inf

import torch
from torch import Tensor

from . import foreach_rows, native
from .device import has_float64
from .dtypes import as_real, dtype_of
from .flat import is_dense
from .memory import check_memory
from .rows import Cut, Rows, rows_of
from .sums import CHUNK, PLAIN, largest, on_cpu, power_sum


def sums_of_each(tensors: Sequence[Tensor], p: float) -> Tensor:
    """The sum of |x| ** p of each of ``tensors`` on the CPU, for p = inf max(|x|), NaN if any is: float64,
    (len(tensors),); 0 for empty ones.
    """
    sums = torch.zeros(len(tensors), dtype=torch.float64, device="cpu")
    others: Sequence[int] = range(len(tensors))
    if p == 2 and native.kernel is not None:
        numels = array("Q", map(Tensor.numel, tensors))
        cuts = array("Q", [0, 0, 0, 1]) * len(tensors)
        cuts[1::4] = numels
        others = _add_squares(tensors, cuts, range(len(tensors)), sums)
    if others:
        found = [largest([tensors[k]]) if p == inf else power_sum([tensors[k]], p) for k in others]
        sums[list(others)] = torch.tensor(found, dtype=torch.float64, device="cpu")
    return sums


def row_sums(tensors: Sequence[Tensor], cuts: Sequence[Cut], p: float) -> Tensor:
    """The sum of |x| ** p of each row of ``tensors``, for p = inf max(|x|), NaN if any is: float64, the rows of one
    tensor after those of the other, on their common device, or on the CPU if that has no float64. 0 for empty rows.

    What is not finite stays in its row. No temporary is as large as a large tensor. No host sync, but on a device
    without float64, whose tensors are copied to the host one by one.
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
        others = _add_squares(tensors, array("Q", chain.from_iterable(cuts)), first, sums)
    else:
        check_memory(tensors)
    for k in others:
        for rows in rows_of([tensors[k]], [cuts[k]]):
            _write_sums(rows, p, sums[first[k] :])
    return sums


def _add_squares(tensors: Sequence[Tensor], cuts: "array[int]", first: Sequence[int], sums: Tensor) -> Sequence[int]:
    """Write the sums of squares of rows by the compiled kernel; the places of the tensors that it does not read.

    ``cuts``: four numbers a tensor; ``first``: where the sums of each begin.
    """
    dtypes = set(map(dtype_of, tensors))
    if len(dtypes) == 1 and dtypes <= native.KINDS.keys() and _all_contiguous(tensors):
        _call(tensors, cuts, array("Q", first), sums)
        return ()
    groups: dict[torch.dtype, list[int]] = {}
    others: list[int] = []
    for k, tensor in enumerate(tensors):
        usual = tensor.dtype in native.KINDS and type(tensor) in PLAIN and tensor.is_cpu
        readable = usual and _in_row_order(tensor, cuts[4 * k + 3])
        (groups.setdefault(tensor.dtype, []) if readable else others).append(k)
    for places in groups.values():
        theirs = array("Q", [number for k in places for number in cuts[4 * k : 4 * k + 4]])
        _call([tensors[k] for k in places], theirs, array("Q", [first[k] for k in places]), sums)
    check_memory(tensors)
    return others


def _all_contiguous(tensors: Sequence[Tensor]) -> bool:
    return set(map(type, tensors)) <= PLAIN and all(map(on_cpu, tensors)) and all(map(Tensor.is_contiguous, tensors))


def _in_row_order(tensor: Tensor, count: int) -> bool:
    """Whether the elements of ``count`` rows are side by side in memory, row after row, those of a row in any order."""
    if tensor.is_contiguous():
        return True
    along_first = count == len(tensor) and tensor.stride(0) * count == tensor.numel()
    return is_dense(tensor) and (count == 1 or along_first)


def _call(tensors: Sequence[Tensor], cuts: "array[int]", first: "array[int]", sums: Tensor) -> None:
    addresses = array("Q", map(Tensor.data_ptr, tensors))
    check_memory(tensors, addresses)
    assert native.of_rows is not None
    where = (numbers.buffer_info()[0] for numbers in (addresses, cuts, first))
    threads = torch.get_num_threads()
    native.of_rows(*where, len(tensors), native.KINDS[tensors[0].dtype], native.instructions, threads, sums.data_ptr())


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
