"""Who made the norm non-finite: named from the norms each rank already has, by two small all-reduces.

They run only after a reduced value said "not finite", hence on all ranks of the group or on none.
"""

from math import inf

import torch
import torch.distributed as dist

from .compare import say
from .errors import NonFiniteError
from .kernels import local_norms
from .measured import Norms
from .plan import Plan
from .report import Culprit

KINDS = {1: "NaN", 2: "inf", 3: "overflow"}
NOBODY = 1 << 62
OVERFLOW = 1 << 60  # added so that a NaN or inf anywhere comes before an overflow


def find_culprit(plan: Plan, norms: Norms) -> Culprit:
    """The first parameter of the lowest rank whose gradient is not finite, the same answer on every rank.

    Two all-reduces, of one int64 and of 1024 bytes, and one wait. ``norms.parts`` may be empty where the gradients
    have changed since; then an inf norm is taken for an inf gradient.
    """
    group, device = plan.group, plan.device
    word = torch.tensor([_first_bad(group.rank, norms)], device=device)
    winner = int(group.all_reduce(word, dist.ReduceOp.MIN).item())
    if winner == NOBODY:
        return Culprit("overflow", None, None)
    winner %= OVERFLOW
    rank, index, kind = winner >> 34, winner >> 2 & 0xFFFFFFFF, KINDS[winner & 3]
    name = say(group, device, rank, plan.label(index) if group.rank == rank else "")
    return Culprit(kind, name, group.ranks[rank])


def nonfinite(p: float, culprit: Culprit, what_to_do: str) -> NonFiniteError:
    """What to raise; it begins as torch's error does, by which people know it."""
    return NonFiniteError(
        f"The total norm of order {p} for gradients from `parameters` is non-finite, so it cannot be clipped: "
        f"{culprit}; no gradient was changed. {what_to_do}"
    )


def _first_bad(rank: int, norms: Norms) -> int:
    words = [NOBODY]
    for position in (~norms.norms.isfinite()).nonzero().flatten().tolist():
        norm = norms.norms[position]
        if norms.parts and norm == inf:  # a look at the gradient tells an inf from an overflow
            norm = local_norms([norms.parts[position]], inf)[0]
        kind = 1 if norm.isnan() else 2 if norm == inf else 3
        words.append(rank << 34 | norms.indices[position] << 2 | kind | (OVERFLOW if kind == 3 else 0))
    return min(words)
