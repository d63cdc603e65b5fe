"""Proving a layout after a backward: ranks said to hold replicas do, and every element counts once."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import FAILURES, LayoutError
from ..gradients.storage import Storage
from ..kernels.transfer import sent
from ..ranks.compare import bit_sums
from ..ranks.connections import all_reduce
from . import refusals
from .build import Plan
from .copies import drift_words, drifted, norms_and_projections, signs_of, values_apart
from .measure import fail_with_others, measure, norms_of
from .measured import Norms
from .split import count_split

VERIFYING = 1 << 29  # tag of its measurement
TOLERANCE = 1e-5  # copies of a gradient may differ in their last bits where a kernel adds in any order


def verify(
    plan: Plan,
    holders: Sequence[Tensor],
    storage: Storage,
    error: LayoutError | None = None,
    tag: int = 0,
    call: str = "verify()",
) -> None:
    """Raise LayoutError, on every rank of the group, unless the layout holds for the gradients there are.

    ``error``: what this rank knows to be wrong already. ``tag``, ``call``: of who calls, as in :func:`measure`.
    """
    try:
        gradients = storage.read()
    except FAILURES as failed:
        fail_with_others(plan, failed, VERIFYING + tag, call)
        raise
    measured = measure(plan, gradients, storage.store, tag=VERIFYING + tag, error=error, call=call)
    if measured.reduced.read()[1]:
        raise refusals.calls_disagree(measured.reduced.who)
    apart = values_apart(plan, plan.held(holders), bit_sums)
    if apart:
        raise refusals.drifted_apart(apart)
    norms = norms_of(plan, measured)
    some_are_split = _count_known(plan, norms)
    _count_units(plan)
    if some_are_split:
        count_split(plan, holders, norms)


def _count_known(plan: Plan, found: Norms) -> bool:
    """There are gradients, every element counts once, and copies of a gradient are equal.

    One all-reduce of six numbers a piece, and three. Returns whether some rank has gradients that not all know of.
    """
    known = plan.known
    sizes = [float(plan.pieces[i].here) for i in known]
    counted = torch.tensor(sizes, dtype=torch.float64, device=plan.device) * plan.weights[known]
    comparable = torch.tensor([float(plan.pieces[i].aligned) for i in known], device=plan.device)
    drift = drift_words(norms_and_projections(plan, found, known) * comparable, signs_of(plan, known))
    split = sum(not plan.known_to_all[i] for i in found.indices)
    numbers = counted.new_tensor([len(found.indices), len(plan.pieces), split])
    words = all_reduce(plan.group, torch.cat([counted, drift.flatten(), numbers])).cpu()
    present, pieces, split = words[-3:].tolist()
    if pieces and not present:
        raise refusals.no_gradient()
    counted, *rest = words[:-3].view(6, -1)
    whole = torch.tensor([float(plan.pieces[i].size or 0) for i in known], dtype=torch.float64)
    wrong = ((counted - whole).abs() > 0.5).nonzero().flatten().tolist()
    if wrong:
        listed = [f"{plan.label(known[k])} ({counted[k] / whole[k]:.3g}x)" for k in wrong]
        raise refusals.not_counted_once(listed)
    apart = drifted(torch.stack(rest), TOLERANCE).nonzero().flatten().tolist()
    if apart:
        raise refusals.not_replicas([plan.label(known[k]) for k in apart])
    return bool(split)


def _count_units(plan: Plan) -> None:
    """Where norms finer than the model's travel, each unit has its elements once: one all-reduce of a number a slot."""
    slots = plan.slots
    if slots is None:
        return
    sizes = [[piece.here] for piece in plan.pieces] if slots.cuts is None else [cut.lengths for cut in slots.cuts]
    mine = torch.tensor([float(n) for each in sizes for n in each], dtype=torch.float64)
    counted = all_reduce(plan.group, slots.vector(sent(mine, plan.device), 1.0))  # the sum of powers of ones
    for statistic in slots.units.levels:
        level = slots.units.level(statistic)
        found = level.of_slots(counted, 1.0)
        wrong = ((found - level.sizes).abs() > 0.5).nonzero().flatten().tolist()
        if wrong:
            listed = [f"{level.names[k]} ({(found[k] / level.sizes[k]).item():.3g}x)" for k in wrong]
            raise refusals.units_not_counted_once(listed)
    total, size = counted.sum().item(), slots.units.size
    if abs(total - size) > 0.5:
        raise refusals.units_not_counted_once([f"all parameters ({total / size:.3g}x)"])
