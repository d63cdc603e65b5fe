"""Gradients that share memory: each element in common would be counted for each of them, and scaled as often."""

from collections.abc import Sequence
from operator import add, le

import torch
from torch import Tensor

from ..kernels.dtypes import size_in_bytes


def overlaps_itself(tensor: Tensor) -> bool:
    """Whether one element of memory may be several of ``tensor``, as after ``expand`` or some ``as_strided``."""
    reach = 0
    for step, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and step <= reach:
            return True
        reach += step * (size - 1)
    return False


def first_shared(tensors: Sequence[Tensor]) -> tuple[int, int] | None:
    """The places of two of these strided tensors that have memory in common; None where each has its own. 0.2 us each.

    Where some lie in the gaps of others (columns of one matrix), their bytes are marked one by one, on the host.
    """
    starts, ends = list(map(Tensor.data_ptr, tensors)), list(map(size_in_bytes, tensors))
    if not all(map(Tensor.is_contiguous, tensors)):
        ends = list(map(_extent, tensors))
    ends = list(map(add, starts, ends))
    if all(map(le, sorted(ends), sorted(starts)[1:])):
        return None
    here: list[int] = []  # those that reach beyond the start of the next
    for k in sorted((k for k, t in enumerate(tensors) if t.numel() and starts[k]), key=starts.__getitem__):
        here = [other for other in here if ends[other] > starts[k]]
        for other in here:
            if _share(tensors[other], tensors[k]):
                return min(other, k), max(other, k)
        here.append(k)
    return None


def _extent(tensor: Tensor) -> int:
    """Bytes from its first element to the end of its last."""
    if not tensor.numel():
        return 0
    steps = zip(tensor.stride(), tensor.shape, strict=True)
    return (1 + sum(step * (size - 1) for step, size in steps)) * tensor.element_size()


def _share(tensor: Tensor, other: Tensor) -> bool:
    """Whether two tensors of which the second begins inside the first share a byte."""
    if tensor.device != other.device:
        return False
    if not tensor.is_cpu and tensor.untyped_storage().data_ptr() != other.untyped_storage().data_ptr():
        return False  # addresses of some devices are handles
    if tensor.is_contiguous() and other.is_contiguous():
        return True
    first = tensor.data_ptr()
    marks = torch.zeros(max(_extent(tensor), other.data_ptr() - first + _extent(other)), dtype=torch.bool)
    _bytes_of(tensor, marks, first).fill_(True)
    return bool(_bytes_of(other, marks, first).any())


def _bytes_of(tensor: Tensor, marks: Tensor, first: int) -> Tensor:
    size = tensor.element_size()
    return marks.as_strided((*tensor.shape, size), (*(s * size for s in tensor.stride()), 1), tensor.data_ptr() - first)
