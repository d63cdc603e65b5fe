"""The table of a plan: all parameters of the model, the same list on every rank, each of which finds its own in it.

Names travel only where ``split_over`` or ``layout`` say that ranks hold different parameters.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import prod
from typing import TypeAlias

import torch

from ..kernels.transfer import sent
from ..layouts.rows import Grid, Rows, rows_of
from ..policies.statistic import Dims, Statistic
from ..ranks.connections import all_reduce
from . import refusals
from .build import Plan


@dataclass(slots=True)
class Parameter:
    """One of the table.

    * ``where``: which of those of this ``name``, as :class:`.layouts.layout.Replication` tells it; ``label``: what its
      unit is called.
    * ``grid``: dimensions that number its rows, and their sizes; empty where it is one row, or nobody asked for rows.
    * ``size``: its elements, 0 where ranks have parts and none knows.
    * ``bare``: its name without the number of the part of the model in which it is.
    """

    name: str
    where: str
    grid: Grid
    size: float
    bare: str
    label: str = ""

    @property
    def rows(self) -> int:
        return prod(size for _, size in self.grid)

    def matches(self, pattern: str) -> bool:
        """Whether a group with this pattern has it."""
        return matches(self.name, pattern) or matches(self.label, pattern)


def matches(name: str, pattern: str) -> bool:
    """Whether ``pattern`` is this name, brackets and all, or has wildcards that fit."""
    return name == pattern or fnmatchcase(name, pattern)


Others: TypeAlias = Sequence[tuple[str, str, Sequence[Sequence[int]], float, str]]
"""Name, ``where``, grid, size and bare name of the parameters of one rank that not all ranks know."""


def others_of(plan: Plan, asked: Sequence[Statistic]) -> Others:
    """Those of this rank. LayoutError where it is not known which ranks hold the same, or which rows are here."""
    rows = rows_asked(plan, asked)
    mine = [_own(plan, i, rows) for i in range(len(plan.pieces))]
    others = [each for each, known in zip(mine, plan.known_to_all, strict=True) if not known]
    return [(each.name, each.where, each.grid, each.size, each.bare) for each in others]


def rows_asked(plan: Plan, asked: Sequence[Statistic]) -> list[Rows] | None:
    """Which rows each piece has, where some are asked for; ValueError where these are along different dimensions."""
    dims = list(dict.fromkeys(each.along for each in asked if each.per == "row"))
    if len(dims) > 1:
        raise refusals.other_rows(*dims[:2])
    return [rows_of(piece, _dims(plan, i, dims[0])) for i, piece in enumerate(plan.pieces)] if dims else None


def _dims(plan: Plan, index: int, by_pattern: Dims) -> tuple[int, ...] | None:
    """The row dims that somebody named for this piece."""
    return next((dims for pattern, dims in by_pattern if matches(_name(plan, index), pattern)), None)


def _name(plan: Plan, index: int) -> str:
    """Without one it has a number, which all ranks that know it count alike."""
    return plan.pieces[index].name or f"parameter {index}"


def _own(plan: Plan, index: int, rows: Sequence[Rows] | None) -> Parameter:
    """That of this piece."""
    where = plan.where[index]
    if where is None:
        raise refusals.unknown_replicas(plan.label(index))
    if rows is not None and plan.in_parts[index]:
        raise refusals.unknown_rows(plan.label(index))
    size = 0.0 if plan.in_parts[index] else float(plan.pieces[index].size)
    name = _name(plan, index)
    bare = name.partition(".")[2] if plan.numbered and plan.pieces[index].name else name
    return Parameter(name, where, () if rows is None else rows[index].grid, size, bare)


def table_of(plan: Plan, rows: Sequence[Rows] | None, others: Sequence[Others]) -> tuple[list[Parameter], list[int]]:
    """The parameters of all ranks, the same list on each of them; and the place in it of each piece of this rank.

    First those that all know, in their order, then the ``others`` in the order of the ranks that hold them.
    """
    mine = [_own(plan, i, rows) for i in range(len(plan.pieces))]
    found = {(each.name, each.where): each for each, known in zip(mine, plan.known_to_all, strict=True) if known}
    for rank in others:
        for name, where, listed, size, bare in rank:
            grid = tuple((dim, count) for dim, count in listed)
            same = found.setdefault((name, where), Parameter(name, where, grid, size, bare))
            if (same.grid, same.size) != (grid, size):
                raise refusals.units_differ(name, same.size, size)
    table, place = list(found.values()), {key: k for k, key in enumerate(found)}
    places = [place[each.name, each.where] for each in mine]
    for each, label in zip(table, labels([each.name for each in table], table), strict=True):
        each.label = label
    if any(others):
        _count(plan, table, places)
    return table, places


def labels(names: Sequence[str], table: Sequence[Parameter]) -> list[str]:
    """The ``names`` of all in the table; those that share one say where they are too."""
    namesakes, before, found = Counter(names), Counter[str](), []
    for name, each in zip(names, table, strict=True):
        where = str(before[name]) if each.where.startswith("#") else each.where  # a rank: the number among namesakes
        found.append(f"{name}[{where}]" if namesakes[name] > 1 and where else name)
        before[name] += 1
    return found


def _count(plan: Plan, table: Sequence[Parameter], places: Sequence[int]) -> None:
    """Count the elements of each, which is the size of those in parts; LayoutError where that is not what it has.

    A weight that two stages share by different names, said to be on two ranks, would have half of its elements twice.
    """
    here = torch.tensor([float(piece.here) for piece in plan.pieces], dtype=torch.float64) * plan.weights.cpu()
    sizes = torch.zeros(len(table), dtype=torch.float64).index_add_(0, torch.tensor(places, dtype=torch.int64), here)
    for parameter, size in zip(table, all_reduce(plan.group, sent(sizes, plan.device)).tolist(), strict=True):
        if parameter.size and abs(size - parameter.size) > 0.5:
            raise refusals.unit_not_counted_once(parameter.label, size / parameter.size)
        parameter.size = float(round(size))
