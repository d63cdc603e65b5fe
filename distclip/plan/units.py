"""The units of a plan: one table of parameters for all ranks, of which each finds its own.

Called once, where a Clipper is built. Names travel only where ``split_over`` or ``layout`` say that ranks hold
different parameters. The words: [Note: units and slots] in policies/statistics.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from itertools import accumulate
from math import prod
from typing import TypeAlias

import torch
from torch import Tensor

from ..kernels.transfer import sent
from ..layouts.rows import Grid, Rows, are_first, rows_of
from ..policies.statistic import LEVELS, Dims, Statistic
from ..policies.units import Gather, Level, RowNames, Units
from ..ranks.connections import all_reduce
from . import refusals
from .build import Plan
from .slots import Slots, firsts_of


@dataclass(slots=True)
class Parameter:
    """One of the table.

    * ``where``: which of those of this ``name``, as :class:`.layouts.layout.Replication` tells it; ``label``: what its
      unit is called.
    * ``grid``: dimensions that number its rows, and their sizes; empty where it is one row, or nobody asked for rows.
    * ``size``: its elements, 0 where ranks have parts and none knows.
    """

    name: str
    where: str
    grid: Grid
    size: float
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


Others: TypeAlias = Sequence[tuple[str, str, Sequence[Sequence[int]], float]]
"""Name, ``where``, grid and size of the parameters of one rank that not all ranks know."""


def others_of(plan: Plan, asked: Sequence[Statistic]) -> Others:
    """Those of this rank. LayoutError where it is not known which ranks hold the same, or which rows are here."""
    rows = _rows(plan, asked)
    mine = [_own(plan, i, rows) for i in range(len(plan.pieces))]
    others = [each for each, known in zip(mine, plan.known_to_all, strict=True) if not known]
    return [(each.name, each.where, each.grid, each.size) for each in others]


def with_slots(plan: Plan, asked: Sequence[Statistic], others: Sequence[Others], zeros: bool = False) -> Plan:
    """``plan`` with slots for what is ``asked``, not nothing, and for ``zeros`` of gradients.

    ``others``: of all ranks, the same on each; one all-reduce if there are some. ValueError for a group of nothing.
    """
    finest = max((each.per for each in asked), key=LEVELS.index)
    rows, by_parameter = _rows(plan, asked), finest in ("parameter", "row")
    table, places = _table(plan, rows, others)
    _must_match(table, asked)
    groups = [patterns for each in asked for _, patterns in each.named]
    blocks = _by_parameter(table) if by_parameter else _by_groups(table, groups)
    slot_of_sum = _slots_of_sums(blocks, places, rows)
    counts = [1] * len(places) if rows is None else [each.cut.count for each in rows]
    weights = plan.weights.cpu().repeat_interleave(torch.tensor(counts, dtype=torch.int64))
    levels = {each.level: _level(table, blocks, each.level) for each in asked if each.per != "model"}
    slots = Slots(
        count=blocks.total,
        of_parameters=any(each.of == "parameter" for each in asked),
        units=Units(sum(each.size for each in table), {k: _sent(v, plan.device) for k, v in levels.items()}, plan.p),
        names=_row_names(table) if by_parameter else None,
        here=_sent_gather(_gather(slot_of_sum, blocks.total, len(slot_of_sum)), plan.device),
        slot_of_sum=sent(slot_of_sum, plan.device),
        per_piece=tuple(counts),
        of_pieces=Gather() if rows is None else Gather(None, sent(torch.tensor(counts), plan.device)),
        cuts=None if rows is None else tuple(each.cut for each in rows),
        along=() if rows is None else tuple(each.dims for each in rows),
        moves={} if rows is None else {i: each.dims for i, each in enumerate(rows) if not are_first(each.dims)},
        weights=None if plan.unweighted else sent(weights, plan.device),
        firsts=sent(firsts_of(counts), plan.device) if zeros else None,
    )
    return plan.with_slots(slots, repr([(each.label, each.grid) for each in table]))


# ---- the table ----------------------------------------------------------------------------------------------


def _rows(plan: Plan, asked: Sequence[Statistic]) -> list[Rows] | None:
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
    return Parameter(_name(plan, index), where, () if rows is None else rows[index].grid, size)


def _table(plan: Plan, rows: Sequence[Rows] | None, others: Sequence[Others]) -> tuple[list[Parameter], list[int]]:
    """The parameters of all ranks, the same list on each of them; and the place in it of each piece of this rank.

    First those that all know, in their order, then the ``others`` in the order of the ranks that hold them.
    """
    mine = [_own(plan, i, rows) for i in range(len(plan.pieces))]
    found = {(each.name, each.where): each for each, known in zip(mine, plan.known_to_all, strict=True) if known}
    for rank in others:
        for name, where, listed, size in rank:
            grid = tuple((dim, count) for dim, count in listed)
            same = found.setdefault((name, where), Parameter(name, where, grid, size))
            if (same.grid, same.size) != (grid, size):
                raise refusals.units_differ(name, same.size, size)
    table, place = list(found.values()), {key: k for k, key in enumerate(found)}
    places = [place[each.name, each.where] for each in mine]
    _label(table)
    if any(others):
        _count(plan, table, places)
    return table, places


def _label(table: Sequence[Parameter]) -> None:
    """By their names; those that share one say where they are too."""
    namesakes: dict[str, list[Parameter]] = {}
    for each in table:
        namesakes.setdefault(each.name, []).append(each)
    for name, same in namesakes.items():
        for k, each in enumerate(same):
            where = str(k) if each.where.startswith("#") else each.where  # a rank: the number among its namesakes
            each.label = f"{name}[{where}]" if len(same) > 1 and where else name


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


def _must_match(table: Sequence[Parameter], asked: Sequence[Statistic]) -> None:
    for pattern in dict.fromkeys(pattern for each in asked for pattern, _ in each.along):
        if not any(matches(each.name, pattern) for each in table):
            raise refusals.no_parameter("dims", pattern, [each.label for each in table])


# ---- slots --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Blocks:
    """Slots that always go together: the rows of one parameter, or what parameters in the same groups share.

    ``of``: the block of each parameter of the table; ``counts``: slots of each block; ``starts``: its first.
    """

    of: Sequence[int]
    counts: Sequence[int]

    @property
    def starts(self) -> list[int]:
        return [0, *accumulate(self.counts)][:-1]

    @property
    def total(self) -> int:
        return max(1, sum(self.counts))  # a message is never empty


def _by_parameter(table: Sequence[Parameter]) -> _Blocks:
    return _Blocks(range(len(table)), [each.rows for each in table])


def _by_groups(table: Sequence[Parameter], groups: Sequence[Sequence[str]]) -> _Blocks:
    """One slot for all parameters that are in the same of these groups."""
    kinds = [tuple(any(map(each.matches, patterns)) for patterns in groups) for each in table]
    number = {kind: k for k, kind in enumerate(dict.fromkeys(kinds))}
    return _Blocks([number[kind] for kind in kinds], [1] * len(number))


def _slots_of_sums(blocks: _Blocks, places: Sequence[int], rows: Sequence[Rows] | None) -> Tensor:
    """Where each local sum goes: (local sums,) int64."""
    starts = blocks.starts
    firsts = [starts[blocks.of[place]] for place in places]
    if rows is None:
        return torch.tensor(firsts, dtype=torch.int64)
    every = [first + each.index for first, each in zip(firsts, rows, strict=True)]
    return torch.cat(every) if every else torch.zeros(0, dtype=torch.int64)


def _gather(places: Tensor, count: int, of: int) -> Gather:
    """How numbers make up ``count`` others, each in the place of ``places``; those with the same place are combined.

    ``of``: how many numbers there are, of which those that have no place are the last.
    """
    ordered, order = places.sort(stable=True)
    lengths = torch.bincount(places, minlength=count)
    return Gather(
        None if len(places) == of and torch.equal(ordered, places) else order,
        None if len(places) == count and bool((lengths == 1).all()) else lengths,
    )


def _level(table: Sequence[Parameter], blocks: _Blocks, level: Statistic) -> Level:
    sizes = torch.tensor([each.size for each in table], dtype=torch.float64)
    counts = torch.tensor([each.rows for each in table], dtype=torch.int64)
    labels = [each.label for each in table]
    if level.per == "group":
        return _groups(table, blocks, level, sizes)
    rows = sum(blocks.counts)  # where there are none, the slot that travels all the same is in no unit
    if level.per == "row":
        each, of_slots = (sizes / counts).repeat_interleave(counts), Gather(None if rows else torch.arange(0))
        return Level(_row_names(table), each, of_slots, torch.arange(blocks.total))
    units = torch.full((blocks.total,), len(table))
    units[:rows] = torch.arange(len(table)).repeat_interleave(counts)
    return Level(labels, sizes, _gather(units[:rows], len(table), blocks.total), units)


def _row_names(table: Sequence[Parameter]) -> RowNames:
    return RowNames([each.label for each in table], [each.rows for each in table], [each.grid for each in table])


def _groups(table: Sequence[Parameter], blocks: _Blocks, level: Statistic, sizes: Tensor) -> Level:
    """The slots of a group are those of its parameters."""
    starts, names = blocks.starts, [name for name, _ in level.named]
    slots: list[Tensor] = []
    lengths, elements = [], []
    unit_of_slot, groups_of_slot = torch.full((blocks.total,), len(names)), torch.zeros(blocks.total)
    for k, (name, patterns) in enumerate(level.named):
        members = [i for i, each in enumerate(table) if any(map(each.matches, patterns))]
        if not members:
            raise refusals.empty_group(name, patterns, [each.label for each in table])
        whole = dict.fromkeys(blocks.of[i] for i in members)
        own = torch.cat([torch.arange(starts[block], starts[block] + blocks.counts[block]) for block in whole])
        unit_of_slot[own] = k
        groups_of_slot[own] += 1
        slots.append(own)
        lengths.append(len(own))
        elements.append(float(sizes[members].sum()))
    overlap = bool((groups_of_slot > 1).any())
    shared = _shared(table, level) if overlap else ""
    gather = Gather(torch.cat(slots), torch.tensor(lengths))
    return Level(names, torch.tensor(elements, dtype=torch.float64), gather, None if overlap else unit_of_slot, shared)


def _shared(table: Sequence[Parameter], level: Statistic) -> str:
    """Which parameter is in two groups, and in which."""
    for each in table:
        found = [name for name, patterns in level.named if any(map(each.matches, patterns))]
        if len(found) > 1:
            return f"{each.label} is in the groups {' and '.join(map(repr, found))}"
    return ""


def _sent(level: Level, device: torch.device) -> Level:
    units = None if level.unit_of_slot is None else sent(level.unit_of_slot, device)
    return replace(
        level, sizes=sent(level.sizes, device), of_slots=_sent_gather(level.of_slots, device), unit_of_slot=units
    )


def _sent_gather(gather: Gather, device: torch.device) -> Gather:
    return Gather(*(None if each is None else sent(each, device) for each in (gather.order, gather.lengths)))
