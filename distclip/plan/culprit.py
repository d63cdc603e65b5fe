"""Who made the norm non-finite: named from the norms each rank already has, by three small all-reduces.

They run only after a reduced value said "not finite", hence on all ranks of the group or on none.
"""

from math import inf, isfinite, isnan

import torch
import torch.distributed as dist

from ..kernels import local_norms
from ..ranks.compare import broadcast_text
from ..ranks.connections import all_reduce
from ..ranks.group import ClippingGroup
from ..report import Culprit
from .build import Plan
from .measure import norms_of
from .measured import Measured, Norms

KINDS = {1: "NaN", 2: "inf", 3: "overflow"}
NOBODY = 1 << 62
OVERFLOW = 1 << 60  # added so that a NaN or inf anywhere comes before an overflow
OWN, REDUCED, COPIED = "O", "R", "C"  # how the rank that is named came by its gradient


def culprit_of(plan: Plan, measured: Measured) -> Culprit:
    """Who made the norm of this measurement non-finite, the same answer on every rank.

    Where sums of parameters or rows have travelled, the first of these that is not finite names its parameter, without
    a collective, and not the rank; else :func:`find_culprit` asks the ranks.
    """
    slots, sums = plan.slots, measured.reduced.sums
    if slots is not None and slots.names is not None and sums is not None and not measured.can_overflow:
        bad = (~sums[: slots.count].isfinite()).nonzero().flatten().tolist()
        if bad:
            name, kind = slots.names.parameter_of(bad[0]), "NaN" if sums[bad[0]].isnan() else "inf"
            alone = plan.group.ranks if plan.group.size == 1 else ()
            return Culprit(kind, name, alone[0] if alone else None, tuple(alone), reduced=not alone)
    return find_culprit(plan, norms_of(plan, measured))


def find_culprit(plan: Plan, norms: Norms) -> Culprit:
    """The first parameter of the lowest rank whose gradient is not finite, the same answer on every rank.

    Three all-reduces, of one int64, of 1024 bytes and of a float64 a rank. Host syncs: one for each, one for the norms,
    and one for each gradient whose norm is inf, up to the first that is so itself. ``norms.parts`` may be empty where
    the gradients have changed since; then an inf norm is taken for an inf gradient.
    """
    group, device = plan.group, plan.device
    word = torch.tensor([_first_bad(group.rank, norms)], device=device)
    winner = int(all_reduce(group, word, dist.ReduceOp.MIN).item())
    if winner == NOBODY:
        return Culprit("overflow", None, None)
    winner %= OVERFLOW
    rank, index, kind = winner >> 34, winner >> 2 & 0xFFFFFFFF, KINDS[winner & 3]
    here = f"{_made(plan, index)}{plan.label(index)}" if group.rank == rank else ""
    answer = broadcast_text(group, device, rank, here)
    made, name = answer[:1], answer[1:]
    if kind == "overflow" or made == OWN:
        return Culprit(kind, name, group.ranks[rank], (group.ranks[rank],))
    bad = {plan.label(norms.indices[k]) for k in _bad(norms)}
    ranks = ranks_that(group, device, name in bad or group.rank == rank)
    return Culprit(kind, name, group.ranks[rank], ranks, reduced=made == REDUCED or len(ranks) > 1)


def ranks_that(group: ClippingGroup, device: torch.device, is_one: bool) -> tuple[int, ...]:
    """The global ranks for which ``is_one`` is true: one all-reduce of a float64 number a rank, and a host sync."""
    rows = torch.zeros(group.size, dtype=torch.float64, device=device)
    rows[group.rank] = is_one
    return tuple(group.ranks[k] for k, found in enumerate(all_reduce(group, rows).tolist()) if found)


def _made(plan: Plan, index: int) -> str:
    """Whether a gradient is its rank's own, was summed over ranks and cut, or is one of several copies.

    Where only one of several copies is not finite, that rank is the one. [Note: a new sharding] in layouts/__init__.py.
    """
    piece = plan.pieces[index]
    if plan.replicas[index] > 1:
        return COPIED
    return REDUCED if piece.reduced or piece.flat_over else OWN


def _bad(norms: Norms) -> list[int]:
    positions: list[int] = (~norms.norms.isfinite()).nonzero().flatten().tolist()
    return positions


def _first_bad(rank: int, norms: Norms) -> int:
    """The least number of the gradients that are not finite: that of the first NaN or inf, or of the first overflow."""
    overflow = NOBODY
    for position, norm in enumerate(norms.norms.tolist()):
        if isfinite(norm):
            continue
        if norms.parts and norm == inf:  # a look at the gradient tells an inf from an overflow
            norm = local_norms([norms.parts[position]], inf)[0].item()
        number = rank << 34 | norms.indices[position] << 2
        if not isfinite(norm):  # pieces come in order, and an overflow after all of them
            return number | (1 if isnan(norm) else 2)
        overflow = min(overflow, number | 3 | OVERFLOW)
    return overflow
