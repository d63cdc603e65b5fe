"""Table: where rows of tensors lie, for the compiled kernel to do something with each of them in one call."""

from array import array
from collections.abc import Callable, Collection, Sequence
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

    def call(
        self, kernel: Callable[..., None] | None, dtypes: Collection[torch.dtype], numbers: Tensor
    ) -> Sequence[int]:
        """Hand rows of these ``dtypes`` to one of the kernels in :mod:`.native`; the places of all other tensors.

        ``numbers``: one for each row, (rows,) float64, the rows of one tensor after those of the other.
        """
        assert kernel is not None
        assert numbers.is_cpu
        assert numbers.dtype == torch.float64
        assert numbers.is_contiguous()
        others, threads = [self.others], torch.get_num_threads()
        for dtype, places, *table in self.groups:
            if dtype in dtypes:
                where = (each.buffer_info()[0] for each in table)
                kernel(*where, len(places), native.KINDS[dtype], native.instructions, threads, numbers.data_ptr())
            else:
                others.append(places)
        return sorted(chain.from_iterable(others))


def _all_contiguous(tensors: Sequence[Tensor]) -> bool:
    return set(map(type, tensors)) <= PLAIN and all(map(on_cpu, tensors)) and all(map(Tensor.is_contiguous, tensors))


def _in_row_order(tensor: Tensor, count: int) -> bool:
    """Whether the elements of ``count`` rows are side by side in memory, row after row, those of a row in any order."""
    if tensor.is_contiguous():
        return True
    along_first = count == len(tensor) and tensor.stride(0) * count == tensor.numel()
    return is_dense(tensor) and (count == 1 or along_first)
