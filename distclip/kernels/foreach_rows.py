"""Sums and scaling of rows on accelerators by torch's own kernels: few launches, no large copy, no host sync.

Rows of one length are joined, from many small tensors or from a part of a large one, to be converted to float64 and
summed in two launches. In which precision: [Note: how a norm is summed] in kernels/__init__.py.

Private torch API, read in 2.13: ``_foreach_copy_``.
"""

from collections.abc import Iterable, Iterator, Sequence
from math import inf

import torch
from torch import Tensor

from . import foreach
from .dtypes import WIDE
from .foreach import FEW, LARGE, SMALL
from .rows import Rows


def sums(rows: Sequence[Rows], count: int, like: Tensor, p: float) -> Tensor:
    """The sum of |x| ** p of each of ``count`` rows, for p = inf max(|x|): float64, (count,), on the device of
    ``like``; 0 for those that are not among ``rows``.
    """
    found = like.new_zeros(count, dtype=torch.float64)
    long = [each for each in rows if len(each.numbers) == 1 or each.length > SMALL]
    alone = [(each.first + k, row) for each in long for k, row in enumerate(each.numbers.unbind())]
    norms = [norm.view(1) for norm in foreach.norms([row for _, row in alone], p)]
    places = [slice(at, at + 1) for at, _ in alone]
    short = [each for each in rows if len(each.numbers) > 1 and each.length <= SMALL]
    for same in _alike(map(Rows.real, short) if p == 2 else short):
        for few in _batches(same):
            norms += _norms(few, p)
            places += [slice(each.first, each.first + len(each.numbers)) for each in few]
    if places:  # to write by a list of indices would wait for these to be copied
        torch._foreach_copy_([found[place] for place in places], norms)
    return found if p == inf else found.pow_(p)


def multiply_(rows: Sequence[Rows], factors: Tensor) -> None:
    """Multiply every row in place by its factor, ``factors[first]`` and so on: float32 or float64 on their device.

    The product is in fp32 and rounded once, for bf16 and fp16 tensors too; in float64 for float64.
    """
    for same in _alike(map(Rows.real, rows)):
        by = factors if same[0].numbers.dtype in WIDE else factors.float()
        small, large = _by_size(same)
        joined, alone = (small, large) if len(small) > FEW else ([], same)
        for each in alone:
            each.numbers.mul_(each.theirs(by))  # never 0-d, of which torch would round the factor to bf16
        for few in _batches(joined):
            copy, parts = _copied(few, few[0].numbers.dtype)
            copy.mul_(torch.cat([each.theirs(by).flatten() for each in few]).view(-1, 1))
            torch._foreach_copy_([each.numbers for each in few], parts)


def _by_size(rows: Iterable[Rows]) -> tuple[list[Rows], list[Rows]]:
    """Those that are worth joining, and the others."""
    small: list[Rows] = []
    large: list[Rows] = []
    for each in rows:
        (small if each.numbers.numel() <= SMALL and each.numbers.is_contiguous() else large).append(each)
    return small, large


def _norms(rows: Sequence[Rows], p: float) -> Sequence[Tensor]:
    numbers = rows[0].numbers
    copy, _ = _copied(rows, torch.complex128 if numbers.is_complex() else torch.float64)
    norms: Tensor = torch.linalg.vector_norm(copy, p, 1)
    return torch.split(norms, [len(each.numbers) for each in rows])


def _copied(rows: Sequence[Rows], dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    """One copy of rows of one length, (all rows, length), and views of it shaped like each."""
    numbers = [each.numbers for each in rows]
    counts = list(map(len, numbers))
    copy = numbers[0].new_empty((sum(counts), rows[0].length), dtype=dtype)
    parts = [part.view(each.shape) for part, each in zip(torch.split(copy, counts), numbers, strict=True)]
    torch._foreach_copy_(parts, numbers)
    return copy, parts


def _alike(rows: Iterable[Rows]) -> Iterable[list[Rows]]:
    """Lists of one dtype and one length."""
    groups: dict[tuple[torch.dtype, int], list[Rows]] = {}
    for each in rows:
        groups.setdefault((each.numbers.dtype, each.length), []).append(each)
    return groups.values()


def _batches(rows: Iterable[Rows]) -> Iterator[list[Rows]]:
    """Lists of at most ``LARGE`` elements; what is larger is cut between rows."""
    few: list[Rows] = []
    waiting = 0
    for each in rows:
        at = each.first
        for part in torch.split(each.numbers, max(1, LARGE // each.length)):
            if waiting + part.numel() > LARGE and few:
                yield few
                few, waiting = [], 0
            few.append(Rows(part, at))
            at += len(part)
            waiting += part.numel()
    if few:
        yield few
