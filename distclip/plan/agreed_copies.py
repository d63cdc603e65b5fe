"""Which ranks hold copies of the same pieces: found out where a Clipper is built, by what each says that it holds.

Metadata tells how many ranks hold a piece, and not always which: of pipeline stages under DDP nobody knows. So each
rank sends a digest of its pieces that lie alike, and ranks with the same one hold copies. Where these are not as many
as the layout says, nothing of that family is compared: experts under one name that a layout calls different.
"""

from collections.abc import Sequence
from hashlib import blake2b

import torch
import torch.distributed as dist

from ..kernels.transfer import sent
from ..layouts.layout import part_of
from ..ranks.connections import all_reduce
from .build import Plan
from .families import NO_FAMILY, Copies, CopySet

EVERYWHERE = -1
Row = tuple[int, int, int, int]  # digests of a set of copies and of what it holds, number of pieces, replicas


def agree_on_copies(plan: Plan, may_differ: bool, stops: bool) -> Copies | None:
    """The copies whose bits the ranks of this plan compare; None where there are none, on all of them.

    ``may_differ``: ranks may hold other pieces, as `split_over` or `layout` say. Up to two all-reduces, of a number and
    of four numbers a rank and family, each with a host sync; none where all copies are on all ranks.
    """
    if plan.group.size == 1:
        return None
    families = _families(plan)
    mine = [_row(plan, family) for family in families]
    table = _told(plan, mine, may_differ)
    first, count = _numbered(table)
    ranks_of: dict[Row, list[int]] = {}
    for rank, rows in enumerate(table):
        for row in rows:
            ranks_of.setdefault(row, []).append(rank)
    sets = [CopySet(first[row[1]], row[2], ranks) for row, ranks in ranks_of.items() if len(ranks) == row[3]]
    compared = {row: each for row, each in ((row, ranks_of[row]) for row in mine) if len(each) == row[3]}
    if not sets or (plan.p == torch.inf and all(len(each.ranks) < plan.group.size for each in sets)):
        return None
    kept = [(row, family) for row, family in zip(mine, families, strict=True) if row in compared]
    home = {i: k for k, (_, family) in enumerate(kept) for i in family}
    homes = [home.get(i, NO_FAMILY) for i in range(len(plan.pieces))]
    return Copies(
        home=homes,
        signs=[1 - row[3] if compared[row][0] == plan.group.rank else 1 for row, _ in kept],
        everywhere=[row[3] == plan.group.size for row, _ in kept],
        slots={i: first[row[1]] + k for row, family in kept for k, i in enumerate(family)},
        count=count,
        sets=sets,
        stops=stops,
        families=homes,
    )


def _families(plan: Plan) -> list[list[int]]:
    """The pieces that other ranks hold too, those that lie on the same ranks together."""
    found: dict[int, list[int]] = {}
    for i, piece in enumerate(plan.pieces):
        if plan.replicas[i] > 1 and piece.aligned:
            everywhere = plan.known_to_all[i] and plan.replicas[i] == plan.group.size
            found.setdefault(EVERYWHERE if everywhere else plan.alike[i], []).append(i)
    return list(found.values())


def _row(plan: Plan, family: Sequence[int]) -> Row:
    pieces = [plan.pieces[i] for i in family]
    told = [(plan.label(i), str(plan.pieces[i].dtype), *plan.pieces[i].global_shape, plan.where[i]) for i in family]
    here = part_of(plan.group, pieces[0]), [piece.here for piece in pieces]
    return _digest(f"{told}|{here}"), _digest(str(told)), len(family), plan.replicas[family[0]]


def _digest(text: str) -> int:
    return int.from_bytes(blake2b(text.encode(), digest_size=6).digest())  # 48 bits: exact in float64


def _told(plan: Plan, mine: Sequence[Row], may_differ: bool) -> list[list[Row]]:
    """The rows of every rank."""
    group = plan.group
    if not may_differ and all(row[3] == group.size for row in mine):
        return [list(mine)] * group.size
    most = len(mine)
    if may_differ:
        most = int(all_reduce(group, torch.tensor([most], device=plan.device), dist.ReduceOp.MAX).item())
    rows = torch.zeros(group.size, most, 4, dtype=torch.float64)
    rows[group.rank, : len(mine)] = torch.tensor(mine, dtype=torch.float64).view(-1, 4)
    told = all_reduce(group, sent(rows, plan.device)).long().tolist() if most else [[]] * group.size
    return [[(row[0], row[1], row[2], row[3]) for row in each if row[2]] for each in told]


def _numbered(table: Sequence[Sequence[Row]]) -> tuple[dict[int, int], int]:
    """The first slot of what each set of copies holds, by digest; and the number of all slots."""
    first: dict[int, int] = {}
    count = 0
    for rows in table:
        for _, content, pieces, _ in rows:
            if content not in first:
                first[content] = count
                count += pieces
    return first, count
