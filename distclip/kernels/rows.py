"""How tensors fall into rows, each of which has a sum and a factor of its own: views of them, nothing is copied."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from torch import Tensor

from .dtypes import as_real


class Cut(NamedTuple):
    """How the elements of one tensor, in row-major order, fall into ``count`` rows.

    The end of a row in front, of ``head`` elements, then whole rows of ``length``, and behind them the beginning of a
    row, of ``tail`` elements; 0 where there is no such row. ``length`` is 0 where rows are empty.
    """

    head: int
    length: int
    tail: int
    count: int  # type: ignore[assignment]  # and no tuple.count

    @property
    def lengths(self) -> list[int]:
        """How many elements each row has."""
        ends = [[n] if n else [] for n in (self.head, self.tail)]
        return [*ends[0], *[self.length] * (self.count - len(ends[0]) - len(ends[1])), *ends[1]]


class Rows(NamedTuple):
    """Rows of one length: dim 0 of ``numbers``, which has two dimensions or more; ``first``: which of all rows."""

    numbers: Tensor
    first: int

    @property
    def length(self) -> int:
        return self.numbers.numel() // len(self.numbers)

    def real(self) -> "Rows":
        """The same with complex numbers as pairs."""
        return Rows(as_real(self.numbers), self.first)

    def theirs(self, factors: Tensor) -> Tensor:
        """Of the ``factors`` of all rows, (rows,), those of these: a view with as many dimensions as ``numbers``."""
        count, *others = self.numbers.shape
        return factors[self.first : self.first + count].view(count, *[1] * len(others))


def whole(tensor: Tensor) -> Cut:
    """The tensor is one row."""
    return Cut(0, tensor.numel(), 0, 1)


def rows_of(tensors: Sequence[Tensor], cuts: Sequence[Cut]) -> Iterator[Rows]:
    """Yield the rows of each tensor; none where there are no elements.

    At most three times, or as often as takes views of one that is not contiguous.
    """
    first = 0
    for tensor, cut in zip(tensors, cuts, strict=True):
        at = first
        for numbers in _matrices(tensor, cut) if tensor.numel() else ():
            yield Rows(numbers, at)
            at += len(numbers)
        first += cut.count


def _matrices(tensor: Tensor, cut: Cut) -> Sequence[Tensor]:
    if cut.count == 1:
        return (tensor.unsqueeze(0) if tensor.ndim else tensor.view(1, 1),)
    if not (cut.head or cut.tail) and cut.count == tensor.shape[0] and tensor.ndim > 1:
        return (tensor,)
    if not tensor.is_contiguous():
        assert cut.head == cut.tail == 0, "only flat tensors are cut within rows"
        inside = cut._replace(count=cut.count // len(tensor))  # rows have indices along more dimensions than the first
        return [numbers for each in tensor.unbind() for numbers in _matrices(each, inside)]
    flat = tensor.view(-1)
    body = flat[cut.head : len(flat) - cut.tail]
    parts = [flat[: cut.head].view(1, -1), body.view(-1, cut.length or 1), flat[len(flat) - cut.tail :].view(1, -1)]
    return [part for part in parts if part.numel()]
