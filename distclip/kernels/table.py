"""Table: where rows of tensors lie, for the compiled kernel to do something with each of them in one call."""

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import NamedTuple, Self

import torch
from torch import Tensor

from . import native
from .dtypes import dtype_of
from .flat import is_dense
from .memory import check_memory
from .rows import Cut
from .sums import PLAIN, on_cpu


class Group(NamedTuple):
    """Tensors of one dtype: their ``places`` among all, addresses, four numbers each that say how they fall into rows,
    and where the numbers of their rows begin.
    """

    dtype: torch.dtype
    places: Sequence[int]
    addresses: "array[int]"
    cuts: "array[int]"
    first: "array[int]"


@dataclass(frozen=True, slots=True, eq=False)
class Table:
    """Where tensors lie, as long as they do.

    ``addresses``: of all. ``groups``: those that lie on the CPU, row after row, in a dtype that is known there.
    ``others``: places of all others.
    """

    addresses: "array[int]"
    groups: Sequence[Group]
    others: Sequence[int]

    @classmethod
    def of(cls, tensors: Sequence[Tensor], cuts: Sequence[Cut] | None = None) -> Self:
        """``cuts``: None where each tensor is one row. RuntimeError where memory was freed, or two share it."""
        first: Sequence[int] = range(len(tensors))
        if cuts is None:
            numbers = array("Q", [0, 0, 0, 1]) * len(tensors)
            numbers[1::4] = array("Q", map(Tensor.numel, tensors))
        else:
            numbers = array("Q", chain.from_iterable(cuts))
            first = list(accumulate((cut.count for cut in cuts), initial=0))[:-1]
        addresses = array("Q", map(Tensor.data_ptr, tensors))
        check_memory(tensors, addresses)
        dtypes = set(map(dtype_of, tensors))
        if len(dtypes) == 1 and dtypes <= native.KINDS.keys() and _all_contiguous(tensors):
            group = Group(dtypes.pop(), range(len(tensors)), addresses, numbers, array("Q", first))
            return cls(addresses, [group], ())
        found: dict[torch.dtype, list[int]] = {}
        others: list[int] = []
        for k, tensor in enumerate(tensors):
            usual = tensor.dtype in native.KINDS and type(tensor) in PLAIN and tensor.is_cpu
            readable = usual and _in_row_order(tensor, numbers[4 * k + 3])
            (found.setdefault(tensor.dtype, []) if readable else others).append(k)
        groups = [
            Group(
                dtype,
                places,
                array("Q", [addresses[k] for k in places]),
                array("Q", [number for k in places for number in numbers[4 * k : 4 * k + 4]]),
                array("Q", [first[k] for k in places]),
            )
            for dtype, places in found.items()
        ]
        return cls(addresses, groups, others)

    def is_of(self, tensors: Sequence[Tensor]) -> bool:
        """Whether these tensors, of the same sizes and strides, still lie there, all of them within reach."""
        return not self.others and array("Q", map(Tensor.data_ptr, tensors)) == self.addresses

    def add_squares(self, sums: Tensor, zeros: Tensor | None = None) -> Sequence[int]:
        """Add the sum of squares of each row; the places of all tensors that it has not read.

        ``sums``: one for each row, (rows,) float64, the rows of one tensor after those of the other. ``zeros``: how
        many elements of each tensor are 0 is written to it, (tensors,) float64.
        """
        assert native.sum_rows is not None
        for group in self.groups:
            found = None if zeros is None else torch.zeros(len(group.places), dtype=torch.float64, device="cpu")
            _call(native.sum_rows, group, sums, None if found is None else found.data_ptr())
            if zeros is not None and found is not None:
                zeros[list(group.places)] = found
        return self.others

    def multiply_(self, factors: Tensor) -> Sequence[int]:
        """Multiply each row by its factor, (rows,) float64; the places of all tensors that it has not changed."""
        assert native.multiply_rows is not None
        others = [self.others]
        for group in self.groups:
            if group.dtype in native.SCALED:
                _call(native.multiply_rows, group, factors)
            else:
                others.append(group.places)
        return sorted(chain.from_iterable(others))


def _call(kernel: Callable[..., None], group: Group, numbers: Tensor, *more: int | None) -> None:
    assert numbers.is_cpu
    assert numbers.dtype == torch.float64
    assert numbers.is_contiguous()
    where = (each.buffer_info()[0] for each in (group.addresses, group.cuts, group.first))
    kind, threads = native.KINDS[group.dtype], torch.get_num_threads()
    kernel(*where, len(group.places), kind, native.instructions, threads, numbers.data_ptr(), *more)


def _all_contiguous(tensors: Sequence[Tensor]) -> bool:
    return set(map(type, tensors)) <= PLAIN and all(map(on_cpu, tensors)) and all(map(Tensor.is_contiguous, tensors))


def _in_row_order(tensor: Tensor, count: int) -> bool:
    """Whether the elements of ``count`` rows are side by side in memory, row after row, those of a row in any order."""
    if tensor.is_contiguous():
        return True
    along_first = count == len(tensor) and tensor.stride(0) * count == tensor.numel()
    return is_dense(tensor) and (count == 1 or along_first)
