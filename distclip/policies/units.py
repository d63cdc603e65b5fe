"""Units: what has a norm of its own, by levels, and how the slots that travel make them up.

The words: [Note: units and slots] in policies/statistics.py.
"""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from math import inf
from typing import TypeAlias, overload

import torch
from torch import Tensor

from .statistic import MODEL, Per, Statistic, asked, not_asked_for


@dataclass(frozen=True, slots=True, eq=False)
class Gather:
    """How numbers are put together: ``order`` them, (n,) int64, and combine the first ``lengths[0]``, and so on.

    ``order``: None where they are in order. ``lengths``: (units,) int64; None where each is a unit.
    """

    order: Tensor | None = None
    lengths: Tensor | None = None

    @property
    def is_nothing(self) -> bool:
        """Whether each number is a unit, in order."""
        return self.order is None and self.lengths is None

    def __call__(self, numbers: Tensor, p: float) -> Tensor:
        """Sums of powers (their maximum for p = inf) of each unit; 0 for a unit without numbers. No host sync.

        The order of additions is fixed, and what is not finite stays in its unit.
        """
        if self.order is not None:
            numbers = numbers.index_select(0, self.order)
        if self.lengths is None:
            return numbers
        how = "max" if p == inf else "sum"
        return torch.segment_reduce(numbers, how, lengths=self.lengths, unsafe=True, initial=0)

    def firsts(self) -> Tensor | None:
        """The first number of each unit, (units,) int64; None where each number is a unit. None may be empty."""
        if self.lengths is None:
            return self.order
        places = self.lengths.cumsum(0) - self.lengths
        return places if self.order is None else self.order.index_select(0, places)


Grid: TypeAlias = tuple[tuple[int, int], ...]
"""How the rows of a parameter are numbered: dimensions, ascending, and their sizes; the last counts fastest."""


class RowNames(Sequence[str]):
    """Names of rows, made when they are asked for: there may be millions. ``parameters`` have ``counts`` rows each.

    They say what to write in Python to get at the row: ``weight[3]``, ``experts.w2[0, :, 5]``.
    """

    __slots__ = ("_grids", "_starts", "counts", "parameters")

    def __init__(self, parameters: Sequence[str], counts: Sequence[int], grids: Sequence[Grid] = ()) -> None:
        self.parameters, self.counts, self._grids = parameters, counts, grids
        self._starts = [0, *accumulate(counts)]

    def __len__(self) -> int:
        return self._starts[-1]

    def parameter_of(self, index: int) -> str:
        """The name of the parameter whose row this is."""
        return self.parameters[bisect_right(self._starts, index) - 1]

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[k] for k in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        k = bisect_right(self._starts, index) - 1
        name, grid = self.parameters[k], self._grids[k] if self._grids else ((0, self.counts[k]),)
        return name if self.counts[k] == 1 else f"{name}[{_place(index - self._starts[k], grid)}]"


def _place(row: int, grid: Grid) -> str:
    places: dict[int, str] = {}
    for dim, size in reversed(grid):
        row, at = divmod(row, size)
        places[dim] = str(at)
    return ", ".join(places.get(dim, ":") for dim in range(max(places) + 1))


@dataclass(frozen=True, slots=True, eq=False)
class Level:
    """The units of one level.

    * ``names``: of the units, the same on every rank; of rows :class:`RowNames`.
    * ``sizes``: (units,) float64, how many elements each has.
    * ``of_slots``: how slots make them up.
    * ``unit_of_slot``: (slots,) int64, the unit that a slot is in, ``len(names)`` for one in no unit; None where groups
      overlap. ``shared``: says which parameter is in two of them, and which these are.
    """

    names: Sequence[str]
    sizes: Tensor
    of_slots: Gather
    unit_of_slot: Tensor | None
    shared: str = ""

    def longer(self) -> "Level":
        """With one more unit, the last, of no name and without slots."""
        names: Sequence[str] = [*self.names, ""]
        if isinstance(self.names, RowNames):
            names = RowNames([*self.names.parameters, ""], [*self.names.counts, 1])
        return replace(self, names=names, sizes=torch.cat([self.sizes, self.sizes.new_ones(1)]))


class Units:
    """What the statistics of one Clipper are norms of: agreed when it is built, the same on every rank.

    Inside a policy that wraps another, the *whole* of the inner one may be other units than the model: of all
    parameters at once, or one group. It is what is meant where no statistic is named.
    """

    __slots__ = ("_levels", "_member", "_whole", "bounded", "p", "size")

    def __init__(self, size: float = 0.0, levels: Mapping[Statistic, Level] | None = None, p: float = 2.0) -> None:
        """``size``: how many elements the model has; 0 where nobody asked for more than its norm. ``p``: of norms."""
        self.size, self.p = size, p
        self._levels = dict(levels or {})
        self._whole = self.bounded = MODEL  # what a decision for the model bounds
        self._member: int | None = None

    def at(self, whole: Statistic, member: int | None = None) -> "Units":
        """The same for a policy whose whole are the units of ``whole``, or the one with this number."""
        inner = Units(self.size, self._levels, self.p)
        inner._whole, inner._member = whole, member
        inner.bounded = whole if member is None else MODEL  # one group has one number, as the model has
        return inner

    def with_one_more(self, per: str) -> "Units":
        """The same with one more unit of this level, the last: to see which dimensions of a state are of units."""
        levels = {k: level.longer() if k.per == per else level for k, level in self._levels.items()}
        return Units(self.size, levels, self.p)

    @property
    def levels(self) -> tuple[Statistic, ...]:
        """The statistics of gradients that have units, in an order that is the same on every rank."""
        return tuple(self._levels)

    def level(self, statistic: Statistic | Per) -> Level:
        """The units of a statistic; ValueError where it was not asked for."""
        level = self._levels.get(asked(statistic).level)
        if level is None:
            raise not_asked_for(statistic)
        return level

    def shape(self, statistic: Statistic | Per | None = None) -> tuple[int, ...]:
        """The shape of a statistic: () for the model and for one group, else (units,). None: of the whole."""
        wanted = self._whole if statistic is None else asked(statistic)
        one = wanted.per == "model" or (statistic is None and self._member is not None)
        return () if one else (len(self.names(wanted)),)

    def names(self, statistic: Statistic | Per) -> Sequence[str]:
        """What its units are called: a parameter's name, ``name[row]``, or a group's name.

        Parameters that differ between ranks and share a name say where they are: ``experts.w1[ep=3]``.
        """
        return self.level(statistic).names

    def where(self, unit: int, statistic: Statistic | Per | None = None) -> str:
        """Of which unit something is, as errors say it; None: of the whole."""
        if statistic is not None:
            names = self.names(statistic)
            return f" for {names[unit]} (unit {unit} of {len(names)})"
        return "" if self._member is None else f" for the group {self.names(self._whole)[self._member]!r}"

    def sizes(self, statistic: Statistic | Per) -> Tensor:
        """How many elements each unit has: (units,) float64."""
        return self.level(statistic).sizes

    def by_slot(self, per: Statistic | Per, coefs: Tensor) -> Tensor:
        """Of one coefficient for each unit, (units,), that of each slot, (slots,): 1 for those in no unit.

        For the model they are those of the whole: 0-d for one group, and for the model itself, where they stay so.
        """
        of_whole = asked(per) == MODEL
        wanted, member = (self._whole, self._member) if of_whole else (asked(per), None)
        if wanted == MODEL:
            return coefs
        level = self.level(wanted)
        if level.of_slots.is_nothing and member is None:
            return coefs
        places = level.unit_of_slot
        assert places is not None, "groups that overlap are refused"
        if member is not None:
            return torch.where(places == member, coefs, 1.0)
        return torch.cat([coefs, coefs.new_ones(1)]).index_select(0, places)

    def spread(self, coefs: Tensor, per: Statistic | Per, finer: Statistic | Per) -> Tensor:
        """Of one coefficient for each unit, that of each unit of a ``finer`` level; ValueError where units are cut."""
        level = self.level(finer)
        if asked(finer).per == "group":
            raise ValueError(f"{per!r} and {finer!r} group parameters differently: decide by the same groups")
        slots = self.by_slot(per, coefs)
        firsts = level.of_slots.firsts()
        return slots if firsts is None else slots.index_select(0, firsts.clamp(max=len(slots) - 1))

    def must_not_overlap(self, per: Statistic) -> None:
        """ValueError where a parameter is in two groups."""
        shared = self.level(per).shared
        if shared:
            raise ValueError(f"{shared}: give each parameter to one group")
