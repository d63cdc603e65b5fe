"""Table: where rows of tensors lie, for the compiled kernel to do something with each of them in one call."""

from array import array
from bisect import bisect_right
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

    ``tensors``: that hold all of them, at these ``addresses``. ``groups``: those that lie on the CPU, row after row, in
    a dtype that is known there. ``others``: places of all others.
    """

    tensors: Sequence[Tensor]
    addresses: "array[int]"
    groups: Sequence[Group]
    others: Sequence[int]

    @classmethod
    def of(cls, tensors: Sequence[Tensor], cuts: Sequence[Cut] | None = None) -> Self:
        """``cuts``: None where each tensor is one row. RuntimeError where memory was freed, or two share it."""
        numbers, first = _rows_of(tensors, cuts)
        addresses = array("Q", map(Tensor.data_ptr, tensors))
        check_memory(tensors, addresses)
        dtypes = set(map(dtype_of, tensors))
        if len(dtypes) == 1 and dtypes <= native.KINDS.keys() and _all_contiguous(tensors):
            return cls(tensors, addresses, [Group(dtypes.pop(), range(len(tensors)), addresses, numbers, first)], ())
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
        return cls(tensors, addresses, groups, others)

    def reaches_all(self) -> bool:
        """Whether the kernel can, and they still lie there."""
        return not self.others and array("Q", map(Tensor.data_ptr, self.tensors)) == self.addresses

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


class Pattern:
    """How tensors lie in runs, of which each holds many, the same in every step: found out in the first."""

    __slots__ = ("_dtype", "_places", "_rows")

    def __init__(self) -> None:
        self._places: list[tuple[int, int]] | None = None  # of each tensor: its run, and bytes behind its beginning
        self._dtype: torch.dtype | None = None  # of all, where the kernel knows it
        self._rows = array("Q"), array("Q")

    def table(self, tensors: Sequence[Tensor], runs: Sequence[Tensor], cuts: Sequence[Cut] | None) -> Table:
        """Of ``tensors``, all of whose elements are in these ``runs``, and whose ``cuts`` are those of every step."""
        if not _all_contiguous(runs):
            return Table.of(tensors, cuts)
        begins, dtypes = array("Q", map(Tensor.data_ptr, runs)), set(map(dtype_of, runs))
        check_memory(runs, begins)
        if self._places is None:
            self._find(tensors, runs, begins, cuts)
            self._dtype = dtypes.pop() if len(dtypes) == 1 and dtypes <= native.KINDS.keys() else None
        elif dtypes != {self._dtype}:
            return Table.of(tensors, cuts)
        assert self._places is not None
        if self._dtype is None:
            return Table.of(tensors, cuts)
        starts = begins or (0,)  # where no tensor has elements
        addresses = array("Q", [starts[run] + behind for run, behind in self._places])
        return Table(runs, begins, [Group(self._dtype, range(len(tensors)), addresses, *self._rows)], ())

    def _find(
        self, tensors: Sequence[Tensor], runs: Sequence[Tensor], begins: "array[int]", cuts: Sequence[Cut] | None
    ) -> None:
        order = sorted(range(len(begins)), key=begins.__getitem__)
        ascending, self._places = [begins[run] for run in order], []
        for tensor in tensors:
            if not tensor.numel():
                self._places.append((0, 0))
                continue
            run = order[bisect_right(ascending, tensor.data_ptr()) - 1]
            behind = tensor.data_ptr() - begins[run]
            assert 0 <= behind <= runs[run].nbytes - tensor.nbytes
            self._places.append((run, behind))
        self._rows = _rows_of(tensors, cuts)


def _rows_of(tensors: Sequence[Tensor], cuts: Sequence[Cut] | None) -> tuple["array[int]", "array[int]"]:
    """The ``cuts`` of a group, and its ``first``."""
    if cuts is not None:
        first = list(accumulate((cut.count for cut in cuts), initial=0))[:-1]
        return array("Q", chain.from_iterable(cuts)), array("Q", first)
    numbers = array("Q", [0, 0, 0, 1]) * len(tensors)
    numbers[1::4] = array("Q", map(Tensor.numel, tensors))
    return numbers, array("Q", range(len(tensors)))


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
