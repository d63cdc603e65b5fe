"""The units of a plan, made of its table of parameters, and the slots in which their sums travel.

Called once, where a Clipper is built. The words: [Note: units and slots] in policies/statistics.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

from ..kernels.transfer import sent
from ..layouts.rows import Rows, are_first
from ..policies.statistic import LEVELS, Statistic
from ..policies.units import Gather, Level, RowNames, Units
from . import refusals
from .build import Plan
from .slots import Slots, firsts_of
from .table import Others, Parameter, matches, rows_asked, table_of


def with_slots(plan: Plan, asked: Sequence[Statistic], others: Sequence[Others], zeros: bool = False) -> Plan:
    """``plan`` with slots for what is ``asked``, not nothing, and for ``zeros`` of gradients.

    ``others``: of all ranks, the same on each; one all-reduce if there are some. ValueError for a group of nothing.
    """
    finest = max((each.per for each in asked), key=LEVELS.index)
    rows, by_parameter = rows_asked(plan, asked), finest in ("parameter", "row")
    table, places = table_of(plan, rows, others)
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
