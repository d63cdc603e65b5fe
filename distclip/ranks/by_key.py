"""Adding numbers by key, where ranks do not have the same keys and none knows who has which.

[Note: adding by key]
Every key is at **home** on one rank, ``key`` modulo the number of ranks. What a rank has for a key travels there in
steps of 1, 2, 4, ... ranks, those of which the distance is the sum, and what meets on the way is added up. So a rank
exchanges messages with one other for each doubling of the number of ranks, and however many there are, it sends and
keeps about as many numbers as it began with, times these few steps.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels.transfer import sent
from .connections import all_reduce, pass_on
from .group import ClippingGroup


class Sum(NamedTuple):
    """The ``total`` of all ranks that have a key, and the ``first`` of these ranks."""

    total: float
    first: int


def add_by_key(group: ClippingGroup, device: torch.device, mine: Mapping[int, float]) -> dict[int, Sum]:
    """The sums over the group of the keys that are at home on this rank. Keys are whole numbers from 0 to 2**53.

    Two collectives for each doubling of the number of ranks, of one number and of three a key, each with a host sync.
    """
    held = {key: Sum(number, group.rank) for key, number in mine.items()}
    places = 1
    while places < group.size:
        leaving = [key for key in held if (key - group.rank) % group.size & places]
        rows = [(float(key), *held.pop(key)) for key in leaving]
        for key, total, first in _passed_on(group, device, rows, places).tolist():
            have = held.get(int(key), Sum(0.0, int(first)))
            held[int(key)] = Sum(have.total + total, min(have.first, int(first)))
        places *= 2
    return held


def _passed_on(group: ClippingGroup, device: torch.device, rows: Sequence[tuple[float, ...]], places: int) -> Tensor:
    """The rows, (n, 3), of the rank ``places`` behind this one, in exchange for ``rows``."""
    count = int(pass_on(group, torch.tensor([len(rows)], device=device), places, 1).item())
    numbers = torch.tensor(rows, dtype=torch.float64).view(-1, 3)
    return pass_on(group, sent(numbers, device), places, count)


def asked(
    group: ClippingGroup, device: torch.device, source: int, keys: Sequence[int], held: Mapping[int, Sum]
) -> dict[int, float]:
    """The totals of the ``keys`` of the rank ``source``, on every rank; ``held``: from :func:`add_by_key`.

    Three all-reduces, of a number and twice of one a key, each with a host sync.
    """
    mine = keys if group.rank == source else ()
    count = int(all_reduce(group, torch.tensor([len(mine)], device=device)).item())
    theirs = torch.zeros(count, dtype=torch.float64)
    theirs[: len(mine)] = torch.tensor(mine, dtype=torch.float64)
    names = [int(key) for key in all_reduce(group, sent(theirs, device)).tolist()]
    totals = torch.tensor([held[key].total if key in held else 0.0 for key in names], dtype=torch.float64)
    return dict(zip(names, all_reduce(group, sent(totals, device)).tolist(), strict=True))
